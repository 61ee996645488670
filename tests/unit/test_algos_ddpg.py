"""DDPG against an independent implementation written the usual way."""

from __future__ import annotations

import copy

import pytest
import torch
from builders import ddpg_config, popsan
from plain import average, cut, descend, q_networks, transitions, values
from torch import Tensor, nn

from spikerl.algos.ddpg import DDPG
from spikerl.kernels import build as native
from spikerl.models.actor import Actor, MLPActor
from spikerl.models.actor_config import MLPConfig
from spikerl.models.critic import Critics
from spikerl.types import Batch

KERNELS = ["reference", f"cpu/{native.supported_paths()[0]}"]


def made(kind: str) -> Actor:
    torch.manual_seed(0)
    if kind == "spiking":
        return popsan(3, 2, [16, 12])
    return MLPActor(3, 2, MLPConfig(name="mlp", hidden_sizes=[16, 12], lr=1e-3))


def learner(kind: str, kernel: str) -> DDPG:
    torch.manual_seed(1)
    actor, critic = made(kind), Critics(3, 2, [24, 16], networks=1, kernel=kernel)
    generator = torch.Generator().manual_seed(0)
    return DDPG(actor, critic, ddpg_config(tau=0.1), actor_lr=1e-3, generator=generator)


def usual(ours: DDPG, batches: list[Batch]) -> tuple[list[float], list[float], list[Tensor]]:
    """Plain PyTorch updates, one batch after the other; the losses, and the actor's weights."""
    q, pi = q_networks(ours.critic), copy.deepcopy(ours.actor)
    q_target, pi_target = copy.deepcopy(q), copy.deepcopy(pi)
    q_adam = torch.optim.Adam(q.parameters(), lr=1e-3)
    pi_adam = torch.optim.Adam(pi.parameters(), lr=1e-3)
    critic_losses, actor_losses = [], []
    for b in batches:
        with torch.no_grad():
            (following,) = values(q_target, b.next_obs, pi_target(b.next_obs))
            y = b.rew + 0.9 * (1.0 - b.terminated.float()) * following
        loss = nn.functional.mse_loss(values(q, b.obs, b.act)[0], y)
        descend(loss, q_adam)
        actor_loss = -values(q, b.obs, pi(b.obs)).mean()
        descend(actor_loss, pi_adam)
        average(q_target, q, 0.1)
        average(pi_target, pi, 0.1)
        critic_losses.append(loss.item())
        actor_losses.append(actor_loss.item())
    return critic_losses, actor_losses, list(pi.parameters())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", ["spiking", "dense"])
def test_six_updates_are_the_usual_ones(kind: str, kernel: str) -> None:
    ours = learner(kind, kernel)
    if kind == "spiking":
        ours.actor.kernel = ours.actor_target.kernel = kernel
    everything = transitions(6 * 32, torch.float32)
    critic_losses, actor_losses, weights = usual(ours, cut(everything, 32))
    found = ours.run_updates(everything, 6)
    assert ours.updates == 6
    assert [float(m["critic_loss"]) for m in found] == pytest.approx(critic_losses, rel=1e-4)
    assert [float(m["actor_loss"]) for m in found] == pytest.approx(actor_losses, rel=1e-3)
    for p, other in zip(ours.actor.parameters(), weights, strict=True):
        torch.testing.assert_close(p, other, rtol=1e-3, atol=1e-4)
    ours.check()


def test_its_targets_are_not_smoothed() -> None:
    ours = learner("dense", "reference")
    before = ours.generator.get_state()
    ours.run_updates(transitions(8, torch.float32), 1)
    assert torch.equal(ours.generator.get_state(), before)  # no noise was drawn


@pytest.mark.parametrize("kind", ["spiking", "dense"])
def test_a_copy_that_explores_has_the_actors_weights(kind: str) -> None:
    """On a GPU run a copy of the actor explores on the CPU; here both are on the CPU."""
    ours, plain = learner(kind, "reference"), learner(kind, "reference")
    ours.act_on_cpu(KERNELS[1])
    assert ours.acting is not ours.actor
    obs = transitions(5, torch.float32).obs

    def explored(ddpg: DDPG) -> Tensor:
        return ddpg.explore(obs, torch.Generator().manual_seed(3))

    first = explored(ours)
    torch.testing.assert_close(first, explored(plain), rtol=0, atol=1e-6)
    for ddpg in (ours, plain):
        ddpg.run_updates(transitions(4 * 32, torch.float32), 4)
    torch.testing.assert_close(explored(ours), explored(plain), rtol=0, atol=1e-6)
    assert not torch.equal(explored(ours), first)
    (copied,) = ours.copies.values()
    assert torch.equal(copied, ours.actor_optimizer.flat)
    assert copied.data_ptr() != ours.actor_optimizer.flat.data_ptr()
    ours.actor_optimizer.flat.zero_()  # as when a checkpoint is loaded
    ours.refresh()
    assert not copied.any()
