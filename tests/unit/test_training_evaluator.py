"""The observations that an evaluation keeps, and the operations that it counts on them."""

from __future__ import annotations

from contextlib import closing
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from builders import INVERTED_PENDULUM
from exports import config, policy_of
from threads import run_in_threads, worlds

from spikerl.distributed.world import World
from spikerl.energy import modelled
from spikerl.envs.make import make_env, task_of
from spikerl.training import evaluator
from spikerl.training.evaluator import Evaluation, Evaluator, Seen
from spikerl.types import Task


def test_workers_count_operations_together() -> None:
    """Each worker counts on its own observations; all get the mean over all observations."""
    with closing(make_env(INVERTED_PENDULUM)) as env:
        policy = policy_of(config(), task_of(env))

    def run(world: World) -> Evaluation:
        with closing(Evaluator(INVERTED_PENDULUM, 3, 0, world)) as evaluator:
            return evaluator.run(deepcopy(policy), 0)

    found = run_in_threads([partial(run, world) for world in worlds(2)])
    counted = [one.operations for one in found]
    assert counted[0]
    assert counted[1]
    each = [(ops.observations, modelled.per_decision(ops)) for ops in counted if ops]
    assert each[0][1] != each[1][1]
    assert found[0].decision == found[1].decision == modelled.mean(each)


def test_observations_that_take_much_are_thinned_out() -> None:
    """80 bytes hold five observations of 16: every fourth of 21 is kept, then every eighth."""
    seen = Seen(80)
    for first in range(0, 21, 3):
        seen.add(np.array([[n, n] for n in range(first, first + 3)], np.float64))
    assert seen.rows()[:, 0].tolist() == [0.0, 8.0, 16.0]
    whole = Seen()
    whole.add(np.zeros((100, 2)))
    assert len(whole.rows()) == whole.count == 100


def test_what_is_thinned_out_is_let_go() -> None:
    """Kept rows are no views of larger arrays, whose memory would stay in use."""
    seen = Seen(1000)
    for _ in range(100):
        seen.add(np.zeros((10, 5)))
    assert sum((one if one.base is None else one.base).nbytes for one in seen.held) <= 1000


class Shown(gym.Env[np.ndarray, np.ndarray]):
    action_space = gym.spaces.Box(-1.0, 1.0, (1,))

    def __init__(self, seen: list[float], dtype: Any) -> None:
        self.seen = np.array(seen, dtype)
        self.observation_space = gym.spaces.Box(0, 255, (2,), dtype)

    def reset(self, **_: Any) -> tuple[np.ndarray, dict[str, Any]]:
        return self.seen, {}

    def step(self, _: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        return self.seen, 1.0, False, True, {}


@pytest.mark.parametrize(("dtype", "seen"), [("uint8", [0, 255]), ("float64", [0.5, 254.5])])
def test_images_are_held_as_bytes(
    dtype: str, seen: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only bytes: if the environment returns fractions they are kept, even if the policy's task
    has bytes.
    """
    bounds = np.ones(1)
    task = Task("Nowhere-v0", (2,), (1,), -bounds, bounds, 3, obs_bytes=True)
    monkeypatch.setattr(gym.envs.registration, "registry", dict(gym.registry))
    gym.register("Shown-v0", lambda **_: Shown(seen, dtype), max_episode_steps=3)
    env = replace(INVERTED_PENDULUM, name="gym", version=None, id="Shown-v0")
    with closing(Evaluator(env, 1, 0)) as made:
        rows = made.observations(policy_of(config(), task))
    assert rows.dtype == dtype
    assert rows.tolist() == [seen]


@pytest.mark.parametrize(("entries", "rows"), [(12, 3), (3, 1)])
def test_few_large_observations_are_probed(
    entries: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Observations have four entries: 12 allow three of them; at least one is probed."""
    monkeypatch.setattr(evaluator, "PROBED_ENTRIES", entries)
    with closing(make_env(INVERTED_PENDULUM)) as env:
        policy = policy_of(config(), task_of(env))
    with closing(Evaluator(INVERTED_PENDULUM, 2, 0)) as made:
        assert made.run(policy, 0).probed.shape == (rows, 4)
