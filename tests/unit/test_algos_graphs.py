"""Updates can be CUDA graphs: nothing in them waits for the device or copies to it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch.utils._python_dispatch import TorchDispatchMode

from spikerl.algos import ALGOS
from spikerl.algos.offpolicy import OffPolicy
from spikerl.config.build import build, parse_groups
from spikerl.config.together import why_no_graphs
from spikerl.config.yaml_file import conf_folder, group_options
from spikerl.distributed.world import ALONE
from spikerl.models.actor import SpikingActor
from spikerl.training.learner import build_learner
from spikerl.training.start import task_for
from spikerl.types import Batch

# Operations that hand a value to Python, have a shape that depends on values, or copy data from
# Python's memory.
REFUSED = (
    "_local_scalar_dense",
    "equal.default",
    "nonzero",
    "masked_select",
    "unique",
    "lift_fresh",
)
ROWS = 8


class Recording(TorchDispatchMode):
    """Records the names of operations that a graph cannot hold."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = str(func)
        self.seen += [name for refused in REFUSED if refused in name]
        return func(*args, **(kwargs or {}))


def data_of(*keys: str) -> Any:
    common = ("env=InvertedPendulum", "kernel=reference", "device=cpu", "energy=none")
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        composed = compose("train", [*common, "threads=1", *keys])
    return OmegaConf.to_container(composed, resolve=True)


def learner_of(*keys: str) -> Any:
    config = build(data_of("world_size=1", *keys))
    generator = torch.Generator().manual_seed(0)
    return build_learner(config, task_for(config), generator, ALONE, torch.device("cpu"))


def batch(rows: int) -> Batch:
    uniform = torch.rand(rows, 12)
    obs, next_obs, act, rew = uniform.split([4, 4, 1, 3], 1)
    return Batch(obs, act, rew[:, 0], next_obs, rew[:, 1] > 0.8, rew[:, 2])


def recorded(learner: OffPolicy) -> list[str]:
    rows = ROWS * learner.policy_delay * learner.batches_per_update
    if isinstance(learner.actor, SpikingActor):
        learner.actor.schedule(0, 1000)
    learner.whole_round(batch(rows))
    with Recording() as recording:
        learner.whole_round(batch(rows))
    return recording.seen


# Experiments on images, on recorded data, with an algorithm that has no graphs, or that are like
# another one in EXPERIMENTS.
OTHERS = ("dqn", "ram_pong", "dsqn/", "ppo", "offline/", "bcq", "dsformer/", "decision_transformer",
          "spikerl/", "_poisson")  # fmt: skip
EXPERIMENTS = [
    name for name in group_options("experiment") if not any(other in name for other in OTHERS)
]

PARTS = [
    *(f"neuron={name}" for name in ("alif", "plif", "dynamic", "lif")),
    *(f"encoder={name}" for name in ("learned", "direct", "poisson", "analog", "tanh_population")),
    *(f"decoder={name}" for name in ("ilc", "membrane", "learned", "linear")),
    "neuron.reset=soft", "neuron.surrogate=atan", "actor.spike_cost=2", "actor.prune=0.5",
    "precision=bf16", "algo.max_grad_norm=1", "algo=sac actor=care_bn",
    "algo=sac algo.log_std=shared",
]  # fmt: skip


@pytest.mark.parametrize("keys", [*(f"experiment={name}" for name in EXPERIMENTS), *PARTS])
def test_a_round_of_updates_can_be_a_graph(keys: str) -> None:
    learner = learner_of(*keys.split())
    assert learner.has_graphs
    assert recorded(learner) == []


def test_every_algorithm_with_graphs_is_tried() -> None:
    graphs = {name for name, (_, learner) in ALGOS.options.items() if learner.has_graphs}
    assert graphs == {"ddpg", "td3", "sac", "proxy_td3"}
    assert {"popsan/ddpg", "popsan/sac", "popsan/td3", "proxy_target/lif"} <= set(EXPERIMENTS)


@pytest.mark.parametrize(
    ("keys", "against"),
    [
        ("", None),
        ("algo=sac algo.update_interval=1", None),  # each update is a round
        ("algo=ddpg algo.update_interval=50 algo.updates_per_step=0.1", None),
        ("algo.update_interval=3", None),  # bursts 1 2, 3 4 5: updates 3 and 4 are a round
        ("algo.update_interval=2", "algo.update_interval=2"),  # bursts 0 1, 2 3: no whole round
        ("algo.update_interval=6 algo.updates_per_step=0.4", "algo.update_interval=6"),
        ("experiment=proxy_target/lif", "algo.update_interval=1"),
        ("experiment=care_bn", "algo.update_interval=1"),
        ("algo=ppo", "algo=ppo"),
        ("algo=iql dataset=d", "algo=iql"),
        ("neuron.surrogate=atan neuron.surrogate_slope_end=9", "neuron.surrogate_slope_end=9.0"),
        ("world_size=2", "world_size=2"),
    ],
)
def test_what_is_against_graphs(keys: str, against: str | None) -> None:
    parsed = parse_groups(data_of(*keys.split()))
    size = parsed.run.world_size or 1
    refusal = why_no_graphs(parsed.run, parsed.algo, parsed.actor, size)
    assert (None if refusal is None else str(refusal).partition(": ")[0]) == against


def test_parts_of_plugins_are_no_graphs() -> None:
    """A plugin's code may keep state in Python that changes from update to update."""
    parsed = parse_groups(data_of())
    run = replace(parsed.run, plugins=["mine"])
    refusal = why_no_graphs(run, parsed.algo, parsed.actor, 1)
    assert str(refusal).startswith("plugins=['mine']: ")


def test_what_is_refused_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = learner_of("algo=td3")
    plain = learner.update_targets

    def careless() -> None:
        scale = torch.tensor([float(learner.guard.masked)])
        plain()
        assert scale.numel() == 1

    monkeypatch.setattr(learner, "update_targets", careless)
    assert recorded(learner) == ["aten._local_scalar_dense.default", "aten.lift_fresh.default"]
