"""Actions within their bounds, and the environments that can be trained on."""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from shell import refusal
from transitions_env import BoxesEnv, get_attr, registered

from spikerl.envs import make as envs_module
from spikerl.envs.make import make_env, task_of
from spikerl.envs.vector import make_envs
from spikerl.errors import BadRequest
from spikerl.types import Batch, Task


@st.composite
def boxes(draw: st.DrawFn) -> gym.spaces.Box:
    dtype: Any = draw(st.sampled_from([np.float32, np.float64]))
    edge = st.floats(-(2.0**100), 2.0**100, width=32 if dtype == np.float32 else 64)
    pairs = draw(st.lists(st.tuples(edge, edge), min_size=1, max_size=4))
    low, high = (np.array(side, dtype) for side in zip(*map(sorted, pairs), strict=True))
    inward = np.nextafter(low.astype(np.float32), np.float32(np.inf)).astype(np.float64)
    assume((inward <= high).all())  # some float32 is inside
    return gym.spaces.Box(low, high, dtype=dtype)


@settings(max_examples=300, deadline=None)
@given(boxes(), st.data())
def test_actions_lie_in_the_box_and_reach_its_edges(
    box: gym.spaces.Box, data: st.DataObject
) -> None:
    """Bug 7: each dimension has its own bounds, and rounded actions stay in the box."""
    low, high = box.low.astype(np.float64), box.high.astype(np.float64)
    task = Task("any", (1,), box.shape, low, high, 1)
    entry = st.floats(-1.0, 1.0, width=32) | st.sampled_from([-1.0, 1.0])
    act = data.draw(st.lists(entry, min_size=task.act_dim, max_size=task.act_dim))
    scaled = task.to_env(np.array(act, np.float32))
    assert scaled.dtype == np.float32
    assert box.contains(scaled)
    wanted = low + (np.array(act) + 1.0) / 2.0 * (high - low)
    size = np.maximum(np.abs(low), np.abs(high))
    assert (np.abs(scaled - wanted) <= size * 2e-7 + 1e-44).all()


def test_multi_dimensional_boxes_are_flat_inside_and_whole_outside() -> None:
    low = np.arange(6, dtype=np.float32).reshape(2, 3)
    spaces = {"obs": gym.spaces.Box(-9.0, 99.0, (2, 2)), "act": gym.spaces.Box(low, low + 2.0)}
    config = registered("Whole", BoxesEnv, limit=9, **spaces)
    task = task_of(make_env(config))
    assert (task.obs_shape, task.act_shape, task.obs_dim, task.act_dim) == ((2, 2), (2, 3), 4, 6)
    with closing(make_envs(config, 2, task)) as envs:
        envs.reset([0, 1])
        assert np.array_equal(envs.obs, [[0.0, 1.0, 2.0, 3.0]] * 2)
        act = np.linspace(-1.0, 1.0, 12, dtype=np.float32).reshape(2, 6)
        steps = envs.step(act)
        received = get_attr(envs, "action")
    assert steps.next_obs.tolist() == [[1.0, 2.0, 3.0, 4.0]] * 2
    assert [part.shape for part in received] == [(2, 3)] * 2
    np.testing.assert_allclose(np.stack(received), low + 1.0 + act.reshape(2, 2, 3), rtol=1e-6)


BOX = gym.spaces.Box(-1.0, 1.0, (2,))


def test_one_bound_for_all_entries() -> None:
    """As in PopSAN's code, all entries have the first one's bound, even beyond their own."""
    act = gym.spaces.Box(np.array([-1.0, 0.0], np.float32), np.array([3.0, 9.0], np.float32))
    config = registered("OneBound", BoxesEnv, limit=9, obs=BOX, act=act)
    first = replace(config, action_bounds="first")
    task = task_of(make_env(first))
    assert (task.act_low.tolist(), task.act_high.tolist()) == ([-3.0, -3.0], [3.0, 3.0])
    with closing(make_envs(first, 1, task)) as envs:
        envs.reset([0])
        envs.step(np.array([[-1.0, 0.5]], np.float32))
        (received,) = get_attr(envs, "action")
    assert received.tolist() == [-3.0, 1.5]
    negative = gym.spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([-1.0, 1.0], np.float32))
    config = registered("Below", BoxesEnv, limit=9, obs=BOX, act=negative)
    refused = refusal(make_env, replace(config, action_bounds="first"))
    assert refused.args == ("env.action_bounds", "first",
                            "the first entry's upper bound is -1; give each")  # fmt: skip


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "several discrete actions": (
        BOX,
        gym.spaces.MultiDiscrete([3, 2]),
        r"its actions are MultiDiscrete; a Box \(continuous\) or Discrete is needed",
    ),
    "one action": (BOX, gym.spaces.Discrete(1), "it has one action, which leaves no choice"),
    "discrete observations": (gym.spaces.Discrete(3), BOX, "its observations are Discrete"),
    "graph": (gym.spaces.Graph(BOX, None), BOX, "its observations are Graph"),
    "words": (
        gym.spaces.Dict({"a": BOX, "b": gym.spaces.Dict({"c": gym.spaces.Text(3)})}),
        BOX,
        r"its observations hold a Text, b\.c",
    ),
    "empty observations": (gym.spaces.Box(0.0, 1.0, (0,)), BOX, "observations"),
    "empty actions": (BOX, gym.spaces.Box(0.0, 1.0, (0,)), "actions"),
    "unbounded": (BOX, gym.spaces.Box(-np.inf, np.inf, (2,)), "finite bounds"),
    "half bounded": (
        BOX,
        gym.spaces.Box(np.array([0, -np.inf], np.float32), np.array([1, 1], np.float32)),
        "finite bounds",
    ),
    "integers": (BOX, gym.spaces.Box(0, 5, (1,), np.int64), "actions are int64"),
    "no width": (
        BOX,
        gym.spaces.Box(np.array([0, 1], np.float32), np.array([1, 1], np.float32)),
        "no room",
    ),
}


@pytest.mark.parametrize(("obs", "act", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_trained_on_is_refused_by_name(obs: Any, act: Any, words: str) -> None:
    made: list[BoxesEnv] = []

    def entry() -> BoxesEnv:
        made.append(BoxesEnv(obs, act))
        return made[-1]

    config = registered("Refused", entry, limit=9)
    with pytest.raises(BadRequest, match=words) as caught:
        make_env(config)
    assert str(caught.value).startswith("env.id=Refused-v0: ")
    assert all(env.closed for env in made)


@pytest.mark.parametrize(("own", "asked", "ends"), [(None, None, 7), (5, None, 5), (5, 3, 3)])
def test_every_episode_ends(
    monkeypatch: pytest.MonkeyPatch, own: int | None, asked: int | None, ends: int
) -> None:
    monkeypatch.setattr(envs_module, "DEFAULT_EPISODE_STEPS", 7)
    config = registered("Endless", BoxesEnv, limit=own, obs=BOX, act=BOX)
    config.max_episode_steps = asked
    env = make_env(config)
    assert task_of(env).max_episode_steps == ends
    env.reset(seed=0)
    results = [env.step(np.zeros(2, np.float32))[2:4] for _ in range(ends)]
    assert results == [(False, False)] * (ends - 1) + [(False, True)]


def test_what_follows_a_terminated_step_counts_for_nothing() -> None:
    """1 + 0.5 * 8 = 5; after a termination 1, even if the next value is not finite."""
    rew, discount = torch.ones(3), torch.full((3,), 0.5)
    terminated, none = torch.tensor([False, True, True]), torch.empty(3, 0)
    batch = Batch(none, none, rew, none, terminated, discount)
    assert batch.td_target(torch.tensor([8.0, math.inf, math.nan])).tolist() == [5.0, 1.0, 1.0]
