"""`spikerl compress`: a smaller policy, and its return, operations and energy beside the old."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from spikerl.config.yaml_file import config_for
from spikerl.energy import modelled, operations
from spikerl.envs.config import EnvConfig
from spikerl.errors import DONE, BadRequest
from spikerl.export.proof import known_env
from spikerl.files import shown, write_json
from spikerl.machine import versions
from spikerl.models.actor import Actor, MLPActor, SpikingActor
from spikerl.models.compression import Compression, bits_of, nonzero, prune, quantise
from spikerl.models.policy import Policy
from spikerl.output import add_results
from spikerl.runs import folder as run_folder
from spikerl.runs.policies import load_policy
from spikerl.schema import check_seed, parse
from spikerl.seeding import generator_for
from spikerl.snn.early_exit import EarlyExit
from spikerl.training.evaluator import Evaluator
from spikerl.training.finetune import finetune

TIMED = 256  # decisions whose time is measured
PIECE = 1024  # observations in a piece
STORED_BITS = 32  # of a number that is not quantised


@dataclass(kw_only=True)
class CompressRequest:
    run: str
    run_dir: str | None
    prune: float | None
    bits: Any  # a number, or a list with one for each layer
    early_exit: float | None
    exit_steps: int
    finetune: int | None
    policy: str  # last, best
    episodes: int
    seed: int
    env_id: str | None  # confirms an environment that names a module, or is given paths
    plugins: list[str]

    def __post_init__(self) -> None:
        if self.prune is None and self.bits is None and self.early_exit is None:
            raise BadRequest("bits", "null", "give bits, prune or early_exit")
        if self.finetune is not None and self.finetune < 1:
            raise BadRequest("finetune", self.finetune, "give at least 1, or null")
        if self.finetune is not None and self.prune is None and self.bits is None:
            remedy = "it makes up for bits or prune; give one of them, or leave it out"
            raise BadRequest("finetune", self.finetune, remedy)
        if self.early_exit is None and self.exit_steps != 1:
            remedy = "it belongs to early_exit; give that, or leave it out"
            raise BadRequest("exit_steps", self.exit_steps, remedy)
        if self.episodes < 1:
            raise BadRequest("episodes", self.episodes, "give at least 1")
        check_seed(self.seed)

    @property
    def target(self) -> str:
        """The folder to make: run_dir, or the run's with what is done to it in its name."""
        if self.run_dir is not None:
            return self.run_dir
        each = self.bits if isinstance(self.bits, list) else [self.bits]
        done = [
            ("prune", self.prune),
            ("bits", self.bits and "-".join(map(str, each))),
            ("exit", self.early_exit and f"{self.early_exit}x{self.exit_steps}"),
            ("finetune", self.finetune),
        ]
        return self.run.rstrip("/") + "".join(f"_{name}{v}" for name, v in done if v is not None)


def main(data: dict[str, Any], argv: Sequence[str]) -> int:
    """`spikerl compress`: makes a run folder with the smaller policy; the exit status."""
    request = parse(CompressRequest, data)
    before = load_policy(request.run, policy=request.policy)
    typed, plugins = request.env_id, request.plugins
    raw = config_for(request.target, request.run, before.task, typed, plugins)
    trained = raw.get("actor")
    kind = trained.get("name") if isinstance(trained, dict) else trained
    if before.config.actor.name != kind:  # its batch normalisation was folded
        raw |= {group: part for group, part in asdict(before.config).items() if part is not None}
    run_folder.check_free(request.target, named=True)
    after, unpruned = compress(before, request)
    env = known_env(before, request.run, request.env_id)
    if env is None:
        remedy = f"{before.task.env_id} is not registered here, and nothing can be compared"
        raise BadRequest("run", request.run, f"{remedy}; env_id=MODULE:NAME imports its module")
    assert after.compression is not None
    if request.finetune is not None:
        losses = relearn(before, after, unpruned, env, request)
        print(
            f"fine-tuned for {request.finetune} steps: loss {losses[0]:.3g}, then {losses[-1]:.3g}"
        )
    if isinstance(after.actor, SpikingActor):
        after.actor.early_exit = after.compression.early_exit
    rows = [measure(policy, env, request) for policy in (before, after)]
    facts = {
        "run": shown(Path(request.run)),
        "policy": request.policy,
        "env_id": env.id,
        **asdict(after.compression),
        "episodes": request.episodes,
        "seed": request.seed,
        "constants": {"45nm": "32-bit floats", "memory": "weights as stored, states of 32 bits"},
        "before": rows[0],
        "after": rows[1],
        "versions": versions(),
    }

    def fill(folder: Path) -> None:
        after.save(folder)
        write_json(folder / "compressed.json", facts)

    done = {"status": "done", "compressed_from": shown(Path(request.run))}
    record = run_folder.make_manifest(before.task.env_id, argv, {}, done)
    folder = run_folder.create(request.target, raw, record, fill, named=True)
    add_results(folder=str(folder))
    print("\n".join(table(env.id, request.episodes, rows)))
    print(f"run folder: {shown(folder)}")
    return DONE


def compress(policy: Policy, request: CompressRequest) -> tuple[Policy, Tensor]:
    """A pruned, then quantised copy of `policy`; and by parameter, 0 if it is pruned, else 1."""
    actor = deepcopy(policy.actor)
    if policy.compression is not None:
        remedy = "it is compressed already; give the run that it was made from"
        raise BadRequest("run", request.run, remedy)
    if isinstance(actor, SpikingActor) and len(actor.norms):
        remedy = "its batch normalisation is not folded into weights; give a policy that acts"
        raise BadRequest("run", request.run, remedy)
    try:
        operations.check(actor)
    except BadRequest as error:
        what = error.args[2].partition(";")[0]
        raise BadRequest("run", request.run, f"nothing can be compared, as {what}") from None
    done = Compression(
        prune=request.prune, bits={}, scales={}, early_exit=None, finetune=request.finetune
    )
    if request.bits is not None:
        done.bits = bits_of(actor, request.bits)
    if request.early_exit is not None:
        if isinstance(actor, MLPActor):
            remedy = "a dense policy has no spike steps; leave it out"
            raise BadRequest("early_exit", request.early_exit, remedy)
        if policy.task.choices is not None:
            remedy = "an action that is chosen by its value has no distance; leave it out"
            raise BadRequest("early_exit", request.early_exit, remedy)
        done.early_exit = EarlyExit(threshold=request.early_exit, steps=request.exit_steps)
        done.early_exit.check(actor.decoder, actor.spike_steps)
    if request.prune is not None:
        prune(actor, request.prune)
    unpruned = nonzero(actor)  # also what training pruned
    if done.bits:
        done.scales = quantise(actor, done.bits)
    smaller = Policy(policy.task, policy.config, actor, policy.norm)
    smaller.trained_with, smaller.compression = policy.trained_with, done
    return smaller, unpruned


def relearn(
    before: Policy, after: Policy, unpruned: Tensor, env: EnvConfig, request: CompressRequest
) -> list[float]:
    """Fine-tune on other episodes than those that are compared; the loss of each step."""
    assert request.finetune is not None
    assert after.compression is not None
    squash, generator = before.task.choices is None, generator_for(request.seed, "update")

    def observe(round_number: int) -> Tensor:
        acting = after if round_number else before
        return before.observe(evaluator.observations(acting, 1 + round_number))

    def goal(obs_MO: Tensor) -> Tensor:
        return actions(before.actor, obs_MO, generator, squash)

    with closing(Evaluator(env, request.episodes, request.seed)) as evaluator:
        return finetune(
            after.actor, observe, goal, request.finetune, after.compression, unpruned, generator,
            squash=squash,
        )  # fmt: skip


@torch.no_grad()
def actions(
    actor: Actor, obs_MO: Tensor, generator: torch.Generator, squash: bool = True
) -> Tensor:
    """An actor's actions on any number of observations, in pieces that bound the memory.

    A random encoder gets all at once, as its draws would differ in pieces.
    """
    random = isinstance(actor, SpikingActor) and actor.encoder.random
    # No short piece at the end: products of few rows round differently.
    ends = [] if random else list(range(PIECE, len(obs_MO) - PIECE + 1, PIECE))
    return torch.cat([actor(piece, generator, squash) for piece in obs_MO.tensor_split(ends)])


def measure(policy: Policy, env: EnvConfig, request: CompressRequest) -> dict[str, Any]:
    """Return, operations and modelled energy of one policy."""
    with closing(Evaluator(env, request.episodes, request.seed)) as evaluator:
        result = evaluator.run(policy, 0)
    ops = result.operations
    assert ops is not None  # checked when the policy was read
    return {
        "return_mean": result.mean,
        "return_std": result.std,
        "returns": result.returns,
        "act_us": act_us(policy, result.probed),
        "firing_rate": result.activity.firing_rate if result.activity else None,
        "spike_steps": ops.steps_taken,
        "spikes": sum(part.spikes for part in ops.parts) if ops.spike_steps else None,
        "updates": sum(part.updates for part in ops.parts),
        "connection_sparsity": ops.connection_sparsity,
        "footprint_bytes": ops.footprint_bytes,
        "packed_bytes": ops.packed_bytes,
        **modelled.per_decision(ops),
        "modelled_stored_nj": modelled.memory(ops, STORED_BITS).total,
    }


def act_us(policy: Policy, probed_BO: Tensor) -> float:
    """Microseconds that a decision takes on this machine, the median of at most TIMED."""
    mean, std = policy.norm.exact_mean_std
    raw_BO = (probed_BO[:TIMED].double() * std + mean).numpy().reshape(-1, *policy.task.obs_shape)
    times = []
    for obs in raw_BO:
        begun = time.perf_counter()
        policy(obs)
        times.append(time.perf_counter() - begun)
    return median(times) * 1e6


# What is printed of a measured policy: its title, key and format.
SHOWN = {
    "us to act, measured here": ("act_us", ",.1f"),
    "spike steps": ("spike_steps", ".2f"),
    "spikes": ("spikes", ",.0f"),
    "MACs": ("macs", ",.0f"),
    "ACs": ("acs", ",.0f"),
    "updates": ("updates", ",.0f"),
    "bytes": ("footprint_bytes", ",d"),
    "bytes without zeros": ("packed_bytes", ",d"),
    "modelled nJ, 45nm": ("modelled_45nm_nj", ",.1f"),
    "modelled nJ, memory, stored bits": ("modelled_stored_nj", ",.1f"),
}


def table(env_id: str, episodes: int, rows: list[dict[str, Any]]) -> list[str]:
    """The lines that are printed; their numbers are per decision, means over observations."""
    returns = [f"{row['return_mean']:,.1f} +- {row['return_std']:,.1f}" for row in rows]
    text = [line(env_id, ["before", "after"]), line(f"return, n={episodes}", returns)]
    for name, (key, form) in SHOWN.items():
        values = [row[key] for row in rows]
        text.append(line(name, ["-" if v is None else format(v, form) for v in values]))
    return text


def line(name: str, cells: Sequence[str]) -> str:
    return f"{name:<32}" + "".join(f"{cell:>22}" for cell in cells)
