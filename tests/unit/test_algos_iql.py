"""IQL against numbers worked by hand, and against the update in plain PyTorch."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from builders import fill, iql_config, popsan, twin_critic
from plain import average, cut, dense, descend, doubled, flat, float64, q_networks, transitions
from plain import values as values_of
from threads import run_in_threads, worlds
from torch import Tensor
from torch.nn import functional

from spikerl.algos.iql import IQL
from spikerl.models.actor import Actor, MLPActor
from spikerl.models.actor_config import MLPConfig
from spikerl.types import Batch


def network(kind: str = "dense", act_dim: int = 2, hidden: int = 8) -> Actor:
    torch.manual_seed(3)
    if kind == "spiking":
        return popsan(3, act_dim, [hidden])
    return MLPActor(3, act_dim, MLPConfig(name="mlp", hidden_sizes=[hidden], lr=1e-3))


def learner(actor: Actor, **settings: Any) -> IQL:
    parts = {key: settings.pop(key) for key in ("world", "weight") if key in settings}
    torch.manual_seed(4)
    hidden = settings.setdefault("critic_hidden_sizes", [8])
    critic = twin_critic(3, actor.act_dim, hidden)
    generator = torch.Generator().manual_seed(0)
    config = iql_config(**settings)
    return IQL(actor, critic, config, actor_lr=1e-3, generator=generator, **parts)


@pytest.mark.parametrize(
    ("beta", "weights"),
    # min Q' - V is 2 and -1; the weights are exp(2 beta) and exp(-beta), clipped at 100.
    [(0.0, [1.0, 1.0]), (0.5, [2.718282, 0.606531]), (3.0, [100.0, 0.049787])],
)
def test_losses_by_hand(beta: float, weights: list[float]) -> None:
    actor = network(act_dim=1, hidden=1)
    fill(actor, {"layers.1.weight_IN": [[0.0]], "layers.1.bias_N": [0.0]})
    made = learner(actor, beta=beta, expectile=0.75, critic_lr=1e-12, critic_hidden_sizes=[1])
    first = {"weights_CIN.0": [[[1.0], [0.0], [0.0], [0.0]]] * 2, "biases_C1N.0": [[[0.0]]] * 2}
    # Q_1 = s, Q_2 = 2 s + 1 for an observation s; the smaller of the two target values is 3 s - 1.
    fill(
        made.critic,
        first | {"weights_CIN.1": [[[1.0]], [[2.0]]], "biases_C1N.1": [[[0.0]], [[1.0]]]},
    )
    last = {"weights_CIN.1": [[[3.0]], [[3.0]]], "biases_C1N.1": [[[5.0]], [[-1.0]]]}
    fill(made.critic_target, first | last)
    state = {"weights_CIN.0": [[[1.0], [0.0], [0.0]]], "biases_C1N.0": [[[0.0]]]}
    fill(made.value, state | {"weights_CIN.1": [[[0.0]]], "biases_C1N.1": [[[0.0]]]})
    obs = torch.tensor([[1.0, 0.0, 0.0], [0.0] * 3])  # V = 0 everywhere, min Q' = 2 and -1
    act, rew, half = torch.tensor([[1.0], [-0.5]]), torch.tensor([1.0, 2.0]), torch.full((2,), 0.5)
    (found,) = made.run_updates(Batch(obs, act, rew, obs, rew > 1.5, half), 1)
    assert float(found["value_loss"]) == pytest.approx((0.75 * 4.0 + 0.25 * 1.0) / 2)
    assert float(found["imitation_weight"]) == pytest.approx(sum(weights) / 2, rel=1e-5)
    loss = (weights[0] * 1.0 + weights[1] * 0.25) / 2  # the policy's action is 0
    assert float(found["actor_loss"]) == pytest.approx(loss, rel=1e-5)
    # y = r, as V = 0. Errors of Q_1, Q_2: (1 - 1)^2 and (3 - 1)^2; then (0 - 2)^2 and (1 - 2)^2.
    assert float(found["critic_loss"]) == pytest.approx((0.0 + 4.0) / 2 + (4.0 + 1.0) / 2)
    assert float(found["q_mean"]) == pytest.approx((1.0 + 3.0 + 0.0 + 1.0) / 4)


def expectile_loss(excess: Tensor, expectile: float) -> Tensor:
    return (expectile * excess.relu() ** 2 + (1.0 - expectile) * (-excess).relu() ** 2).mean()


def test_updates_are_those_of_plain_pytorch() -> None:
    """Losses and weights of five updates agree in float64."""
    with float64():
        made = doubled(learner(network()))
        assert isinstance(made.actor, MLPActor)
        actor, critic, value = dense(made.actor), q_networks(made.critic), q_networks(made.value)
        target = deepcopy(critic)
        nets = {"actor": actor, "critic": critic, "value": value}
        adams = {k: torch.optim.Adam(net.parameters(), lr=1e-3) for k, net in nets.items()}
        for batch in cut(transitions(5 * 8, torch.float64), 8):
            (found,) = made.run_updates(batch, 1)
            q = values_of(target, batch.obs, batch.act).min(0).values.detach()
            value_loss = expectile_loss(q - values_of(value, batch.obs)[0], 0.7)
            descend(value_loss, adams["value"])
            weight = torch.exp(3.0 * (q - values_of(value, batch.obs)[0])).clamp(max=100.0).detach()
            squares = (torch.tanh(actor(batch.obs)) - batch.act) ** 2
            actor_loss = (weight[:, None] * squares).mean()
            descend(actor_loss, adams["actor"])
            ahead = batch.discount * values_of(value, batch.next_obs)[0].detach()
            y = batch.rew + torch.where(batch.terminated, 0.0, ahead)
            q1, q2 = values_of(critic, batch.obs, batch.act)
            critic_loss = functional.mse_loss(q1, y) + functional.mse_loss(q2, y)
            descend(critic_loss, adams["critic"])
            average(target, critic, 0.005)
            for name, loss in (
                ("value", value_loss),
                ("actor", actor_loss),
                ("critic", critic_loss),
            ):
                assert float(found[f"{name}_loss"]) == pytest.approx(loss.item(), rel=1e-5)
        for name, net in nets.items():
            torch.testing.assert_close(made.optimizers[name].flat, flat(net), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(made.targets["critic"], flat(target), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["dense", "spiking"])
def test_two_workers_are_one_with_both_batches(kind: str) -> None:
    whole = learner(network(kind))
    both = [learner(network(kind), world=world, weight=0.5) for world in worlds(2)]
    rows = transitions(16, torch.float32)
    for _ in range(3):
        (alone,) = whole.run_updates(rows, 1)
        parts = zip(both, cut(rows, 8), strict=True)
        found = run_in_threads([partial(own.run_updates, part, 1) for own, part in parts])
        for name in ("value_loss", "actor_loss", "critic_loss"):
            each = [float(one[0][name]) for one in found]
            assert each == pytest.approx([float(alone[name])] * 2, rel=1e-4)
    assert whole.optimizers.keys() == {"critic", "actor", "value"}
    for name in whole.optimizers:
        first, second = (own.optimizers[name].flat for own in both)
        assert torch.equal(first, second)
        torch.testing.assert_close(first, whole.optimizers[name].flat, rtol=1e-4, atol=1e-5)
