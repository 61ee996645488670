"""Every transition, from environments to replay, against a plain loop over numbers.

Shape legend   N environments, T vector steps, A action entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from transitions_env import COUNTER, HIGH, LOW, SCRIPT, CounterEnv, get_attr, parse

from spikerl.algos.replay import Replay
from spikerl.envs.checked import CheckedEnv
from spikerl.envs.make import make_env, task_of
from spikerl.envs.vector import Envs, Steps, make_envs
from spikerl.models.normalizer import RunningNorm
from spikerl.types import Task

SCRIPTS = {
    1: [SCRIPT],
    # In the first two steps several environments terminate, are truncated, or both, at once.
    4: ["1t 1x 2b 3t", "1x 1t 5x", "2t 1b 1x", SCRIPT],
    3: ["2x", "2t", "2b"],  # all end together, so a step may have no transition
}
TASK = Task("Counter-v0", (2,), (2,), LOW.astype(float), HIGH.astype(float), 100)
GAMMA = 0.5  # exact as a float32


class Row(NamedTuple):
    """A transition of the scalar loop."""

    t: int
    obs: tuple[int, int]
    act: tuple[float, float]
    rew: float
    next_obs: tuple[int, int]
    terminated: bool
    last: bool


class Expected(NamedTuple):
    rows: list[Row]
    received: list[list[list[float]]]  # by environment
    finished: list[tuple[float, int]]
    resets: list[int]  # by environment


def grid_actions(steps: int, num_envs: int) -> np.ndarray:
    """Actions (T, N, A) in [-1, 1], multiples of 1/64, so that every scaled action is exact."""
    rng = np.random.default_rng(steps * 10 + num_envs)
    return (rng.integers(-64, 65, (steps, num_envs, 2)) / 64).astype(np.float32)


def scalar_loop(scripts: list[str], actions: np.ndarray, *, same_step: bool) -> Expected:
    n = len(scripts)
    parsed = [parse(script) for script in scripts]
    expected = Expected([], [[] for _ in range(n)], [], [1] * n)
    step, episode, ret, waiting = [0] * n, [0] * n, [0.0] * n, [False] * n
    for t in range(len(actions)):
        for i in range(n):
            if waiting[i]:  # this step only resets
                waiting[i] = False
                expected.resets[i] += 1
                continue
            a, b = (float(entry) for entry in actions[t, i])
            first, second = -1.0 + 2.0 * (a + 1.0), 0.25 * (b + 1.0)
            expected.received[i].append([first, second])
            rew = 32.0 * first + 256000.0 * second
            length, end = parsed[i][episode[i] % len(parsed[i])]
            obs, step[i], ret[i] = (step[i], episode[i]), step[i] + 1, ret[i] + rew
            last = step[i] == length
            terminated = last and end in ("t", "b")
            following = step[i], episode[i]
            expected.rows.append(Row(t, obs, (a, b), rew, following, terminated, last))
            if last:
                expected.finished.append((ret[i], length))
                step[i], episode[i], ret[i], waiting[i] = 0, episode[i] + 1, 0.0, not same_step
                expected.resets[i] += same_step
    return expected


@contextmanager
def counters(scripts: list[str], kind: Any, mode: AutoresetMode) -> Iterator[Envs]:
    makers: list[Callable[[], CheckedEnv]] = [partial(plain_counter, script) for script in scripts]
    with closing(Envs(kind(makers, autoreset_mode=mode), TASK)) as envs:
        yield envs


def plain_counter(script: str) -> CheckedEnv:
    return CheckedEnv(CounterEnv(script), COUNTER)


@pytest.mark.parametrize("num_envs", SCRIPTS)
@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP])
@pytest.mark.parametrize("kind", [SyncVectorEnv, AsyncVectorEnv])
def test_every_transition_is_the_scalar_loop_s(
    kind: Any, mode: AutoresetMode, num_envs: int
) -> None:
    """Bugs 1 to 5 and 7: kinds of ends, no transition across a reset, no shared array, scaling."""
    scripts, actions = SCRIPTS[num_envs], grid_actions(60, num_envs)
    expected = scalar_loop(scripts, actions, same_step=mode == AutoresetMode.SAME_STEP)
    seeds = [2**62 + 12345 * i for i in range(num_envs)]  # too large for a float or an int32
    norm, replay = RunningNorm(2, 5.0), Replay(1000, 2, 2)
    kept: list[Steps] = []
    with counters(scripts, kind, mode) as envs:
        envs.reset(seeds)
        assert np.array_equal(envs.obs, [[0.0, 0.0]] * num_envs)
        for act in actions:
            steps = envs.step(act)
            kept.append(steps)  # not copied: a later overwrite would fail below
            replay.add(*steps, discount=GAMMA)
            norm.add(steps.obs)
        received = [list(part) for part in get_attr(envs, "received")]
        got_seeds = [list(part) for part in get_attr(envs, "seeds")]
        assert envs.steps == len(expected.rows)
        assert [tuple(episode) for episode in envs.finished] == expected.finished

    assert [len(s.rew) for s in kept] == np.bincount(
        [r.t for r in expected.rows], None, 60
    ).tolist()
    found = [
        Row(t, tuple(obs), tuple(act), float(rew), tuple(next_obs), bool(terminated), bool(last))
        for t, steps in enumerate(kept)
        for obs, act, rew, next_obs, terminated, last in zip(*steps, strict=True)
    ]
    assert found == expected.rows
    assert all(s.terminated.dtype == bool and s.obs.dtype == np.float64 for s in kept)
    assert not any(np.shares_memory(s.obs, s.next_obs) for s in kept)
    assert received == expected.received
    assert got_seeds == [
        [s] + [None] * (n - 1) for s, n in zip(seeds, expected.resets, strict=True)
    ]

    stored = [
        [*r.obs, *r.next_obs, *r.act, r.rew, r.terminated, r.last, GAMMA] for r in expected.rows
    ]
    assert replay.between(0, replay.added).tolist() == stored
    check_moments(norm, [row.obs for row in expected.rows])


def check_moments(norm: RunningNorm, seen: list[tuple[int, int]]) -> None:
    assert norm.pending_rows().tolist() == [list(map(float, obs)) for obs in seen]
    assert norm.count == 0
    norm.merge([norm.collect()])
    assert norm.count == len(seen)
    for column, mean, var in zip(zip(*seen, strict=True), norm.mean_O, norm.var_O, strict=True):
        exact = Fraction(sum(column), len(column))
        assert mean == float(exact)
        squares = sum((x - exact) ** 2 for x in column)
        assert var == pytest.approx(float(squares / len(column)), rel=1e-14, abs=0)


@pytest.mark.parametrize("vectorizer", ["sync", "async"])
def test_the_vectors_that_training_makes_step_alike(vectorizer: str) -> None:
    config = replace(COUNTER, vectorizer=vectorizer)
    actions = grid_actions(40, 2)
    expected = scalar_loop([SCRIPT] * 2, actions, same_step=True)
    task = task_of(make_env(config))
    assert (task.env_id, task.max_episode_steps, task.obs_dim) == ("Counter-v0", 100, 2)
    with closing(make_envs(config, 2, task)) as envs:
        envs.reset([5, 6])
        rows = [r for act in actions for r in zip(*envs.step(act), strict=True)]
        received = [list(part) for part in get_attr(envs, "received")]
    assert [tuple(r[3]) for r in rows] == [r.next_obs for r in expected.rows]
    assert [r[4] for r in rows] == [r.terminated for r in expected.rows]
    assert received == expected.received


def test_truncated_rows_hold_the_true_successor_and_are_not_terminal() -> None:
    """Bugs 1 and 5 by hand: an episode that is truncated after its second step."""
    with counters(["2x"], SyncVectorEnv, AutoresetMode.SAME_STEP) as envs:
        envs.reset([0])
        envs.step(np.zeros((1, 2), np.float32))
        last = envs.step(np.zeros((1, 2), np.float32))
        assert last.next_obs.tolist() == [[2.0, 0.0]]
        assert last.terminated.tolist() == [False]
        assert np.array_equal(envs.obs, [[0.0, 1.0]])


# --- replay ---------------------------------------------------------------------------------


def numbered(start: int, count: int) -> Steps:
    """Transitions that carry their own number k in every entry."""
    k = np.arange(start, start + count, dtype=np.float64)
    obs = np.stack([k, k + 0.25], 1)
    return Steps(obs, np.stack([k / 1024], 1), k * 2, obs + 0.5, k % 3 == 0, k % 2 == 0)


def packed(numbers: list[int]) -> list[list[float]]:
    return [
        [k, k + 0.25, k + 0.5, k + 0.75, k / 1024, k * 2, k % 3 == 0, k % 2 == 0, GAMMA]
        for k in numbers
    ]


@pytest.mark.parametrize("bursts", [[3], [7], [1] * 20, [3] * 9, [0, 5, 0, 4], [30], [4, 16, 2, 9]])
def test_the_ring_keeps_the_newest_rows(bursts: list[int]) -> None:
    replay = Replay(7, 2, 1)
    added = 0
    for count in bursts:
        replay.add(*numbered(added, count), discount=GAMMA)
        added += count
        held = list(range(max(0, added - 7), added))
        assert (replay.added, replay.size) == (added, len(held))
        assert replay.between(held[0] if held else 0, added).tolist() == packed(held)
        for k in held:
            assert replay.rows[k % 7].tolist() == packed([k])[0]


@pytest.mark.parametrize(("start", "count"), [(0, 7), (5, 4), (13, 7), (6, 1), (3, 20), (4, 0)])
def test_put_writes_where_add_would_have(start: int, count: int) -> None:
    source, target = Replay(1000, 2, 1), Replay(7, 2, 1)
    source.add(*numbered(0, start + count), discount=GAMMA)
    target.put(0, torch.full((7, 9), -1.0))
    target.put(start, source.between(start, start + count))
    slots = [[-1.0] * 9] * 7
    for k in range(start, start + count):
        slots[k % 7] = packed([k])[0]
    assert target.rows.tolist() == slots


def test_samples_are_stored_rows_normalised_with_the_moments_of_now() -> None:
    """Bugs 1, 4 and 10: `terminated` is bool, successors differ, rows stay raw."""
    replay, norm = Replay(50, 2, 1), RunningNorm(2, 3.0)
    replay.add(*numbered(0, 80), discount=GAMMA)
    before = replay.rows.clone()
    fresh = replay.sample(400, torch.Generator().manual_seed(1), lambda obs: obs)
    norm.add(numbered(0, 80)[0])
    norm.merge([norm.collect()])
    batch = replay.sample(400, torch.Generator().manual_seed(1), norm.normalize)

    k = (fresh.rew / 2).long().tolist()
    assert set(k) == set(range(30, 80))  # all rows held, none overwritten
    assert torch.cat([fresh.obs, fresh.next_obs, fresh.act], 1).tolist() == [
        row[:5] for row in packed(k)
    ]
    assert fresh.terminated.dtype == torch.bool
    assert fresh.terminated.tolist() == [n % 3 == 0 for n in k]
    assert fresh.discount.tolist() == [GAMMA] * 400

    for raw, normalised in ((fresh.obs, batch.obs), (fresh.next_obs, batch.next_obs)):
        expected = np.clip((raw.numpy() - norm.mean_O) / np.sqrt(norm.var_O), -3.0, 3.0)
        np.testing.assert_allclose(normalised.numpy(), expected, rtol=1e-5, atol=1e-5)
    for name in ("act", "rew", "terminated", "discount"):
        assert torch.equal(getattr(batch, name), getattr(fresh, name))
    assert torch.equal(replay.rows, before)
