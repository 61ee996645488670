"""A trained dense policy as a spiking one: weights are kept, thresholds balanced.

Every ReLU becomes an integrate-and-fire neuron (no leak, threshold 1) whose firing rate over T
spike steps stands for its activation. So that rates of up to 1 cover what the activations reach,
each layer's weights are scaled by what the layers around it reach on observations of the policy's
own episodes (threshold balancing: Diehl et al., 2015; a percentile of it: Rueckauer et al., 2017,
arXiv:1612.04052). reset=soft keeps what lies above the threshold, and loses less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spikerl.config import build as configs
from spikerl.config.yaml_file import check_confirmed, overrides_of, read_config
from spikerl.envs.make import task_of
from spikerl.errors import BadRequest
from spikerl.files import shown
from spikerl.models.actor import MLPActor, SpikingActor, build_actor
from spikerl.models.policy import Policy, load_policy
from spikerl.runs import folder as run_folder
from spikerl.schema import parse
from spikerl.snn.decoders import LinearDecoder
from spikerl.snn.linear import Linear
from spikerl.training.evaluator import Evaluator


@dataclass(kw_only=True)
class ConvertRequest:
    run: str
    run_dir: str
    encoder: str
    spike_steps: int
    reset: str
    percentile: float
    episodes: int
    seed: int
    plugins: list[str]
    env_id: str | None  # confirms an environment that names a module, or is given paths

    def __post_init__(self) -> None:
        if self.encoder != "direct":
            remedy = "a converted network is driven by the observation itself; give direct"
            raise BadRequest("encoder", self.encoder, remedy)
        if not 0.0 < self.percentile <= 100.0:
            raise BadRequest("percentile", self.percentile, "give a value in (0, 100]")
        if self.episodes < 1:
            raise BadRequest("episodes", self.episodes, "give at least 1")
        if not 0 <= self.seed < 2**63:
            raise BadRequest("seed", self.seed, "give 0 or more, below 2^63")


def main(data: dict[str, Any], argv: Sequence[str]) -> int:
    """`spikerl convert`: a run folder with the spiking policy."""
    request = parse(ConvertRequest, data)
    dense = load_policy(request.run)
    if not isinstance(dense.actor, MLPActor):
        remedy = f"its actor is {dense.config.actor.name}; a dense one (actor=mlp) is converted"
        raise BadRequest("run", request.run, remedy)
    raw = spiking_config(Path(request.run), dense, request)
    config = configs.build(raw)
    run_folder.check_free(request.run_dir, named=True)
    evaluator = Evaluator(config.env, request.episodes, request.seed)
    try:
        if task_of(evaluator.envs[0]).env_id != dense.task.env_id:
            raise BadRequest("run", request.run, f"was not trained on {config.env.id}")
        seen = dense.norm.observe(evaluator.observations(dense), dense.device)
    finally:
        evaluator.close()
    spiking = build_actor(config.actor, dense.task.obs_dim, dense.task.act_dim)
    assert isinstance(spiking, SpikingActor)
    reached = convert(dense.actor, spiking, seen, request.percentile)
    policy = Policy(dense.task, config.actor, spiking, dense.norm)
    facts = {"status": "done", "converted_from": request.run, "activations_reached": reached}
    record = run_folder.make_manifest(dense.task.env_id, argv, {}, facts)
    folder = run_folder.create(request.run_dir, raw, record, policy.save, named=True)
    scales = ", ".join(f"{value:.3g}" for value in reached)
    print(
        f"{dense.task.env_id}: {request.spike_steps} spike steps, {request.reset} reset;"
        f" activations reach {scales} on {len(seen)} observations; run folder: {shown(folder)}"
    )
    return 0


def spiking_config(run: Path, dense: Policy, request: ConvertRequest) -> dict[str, Any]:
    """The run's config with a spiking actor."""
    path = run / "config.yaml"
    raw = read_config(path)
    env = raw["env"] if isinstance(raw.get("env"), dict) else {}
    env_id = str(env.get("id", ""))
    check_confirmed(run, env_id, env.get("kwargs"), request.env_id)
    typed = [f"env.id={env_id}", f"plugins=[{','.join(request.plugins)}]"]
    overrides_of(path, typed, resumes=True)  # which refuses what is no plain data
    raw["actor"] = {
        "name": "popsan",
        "hidden_sizes": dense.config.actor.hidden_sizes,
        "spike_steps": request.spike_steps,
        "lr": dense.config.actor.lr,
    }
    raw["encoder"], raw["decoder"] = {"name": "direct"}, {"name": "linear"}
    raw["neuron"] = {
        "name": "lif",
        "voltage_decay": 1.0,
        "threshold": 1.0,
        "reset": request.reset,
        "surrogate": "rect",
        "surrogate_window": 0.5,
        "surrogate_slope": 2.0,
        "surrogate_slope_end": None,
    }
    own = {"run_dir": request.run_dir, "resume": None, "init_from": None, "config": None}
    return {**raw, **own, "plugins": request.plugins}


@torch.no_grad()
def convert(
    dense: MLPActor, spiking: SpikingActor, obs_BO: Tensor, percentile: float
) -> list[float]:
    """Give `spiking` the weights of `dense`; what each hidden layer's activations reach."""
    assert isinstance(spiking.decoder, LinearDecoder)
    *hidden, last = dense.layers
    x, below, reached = obs_BO, 1.0, []
    for source, target in zip(hidden, spiking.layers, strict=True):
        x = torch.relu(source(x))
        # A layer that is silent on all observations keeps its weights.
        most = float(torch.quantile(x.amax(1), percentile / 100.0)) or 1.0
        scale(source, target, below / most, 1.0 / most)
        reached.append(most)
        below = most
    scale(last, spiking.decoder.map, below, 1.0)
    return reached


def scale(source: Linear, target: Linear, weight: float, bias: float) -> None:
    target.weight_IN.copy_(source.weight_IN * weight)
    target.bias_N.copy_(source.bias_N * bias)
