"""When the trainer acts at random, updates, merges and ends an epoch, as counted by hand.

Shape legend   N environments, T vector steps, A action entries.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from itertools import count
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from builders import small_config
from transitions_env import COUNTER, HIGH, LOW, CounterEnv, Fault, get_attr, registered

from spikerl.energy.meter import Reading
from spikerl.envs.config import EnvConfig
from spikerl.envs.make import make_env, task_of
from spikerl.errors import NonFinite
from spikerl.models.normalizer import RunningNorm
from spikerl.seeding import reset_seed
from spikerl.training.evaluator import Evaluator
from spikerl.training.progress import progress_of
from spikerl.training.trainer import Trainer

# learning_starts, update_interval, updates_per_step, num_envs, total_steps
SCHEDULES = [
    (0, 1, 1.0, 1, 30),
    (0, 1, 1.0, 4, 30),
    (1, 1, 2.0, 1, 30),
    (10, 10, 1.0, 1, 60),
    (11, 10, 1.0, 1, 60),
    (9, 10, 1.0, 3, 60),
    (7, 3, 0.5, 1, 40),
    (7, 3, 0.25, 2, 41),
    (20, 5, 0.125, 4, 70),
    (0, 7, 1.5, 3, 50),
    (100, 10, 1.0, 2, 40),  # learning never starts
    (0, 50, 1.0, 4, 40),
]


@contextmanager
def trainer_of(env: EnvConfig = COUNTER, **settings: Any) -> Iterator[Trainer]:
    training = small_config(env=env, **({"eval_episodes": 1} | settings))
    with closing(make_env(env)) as one:
        task = task_of(one)
    with closing(Trainer(training, task)) as trainer:
        yield trainer


def calls_at(trainer: Trainer, patch: pytest.MonkeyPatch, owner: Any, name: str) -> list[int]:
    """A list to which each later call of the method appends the trainer's step."""
    steps: list[int] = []
    original = getattr(owner, name)

    def noting(*args: Any, **kwargs: Any) -> Any:
        steps.append(trainer.step)
        return original(*args, **kwargs)

    patch.setattr(owner, name, noting)
    return steps


def vector_steps(num_envs: int, total: int) -> range:
    """The step counts after each vector step, up to the first that reaches `total`."""
    return range(num_envs, math.ceil(total / num_envs) * num_envs + 1, num_envs)


@pytest.mark.parametrize(("starts", "interval", "per_step", "num_envs", "total"), SCHEDULES)
def test_updates_come_when_counting_by_hand_says(
    monkeypatch: pytest.MonkeyPatch,
    starts: int,
    interval: int,
    per_step: float,
    num_envs: int,
    total: int,
) -> None:
    expected: list[int] = []
    credit, step = 0.0, 0
    for now in vector_steps(num_envs, total):
        while step < now:
            step += 1
            if step % interval == 0 and step >= starts:
                credit += interval * per_step
        expected += [now] * (int(credit) - len(expected))

    env = registered("Schedule", CounterEnv, limit=9)
    schedule: dict[str, Any] = {"learning_starts": starts, "update_interval": interval}
    with trainer_of(
        env,
        num_envs=num_envs,
        total_steps=total,
        steps_per_epoch=1000,
        updates_per_step=per_step,
        **schedule,
    ) as trainer:
        updates = calls_at(trainer, monkeypatch, trainer.algo.critic_optimizer, "step")
        samples = calls_at(trainer, monkeypatch, trainer.replay, "sample")
        rows = list(trainer.epochs())
        assert updates == expected
        assert samples == sorted(set(expected))  # one draw for all updates at a step
        assert [row["updates"] for row in rows] == [len(expected)]
        assert trainer.algo.updates == trainer.updates_due(trainer.step) == len(expected)
        assert trainer.envs.steps == trainer.replay.added == trainer.step


@pytest.mark.parametrize(
    ("per_epoch", "num_envs", "total", "ends"),
    [
        (20, 1, 60, [20, 40, 60]),
        (20, 1, 50, [20, 40, 50]),  # a short last epoch
        (20, 1, 7, [7]),
        (20, 3, 50, [21, 42, 51]),  # crossed, not hit
        (7, 3, 30, [9, 15, 21, 30]),
        (4, 4, 12, [4, 8, 12]),
        (2, 5, 15, [5, 10, 15]),  # several epochs in a step: one row
    ],
)
def test_epochs_end_where_they_are_crossed(
    per_epoch: int, num_envs: int, total: int, ends: list[int]
) -> None:
    with trainer_of(
        num_envs=num_envs, total_steps=total, steps_per_epoch=per_epoch, learning_starts=1000
    ) as trainer:
        rows = list(trainer.epochs())
        assert [row["step"] for row in rows] == ends
        assert [row["epoch"] for row in rows] == list(range(1, len(ends) + 1))
        assert all(row["critic_loss"] is None for row in rows)
        # Every episode of the script is counted once, in the epoch where it ended.
        steps = ends[-1] // num_envs
        ended = np.cumsum([length for length, _ in CounterEnv().script * 9])
        assert sum(row["train_episodes"] for row in rows) == num_envs * sum(ended <= steps)


@pytest.mark.parametrize(
    ("random_steps", "num_envs", "random"), [(0, 1, 0), (13, 1, 13), (12, 4, 12), (13, 4, 16)]
)
def test_the_first_steps_and_no_others_are_random(
    monkeypatch: pytest.MonkeyPatch, random_steps: int, num_envs: int, random: int
) -> None:
    with trainer_of(
        num_envs=num_envs, total_steps=40, random_steps=random_steps, learning_starts=1000
    ) as trainer:
        quarter = torch.full((num_envs, 2), 0.25)
        monkeypatch.setattr(trainer.algo, "explore", lambda obs, generator: quarter)
        list(trainer.epochs())
        act = trainer.replay.between(0, 40)[:, 4:6]
        chosen = (act == 0.25).all(1)
        assert chosen.tolist() == [False] * random + [True] * (40 - random)
        assert (act[:random] != 0.25).all()


def test_warm_up_covers_each_dimension_s_own_bounds() -> None:
    """Bugs 6 and 7: uniform within each dimension's bounds; each environment has its own draw."""
    with trainer_of(num_envs=4, total_steps=4000, random_steps=4000, learning_starts=9999) as t:
        while t.step < 4000:
            t.act()
        received = np.array(get_attr(t.envs, "received"))  # (N, T, A)
    share = (received - LOW) / (HIGH - LOW)
    assert share.min() >= 0.0
    assert share.max() <= 1.0
    quantiles = np.quantile(share, [0.0, 0.25, 0.5, 0.75, 1.0], axis=(0, 1))
    np.testing.assert_allclose(quantiles, np.array([[0, 0.25, 0.5, 0.75, 1]] * 2).T, atol=0.03)
    check_independent(share)


def test_noise_is_drawn_for_every_environment_and_entry() -> None:
    """Bug 6: noise was drawn once for all rows or entries, was biased, or was not clipped."""
    settings: dict[str, Any] = {"num_envs": 4, "random_steps": 0, "learning_starts": 9999}
    with trainer_of(explore_noise=0.1, **settings) as t:
        # All rows have the same observation, so only the noise differs.
        obs = torch.zeros(4, 2)
        act = torch.stack([t.algo.explore(obs, t.streams.explore) for _ in range(1000)])
        noise = (act - t.algo.actor(obs, t.streams.update)).transpose(0, 1).detach().numpy()
        for _ in range(200):
            t.act()
        taken = t.replay.between(0, 800)[:, 4:6].reshape(200, 4, 2).numpy()
        assert len(np.unique(taken[0])) == 8  # equal observations at the first step
    assert np.abs(noise.mean(1)).max() < 0.015
    np.testing.assert_allclose(noise.std(1), 0.1, rtol=0.1)
    check_independent(noise)
    with trainer_of(explore_noise=5.0, **settings) as t:
        for _ in range(50):
            t.act()
        act = t.replay.between(0, 200)[:, 4:6]
        assert act.abs().max() == 1.0
        received = np.concatenate(get_attr(t.envs, "received"))
        assert received.min(0).tolist() == LOW.tolist()
        assert received.max(0).tolist() == HIGH.tolist()


def check_independent(values_NTA: np.ndarray) -> None:
    columns = values_NTA.transpose(0, 2, 1).reshape(-1, values_NTA.shape[1])
    correlation = np.corrcoef(columns) - np.eye(len(columns))
    assert np.abs(correlation).max() < 0.15


@pytest.mark.parametrize(("interval", "num_envs"), [(1, 1), (10, 1), (10, 3), (7, 4), (3, 5)])
def test_the_normaliser_merges_when_a_multiple_is_crossed(
    monkeypatch: pytest.MonkeyPatch, interval: int, num_envs: int
) -> None:
    """Bug 11: observations count once, and between merges the moments do not change."""
    steps = vector_steps(num_envs, 60)
    before = [0, *steps][: len(steps)]
    with trainer_of(num_envs=num_envs, total_steps=60, norm_interval=interval) as t:
        merges = calls_at(t, monkeypatch, t.norm, "merge")
        counts: list[int] = []
        list(t.epochs(on_updates=lambda progress: counts.append(t.norm.count)))
        crossings = [
            now
            for then, now in zip(before, steps, strict=True)
            if any(k % interval == 0 for k in range(then + 1, now + 1))
        ]
        assert merges == crossings
        assert counts == [max([c for c in crossings if c <= now], default=0) for now in steps]
        assert t.norm.count + len(t.norm.pending_rows()) == t.step
        seen = t.replay.between(0, t.norm.count)[:, :2].double().numpy()
        np.testing.assert_allclose(t.norm.mean_O, seen.mean(0), rtol=1e-13)
        np.testing.assert_allclose(t.norm.var_O, seen.var(0), rtol=1e-13)


def test_environments_and_runs_have_seeds_of_their_own() -> None:
    seeds = []
    for seed in (0, 1):
        with trainer_of(num_envs=3, seed=seed) as trainer:
            expected = [[reset_seed(31, seed, "env", i)] for i in range(3)]
            assert list(get_attr(trainer.envs, "seeds")) == expected
            trainer.reset_envs(100)
            expected = [[*e, reset_seed(31, seed, "env", i, 100)] for i, e in enumerate(expected)]
            assert list(get_attr(trainer.envs, "seeds")) == expected
            seeds += [seed for part in expected for seed in part]
    assert len(set(seeds)) == len(seeds)


# --- NaN and infinity ---------------------------------------------------------------------------

FAULTS: list[Fault] = [
    ("reward", 23, math.nan),
    ("reward", 1, -math.inf),
    ("observation", 23, math.inf),
    ("observation", 8, math.nan),  # the successor of a last step
    ("reset", 4, math.nan),  # after the third episode, which ends with step 8
]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("num_envs", [1, 2])
def test_nothing_infinite_gets_past_the_environments(fault: Fault, num_envs: int) -> None:
    what, occasion, _ = fault
    env = registered("Faulty", CounterEnv, limit=99, fault=fault)
    good = (8 if what == "reset" else occasion) - 1  # vector steps before the fault
    word = "reward" if what == "reward" else "observation"
    with trainer_of(env, num_envs=num_envs, norm_interval=1, learning_starts=5) as trainer:
        message = f"step {good * num_envs + 1}: Faulty-v0 .*NaN or infinite {word}"
        with pytest.raises(NonFinite, match=message):
            list(trainer.epochs())
        assert trainer.replay.added == trainer.norm.count == trainer.step == good * num_envs
        assert trainer.replay.between(0, trainer.step).isfinite().all()
        assert all(tensor.isfinite().all() for tensor in trainer.learner_state().values())


def test_a_first_observation_that_is_infinite_stops_at_once() -> None:
    env = registered("Faulty", CounterEnv, limit=99, fault=("reset", 1, math.nan))
    with pytest.raises(NonFinite, match="step 1: Faulty-v0 "), trainer_of(env):
        pass


def test_a_reward_that_scaling_takes_beyond_float32() -> None:
    """It is not stored, as an infinity in the replay would make every resume fail."""
    said = r"^step 1: learning would see a reward of .*, which float32 lacks; env.*_scale=1e\+36$"
    with trainer_of(replace(COUNTER, reward_scale=1e36)) as trainer:
        with pytest.raises(NonFinite, match=said):
            list(trainer.epochs())
        assert trainer.replay.added == trainer.step == 0


@pytest.mark.parametrize("what", ["reward", "observation"])
def test_an_evaluation_does_not_average_over_infinities(what: str) -> None:
    env = registered("Faulty", CounterEnv, limit=99, fault=(what, 2, math.nan))
    with trainer_of(env) as trainer, pytest.raises(NonFinite, match="evaluation, step 2: Faulty-"):
        trainer.evaluator.run(trainer.policy, 1)


def test_an_evaluation_notices_a_bad_reset() -> None:
    env = registered("Faulty", CounterEnv, limit=99, fault=("reset", 1, math.nan))
    with (
        trainer_of() as trainer,
        closing(Evaluator(env, 1, 0)) as evaluator,
        pytest.raises(NonFinite, match="evaluation, reset: "),
    ):
        evaluator.run(trainer.policy, 1)


@pytest.mark.parametrize(
    ("count", "rows"), [(10, np.array([[0.0, 1e200]])), (2**53, np.zeros((1, 2)))]
)
def test_a_normaliser_that_diverged_stops_the_run(count: int, rows: np.ndarray) -> None:
    with trainer_of(norm_interval=7, learning_starts=20) as trainer:
        for _ in range(6):
            trainer.advance()
        trainer.norm.count = count
        trainer.norm.add(rows)
        with pytest.raises(NonFinite, match=r"^step 7: the observation normaliser diverged: entry"):
            trainer.advance()


def test_a_bad_update_names_the_step() -> None:
    with trainer_of(learning_starts=20, update_interval=10) as trainer:
        for _ in range(19):
            trainer.advance()
        trainer.replay.rows[:19] = math.nan
        with pytest.raises(NonFinite, match=r"^step 20: update 0: the loss or a gradient"):
            trainer.advance()


def test_a_decimal_fraction_of_updates_is_not_cut_short() -> None:
    with trainer_of(learning_starts=0, update_interval=100, updates_per_step=0.29) as trainer:
        assert [trainer.updates_due(100 * k) for k in range(4)] == [0, 29, 58, 87]


def test_alone_it_stops_where_it_is_told() -> None:
    """One process stops at once; several would have to agree, at the next merge."""
    with trainer_of(norm_interval=1000, total_steps=3000) as trainer:
        list(trainer.epochs(stop_signal=lambda: 15 if trainer.step >= 7 else 0))
        assert (trainer.step, trainer.stopping) == (7, 15)


def test_pending_observations_are_copies() -> None:
    """Bug 4: an environment may later write into the array that it returned."""
    norm, obs = RunningNorm(2, 5.0), np.ones((1, 2))
    norm.add(obs)
    obs[:] = 7.0
    assert norm.pending_rows().tolist() == [[1.0, 1.0]]


def test_async_counts_as_sync_does() -> None:
    rows = []
    for vectorizer in ("sync", "async"):
        env = replace(COUNTER, vectorizer=vectorizer)
        with trainer_of(env, num_envs=3, total_steps=30, learning_starts=9999) as trainer:
            list(trainer.epochs())
            rows.append(trainer.replay.between(0, 30).tolist())
    assert rows[0] == rows[1]


def test_what_an_evaluation_spent_that_a_stop_ended_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each window has 2 J: epoch 1 has two of training, before and after the stop, and two of
    evaluation.
    """
    windows: list[str] = []
    meter: Any = SimpleNamespace(
        source="replay:x",
        begin=windows.append,
        end=lambda window: Reading(1.0, {"gpu:0": 2.0}, {}),
    )
    monkeypatch.setattr("spikerl.training.evaluator.ASK_S", 0.0)
    seconds = map(float, count())
    monkeypatch.setattr("spikerl.training.trainer.time.process_time", lambda: next(seconds))
    with trainer_of(total_steps=20, steps_per_epoch=10, norm_interval=7) as trainer:
        trainer.meter = meter
        assert list(trainer.epochs(stop_signal=lambda: 15 * (windows[-1] == "eval"))) == []
        assert (trainer.step, trainer.progress.epoch, trainer.stopping) == (10, 0, 15)
        data = asdict(trainer.progress)
        trainer.progress = progress_of(data, 10)
        assert progress_of({k: v for k, v in data.items() if k != "cpu_s"}, 10).cpu_s is None
        trainer.stopping = 0
        first, second = trainer.epochs()
        assert (first["epoch"], first["step"], second["epoch"]) == (1, 10, 2)
        assert (first["energy_train_j"], first["energy_eval_j"]) == (4.0, 4.0)
        assert (second["energy_train_j"], second["energy_eval_j"]) == (2.0, 2.0)
        assert (first["cpu_s"], second["cpu_s"]) == (4.0, 2.0)  # each reading of the clock adds 1 s


def test_processor_time_with_environments_elsewhere_is_not_known() -> None:
    env = replace(COUNTER, vectorizer="async")
    with trainer_of(env, total_steps=4, steps_per_epoch=4, learning_starts=9999) as trainer:
        (row,) = trainer.epochs()
    assert row["cpu_s"] is None


@pytest.mark.parametrize(("step", "last"), [(40, 0), (50, 50), (57, 50), (60, 60)])
def test_slopes_are_those_of_the_last_update(step: int, last: int) -> None:
    """Updates are made every 10 steps, from step 50 on."""
    with trainer_of() as trainer:
        trainer.progress.step = step
        assert trainer.last_update() == last


@pytest.mark.parametrize("odd", [
    {"step": 3}, {"updates": -1}, {"epoch": 1.5}, {"updates": 2**70}, {"train_s": float("nan")},
    {"cpu_s": float("nan")}, {"cpu_s": "1"},
    {"losses": {"x": "1"}}, {"returns": [None]}, {"sums": {"x": [1.0, "2"]}}, {"more": 1},
    {"eval_energy": [1.0, {"gpu:0": "1"}, {}]}, {"eval_energy": [1.0, {}, {"gpu:0": 1}]},
    {"energy": [1.0, {"gpu:0": "1"}, {}]}, {"energy": [1.0, {}, {"gpu:0": 1}]}, {"energy": [1.0]},
])  # fmt: skip
def test_progress_that_is_none(odd: dict[str, Any]) -> None:
    assert progress_of({"step": 2, "energy": [1.0, {"gpu:0": 1.0}, {}]}, 2).step == 2
    with pytest.raises((ValueError, TypeError)):
        progress_of({"step": 2} | odd, 2)
