"""What each worker of a run has of its own, and what is shared out between them.

Shape legend   W workers, N environments.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import INVERTED_PENDULUM, small_config
from threads import run_in_threads, worlds
from torch import Tensor
from trainers import Workers
from transitions_env import COUNTER, get_attr

from spikerl.config.build import Config
from spikerl.distributed.world import World
from spikerl.runs.checkpoint import verified
from spikerl.seeding import generator_for, seed_for
from spikerl.training.evaluator import Evaluator
from spikerl.training.trainer import batch_share

W, N = 3, 6


def config(**settings: Any) -> Config:
    own = {"num_envs": N, "seed": 7, "total_steps": 600, "replay_capacity": 300}
    return small_config(**({"env": COUNTER} | own | settings))


@pytest.fixture
def workers() -> Iterator[Workers]:
    with closing(Workers(config(), W)) as made:
        yield made


def apart(tensors: list[Tensor]) -> bool:
    return not any(torch.equal(a, b) for a, b in combinations(tensors, 2))


def test_every_environment_of_a_run_has_a_seed_of_its_own(workers: Workers) -> None:
    """Environment i of N is the same one, however many workers there are."""

    def seeds() -> list[list[int]]:
        return [own for t in workers.trainers for own in get_attr(t.envs, "seeds")]

    assert seeds() == [[seed_for(7, "env", i)] for i in range(N)]
    for trainer in workers.trainers:
        trainer.reset_envs(100)
    assert seeds() == [[seed_for(7, "env", i), seed_for(7, "env", i, 100)] for i in range(N)]
    with closing(Workers(config(), 2)) as two:
        assert [own for t in two.trainers for own in get_attr(t.envs, "seeds")] == [
            [seed_for(7, "env", i)] for i in range(N)
        ]


def test_every_worker_has_streams_of_its_own(workers: Workers) -> None:
    for name in ("explore", "sample", "update"):
        states = [trainer.streams.state()[name] for trainer in workers.trainers]
        for rank, state in enumerate(states):
            assert torch.equal(state, generator_for(7, name, rank).get_state()), (name, rank)
        assert apart(states)
    assert all(trainer.algo.generator is trainer.streams.update for trainer in workers.trainers)


def test_workers_begin_with_the_weights_of_the_seed(workers: Workers) -> None:
    first = workers.first.algo.actor_optimizer.flat
    assert all(torch.equal(t.algo.actor_optimizer.flat, first) for t in workers.trainers)
    torch.rand(3)  # whatever the process drew before
    for seed, same in ((7, True), (8, False)):
        with closing(Workers(config(seed=seed), 1)) as other:
            assert torch.equal(other.first.algo.actor_optimizer.flat, first) == same


@pytest.mark.parametrize("random_steps", [0, 10**6])
def test_workers_explore_apart(random_steps: int) -> None:
    """Its first actions are drawn from a worker's own stream, at random or as noise."""
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
        sample, learn = trainer.replay.sample, trainer.algo.learn  # type: ignore[attr-defined]

        def sampling(count: int, generator: torch.Generator, *rest: Any, own: Any = trainer,
                     sample: Any = sample) -> Any:  # fmt: skip
            copy = torch.Generator()
            copy.set_state(own.streams.sample.get_state())
            index = torch.randint(own.replay.size, (count,), generator=copy)
            drawn.append((own.world.rank, index))
            return sample(count, generator, *rest)

        def learning(rows: Any, count: int, rank: int = rank, learn: Any = learn) -> Any:
            learned.append((rank, rows.rew))
            return learn(rows, count)

        monkeypatch.setattr(trainer.replay, "sample", sampling)
        monkeypatch.setattr(trainer.algo, "learn", learning)
    workers.train(54)  # the first updates are of step 50
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
def test_the_episodes_of_an_evaluation_are_shared_out(episodes: int) -> None:
    """Worker i mod W runs episode i, from its seed; all get the results of one process."""
    with closing(Workers(config(), 1)) as one, closing(Evaluator(COUNTER, episodes, 7)) as alone:
        policy = one.first.policy
        expected = alone.run(policy, 4)
    evaluators = [Evaluator(COUNTER, episodes, 7, world) for world in worlds(W)]
    found = run_in_threads([lambda e=e: e.run(policy, 4) for e in evaluators])  # type: ignore[misc]
    for rank, evaluator in enumerate(evaluators):
        mine = range(rank, episodes, W)
        seeds = [seed for env in evaluator.envs for seed in env.unwrapped.seeds]  # type: ignore[attr-defined]
        assert seeds == [seed_for(7, "eval", 4, i) for i in mine]
        evaluator.close()
    for evaluation in found:
        assert (evaluation.returns, evaluation.lengths) == (expected.returns, expected.lengths)
        assert evaluation.activity is not None
        assert expected.activity is not None
        assert evaluation.activity.samples == expected.activity.samples
        assert evaluation.activity.layers == pytest.approx(expected.activity.layers)


def test_a_checkpoint_gives_each_worker_back_what_is_its_own(tmp_path: Path) -> None:
    """Rows, environments, streams and what waits to be merged; to as many workers as wrote it."""
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
            mine, written = ours.shard(), theirs.shard()
            assert json.dumps(mine.notes) == json.dumps(written.notes)
            assert mine.tensors.keys() == written.tensors.keys()
            for name, tensor in written.tensors.items():
                assert torch.equal(mine.tensors[name], tensor), name
        for name in ("explore", "sample", "update"):
            assert apart([t.streams.state()[name] for t in new.trainers])


def test_episodes_of_all_workers_make_a_rows_mean(workers: Workers) -> None:
    """Every finished episode counts once, whichever worker it ended on."""
    for trainer in workers.trainers:
        trainer.progress.returns = [float(trainer.world.rank)] * (trainer.world.rank + 1)
        trainer.progress.sums = {"critic_loss": (float(trainer.world.rank), 1)}
    rows = run_in_threads([trainer.row for trainer in workers.trainers])
    assert all(row["train_episodes"] == 6 for row in rows)
    assert all(row["train_return"] == (0.0 + 2 * 1.0 + 3 * 2.0) / 6 for row in rows)
    assert all(row["critic_loss"] == 1.0 for row in rows)
