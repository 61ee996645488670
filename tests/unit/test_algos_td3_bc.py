"""TD3+BC against numbers worked by hand, and against the update as its paper's code writes it."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from builders import fill, popsan, td3_bc_config, twin_critic
from plain import (
    average,
    cut,
    dense,
    descend,
    doubled,
    flat,
    float64,
    q_networks,
    transitions,
    values,
)
from threads import run_in_threads, worlds
from torch.nn import functional

from spikerl.algos.td3_bc import TD3BC
from spikerl.models.actor import Actor, MLPActor
from spikerl.models.actor_config import MLPConfig
from spikerl.types import Batch


def network(kind: str = "dense", act_dim: int = 2, hidden: int = 8) -> Actor:
    torch.manual_seed(3)
    if kind == "spiking":
        return popsan(3, act_dim, [hidden])
    return MLPActor(3, act_dim, MLPConfig(name="mlp", hidden_sizes=[hidden], lr=1e-3))


def learner(actor: Actor, **settings: Any) -> TD3BC:
    parts = {key: settings.pop(key) for key in ("world", "weight") if key in settings}
    torch.manual_seed(4)
    critic = twin_critic(3, actor.act_dim, settings.pop("hidden", [8]))
    generator = torch.Generator().manual_seed(0)
    config = td3_bc_config(target_noise=0.0, **settings)
    return TD3BC(actor, critic, config, actor_lr=1e-3, generator=generator, **parts)


@pytest.mark.parametrize(
    ("alpha", "weight", "loss"),
    # Q_1 of the two rows is 2 and -4, so mean Q_1 = -1 and mean |Q_1| = 3; the policy's actions are
    # 0, the recorded ones 1 and -.5: (1 + .25) / 2.
    [(0.0, 0.0, 0.625), (3.0, 1.0, 1.625), (2.5, 2.5 / 3.0, 0.625 + 2.5 / 3.0)],
)
def test_actor_loss_by_hand(alpha: float, weight: float, loss: float) -> None:
    actor = network(act_dim=1, hidden=1)
    fill(actor, {"layers.1.weight_IN": [[0.0]], "layers.1.bias_N": [0.0]})
    made = learner(actor, alpha=alpha, critic_lr=1e-12, hidden=[1])
    weights = {"weights_CIN.0": [[[1.0], [0.0], [0.0], [0.0]]] * 2, "biases_C1N.0": [[[0.0]]] * 2}
    weights |= {"weights_CIN.1": [[[2.0]], [[5.0]]], "biases_C1N.1": [[[-4.0]], [[7.0]]]}
    fill(made.critic, weights)  # Q_1 = 2 relu(first entry) - 4
    obs, act = torch.tensor([[3.0, 0.0, 0.0], [0.0] * 3]), torch.tensor([[1.0], [-0.5]])
    zero = torch.zeros(2)
    (found,) = made.run_updates(Batch(obs, act, zero, obs, zero > 0, zero), 1)
    assert float(found["value_weight"]) == pytest.approx(weight)
    assert float(found["actor_loss"]) == pytest.approx(loss)
    # Gradient of the last layer's bias, the sum of 2 (0 - a) / 2: Q_1 does not depend on actions.
    assert made.actor_optimizer.gradient.slots[3].tolist() == pytest.approx([-0.5])


def test_updates_are_those_of_the_papers_code() -> None:
    """Losses and weights of seven updates agree in float64; the policy changes at every second."""
    with float64():
        made = doubled(learner(network(), alpha=2.5))
        assert isinstance(made.actor, MLPActor)
        rows = cut(transitions(7 * 8, torch.float64), 8)
        actor, critic = dense(made.actor), q_networks(made.critic)
        actor_target, critic_target = deepcopy(actor), deepcopy(critic)
        actor_adam = torch.optim.Adam(actor.parameters(), lr=1e-3)
        critic_adam = torch.optim.Adam(critic.parameters(), lr=1e-3)
        for number, batch in enumerate(rows):
            (found,) = made.run_updates(batch, 1)
            with torch.no_grad():
                next_act = torch.tanh(actor_target(batch.next_obs))
                least = values(critic_target, batch.next_obs, next_act).min(0).values
                y = batch.rew + (1.0 - batch.terminated.double()) * batch.discount * least
            q1, q2 = values(critic, batch.obs, batch.act)
            critic_loss = functional.mse_loss(q1, y) + functional.mse_loss(q2, y)
            descend(critic_loss, critic_adam)
            assert float(found["critic_loss"]) == pytest.approx(critic_loss.item(), rel=1e-5)
            if number % 2:
                assert "actor_loss" not in found
                continue
            pi = torch.tanh(actor(batch.obs))
            q = values(critic, batch.obs, pi)[0]
            actor_loss = -2.5 / q.abs().mean().detach() * q.mean()
            actor_loss = actor_loss + functional.mse_loss(pi, batch.act)
            descend(actor_loss, actor_adam)
            assert float(found["actor_loss"]) == pytest.approx(actor_loss.item(), rel=1e-5)
            average(actor_target, actor, 0.005)
            average(critic_target, critic, 0.005)
        for mine, theirs in (
            (made.actor_optimizer.flat, actor),
            (made.critic_optimizer.flat, critic),
            (made.targets["actor"], actor_target),
            (made.targets["critic"], critic_target),
        ):
            torch.testing.assert_close(mine, flat(theirs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["dense", "spiking"])
def test_two_workers_are_one_with_both_batches(kind: str) -> None:
    """The weight of the values is computed over all workers' rows, too."""
    whole = learner(network(kind))
    both = [learner(network(kind), world=world, weight=0.5) for world in worlds(2)]
    rows = transitions(16, torch.float32)
    for number in range(3):
        (alone,) = whole.run_updates(rows, 1)
        parts = zip(both, cut(rows, 8), strict=True)
        found = run_in_threads([partial(own.run_updates, part, 1) for own, part in parts])
        for name in ("actor_loss", "value_weight") if number % 2 == 0 else ():
            each = [float(one[0][name]) for one in found]
            assert each == pytest.approx([float(alone[name])] * 2, rel=1e-4)
    for name in whole.optimizers:
        first, second = (own.optimizers[name].flat for own in both)
        assert torch.equal(first, second)
        torch.testing.assert_close(first, whole.optimizers[name].flat, rtol=1e-4, atol=1e-5)
