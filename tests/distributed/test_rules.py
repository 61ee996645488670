"""Each learning rule with two workers: gradients as in one process, and the same parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
import torch
from builders import (
    CARTPOLE,
    CUBA_LIF,
    INVERTED_PENDULUM,
    POPULATION,
    RATE,
    care_bn_config,
    popsan,
    ppo_config,
    proxy_td3_config,
    sac_config,
    small_config,
    td3_config,
)
from plain import doubled, float64, transitions
from spawn import run_workers
from torch import Tensor

from spikerl.algos.base import Learner
from spikerl.algos.ppo import PPO, Rows
from spikerl.algos.proxy_td3 import ProxyTD3
from spikerl.algos.sac import SAC
from spikerl.algos.td3 import TD3
from spikerl.distributed.world import ALONE, World
from spikerl.envs.make import make_env, task_of
from spikerl.models.actor import MLPActor, SpikingActor
from spikerl.models.actor_config import ActorConfig, MLPConfig
from spikerl.models.critic import Critics
from spikerl.models.networks import build_actor
from spikerl.training.learner import batch_share
from spikerl.training.trainer import Trainer, fingerprint
from spikerl.types import Batch

ROWS = 20  # of a batch, shared out unevenly: 11 and 9
PARTS = (slice(0, 11), slice(11, 20))
CARE_BN = ActorConfig(actor=care_bn_config([16]), encoder=POPULATION, neuron=CUBA_LIF, decoder=RATE)
CLOSE: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-13}

Updates = Callable[[Any, slice], object]


def learner(
    kind: type[Learner],
    config: Any,
    world: World,
    weight: float,
    discrete: bool = False,
    **parts: Any,
) -> Any:
    torch.manual_seed(0)
    double = torch.float64
    actor = parts.get("actor") or MLPActor(
        3, config.outputs(2), MLPConfig(name="mlp", hidden_sizes=[8], lr=1e-3), dtype=double
    )
    act_dim = 0 if kind.on_policy else 2
    critic = Critics(3, act_dim, [8], networks=config.critics, dtype=double)
    found = kind(
        actor,
        critic,
        config,
        actor_lr=1e-3,
        generator=torch.Generator(),
        world=world,
        weight=weight,
        discrete=discrete,
    )
    for part in ("log_std", "proxy"):
        if isinstance(getattr(found, part, None), MLPActor):
            getattr(found, part).dtype = double
    if isinstance(actor, SpikingActor):
        for norm in actor.norms:
            norm.sum_ = world.sum_
    return doubled(found)


def check_gradients(
    world: World, kind: type[Learner], config: Any, updates: Updates, **parts: Any
) -> None:
    """Two workers have the gradients and losses of one process after each of three updates, for all
    networks, and the same weights at the end.
    """
    mine = PARTS[world.rank]
    with float64():
        alone = learner(kind, config, ALONE, 1.0, **copy.deepcopy(parts))
        ours = learner(kind, config, world, (mine.stop - mine.start) / ROWS, **parts)
        assert len(ours.optimizers) >= 2
        for _ in range(3):
            updates(alone, slice(0, ROWS))
            updates(ours, mine)
            for name, optimizer in ours.optimizers.items():
                one, other = (o.gradient.vector for o in (optimizer, alone.optimizers[name]))
                torch.testing.assert_close(one, other, **CLOSE)
        for name, tensor in ours.state().items():
            torch.testing.assert_close(tensor, alone.state()[name], rtol=1e-9, atol=1e-12)


def replayed(learner: Any, part: slice) -> None:
    rows = transitions(ROWS, torch.float64)
    learner.run_updates(Batch(*(field[part] for field in rows)), 1)


def with_noise(learner: SAC, part: slice) -> None:
    """Update with noise that is this worker's part of the noise of the whole batch."""
    draw = torch.Generator().manual_seed(learner.updates)
    noise = lambda like: torch.randn(ROWS, 2, generator=draw)[part]  # noqa: E731
    learner.noise = noise  # type: ignore[method-assign]
    replayed(learner, part)


def of_workers(field: Tensor, world: World) -> Tensor:
    """The rows of this worker: five steps of two of the four environments."""
    mine = slice(2 * world.rank, 2 * world.rank + 2)
    return field.unflatten(0, (5, 4))[:, mine].flatten(0, 1)


def rollout_learned_as_one(world: World, discrete: bool = False, **rules: Any) -> None:
    """Normalised advantages and all gradients are those of one process with all environments."""
    with float64():
        config = ppo_config(entropy_coef=0.01, **rules)
        alone, ours = (learner(PPO, config, w, 1.0 / w.size, discrete) for w in (ALONE, world))
        batch, last = transitions(ROWS, torch.float64), torch.arange(ROWS) % 5 < 2
        whole = alone.prepare(batch, last, 4)
        part = Batch(*(of_workers(field, world) for field in batch))
        mine = ours.prepare(part, of_workers(last, world), 2)
        for one, other in zip(mine, whole, strict=True):
            torch.testing.assert_close(one, of_workers(other, world), **CLOSE)
        for _ in range(3):
            alone.update(whole)
            ours.update(mine)
            for name, optimizer in ours.optimizers.items():
                one, other = (x.gradient.vector for x in (optimizer, alone.optimizers[name]))
                torch.testing.assert_close(one, other, **CLOSE)


def all_stop_together(world: World) -> None:
    """Only rank 1's policy has moved: its ratio is exp(-10), its divergence exp(-10) + 9, so that
    the mean of both ranks is 4.5; the limit is 1.5 times target_kl, 4.35 or 4.65.
    """
    for target_kl, stops in ((2.9, True), (3.1, False)):
        ppo = learner(PPO, ppo_config(target_kl=target_kl), world, 0.5)
        n = torch.ones(4, dtype=torch.float64)
        obs, act = torch.zeros(4, 3).double(), torch.zeros(4, 2).double()
        logp = ppo.pi.log_prob(ppo.actor(obs), act).detach() + 5.0 * world.rank
        assert (ppo.update(Rows(obs, act, logp, n, n)) is None) == stops
        assert ppo.updates == (not stops)


REPLAYING: dict[str, Any] = {
    "batch_size": 10,
    "critic_hidden_sizes": [16],
    "random_steps": 30,
    "learning_starts": 30,
    "update_interval": 10,
    "norm_interval": 10,
}
POPSAN = small_config().actor
PPO_RUN: dict[str, Any] = {"rollout_steps": 60, "norm_interval": 60, "batch_size": 20}
RUNS = {
    "ppo_discrete": (ppo_config(**PPO_RUN), POPSAN),
    "ppo": (ppo_config(**PPO_RUN, target_kl=0.1), POPSAN),
    "sac": (sac_config(**REPLAYING, learn_temperature=True), POPSAN),
    "proxy_td3": (proxy_td3_config(**REPLAYING, proxy_hidden_sizes=[8]), POPSAN),
    "care_bn": (
        td3_config(**REPLAYING),
        replace(
            CARE_BN,
            actor=replace(care_bn_config([16]), recalibration_interval=40, recalibration_batches=2),
        ),
    ),
}


def trained_alike(world: World) -> None:
    """Learners have the same bits on all workers, and so have rows; their replays differ."""
    for name, (algo, actor) in RUNS.items():
        env = CARTPOLE if name == "ppo_discrete" else INVERTED_PENDULUM
        training = small_config(
            env=env, num_envs=4, total_steps=120, steps_per_epoch=60, eval_episodes=2
        )
        with closing(make_env(env)) as one:
            task = task_of(one)
        training = replace(training, algo=algo, actor=actor)
        with closing(Trainer(training, task, world=world)) as trainer:
            before = fingerprint(trainer.algo.actor_optimizer.flat)
            rows = list(trainer.epochs())
            assert rows[-1]["updates"] == trainer.algo.updates > 0
            assert all(other == rows for other in world.gather_objects(rows))
            digest = torch.stack([fingerprint(t) for t in trainer.learner_state().values()])
            assert all(torch.equal(other, digest) for other in world.gather(digest))
            assert fingerprint(trainer.algo.actor_optimizer.flat) != before
            seen = world.gather(fingerprint(trainer.replay.rows[: trainer.replay.size]))
            assert seen[0] != seen[1]


def everything(world: World) -> None:
    torch.manual_seed(0)
    popsan64 = popsan(3, 2, [8], dtype=torch.float64, spike_cost=[0.5, 2.0]).double()
    popsan64.schedule(0, 1)
    check_gradients(
        world, ProxyTD3, proxy_td3_config(target_noise=0.0, proxy_steps=1), replayed, actor=popsan64
    )
    for log_std in ("separate", "shared"):
        check_gradients(world, SAC, sac_config(log_std=log_std, learn_temperature=True), with_noise)
    normed = build_actor(CARE_BN, 3, 2, dtype=torch.float64).double()
    check_gradients(
        world, TD3, td3_config(target_noise=0.0, policy_delay=1), replayed, actor=normed
    )
    rollout_learned_as_one(world)
    rollout_learned_as_one(world, normalize_advantage="rollout", ratio="per_entry")
    rollout_learned_as_one(world, discrete=True)
    all_stop_together(world)
    trained_alike(world)


def test_two_workers() -> None:
    run_workers(everything, 2)


@pytest.mark.parametrize(
    ("config", "weights"), [(ppo_config, [0.5, 0.5]), (sac_config, [17 / 33, 16 / 33])]
)
def test_what_a_workers_rows_weigh(config: Callable[..., Any], weights: list[float]) -> None:
    """PPO's rows, of a rollout, weigh the same; SAC's are weighed by each worker's share of 33."""
    training = replace(small_config(), algo=config(batch_size=33))
    shares = [batch_share(training, World(rank=rank, size=2)) for rank in range(2)]
    assert [weight for _, weight in shares] == weights
