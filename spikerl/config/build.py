"""The composed config, validated: plain data in, each group's own dataclass out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from spikerl import kernels, plugins
from spikerl.algos import ALGOS, AlgoConfig
from spikerl.algos.base import CriticsConfig
from spikerl.algos.bc import BCConfig
from spikerl.algos.bcq import BCQConfig
from spikerl.algos.decision_transformer import DecisionTransformerConfig
from spikerl.algos.offpolicy import DelayConfig, OfflineConfig, OffPolicyConfig, ReplayConfig
from spikerl.algos.ppo import PPOConfig
from spikerl.config.yaml_file import quoted
from spikerl.distributed import hosts
from spikerl.distributed.launchers import ranked
from spikerl.distributed.world import (
    BACKENDS,
    BackendConfig,
    resolve_backend,
    resolve_world_size,
)
from spikerl.energy import meter
from spikerl.energy.meter import METERS, EnergyConfig
from spikerl.envs.make import EnvConfig
from spikerl.errors import BadRequest
from spikerl.files import absolute
from spikerl.kernels import KERNELS, coverage
from spikerl.machine import cores, resolve_device, resolve_threads
from spikerl.models.actor import SpikingActor
from spikerl.models.actor_config import ActorConfig, CareBNConfig
from spikerl.models.networks import ACTOR_GROUPS, build_actor, least_obs, parse_actor
from spikerl.models.precision import PRECISIONS, PrecisionConfig, check_precision
from spikerl.models.sequence import SequenceConfig
from spikerl.runs.loggers import check_loggers
from spikerl.runs.policies import CHOICES
from spikerl.schema import check_seed, parse
from spikerl.snn.conv import ConvConfig
from spikerl.types import Resolved, Task

MOST = 4096  # environments, workers, threads: a config file starts no more processes
GROUPS = ("env", *ACTOR_GROUPS, "algo", "precision", "kernel", "backend", "energy")


@dataclass(kw_only=True)
class RunConfig:
    """The keys at the top level; `conf/train.yaml` says what each means, and its default."""

    seed: int
    total_steps: int
    steps_per_epoch: int
    eval_episodes: int
    num_envs: int | None
    world_size: int | None
    scaling: str
    device: str
    threads: int | None
    deterministic: bool
    max_restarts: int
    nnodes: int
    node_rank: int | None
    rdzv: str | None
    run_dir: str | None
    init_from: str | None
    init_policy: str
    resume: str | None
    config: str | None
    keep_replay: bool
    logger: list[str]
    plugins: list[str]
    # Configs of older runs lack these.
    dataset: str | None = None
    energy_to: dict[str, float] | None = None

    def __post_init__(self) -> None:
        for key, least in (("total_steps", 1), ("steps_per_epoch", 1), ("eval_episodes", 0)):
            if getattr(self, key) < least:
                raise BadRequest(key, getattr(self, key), f"give at least {least}")
        for key in ("num_envs", "threads", "world_size"):
            if getattr(self, key) is not None and not 1 <= getattr(self, key) <= MOST:
                raise BadRequest(key, getattr(self, key), f"give 1 to {MOST}, or null")
        check_seed(self.seed)
        for key in ("run_dir", "init_from", "dataset"):
            if getattr(self, key) == "":
                raise BadRequest(key, "", "give a path, or null")
            if getattr(self, key):
                setattr(self, key, str(absolute(getattr(self, key))))
        self.resume = str(absolute(self.resume)) if self.resume else self.resume
        if self.scaling not in ("strong", "weak"):
            raise BadRequest("scaling", self.scaling, "give strong or weak")
        if self.init_policy not in CHOICES:
            raise BadRequest("init_policy", self.init_policy, f"give {' or '.join(CHOICES)}")
        check_loggers(self.logger)
        wanted = self.energy_to if self.energy_to is not None else {"return": 0.0}
        if wanted.keys() != {"return"} or not math.isfinite(wanted["return"]):
            raise BadRequest("energy_to", self.energy_to, "give {return: NUMBER}, or null")
        if self.max_restarts < 0:
            raise BadRequest("max_restarts", self.max_restarts, "give at least 0")
        self.check_nodes()

    def check_nodes(self) -> None:
        """Several machines are named whole, one not at all."""
        nodes = self.nnodes
        if nodes < 1:
            raise BadRequest("nnodes", nodes, "give at least 1")
        if nodes == 1:
            for key in ("node_rank", "rdzv"):
                if getattr(self, key) is not None:
                    raise BadRequest(key, getattr(self, key), "is for several machines: set nnodes")
            return
        if self.world_size is None or self.world_size % nodes:
            remedy = f"give a multiple of nnodes={nodes}, the workers of all machines"
            raise BadRequest("world_size", self.world_size, remedy)
        if self.node_rank is None or not 0 <= self.node_rank < nodes:
            raise BadRequest("node_rank", self.node_rank, f"give this machine's, 0 to {nodes - 1}")
        if not hosts.is_endpoint(self.rdzv or ""):
            remedy = "give machine 0's address and a free port there, as host:29500"
            raise BadRequest("rdzv", self.rdzv, remedy)
        port, restarts = int((self.rdzv or "").rpartition(":")[2]), self.max_restarts
        if port + restarts > 65535:
            remedy = f"each of max_restarts={restarts} takes the next port; give a lower one"
            raise BadRequest("rdzv", self.rdzv, remedy)


@dataclass(kw_only=True)
class Choices:
    """What every "auto" came to, and why; written into the manifest."""

    device: Resolved
    threads: Resolved
    kernel: Resolved
    backend: Resolved
    energy: Resolved


@dataclass(kw_only=True)
class Config:
    """One run, validated; `raw` is the same as plain data, as config.yaml records it."""

    run: RunConfig
    env: EnvConfig
    actor: ActorConfig
    algo: AlgoConfig
    precision: PrecisionConfig
    backend: BackendConfig
    energy: EnergyConfig
    resolved: Choices
    own_products: bool  # PyTorch makes none, whose sums depend on the number of threads
    world_size: int
    raw: dict[str, Any]

    @property
    def num_envs(self) -> int:
        """Over all workers; by default one each."""
        return self.run.num_envs or self.world_size

    @property
    def last_step(self) -> int:
        """total_steps, or the next that all environments together come to."""
        if isinstance(self.algo, OfflineConfig):
            return self.run.total_steps
        return -(-self.run.total_steps // self.num_envs) * self.num_envs


class Parsed(NamedTuple):
    """Each group as it was typed, with nothing decided."""

    run: RunConfig
    env: EnvConfig
    actor: ActorConfig
    algo: AlgoConfig
    precision: PrecisionConfig
    kernel: kernels.KernelConfig
    backend: BackendConfig
    energy: EnergyConfig


def parse_groups(raw: Mapping[str, Any]) -> Parsed:
    """Validate what does not depend on the machine."""
    if missing := [group for group in GROUPS if group not in raw]:
        raise BadRequest(missing[0], None, "the config lacks this group")
    run = parse(RunConfig, {k: v for k, v in raw.items() if k not in GROUPS})
    plugins.load(run.plugins)
    parsed = Parsed(
        run=run,
        env=parse(EnvConfig, raw["env"], key="env"),
        actor=parse_actor({group: raw[group] for group in ACTOR_GROUPS}),
        algo=ALGOS.parse(raw["algo"]),
        precision=PRECISIONS.parse(raw["precision"]),
        kernel=KERNELS.parse(raw["kernel"]),
        backend=BACKENDS.parse(raw["backend"]),
        energy=METERS.parse(raw["energy"]),
    )
    for key in ("kwargs", "wrappers"):  # or no resume could give them back
        quoted(getattr(parsed.env, key), f"env.{key}")
    check_together(parsed.algo, parsed.actor)
    p = parsed.precision
    if p.actor == "fp32" != p.critic and not isinstance(parsed.algo, CriticsConfig):
        remedy = f"algo={parsed.algo.name} has no critics, whose format it is; leave it out"
        raise BadRequest("precision", p.name, remedy)
    check_sequence(parsed)
    check_dataset(parsed.run, parsed.algo)
    return parsed


def build(raw: Mapping[str, Any]) -> Config:
    """Validate a composed config and decide everything that was left to "auto"."""
    run, env, actor, algo, precision, kernel, backend, energy = parse_groups(raw)
    device = resolve_device(run.device)
    world_size = resolve_world_size(run.world_size)
    sharers = 1 if hosts.has_own("cores") else hosts.workers_here(world_size, run.nnodes)
    check_shares(run, algo, world_size)
    check_precision(precision, torch.device(device.choice))
    layered = why_layered(actor, precision.actor_dtype)
    if (refusal := why_no_graphs(run, algo, actor, world_size)) and kernel.path == "graphs":
        raise refusal
    no_graphs = "{}={}".format(*refusal.args) if refusal else None
    chosen = kernels.resolve(kernel, device.choice, layered, no_graphs)
    whole = chosen.choice.startswith("cpu/") and layered is None  # PyTorch makes no product
    whole &= precision.critic_dtype == torch.float32 and isinstance(algo, OffPolicyConfig)
    rows = algo.batch_size if whole else None
    resolved = Choices(
        device=device,
        threads=resolve_threads(run.threads, sharers, rows),
        kernel=chosen,
        backend=resolve_backend(backend, device.choice, world_size, run.nnodes),
        energy=meter.resolve(energy, device=torch.device(device.choice)),
    )
    return Config(
        run=run,
        env=env,
        actor=actor,
        algo=algo,
        precision=precision,
        backend=backend,
        energy=energy,
        resolved=resolved,
        own_products=whole,
        world_size=world_size,
        raw=dict(raw),
    )


def why_layered(actor: ActorConfig, dtype: torch.dtype) -> str | None:
    """Why kernel=cpu runs such an actor layer by layer; None where one call runs all of it."""
    if isinstance(actor.actor, SequenceConfig):
        return f"actor={actor.actor.name}, whose products run in PyTorch"
    with torch.device("meta"):
        net = build_actor(actor, least_obs(actor), 1, dtype=dtype)
    if isinstance(net, SpikingActor):
        return coverage.why_layered(net)
    return coverage.why_no_matrix(net.layers)


def check_shares(run: RunConfig, algo: AlgoConfig, world_size: int) -> None:
    """Refuse what cannot be shared out over the workers."""
    most = max(64, 4 * cores()) * run.nnodes
    if world_size > most and not ranked():  # an untrusted file starts no thousands of processes
        raise BadRequest("world_size", world_size, f"give at most {most} here")
    num_envs = run.num_envs or world_size
    if num_envs % world_size and run.resume:
        remedy = f"the run's {num_envs} environments cannot be shared out evenly; give a divisor"
        raise BadRequest("world_size", world_size, remedy)
    if num_envs % world_size:
        remedy = f"give a multiple of world_size={world_size}"
        raise BadRequest("num_envs", num_envs, remedy)
    if run.scaling == "strong" and algo.batch_size < world_size:
        remedy = f"algo.batch_size={algo.batch_size} has fewer rows than that; use fewer workers"
        raise BadRequest("world_size", world_size, remedy)
    if isinstance(algo, ReplayConfig) and algo.replay_capacity < num_envs:
        remedy = f"give at least num_envs={num_envs}, a row for each environment"
        raise BadRequest("algo.replay_capacity", algo.replay_capacity, remedy)
    batches = world_size if run.scaling == "weak" else 1
    if isinstance(algo, PPOConfig) and algo.batch_size * batches > algo.rollout_steps:
        remedy = f"algo.rollout_steps={algo.rollout_steps} has no such batch for each worker"
        raise BadRequest("algo.batch_size", algo.batch_size, remedy)
    if isinstance(algo, PPOConfig) and algo.rollout_steps % num_envs:
        remedy = f"give a multiple of num_envs={num_envs}"
        raise BadRequest("algo.rollout_steps", algo.rollout_steps, remedy)


def check_actions(algo: AlgoConfig, task: Task) -> None:
    """Refuse an algorithm that does not learn the task's kind of actions."""
    if task.kind not in ALGOS.part(algo).acts:
        fit = [
            name
            for name, (config, learner) in ALGOS.options.items()
            if task.kind in learner.acts and not issubclass(config, OfflineConfig)
        ]
        remedy = f"the actions of {task.env_id} are {task.kind}; use algo={' or '.join(fit)}"
        raise BadRequest("algo", algo.name, remedy)


def check_image(actor: ActorConfig, task: Task) -> None:
    """Refuse observations whose height and width stand elsewhere than the actor looks for them."""
    config, shape = actor.actor, task.obs_shape
    if not isinstance(config, ConvConfig) or len(shape) == 1:  # flat ones do not tell
        return
    size, first = tuple(config.image), config.channels_first
    fits = {False: shape[:2] == size, True: shape[-2:] == size}
    if not fits[first] and fits[not first]:
        remedy = f"observations are {shape}; give {str(not first).lower()}"
        raise BadRequest("actor.channels_first", str(first).lower(), remedy)
    if not fits[first]:
        which = "last" if first else "first"
        remedy = f"observations are {shape}; height and width must be their {which} two numbers"
        raise BadRequest("actor.image", config.image, remedy)


def check_dataset(run: RunConfig, algo: AlgoConfig) -> None:
    """Refuse an offline algorithm without a dataset, and a dataset with any other."""
    offline = isinstance(algo, OfflineConfig)
    if offline and not run.dataset and not run.resume:
        remedy = f"algo={algo.name} learns from recorded transitions; give a folder of `spikerl"
        raise BadRequest("dataset", None, f"{remedy} collect`")
    if run.dataset and not offline:
        parts = ALGOS.options.items()
        fit = [name for name, (config, _) in parts if issubclass(config, OfflineConfig)]
        remedy = f"algo={algo.name} learns from steps of its own; use algo={' or '.join(fit)}"
        raise BadRequest("dataset", run.dataset, remedy)


def check_together(algo: AlgoConfig, actor: ActorConfig) -> None:
    """Refuse what does not go together."""
    neuron = actor.neuron
    if neuron and neuron.surrogate_slope_end is not None and not neuron.slope_moves:
        remedy = f"surrogate={neuron.surrogate} has no slope; give null, or another surrogate"
        raise BadRequest("neuron.surrogate_slope_end", neuron.surrogate_slope_end, remedy)
    if isinstance(algo, PPOConfig) and actor.encoder and actor.encoder.name == "poisson":
        remedy = "ppo needs an action's probability, which random spikes hide; use population"
        raise BadRequest("encoder", "poisson", remedy)
    if isinstance(algo, PPOConfig) and isinstance(actor.actor, CareBNConfig):
        remedy = "ppo compares two passes, which batch moments set apart; use actor=popsan"
        raise BadRequest("actor", "care_bn", remedy)
    if isinstance(algo, BCQConfig) and isinstance(actor.actor, CareBNConfig):
        remedy = "its moments are of observations, and bcq's actor sees actions too; use popsan"
        raise BadRequest("actor", "care_bn", remedy)


def why_no_graphs(
    run: RunConfig, algo: AlgoConfig, actor: ActorConfig, world_size: int
) -> BadRequest | None:
    """What stands against a round of updates as one CUDA graph, if anything does."""
    if not ALGOS.part(algo).has_graphs:
        fit = [name for name, (_, learner) in ALGOS.options.items() if learner.has_graphs]
        remedy = f"graphs are of {', '.join(fit)}; use kernel=triton alone"
        return BadRequest("algo", algo.name, remedy)
    if actor.neuron and actor.neuron.slope_moves:
        remedy = "a graph keeps the slope that it was recorded with; use kernel=triton alone"
        return BadRequest("neuron.surrogate_slope_end", actor.neuron.surrogate_slope_end, remedy)
    if world_size > 1:
        remedy = "a graph holds no exchange between workers; use kernel=triton alone"
        return BadRequest("world_size", world_size, remedy)
    if run.plugins:
        remedy = "a graph keeps what their parts compute in Python; use kernel=triton alone"
        return BadRequest("plugins", run.plugins, remedy)
    assert isinstance(algo, ReplayConfig)
    together = max(int(algo.update_interval * algo.updates_per_step + 1e-6), 1)
    delay = algo.policy_delay if isinstance(algo, DelayConfig) else 1
    if together < 2 * delay - 1:  # no round of algo.policy_delay updates is sure to be whole
        remedy = f"give {2 * delay - 1} updates or more at once, or use kernel=triton alone"
        return BadRequest("algo.update_interval", algo.update_interval, remedy)
    return None


def check_sequence(parsed: Parsed) -> None:
    """Refuse a network over sequences without the algorithm that trains one, and the reverse."""
    algo, name = parsed.algo, parsed.actor.actor.name
    learns = isinstance(algo, DecisionTransformerConfig)
    if isinstance(parsed.actor.actor, SequenceConfig) != learns:
        fits = "spikeformer or transformer" if learns else "decision_transformer"
        remedy = f"algo={algo.name} learns from single steps; use algo={fits}"
        if learns:
            remedy = f"algo={algo.name} learns from sequences; use actor={fits}"
        raise BadRequest("actor", name, remedy)
    if isinstance(algo, BCConfig) and parsed.env.reward_scale != 1.0:
        raise BadRequest("env.reward_scale", parsed.env.reward_scale, "bc reads no reward; give 1")
    if not learns:
        return
    if parsed.env.reward_scale != 1.0:
        remedy = "returns to go are divided by algo.return_scale; give 1"
        raise BadRequest("env.reward_scale", parsed.env.reward_scale, remedy)
    if parsed.precision.name != "fp32":
        raise BadRequest("precision", parsed.precision.name, f"actor={name} learns in fp32 alone")
