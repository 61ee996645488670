"""A trained dense policy as a spiking one: weights are kept, thresholds balanced.

Every ReLU becomes an integrate-and-fire neuron (no leak, threshold 1) whose firing rate over T
spike steps stands for its activation. So that rates of up to 1 cover what the activations reach,
each layer's weights are scaled by the activations that it and the layer below reach on observations
of the policy's own episodes (threshold balancing: Diehl et al., 2015; with a percentile: Rueckauer
et al., 2017, arXiv:1612.04052). reset=soft keeps what lies above the threshold, and loses less.

From CRPI (ICML 2026): threshold=neuron scales each neuron by its own activations, start=0.5 begins
a decision at half the threshold, and alpha carries a share of what is left in a membrane on to the
next decision (`residual_if` in spikerl/snn/neurons.py). If several alpha or spike_steps are given,
each combination is evaluated, and the one of the highest return is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spikerl.config import build as configs
from spikerl.config.yaml_file import config_for
from spikerl.envs.make import task_of
from spikerl.errors import DONE, BadRequest
from spikerl.files import checksum_of, shown
from spikerl.models.actor import MLPActor, SpikingActor
from spikerl.models.actor_config import MOST_SPIKE_STEPS, MLPConfig
from spikerl.models.networks import build_actor
from spikerl.models.policy import Policy
from spikerl.output import add_results, several
from spikerl.runs import folder as run_folder
from spikerl.runs.policies import find_policy, load_policy
from spikerl.runs.policy_env import env_of
from spikerl.schema import check_seed, parse
from spikerl.snn.decoders import LinearDecoder
from spikerl.snn.linear import Linear
from spikerl.training.evaluator import Evaluator


@dataclass(kw_only=True)
class ConvertRequest:
    run: str
    run_dir: str
    spike_steps: Any  # T, or a list to choose from
    reset: str
    threshold: str
    start: float
    alpha: Any  # or a list
    percentile: float
    episodes: int
    seed: int
    plugins: list[str]
    env_id: str | None  # confirms an environment that names a module, or is given paths

    def __post_init__(self) -> None:
        self.spike_steps, self.alpha = as_list(self.spike_steps), as_list(self.alpha)
        if not self.spike_steps or not all(type(t) is int for t in self.spike_steps):
            remedy = "give a whole number, or a list of them"
            raise BadRequest("spike_steps", self.spike_steps, remedy)
        if not all(1 <= t <= MOST_SPIKE_STEPS for t in self.spike_steps):
            raise BadRequest("spike_steps", self.spike_steps, f"give 1 to {MOST_SPIKE_STEPS}")
        real = all(type(a) in (int, float) and 0.0 <= a <= 1.0 for a in self.alpha)
        if not self.alpha or not real:
            raise BadRequest("alpha", self.alpha, "give a value in [0, 1], or a list of them")
        if not 0.0 <= self.start <= 1.0:
            raise BadRequest("start", self.start, "give a value in [0, 1]")
        if self.threshold not in ("layer", "neuron"):
            raise BadRequest("threshold", self.threshold, "give layer or neuron")
        if self.reset not in ("hard", "soft"):
            raise BadRequest("reset", self.reset, "give hard or soft")
        if self.reset != "soft" and (self.start or any(self.alpha)):
            remedy = "start and alpha need a soft reset, which keeps a residual; give soft"
            raise BadRequest("reset", self.reset, remedy)
        if not 0.0 < self.percentile <= 100.0:
            raise BadRequest("percentile", self.percentile, "give a value in (0, 100]")
        if self.episodes < 1:
            raise BadRequest("episodes", self.episodes, "give at least 1")
        check_seed(self.seed)


def main(data: dict[str, Any], argv: Sequence[str]) -> int:
    """`spikerl convert`: makes a run folder with the spiking policy; the exit status."""
    request = parse(ConvertRequest, data)
    # Found once: a run that goes on meanwhile saves other policies.
    found = find_policy(Path(request.run), key="run")
    dense, weights = load_policy(found), checksum_of(found / "policy.safetensors")
    if not isinstance(dense.actor, MLPActor) or dense.config.actor.name != "mlp":
        remedy = f"its actor is {dense.config.actor.name}; a dense one (actor=mlp) is converted"
        raise BadRequest("run", request.run, remedy)
    choices = list(product(request.spike_steps, request.alpha))
    raws = [spiking_config(dense, request, *choice) for choice in choices]
    built = [configs.parse_groups(raw) for raw in raws]  # without what depends on the machine
    run_folder.check_free(request.run_dir, named=True)
    env, probe = env_of(dense.task, request.run, request.env_id)
    probe.close()
    tried: list[dict[str, Any]] = []
    with closing(Evaluator(env, request.episodes, request.seed)) as evaluator:
        if task_of(evaluator.envs[0]).env_id != dense.task.env_id:
            remedy = f"the policy was trained on {dense.task.env_id}; give that, or leave it out"
            raise BadRequest("env_id", request.env_id, remedy)
        seen = dense.norm.observe(evaluator.observations(dense), dense.device)
        policies = []
        for config in built:
            spiking = build_actor(config.actor, dense.task.obs_dim, dense.task.act_dim)
            assert isinstance(spiking, SpikingActor)
            own = request.threshold == "neuron"
            reached = convert(dense.actor, spiking, seen, request.percentile, own)
            policy = Policy(dense.task, config.actor, spiking, dense.norm)
            policy.trained_with = dense.trained_with
            policies.append(policy)
        if len(choices) > 1:
            tried = compare(evaluator, dense, policies, choices)
    best = max(range(len(tried)), key=lambda i: tried[i]["return_mean"]) if tried else 0
    facts = {
        "status": "done",
        "converted_from": shown(Path(request.run)),
        "converted_sha256": weights,
        "activations_reached": reached,
    }
    if tried:
        facts["tried"] = tried
    record = run_folder.make_manifest(dense.task.env_id, argv, {}, facts)
    save = policies[best].save
    folder = run_folder.create(request.run_dir, raws[best], record, save, named=True)
    add_results(folder=str(folder))
    scales = ", ".join(f"{value:.3g}" for value in reached)
    spike_steps, alpha = choices[best]
    chosen = several(spike_steps, "spike step")
    chosen += f", alpha {alpha:g}" if any(request.alpha) else ""
    print(
        f"{dense.task.env_id}: {chosen}, {request.reset} reset;"
        f" activations reach {scales} on {len(seen)} observations; run folder: {shown(folder)}"
    )
    return DONE


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def compare(
    evaluator: Evaluator,
    dense: Policy,
    policies: Sequence[Policy],
    choices: Sequence[tuple[int, float]],
) -> list[dict[str, Any]]:
    """Returns and spikes of each policy on the same episodes, which differ from those that the
    thresholds come from; also printed. Spikes are of all hidden neurons, per decision.
    """
    measured = []
    print(f"{'spike_steps':>11} {'alpha':>6} {'return':>10} {'+-':>8} {'spikes':>8}")
    whole = evaluator.run(dense, 1)
    print(f"{'dense':>11} {'-':>6} {whole.mean:>10.1f} {whole.std:>8.1f} {'-':>8}")
    for policy, (spike_steps, alpha) in zip(policies, choices, strict=True):
        result = evaluator.run(policy, 1)
        spikes = result.carried_spikes
        if spikes is None:
            assert result.activity is not None
            fired = sum(float(counts.sum()) for counts in result.activity.spikes[1:])
            spikes = fired / result.activity.samples * spike_steps
        print(
            f"{spike_steps:>11} {alpha:>6g} {result.mean:>10.1f} {result.std:>8.1f} {spikes:>8.1f}",
            flush=True,
        )
        measured.append({"spike_steps": spike_steps, "alpha": alpha, "return_mean": result.mean,
                      "return_std": result.std, "spikes": spikes})  # fmt: skip
    return measured


def spiking_config(
    dense: Policy, request: ConvertRequest, spike_steps: int, alpha: float
) -> dict[str, Any]:
    """The config of the dense run, with a spiking actor in place of its own."""
    typed, plugins = request.env_id, request.plugins
    raw = config_for(request.run_dir, request.run, dense.task, typed, plugins)
    actor = dense.config.actor
    assert isinstance(actor, MLPConfig)
    raw["actor"] = {
        "name": "popsan",
        "hidden_sizes": actor.hidden_sizes,
        "spike_steps": spike_steps,
        "lr": actor.lr,
    }
    raw["encoder"], raw["decoder"] = {"name": "direct"}, {"name": "linear"}
    kind: dict[str, Any] = {"name": "lif", "voltage_decay": 1.0}
    if request.start or alpha:
        kind = {"name": "residual_if", "start": request.start, "alpha": float(alpha)}
    raw["neuron"] = {
        **kind,
        "threshold": 1.0,
        "reset": request.reset,
        "surrogate": "rect",
        "surrogate_window": 0.5,
        "surrogate_slope": 2.0,
        "surrogate_slope_end": None,
    }
    return raw


@torch.no_grad()
def convert(
    dense: MLPActor, spiking: SpikingActor, obs_BO: Tensor, percentile: float, own: bool = False
) -> list[float]:
    """Give `spiking` the scaled weights of `dense`; return the largest scale of each hidden layer.

    A scale is the given percentile of activations on `obs_BO`: of each neuron's with `own`, else
    of the largest in the layer, one scale for all of its neurons.
    """
    assert isinstance(spiking.decoder, LinearDecoder)
    *hidden, last = dense.layers
    x, below, reached = obs_BO, torch.ones((), dtype=torch.float32), []
    for source, target in zip(hidden, spiking.layers, strict=True):
        x = torch.relu(source(x))
        if own:
            most = torch.stack([torch.quantile(x_B, percentile / 100.0) for x_B in x.T])
        else:
            most = torch.quantile(x.amax(1), percentile / 100.0)
        # A neuron or layer that is silent on all observations keeps its weights.
        most = torch.where(most > 0.0, most, 1.0)
        scale(source, target, below, most)
        reached.append(float(most.max()))
        below = most
    scale(last, spiking.decoder.map, below, torch.ones((), dtype=torch.float32))
    return reached


def scale(source: Linear, target: Linear, below: Tensor, most: Tensor) -> None:
    """Scale weights for inputs in units of `below` and outputs in units of `most`: scalars, or one
    for each neuron.
    """
    most_64, dtype = most.double(), source.weight_IN.dtype
    target.weight_IN.copy_(source.weight_IN * (below.double().unsqueeze(-1) / most_64).to(dtype))
    target.bias_N.copy_(source.bias_N * (1.0 / most_64).to(dtype))
