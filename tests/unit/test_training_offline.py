"""Training from a dataset: each worker's share of it, and the exact resume."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from builders import (
    INVERTED_PENDULUM,
    bc_config,
    bcq_config,
    care_bn_config,
    iql_config,
    small_config,
    td3_bc_config,
)
from recorded import episode, task_for, write
from sequences import actor_config, decision_config, transformer_config
from shell import refusal
from threads import run_in_threads, worlds

from spikerl.algos.base import AlgoConfig
from spikerl.algos.replay import Replay
from spikerl.config.build import Config
from spikerl.config.memory import least_bytes
from spikerl.distributed.world import ALONE
from spikerl.envs.dataset import Dataset, Recorded
from spikerl.models.actor_config import ActorConfig
from spikerl.models.networks import build_actor
from spikerl.models.normalizer import RunningNorm, moments_of
from spikerl.models.policy import Policy
from spikerl.runs.checkpoint import save_checkpoint, verified
from spikerl.training.offline import store_dataset
from spikerl.training.state import load_checkpoint, shard_of
from spikerl.training.trainer import Trainer

LENGTHS = (5, 3, 6)
FIRST = (0.0, 1000.0, 2000.0)  # first observation and reward of each episode
SMALL = {"batch_size": 6, "critic_hidden_sizes": [8]}


def training(
    algo: AlgoConfig | None = None, num_envs: int = 1, actor: ActorConfig | None = None
) -> Config:
    made = small_config(total_steps=80, steps_per_epoch=60, eval_episodes=1, num_envs=num_envs)
    return replace(made, algo=algo or td3_bc_config(**SMALL), actor=actor or made.actor)


def sequences(num_envs: int = 1) -> Config:
    return training(decision_config(warmup_share=0.2), num_envs, actor_config())


def dropping() -> ActorConfig:
    """A dense network with dropout, which draws random numbers."""
    actor = transformer_config(dropout=0.2, layers=1)
    return ActorConfig(actor=actor, encoder=None, neuron=None, decoder=None)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    parts = zip(LENGTHS, FIRST, (True, False, True), strict=True)
    folder = write(tmp_path / "d", [episode(*part) for part in parts])
    return Dataset.open(folder, task_for(INVERTED_PENDULUM), 1 << 20)


@contextmanager
def workers(config: Config, size: int, dataset: Dataset | None) -> Iterator[list[Trainer]]:
    task = task_for(INVERTED_PENDULUM)
    made = [Trainer(config, task, world=w, dataset=dataset) for w in worlds(size)]
    try:
        yield made
    finally:
        for one in made:
            one.close()


def rewards(trainer: Trainer) -> list[float]:
    rows = trainer.replay.between(0, trainer.replay.added)
    return [float(r) for r in rows[:, 2 * 4 + 1]]


def test_rows_and_moments(dataset: Dataset) -> None:
    with workers(training(), 1, dataset) as (one,):
        first = torch.tensor([0.0, 1, 2, 3, 4, 5, 6, 7, -1.0, 0.0, 0.0, 0.0, 0.99])
        torch.testing.assert_close(one.replay.rows[0], first)
        ends = one.replay.rows[: one.replay.added, -3:-1]
        assert ends[4].tolist() == [1.0, 1.0]  # terminated, and the episode's last
        assert ends[7].tolist() == [0.0, 1.0]  # truncated
        assert [float(r) for r in rewards(one)] == [
            0, 1, 2, 3, 4, 1000, 1001, 1002, 2000, 2001, 2002, 2003, 2004, 2005,
        ]  # fmt: skip
        seen = np.concatenate([episode(n, at)["observations"][:-1]
                               for n, at in zip(LENGTHS, FIRST, strict=True)])  # fmt: skip
        np.testing.assert_allclose(one.norm.mean_O, seen.mean(0))
        np.testing.assert_allclose(one.norm.var_O, seen.var(0))
        assert one.norm.count == 14


def test_images_are_not_copied_as_numbers() -> None:
    """200 images of 84 x 84 x 4 bytes take 5.6 MB, in float64 they would take 45 MB; the moments
    are those of the float64 images to the bit.
    """
    size = 84 * 84 * 4
    images = np.random.default_rng(0).integers(0, 256, (201, size), np.uint8)
    ends = np.zeros(200, bool)
    played = Recorded(images, np.zeros((200, 1)), np.zeros(200), ends, ends)
    data: Any = SimpleNamespace(transitions=200, folder=Path("d"), episodes=lambda: iter([played]))
    replay, norm = Replay(200, size, 1, obs_bytes=True), RunningNorm(size, None)
    algo: Any = None
    tracemalloc.start()
    store_dataset(data, training(), algo, replay, norm, 0)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 4e7
    whole = images[:-1].astype(np.float64)
    expected = np.concatenate([[200.0], whole.mean(0), whole.var(0)])
    assert moments_of(images[:-1]).tolist() == expected.tolist()
    np.testing.assert_allclose(norm.mean_O, whole.mean(0), rtol=1e-15)
    np.testing.assert_allclose(norm.var_O, whole.var(0), rtol=1e-15)


def test_rows_that_memory_does_not_hold(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    reserve = Replay.reserve

    def reserved(self: Replay, count: int) -> None:
        if count == 14:
            raise MemoryError("no room")
        reserve(self, count)

    monkeypatch.setattr(Replay, "reserve", reserved)
    task = task_for(INVERTED_PENDULUM)
    line = str(refusal(lambda: Trainer(training(), task, dataset=dataset)))
    needed = f"{14 * (2 * 4 + 1 + 4) * 4 / 2**30:.3g}"
    why = f"its 14 transitions need {needed} GiB, which cannot be had"
    assert line == f"dataset={dataset.folder}: {why}"


def test_rewards_are_scaled_and_observations_left_alone(dataset: Dataset) -> None:
    config = training(td3_bc_config(**SMALL, norm_interval=None))
    config = replace(config, env=replace(config.env, reward_scale=0.5))
    with workers(config, 1, dataset) as (one,):
        assert rewards(one)[:4] == [0.0, 0.5, 1.0, 1.5]
        assert one.norm.count == 0


def test_rewards_beyond_float32(dataset: Dataset, tmp_path: Path) -> None:
    """Too large are a reward of 4 times 1e38, and a return to go of five rewards of 1e38."""
    task, config = task_for(INVERTED_PENDULUM), training()
    scaled = replace(config, env=replace(config.env, reward_scale=1e38))
    large = write(tmp_path / "large", [episode(5) | {"rewards": np.full(5, 1e38)}])
    for one, own, reward, scale in (
        (dataset, scaled, "4e+38", "1e+38"),
        (Dataset.open(large, task, 1 << 20), sequences(), "5e+38", "1.0"),
    ):
        line = str(refusal(partial(Trainer, own, task, dataset=one)))
        assert line == (
            f"dataset={one.folder}: learning would see a reward of {reward}, which float32 lacks,"
            f" with env.reward_scale={scale}"
        )


def test_a_policy_of_another_run_keeps_its_normaliser(dataset: Dataset) -> None:
    task, config = task_for(INVERTED_PENDULUM), training()
    norm = RunningNorm(task.obs_dim, 3.0)
    norm.add(np.arange(8.0).reshape(2, 4))
    norm.merge([norm.collect()])
    actor = build_actor(config.actor, task.obs_dim, task.act_dim)
    init = Policy(task, config.actor, actor, norm)
    with closing(Trainer(config, task, dataset=dataset, init=init)) as one:
        assert one.norm.count == 2
        assert one.norm.mean_O.tolist() == [2.0, 3.0, 4.0, 5.0]


def test_workers_share_it_out(dataset: Dataset) -> None:
    """4 environments share 12 of 14 transitions; each worker has those of its two."""
    with workers(training(num_envs=4), 2, dataset) as (first, second):
        assert rewards(first) == [0.0, 1.0, 4.0, 1000.0, 2000.0, 2001.0]
        assert rewards(second) == [2.0, 3.0, 1001.0, 1002.0, 2002.0, 2003.0]
        assert np.array_equal(first.norm.mean_O, second.norm.mean_O)
        assert first.norm.count == second.norm.count == 14
        run_in_threads([one.advance for one in (first, second)])
        run_in_threads([one.check_in_sync for one in (first, second)])
        assert first.step == first.algo.updates == 50


def returns(first: int, length: int) -> list[int]:
    """Returns to go of the rewards first, first + 1, ..."""
    rewards = range(first, first + length)
    return [sum(rewards[i:]) for i in range(length)]


def test_sequences_have_returns_to_go_and_times(dataset: Dataset) -> None:
    with workers(sequences(), 1, dataset) as (one,):
        assert rewards(one) == returns(0, 5) + returns(1000, 3) + returns(2000, 6)
        rows = one.replay.rows[:14]
        assert rows[:, -1].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3, 4, 5]
        assert rows[:, -2].nonzero().flatten().tolist() == [4, 7, 13]
        assert one.norm.count == 14
        conditioning = one.policy.config.conditioning
        assert conditioning is not None
        assert conditioning.target_return == sum(range(2000, 2006))
        assert one.algo.notes() == [
            "evaluations aim at a return of 12015 (the best of the dataset); the dataset's best"
            " episode has 12015"
        ]


@pytest.mark.parametrize(("pieces", "best"), [([2], 3003.0), ([0, 1, 2], 12015.0)])
def test_it_aims_at_a_whole_episode(pieces: list[int], best: float, tmp_path: Path) -> None:
    """The target is the best return of whole episodes, or of pieces if all episodes are pieces."""

    def touch(file: Any) -> None:
        for i in pieces:
            file[f"episode_{i}"].attrs["whole"] = False

    parts = zip(LENGTHS, FIRST, (True, False, True), strict=True)
    folder = write(tmp_path / "d", [episode(*part) for part in parts], touch)
    opened = Dataset.open(folder, task_for(INVERTED_PENDULUM), 1 << 20)
    with workers(sequences(), 1, opened) as (one,):
        conditioning = one.policy.config.conditioning
        assert conditioning is not None
        assert conditioning.target_return == best


def test_a_resized_run_learns_until_its_end(dataset: Dataset, tmp_path: Path) -> None:
    """With weak scaling, 50 steps of one worker are 50 updates, the other 30 of two workers 15."""
    config = replace(sequences(4), run=replace(sequences(4).run, scaling="weak"))
    with workers(config, 1, dataset) as (one,):
        for _ in range(50):
            one.advance()
        assert (one.step, one.algo.updates, one.algo.total_updates) == (50, 50, 80)
        save(tmp_path, [one])
    with workers(config, 2, None) as both:
        for trainer in both:
            assert load_checkpoint(trainer, verified(tmp_path, print)) == []
            assert trainer.algo.total_updates == 65


def test_workers_share_sequences_out(dataset: Dataset) -> None:
    """Each of 4 environments has 3 consecutive ones of 14 transitions, with the returns to go of
    whole episodes; a worker's rows alternate between its environments.
    """
    all_of_them = returns(0, 5) + returns(1000, 3) + returns(2000, 6)
    columns = [all_of_them[i : i + 3] for i in (0, 3, 6, 9)]
    with workers(sequences(4), 2, dataset) as (first, second):
        for one, (a, b) in ((first, columns[:2]), (second, columns[2:])):
            assert rewards(one) == [x for pair in zip(a, b, strict=True) for x in pair]
        for _ in range(5):
            run_in_threads([one.advance for one in (first, second)])
        run_in_threads([one.check_in_sync for one in (first, second)])
        assert first.step == first.algo.updates == 5
        assert first.algo.total_updates == 80


def test_another_number_of_workers_takes_the_same_sequences(
    dataset: Dataset, tmp_path: Path
) -> None:
    with workers(sequences(4), 2, dataset) as both:
        held = [rewards(one) for one in both]
        save(tmp_path, both)
    with workers(sequences(4), 1, None) as (one,):
        assert load_checkpoint(one, verified(tmp_path, print)) == []
        rows = [held[k % 4 // 2][k // 4 * 2 + k % 2] for k in range(12)]
        assert rewards(one) == rows
        conditioning = one.policy.config.conditioning
        assert conditioning is not None
        assert conditioning.target_return == 12015.0


def save(run: Path, trainers: list[Trainer]) -> None:
    facts = {"step": trainers[0].step, "world_size": len(trainers), "reset_seed_bits": 31}
    calls: list[Callable[[], None]] = [
        partial(
            save_checkpoint, run, t.world, shard_of(t), t.learner_state(), facts, t.policy.files()
        )
        for t in trainers
    ]
    run_in_threads(calls)


def test_another_number_of_workers_takes_the_same_rows(dataset: Dataset, tmp_path: Path) -> None:
    with workers(training(num_envs=4), 1, dataset) as (one,):
        save(tmp_path, [one])
    with workers(training(num_envs=4), 2, None) as both:
        for trainer in both:
            assert load_checkpoint(trainer, verified(tmp_path, print)) == []
        assert rewards(both[0]) == [0.0, 1.0, 4.0, 1000.0, 2000.0, 2001.0]
        assert rewards(both[1]) == [2.0, 3.0, 1001.0, 1002.0, 2002.0, 2003.0]


@pytest.mark.parametrize(
    "config",
    [
        training(td3_bc_config(**SMALL)),
        training(bc_config(batch_size=6)),
        training(iql_config(**SMALL)),
        training(bcq_config(**SMALL)),
        sequences(),
        training(decision_config(), 1, dropping()),
    ],
)
def test_resumed_it_is_the_uninterrupted_run(
    config: Config, dataset: Dataset, tmp_path: Path
) -> None:
    """A resume equals the uninterrupted run to the bit, without reading the dataset again."""
    task = task_for(INVERTED_PENDULUM)
    with closing(Trainer(config, task, dataset=dataset)) as whole:
        rows = list(whole.epochs())
    assert [(row["step"], row["updates"]) for row in rows] == [(60, 60), (80, 80)]
    with closing(Trainer(config, task, dataset=dataset)) as first:
        while first.step < 50:
            first.advance()
        save(tmp_path, [first])
    torch.rand(3)
    with closing(Trainer(config, task)) as second:
        assert load_checkpoint(second, verified(tmp_path, print)) == []
        rest = list(second.epochs())
    assert second.world is ALONE
    mine, theirs = second.learner_state(), whole.learner_state()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert [row["eval_return"] for row in rest] == [row["eval_return"] for row in rows]
    assert not torch.equal(first.algo.actor_optimizer.flat, whole.algo.actor_optimizer.flat)


def test_a_slope_that_moves_is_evaluated_where_it_was(dataset: Dataset, tmp_path: Path) -> None:
    """A run stopped before an evaluation evaluates with the slope of its last update."""
    made, task = sequences(), task_for(INVERTED_PENDULUM)
    assert made.actor.neuron is not None
    neuron = replace(
        made.actor.neuron, surrogate="triangle", surrogate_slope=1.0, surrogate_slope_end=8.0
    )
    config = replace(made, actor=replace(made.actor, neuron=neuron))
    with closing(Trainer(config, task, dataset=dataset)) as first:
        while not first.evaluation_due():
            first.advance()
        save(tmp_path, [first])
        row = next(first.epochs())
    with closing(Trainer(config, task)) as second:
        assert load_checkpoint(second, verified(tmp_path, print)) == []
        assert next(second.epochs())["window_fraction"] == row["window_fraction"]


def test_workers_of_bcq_stay_the_same(dataset: Dataset) -> None:
    """Weights are the same, although each worker draws its own proposals."""
    with workers(training(bcq_config(**SMALL), num_envs=2), 2, dataset) as both:
        run_in_threads([one.advance for one in both])
        run_in_threads([one.check_in_sync for one in both])
        first, second = (one.algo.generator.get_state() for one in both)
        assert not torch.equal(first, second)
        assert both[0].algo.updates == 50


def test_memory_is_the_datasets(dataset: Dataset) -> None:
    """Memory is needed for the dataset's transitions, not for one per update."""
    config = training()
    many = replace(config, run=replace(config.run, total_steps=10**15))
    assert least_bytes(many, dataset.task) == least_bytes(config, dataset.task)


@pytest.mark.parametrize(
    ("step", "settings", "expected"),
    [
        (0, {}, 50),
        (50, {}, 10),  # to the epoch's end at 60
        (60, {}, 20),  # to the run's end
        (0, {"recalibration_interval": 20}, 20),
        (20, {"recalibration_interval": 30}, 10),
        (0, {"spike_cost": 1.0, "spike_cost_start": 41}, 40),  # the cost begins with update 41
        (40, {"spike_cost": 1.0, "spike_cost_start": 41}, 10),
    ],
)
def test_how_many_updates_are_made_at_once(
    step: int, settings: dict[str, Any], expected: int, dataset: Dataset
) -> None:
    plain = training()
    normed = replace(care_bn_config([8]), **{"recalibration_interval": None, **settings})
    with workers(training(actor=replace(plain.actor, actor=normed)), 1, dataset) as (one,):
        one.progress.step = step
        assert one.steps_ahead() == expected


def stopped(trainer: Trainer) -> None:
    """Train with a SIGTERM pending from the start."""
    assert list(trainer.epochs(stop_signal=lambda: 15)) == []


@pytest.mark.parametrize(
    ("made", "updates"),
    [(training(td3_bc_config(**SMALL, norm_interval=1000), 2), 50), (sequences(2), 1)],
    ids=["td3_bc", "transformer"],
)
@pytest.mark.parametrize("size", [1, 2])
def test_how_many_updates_a_signal_waits_for(
    size: int, made: Config, updates: int, dataset: Dataset
) -> None:
    """It does not depend on algo.norm_interval, as the normaliser stays fixed; epochs have 60."""
    with workers(made, size, dataset) as those:
        run_in_threads([partial(stopped, t) for t in those])
        assert [(one.step, one.stopping) for one in those] == [(updates, 15)] * size
