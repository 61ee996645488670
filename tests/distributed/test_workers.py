"""Several workers compared with one: gradients, parameters, normaliser, evaluation."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from builders import small_config, td3_config, twin_critic
from spawn import run_workers
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from spikerl.algos.base import Guard, Optimizer
from spikerl.algos.td3 import TD3
from spikerl.distributed.world import World, share
from spikerl.envs.make import make_env, task_of
from spikerl.errors import NonFinite
from spikerl.models.actor import MLPActor
from spikerl.models.actor_config import MLPConfig
from spikerl.models.normalizer import RunningNorm
from spikerl.training.trainer import Trainer, fingerprint
from spikerl.types import Batch


def global_batch(rows: int) -> Batch:
    g = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    done = torch.arange(rows) % 3 == 0
    discount = torch.full((rows,), 0.9, dtype=torch.float64)
    act = draw(rows, 2).clamp(-1, 1)
    return Batch(draw(rows, 3), act, draw(rows), draw(rows, 3), done, discount)


def learner(world: World, weight: float) -> TD3:
    torch.manual_seed(0)
    actor = MLPActor(3, 2, MLPConfig(name="mlp", hidden_sizes=[8], lr=1e-3), dtype=torch.float64)
    return TD3(
        actor.double(),
        twin_critic(3, 2, [8], torch.float64).double(),
        td3_config(target_noise=0.0, policy_delay=1),
        actor_lr=1e-3,
        generator=torch.Generator(),
        world=world,
        weight=weight,
    )


def gradients_equal_one_process(world: World, rows: int) -> None:
    """Gradients and losses are those of the whole batch in one process, also for uneven shares."""
    alone = learner(World(), 1.0)
    start = sum(share(rows, r, world.size) for r in range(world.rank))
    mine = slice(start, start + share(rows, world.rank, world.size))
    shared = learner(world, (mine.stop - mine.start) / rows)
    whole = global_batch(rows)
    part = Batch(*(field[mine] for field in whole))
    for _ in range(3):
        expected, got = alone.run_updates(whole, 1)[0], shared.run_updates(part, 1)[0]
        for name in ("critic_loss", "actor_loss"):
            torch.testing.assert_close(got[name], expected[name], rtol=1e-12, atol=0.0)
        for ours, theirs in (
            (shared.critic_optimizer, alone.critic_optimizer),
            (shared.actor_optimizer, alone.actor_optimizer),
        ):
            error = torch.linalg.vector_norm(ours.gradient.vector - theirs.gradient.vector)
            assert error <= 1e-12 * torch.linalg.vector_norm(theirs.gradient.vector)


def gradients_equal_ddp(world: World) -> None:
    """With equal shares, as DistributedDataParallel weighs all workers equally."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    wrapped = DistributedDataParallel(copy.deepcopy(module))
    rows = global_batch(4 * world.size)
    mine = slice(4 * world.rank, 4 * world.rank + 4)
    (wrapped(rows.obs[mine]).squeeze(1) - rows.rew[mine]).square().mean().backward()
    expected = torch.cat([p.grad.flatten() for p in wrapped.parameters() if p.grad is not None])
    guard = Guard("cpu", scales_loss=False)
    step = Optimizer(module, 1e-3, guard, world=world, weight=1.0 / world.size)
    step.gradient.differentiate(
        (module(rows.obs[mine]).squeeze(1) - rows.rew[mine]).square().mean()
    )
    step.step()
    torch.testing.assert_close(step.gradient.vector[:-1], expected, rtol=1e-12, atol=1e-14)


def a_bad_worker_masks_all(world: World) -> None:
    td3 = learner(world, 1.0 / world.size)
    before = td3.critic_optimizer.flat.detach().clone()
    rows = global_batch(4)
    td3.run_updates(rows._replace(rew=rows.rew * float("nan")) if world.rank == 1 else rows, 1)
    assert torch.equal(td3.critic_optimizer.flat.detach(), before)
    with pytest.raises(NonFinite, match="update 0:"):
        td3.check()


def normaliser_merges_exactly(world: World) -> None:
    rng = np.random.default_rng(3)
    norm = RunningNorm(4, 3.0)
    everything = []
    for _ in range(3):
        rows = rng.normal(5.0, 2.0, (world.size, 7, 4))
        norm.add(rows[world.rank][: 7 - world.rank])  # each worker adds another number of rows
        norm.merge([part.numpy() for part in world.gather(torch.from_numpy(norm.collect()))])
        everything += [rows[r][: 7 - r] for r in range(world.size)]
    seen = np.concatenate(everything)
    assert norm.count == len(seen)
    np.testing.assert_allclose(norm.mean_O, seen.mean(0), rtol=1e-13)
    np.testing.assert_allclose(norm.var_O, seen.var(0), rtol=1e-12)
    digests = world.gather(torch.stack([fingerprint(t) for t in norm.state().values()]))
    assert all(torch.equal(digest, digests[0]) for digest in digests)


def training_stays_identical(world: World) -> None:
    """After 210 updates on a real task, all workers have the same bits; if one bit differs, the
    trainer's own check raises.
    """
    training = small_config(num_envs=4, total_steps=240, steps_per_epoch=120, learning_starts=40)
    env = make_env(training.env)
    trainer = Trainer(training, task_of(env), world=world)
    rows = list(trainer.epochs())
    assert trainer.algo.updates == 210
    assert [row["step"] for row in rows] == [120, 240]
    state = [*trainer.algo.state().values(), *trainer.norm.state().values()]
    digests = world.gather(torch.stack([fingerprint(t) for t in state]))
    assert all(torch.equal(digest, digests[0]) for digest in digests)
    assert all(other == rows for other in world.gather_objects(rows))
    obs = world.gather_objects(trainer.replay.rows[: trainer.replay.size].tolist())
    assert len(obs[0]) == 240 // world.size
    if world.size > 1:
        assert obs[0] != obs[1]  # workers see different data
        if world.rank == 1:
            trainer.norm.mean_O[0] = np.nextafter(trainer.norm.mean_O[0], np.inf)
        with pytest.raises(RuntimeError, match="workers 0 and 1 have diverged"):
            trainer.check_in_sync()
    trainer.close()


def everything(world: World) -> None:
    gradients_equal_one_process(world, 10)
    gradients_equal_one_process(world, world.size)
    if world.size > 1:
        gradients_equal_ddp(world)
        a_bad_worker_masks_all(world)
    normaliser_merges_exactly(world)
    training_stays_identical(world)


SLOW = [pytest.param(size, marks=pytest.mark.slow) for size in (1, 4)]


@pytest.mark.parametrize("world_size", [2, *SLOW])
def test_workers(world_size: int) -> None:
    run_workers(everything, world_size)


@pytest.mark.parametrize(
    ("total", "size", "shares"), [(100, 8, [13] * 4 + [12] * 4), (3, 4, [1, 1, 1, 0]), (5, 1, [5])]
)
def test_shares(total: int, size: int, shares: list[int]) -> None:
    assert [share(total, rank, size) for rank in range(size)] == shares


def test_fingerprint_sees_every_bit_and_place() -> None:
    x = torch.arange(5.0)
    same = fingerprint(x)
    assert fingerprint(x.clone()) == same
    assert fingerprint(x.flip(0)) != same
    for i in range(5):
        y = x.clone()
        y.view(torch.int32)[i] ^= 1
        assert fingerprint(y) != same
