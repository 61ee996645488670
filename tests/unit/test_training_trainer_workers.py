"""What is separate for each worker of a run, and what is divided among them.

Shape legend   W workers, N environments.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from builders import INVERTED_PENDULUM, ppo_config, small_config
from threads import run_in_threads, worlds
from torch import Tensor
from trainers import Workers
from transitions_env import COUNTER, CounterEnv, get_attr

from spikerl.algos.ppo import PPO, Rows
from spikerl.config.build import Config
from spikerl.distributed.world import World
from spikerl.envs.config import EnvConfig
from spikerl.runs.checkpoint import verified
from spikerl.seeding import generator_for, seed_for
from spikerl.training import evaluator
from spikerl.training.epoch_row import Row
from spikerl.training.evaluator import Evaluator
from spikerl.training.learner import batch_share
from spikerl.training.state import shard_of
from spikerl.training.trainer import Trainer

W, N = 3, 6
PENDULUM = EnvConfig(
    name="Pendulum", version="v1", id="Pendulum-v1", max_episode_steps=5, vectorizer="sync"
)


def config(**settings: Any) -> Config:
    own = {"num_envs": N, "seed": 7, "total_steps": 600, "replay_capacity": 300}
    return small_config(**({"env": COUNTER} | own | settings))


@pytest.fixture
def workers() -> Iterator[Workers]:
    with closing(Workers(config(), W)) as made:
        yield made


def reset_seed(stream: str, *index: int) -> int:
    """The seed of an environment's reset: 31 bits, as some environments accept no more."""
    return seed_for(7, stream, *index) % 2**31


def apart(tensors: list[Tensor]) -> bool:
    return not any(torch.equal(a, b) for a, b in combinations(tensors, 2))


def test_every_environment_of_a_run_has_a_seed_of_its_own(workers: Workers) -> None:
    """Environment i of N has the same seed for any number of workers."""

    def seeds() -> list[list[int]]:
        return [own for t in workers.trainers for own in get_attr(t.envs, "seeds")]

    assert seeds() == [[reset_seed("env", i)] for i in range(N)]
    for trainer in workers.trainers:
        trainer.reset_envs(100)
    assert seeds() == [[reset_seed("env", i), reset_seed("env", i, 100)] for i in range(N)]
    with closing(Workers(config(), 2)) as two:
        assert [own for t in two.trainers for own in get_attr(t.envs, "seeds")] == [
            [reset_seed("env", i)] for i in range(N)
        ]


def test_every_worker_has_streams_of_its_own(workers: Workers) -> None:
    for name in ("explore", "sample", "update"):
        states = [trainer.streams.state()[name] for trainer in workers.trainers]
        for rank, state in enumerate(states):
            assert torch.equal(state, generator_for(7, name, rank).get_state()), (name, rank)
        assert apart(states)
    assert all(trainer.algo.generator is trainer.streams.update for trainer in workers.trainers)


def test_processor_time_is_all_workers_together(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1, 2 and 3 s are 6 s; null if one worker's checkpoint does not have its time."""
    monkeypatch.setattr("spikerl.training.trainer.Trainer.count_cpu", lambda self: None)

    def row(trainer: Trainer) -> Row:
        trainer.start_window()
        return trainer.evaluate_epoch()

    workers.train(60)
    for trainer in workers.trainers:
        trainer.progress.cpu_s = 1.0 + trainer.world.rank
    rows = run_in_threads([partial(row, trainer) for trainer in workers.trainers])
    assert [each["cpu_s"] for each in rows] == [6.0] * W
    workers.trainers[1].progress.cpu_s = None
    rows = run_in_threads([partial(row, trainer) for trainer in workers.trainers])
    assert [each["cpu_s"] for each in rows] == [None] * W


def test_workers_begin_with_the_weights_of_the_seed(workers: Workers) -> None:
    first = workers.first.algo.actor_optimizer.flat
    assert all(torch.equal(t.algo.actor_optimizer.flat, first) for t in workers.trainers)
    torch.rand(3)  # earlier draws must have no effect
    for seed, same in ((7, True), (8, False)):
        with closing(Workers(config(seed=seed), 1)) as other:
            assert torch.equal(other.first.algo.actor_optimizer.flat, first) == same


@pytest.mark.parametrize("random_steps", [0, 10**6])
def test_workers_explore_apart(random_steps: int) -> None:
    """Random actions and noise are drawn from each worker's own stream."""
    with closing(Workers(config(random_steps=random_steps, learning_starts=10**6), W)) as workers:
        workers.train(N)
        acted = []
        for rank, trainer in enumerate(workers.trainers):
            acted.append(trainer.replay.between(0, 2)[:, 4:6].clone())
            draw = generator_for(7, "explore", rank)
            if random_steps:
                expected = torch.rand((2, 2), generator=draw) * 2.0 - 1.0
            else:  # every environment begins at the same observation
                act = trainer.algo.actor(torch.zeros(2, 2), None).detach()
                expected = (act + 0.1 * torch.randn(2, 2, generator=draw)).clamp(-1.0, 1.0)
            torch.testing.assert_close(acted[-1], expected)
        assert apart(acted)


def test_workers_learn_from_rows_drawn_with_their_own_stream(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[int, Tensor]] = []
    learned: list[tuple[int, Tensor]] = []
    for rank, trainer in enumerate(workers.trainers):
        sample, run = trainer.replay.sample, trainer.algo.run_updates  # type: ignore[attr-defined]

        def sampling(count: int, generator: torch.Generator, *rest: Any, own: Any = trainer,
                     sample: Any = sample) -> Any:  # fmt: skip
            copy = torch.Generator()
            copy.set_state(own.streams.sample.get_state())
            index = torch.randint(own.replay.size, (count,), generator=copy)
            drawn.append((own.world.rank, index))
            return sample(count, generator, *rest)

        def learning(rows: Any, count: int, rank: int = rank, run: Any = run) -> Any:
            learned.append((rank, rows.rew))
            return run(rows, count)

        monkeypatch.setattr(trainer.replay, "sample", sampling)
        monkeypatch.setattr(trainer.algo, "run_updates", learning)
    workers.train(54)  # the first updates are at step 50
    assert sorted(rank for rank, _ in drawn) == [0, 1, 2]
    assert [len(index) for _, index in sorted(drawn, key=lambda pair: pair[0])] == [40, 30, 30]
    assert apart([index[:30] for _, index in drawn])
    for rank, rew in learned:
        (index,) = [index for r, index in drawn if r == rank]
        assert torch.equal(rew, workers.trainers[rank].replay.rows[index, 6])


@pytest.mark.parametrize(
    ("scaling", "rows", "weights", "batches"),
    [("strong", [4, 3, 3], [0.4, 0.3, 0.3], 1), ("weak", [10] * 3, [1 / 3] * 3, 3)],
)
def test_a_batch_is_shared_out(
    scaling: str, rows: list[int], weights: list[float], batches: int
) -> None:
    made = config(scaling=scaling, batch_size=10)
    shares = [batch_share(made, World(rank=rank, size=W)) for rank in range(W)]
    assert [count for count, _ in shares] == rows
    assert [weight for _, weight in shares] == weights
    with closing(Workers(made, W)) as workers:
        for trainer, count, weight in zip(workers.trainers, rows, weights, strict=True):
            assert (trainer.batch_size, trainer.batches) == (count, batches)
            weighed = [own.gradient.weight for own in trainer.algo.optimizers.values()]
            assert weighed == [weight] * 2


@pytest.mark.parametrize("episodes", [1, 3, 7])
def test_the_episodes_of_an_evaluation_are_shared_out(
    episodes: int, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Worker i mod W runs episode i with its seed; a Poisson encoder's stream is per worker."""
    drawn: list[int] = []
    wave = Evaluator._wave

    def noting(self: Evaluator, policy: Any, seeds: list[int], *rest: Any) -> Any:
        drawn.append(rest[0].initial_seed())
        return wave(self, policy, seeds, *rest)

    monkeypatch.setattr(Evaluator, "_wave", noting)
    for rank in range(W):
        with closing(Evaluator(COUNTER, episodes, 7, World(rank=rank, size=W))) as evaluator:
            for exchange in ("gather", "gather_objects"):
                monkeypatch.setattr(World, exchange, lambda world, part: [part])
            evaluator.run(workers.first.policy, 4)
            seeds = [seed for env in evaluator.envs for seed in counter_env(env).seeds]
            assert seeds == [reset_seed("eval", 4, i) for i in range(rank, episodes, W)]
    assert drawn == [seed_for(7, "eval", 4, rank, 0) for rank in range(min(W, episodes))]


def counter_env(env: gym.Env[Any, Any]) -> CounterEnv:
    inner = env.unwrapped
    assert isinstance(inner, CounterEnv)
    return inner


def test_all_workers_have_the_evaluation_of_one_process() -> None:
    """All have the same returns and lengths of episodes, and counts over all of them."""
    with closing(Workers(config(env=PENDULUM), 1)) as one:
        policy = one.first.policy
    with closing(Evaluator(PENDULUM, 7, 7)) as alone:
        expected = alone.run(policy, 4)
    assert len({round(ret) for ret in expected.returns}) > 3
    evaluators = [Evaluator(PENDULUM, 7, 7, world) for world in worlds(W)]
    for evaluation in run_in_threads([partial(e.run, policy, 4) for e in evaluators]):
        assert evaluation.returns == pytest.approx(expected.returns, rel=1e-4)
        assert evaluation.lengths == expected.lengths == [5] * 7
        assert evaluation.activity is not None
        assert expected.activity is not None
        assert evaluation.activity.samples == expected.activity.samples
        assert evaluation.activity.layers == pytest.approx(expected.activity.layers, abs=1e-3)
    for each in evaluators:
        each.close()


def test_a_checkpoint_gives_each_worker_back_what_is_its_own(tmp_path: Path) -> None:
    """With the same number of workers each gets its rows, environments, random streams and pending
    observations back.
    """
    made = config(env=INVERTED_PENDULUM)
    with closing(Workers(made, W)) as old, closing(Workers(made, W)) as new:
        old.train(66)
        old.save(tmp_path)
        named = verified(tmp_path, print).manifest["segments"]
        assert {Path(path).parent.name for path in named} == {f"worker_{r}_of_3" for r in range(W)}
        for t in new.trainers:
            t.streams.restart(1, 1, 1)
        new.load(tmp_path)
        assert torch.equal(new.rows(), old.rows())
        assert torch.equal(new.pending(), old.pending())
        rows = [t.replay.rows[: t.replay.size] for t in new.trainers]
        assert apart(rows)
        for ours, theirs in zip(new.trainers, old.trainers, strict=True):
            mine, written = shard_of(ours), shard_of(theirs)
            assert json.dumps(mine.notes) == json.dumps(written.notes)
            assert mine.tensors.keys() == written.tensors.keys()
            for name, tensor in written.tensors.items():
                assert torch.equal(mine.tensors[name], tensor), name
        for name in ("explore", "sample", "update"):
            assert apart([t.streams.state()[name] for t in new.trainers])


def test_episodes_of_all_workers_make_a_rows_mean(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each finished episode of any worker counts once; speeds are by the slowest one's time."""
    workers.train(N)
    for trainer in workers.trainers:
        trainer.progress.train_s = 100.0 * trainer.world.rank
        trainer.progress.returns = [float(trainer.world.rank)] * (trainer.world.rank + 1)
        update = {"critic_loss": torch.tensor(float(trainer.world.rank))}
        trainer.progress.sums = {}
        monkeypatch.setattr(trainer, "updates_due", {0: 0, N: 1}.__getitem__)
        monkeypatch.setattr(trainer.algo, "train", lambda *_, update=update: [update])
        trainer.make_updates(0)
    rows = run_in_threads([trainer.evaluate_epoch for trainer in workers.trainers])
    assert all(row["train_episodes"] == 6 for row in rows)
    assert all(row["train_return"] == (0.0 + 2 * 1.0 + 3 * 2.0) / 6 for row in rows)
    # The workers have four, three and three rows of a batch of ten.
    assert all(row["critic_loss"] == pytest.approx((3 * 1.0 + 3 * 2.0) / 10) for row in rows)
    assert all(row["env_steps_per_s"] == pytest.approx(N / 200, rel=0.1) for row in rows)


def test_all_stop_on_a_signal_that_one_received(workers: Workers) -> None:
    signals = (0, 15, 0)
    run_in_threads(
        [
            partial(t.synchronise, number)
            for t, number in zip(workers.trainers, signals, strict=True)
        ]
    )
    assert [trainer.stopping for trainer in workers.trainers] == [15] * W


def test_all_leave_an_evaluation_on_a_signal_that_one_received(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Worker 2 gets the signal at its fourth check in an evaluation. All stop, save and resume, and
    compute the same as without a stop.
    """
    monkeypatch.setattr(evaluator, "ASK_S", 0.0)
    settings = {"total_steps": 120, "steps_per_epoch": 60, "eval_episodes": 4}
    made = config(env=INVERTED_PENDULUM, **settings)

    def train(workers: Workers, stop: Callable[[], int] = lambda: 0) -> list[list[Row]]:
        signals = [lambda: 0, lambda: 0, stop]
        return run_in_threads(
            [
                partial(lambda t, signal: list(t.epochs(stop_signal=signal)), t, signal)
                for t, signal in zip(workers.trainers, signals, strict=True)
            ]
        )

    with closing(Workers(made, W)) as whole, closing(Workers(made, W)) as stopped:
        expected = train(whole)
        asked = iter(range(1, 1000))
        syncs = 60 // 10  # each also checks for a signal
        first = train(stopped, lambda: 15 * (next(asked) >= syncs + 4))
        assert next(asked) == syncs + 5
        assert first == [[]] * W
        assert [trainer.stopping for trainer in stopped.trainers] == [15] * W
        assert all(t.progress.eval_energy is not None for t in stopped.trainers)
        stopped.save(tmp_path)
        with closing(Workers(made, W)) as resumed:
            resumed.load(tmp_path)
            rest = train(resumed)
            for ours, theirs in zip(resumed.trainers, whole.trainers, strict=True):
                assert same(ours.learner_state(), theirs.learner_state())
        assert [row["step"] for row in rest[0]] == [60, 120]
        for got, wanted in zip(rest, expected, strict=True):
            assert [computed(row) for row in got] == [computed(row) for row in wanted]


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def computed(row: Row) -> Row:
    """A row without times and speeds."""
    return {k: v for k, v in row.items() if k != "cpu_s" and not k.endswith("_per_s")}


def test_a_rollout_is_what_all_workers_have_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rollout of 60 steps is 20 of each worker, which learns from all in two batches of 10."""
    rules = {"rollout_steps": 60, "norm_interval": 60, "batch_size": 30, "epochs": 1}
    made = replace(config(), algo=ppo_config(**rules, critic_hidden_sizes=[16]))
    learned: list[int] = []
    update = PPO.update

    def noting(self: PPO, rows: Rows) -> Any:
        learned.append(len(rows.ret))
        return update(self, rows)

    monkeypatch.setattr(PPO, "update", noting)
    with closing(Workers(made, W)) as workers:
        workers.train(60)
        assert [trainer.replay.size for trainer in workers.trainers] == [20] * W
    assert learned == [10] * 2 * W
