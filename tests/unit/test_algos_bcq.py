"""BCQ against numbers worked by hand, and against the update as its paper's code writes it."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from math import atanh
from typing import Any

import pytest
import torch
from builders import bcq_config, fill, popsan, twin_critic
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
from torch import Tensor
from torch.nn import functional

from spikerl.algos.bcq import BCQ
from spikerl.models.actor import Actor, MLPActor
from spikerl.models.actor_config import MLPConfig
from spikerl.types import Batch


def network(kind: str = "dense", obs_dim: int = 3, act_dim: int = 2, hidden: int = 8) -> Actor:
    torch.manual_seed(3)
    if kind == "spiking":
        return popsan(obs_dim + act_dim, act_dim, [hidden])
    config = MLPConfig(name="mlp", hidden_sizes=[hidden], lr=1e-3)
    return MLPActor(obs_dim + act_dim, act_dim, config)


def learner(actor: Actor, **settings: Any) -> BCQ:
    parts = {key: settings.pop(key) for key in ("world", "weight") if key in settings}
    torch.manual_seed(4)
    hidden = settings.setdefault("critic_hidden_sizes", [8])
    critic = twin_critic(actor.obs_dim - actor.act_dim, actor.act_dim, hidden)
    generator = torch.Generator().manual_seed(0)
    return BCQ(actor, critic, bcq_config(**settings), actor_lr=1e-3, generator=generator, **parts)


@pytest.mark.parametrize(
    ("phi", "critic_loss", "actor_loss", "slope"),
    [
        # The VAE proposes .5; the actor changes it by phi .4, the target actor by phi .2.
        # a = .7, Q_1 = 2 a - 1 = .4; by the last bias its slope is dQ_1/da phi (1 - .4^2) = .84.
        # a' = .6: Q' = 1.2 and 1.6, weighted .75 and .25: 1.3; y = 1 + .5 1.3 = 1.65, and 2.
        (0.5, (1.65**2 + 1.0) / 2 + 0.15**2 / 2, -0.4, -0.84),
        # a = 1.3 is clipped to 1, so the slope is 0; a' = .9: Q' = 1.8 and 1.9, weighted 1.825.
        (2.0, (1.9125**2 + 1.0) / 2 + 0.4125**2 / 2, -1.0, 0.0),
    ],
)
def test_losses_by_hand(phi: float, critic_loss: float, actor_loss: float, slope: float) -> None:
    actor = network(obs_dim=1, act_dim=1, hidden=1)
    last = {"layers.1.weight_IN": [[0.0]]}
    fill(actor, last | {"layers.1.bias_N": [atanh(0.4)]})
    one = {"vae_hidden_sizes": [1], "critic_hidden_sizes": [1]}
    made = learner(actor, phi=phi, critic_lr=1e-12, vae_lr=1e-12, **one)
    fill(made.actor_target, {"layers.1.bias_N": [atanh(0.2)]})
    fill(made.vae.decoder, last | {"layers.1.bias_N": [atanh(0.5)]})
    zeros = {"layers.1.weight_IN": [[0.0] * 4]}
    fill(made.vae.encoder, zeros | {"layers.1.bias_N": [0.3, -0.1, 0.2, -5.0]})  # -5: clipped to -4
    relu = {"weights_CIN.0": [[[0.0], [1.0]]] * 2, "biases_C1N.0": [[[0.0]]] * 2}  # of the action
    ends = {"weights_CIN.1": [[[2.0]], [[1.0]]]}
    fill(made.critic, relu | ends | {"biases_C1N.1": [[[-1.0]], [[1.0]]]})
    fill(made.critic_target, relu | ends | {"biases_C1N.1": [[[0.0]], [[1.0]]]})
    obs, act, rew = (
        torch.tensor([[3.0], [1.0]]),
        torch.tensor([[0.5], [1.0]]),
        torch.tensor([1.0, 2]),
    )
    (found,) = made.run_updates(Batch(obs, act, rew, obs, rew > 1.5, torch.full((2,), 0.5)), 1)
    # Errors (.5 - .5)^2, (.5 - 1)^2; m^2 + s^2 - 1 - log s^2 of (m, s) = (.3, e^.2), (-.1, e^-4).
    divergence = (0.09 + 1.4918247 - 1.4 + 0.01 + 0.00033546 + 7.0) / 2
    assert float(found["vae_loss"]) == pytest.approx(0.125 + 0.25 * divergence, rel=1e-5)
    assert float(found["critic_loss"]) == pytest.approx(critic_loss, rel=1e-5)
    assert float(found["actor_loss"]) == pytest.approx(actor_loss, rel=1e-5)
    assert made.actor_optimizer.gradient.slots[3].tolist() == pytest.approx([slope], abs=1e-5)
    # Q_1 and Q_2 are 0 and 1.5 of the first row, 1 and 2 of the second.
    assert float(found["q_mean"]) == pytest.approx(4.5 / 4)


def test_updates_are_those_of_the_papers_code() -> None:
    """Losses and weights of five updates agree in float64, with the same random draws."""
    with float64():
        made = doubled(learner(network(), phi=0.3, tau=0.1))
        assert isinstance(made.actor, MLPActor)
        actor, critic = dense(made.actor), q_networks(made.critic)
        encoder, decoder = dense(made.vae.encoder), dense(made.vae.decoder)
        actor_target, critic_target = deepcopy(actor), deepcopy(critic)
        adams = [torch.optim.Adam(net.parameters(), lr=1e-3) for net in (actor, critic)]
        vae_adam = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-3)
        draw = torch.Generator().manual_seed(0)

        def noise(count: int) -> Tensor:
            return torch.randn(count, 4, generator=draw, dtype=torch.float32).double()

        def decode(obs: Tensor, z: Tensor | None = None) -> Tensor:
            z = noise(len(obs)).clamp(-0.5, 0.5) if z is None else z
            return torch.tanh(decoder(torch.cat([obs, z], 1)))

        def perturb(net: torch.nn.Module, obs: Tensor, act: Tensor) -> Tensor:
            return (act + 0.3 * torch.tanh(net(torch.cat([obs, act], 1)))).clamp(-1, 1)

        for batch in cut(transitions(5 * 8, torch.float64), 8):
            (found,) = made.run_updates(batch, 1)
            mean, log_std = encoder(torch.cat([batch.obs, batch.act], 1)).chunk(2, 1)
            std = log_std.clamp(-4, 15).exp()
            recon = decode(batch.obs, mean + std * noise(8))
            kl = -0.5 * (1 + torch.log(std**2) - mean**2 - std**2).mean()
            vae_loss = functional.mse_loss(recon, batch.act) + 0.5 * kl
            descend(vae_loss, vae_adam)
            with torch.no_grad():
                ahead = torch.repeat_interleave(batch.next_obs, 3, 0)
                q1, q2 = values(critic_target, ahead, perturb(actor_target, ahead, decode(ahead)))
                q = 0.75 * torch.min(q1, q2) + 0.25 * torch.max(q1, q2)
                q = q.reshape(8, -1).max(1).values
                y = batch.rew + (1.0 - batch.terminated.double()) * batch.discount * q
            q1, q2 = values(critic, batch.obs, batch.act)
            critic_loss = functional.mse_loss(q1, y) + functional.mse_loss(q2, y)
            descend(critic_loss, adams[1])
            with torch.no_grad():
                sampled = decode(batch.obs)
            acts = perturb(actor, batch.obs, sampled)
            actor_loss = -values(critic, batch.obs, acts)[0].mean()
            descend(actor_loss, adams[0])
            average(actor_target, actor, 0.1)
            average(critic_target, critic, 0.1)
            losses = {"vae_loss": vae_loss, "critic_loss": critic_loss, "actor_loss": actor_loss}
            for name, loss in losses.items():
                assert float(found[name]) == pytest.approx(loss.item(), rel=1e-5)
        for mine, theirs in (
            (made.optimizers["vae"].flat, torch.cat([flat(encoder), flat(decoder)])),
            (made.actor_optimizer.flat, flat(actor)),
            (made.critic_optimizer.flat, flat(critic)),
            (made.targets["actor"], flat(actor_target)),
            (made.targets["critic"], flat(critic_target)),
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["dense", "spiking"])
def test_two_workers_are_one_with_both_batches(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise is replaced by functions of the input, since workers otherwise draw their own."""

    def proposed(decoder: MLPActor, obs: Tensor, generator: torch.Generator) -> Tensor:
        turn = torch.arange(len(obs)).unsqueeze(1) % 3  # number of the proposal for its observation
        act: Tensor = decoder(torch.cat([obs, torch.sin(turn + obs[:, :1]).expand(-1, 4)], 1))
        return act

    monkeypatch.setattr("spikerl.algos.bcq.proposed", proposed)
    monkeypatch.setattr("spikerl.algos.bcq.normal_like", lambda like, generator: torch.sin(like))
    whole = learner(network(kind))
    both = [learner(network(kind), world=world, weight=0.5) for world in worlds(2)]
    first = transitions(18, torch.float32)
    for _ in range(3):
        (alone,) = whole.run_updates(first, 1)
        parts = zip(both, cut(first, 9), strict=True)
        found = run_in_threads([partial(own.run_updates, part, 1) for own, part in parts])
        for name in ("vae_loss", "actor_loss", "critic_loss"):
            each = [float(one[0][name]) for one in found]
            assert each == pytest.approx([float(alone[name])] * 2, rel=1e-4)
    assert whole.optimizers.keys() == {"critic", "actor", "vae"}
    for name in whole.optimizers:
        one, other = (own.optimizers[name].flat for own in both)
        assert torch.equal(one, other)
        torch.testing.assert_close(one, whole.optimizers[name].flat, rtol=1e-4, atol=1e-5)
