"""TD3 with a proxy target against its equations, written the usual way in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from builders import CUBA_LIF, POPULATION, RATE, care_bn_config, popsan, proxy_td3_config
from plain import (
    average,
    cut,
    dense,
    descend,
    doubled,
    flat,
    float64,
    length,
    q_networks,
    transitions,
    values,
)
from torch import Tensor, nn

from spikerl.algos.proxy_td3 import ProxyTD3
from spikerl.algos.replay import Replay, Sampler
from spikerl.kernels import build as native
from spikerl.kernels import reference
from spikerl.kernels.gradient import Gradient
from spikerl.kernels.nets import DenseNet
from spikerl.models.actor import Actor, MLPActor
from spikerl.models.actor_config import ActorConfig, MLPConfig
from spikerl.models.critic import Critics
from spikerl.models.networks import build_actor
from spikerl.types import Batch

CPU = f"cpu/{native.supported_paths()[0]}"
ROWS = 32  # rows of a batch


def learner(
    kind: str = "spiking",
    dtype: torch.dtype = torch.float64,
    kernel: str = "reference",
    **given: Any,
) -> ProxyTD3:
    own = {"tau": 0.1, "proxy_hidden_sizes": [12, 8], "proxy_lr": 3e-3}
    torch.manual_seed(0)
    actor: Actor = popsan(3, 2, [16, 12], dtype=dtype)
    if kind == "dense":
        actor = MLPActor(3, 2, MLPConfig(name="mlp", hidden_sizes=[16], lr=1e-3), dtype=dtype)
    else:
        actor.kernel = kernel
    critic = Critics(3, 2, [24, 16], dtype=dtype, kernel=kernel)
    generator = torch.Generator().manual_seed(0)
    config = proxy_td3_config(**(own | given))
    td3 = ProxyTD3(actor, critic, config, actor_lr=2e-3, generator=generator)
    td3.proxy.dtype = dtype
    return doubled(td3) if dtype == torch.float64 else td3


class Usual:
    """A network, an optimiser and a loss for each of its parts."""

    def __init__(self, ours: ProxyTD3) -> None:
        self.c = ours.config
        self.pi, self.proxy = copy.deepcopy(ours.actor), dense(ours.proxy)
        self.q = q_networks(ours.critic)
        self.q_target = copy.deepcopy(self.q)
        self.draw = torch.Generator().manual_seed(0)
        self.q_adam = torch.optim.Adam(self.q.parameters(), lr=1e-3)
        self.pi_adam = torch.optim.Adam(self.pi.parameters(), lr=2e-3)
        self.proxy_adam = torch.optim.Adam(self.proxy.parameters(), lr=3e-3)

    def update(self, number: int, batches: list[Batch]) -> dict[str, float]:
        imitation = []
        for b in batches:
            error = torch.tanh(self.proxy(b.obs)) - self.pi(b.obs).detach()
            imitation.append((error**2).mean())
            descend(imitation[-1], self.proxy_adam)
        b = batches[-1]
        with torch.no_grad():
            noise = (0.2 * torch.randn(ROWS, 2, generator=self.draw, dtype=torch.float32)).clamp(
                -0.5, 0.5
            )
            act = (torch.tanh(self.proxy(b.next_obs)) + noise).clamp(-1.0, 1.0)
            y = (
                b.rew
                + 0.9
                * (1.0 - b.terminated.float())
                * values(self.q_target, b.next_obs, act).min(0).values
            )
        q = values(self.q, b.obs, b.act)
        critic_loss = ((q - y) ** 2).mean(1).sum()
        descend(critic_loss, self.q_adam)
        found = {
            "proxy_loss": torch.stack(imitation).mean().item(),
            "critic_loss": critic_loss.item(),
            "q_mean": q.mean().item(),
        }
        if number % 2 == self.c.first_policy_update:
            actor_loss = -values(self.q, b.obs, self.pi(b.obs))[0].mean()
            descend(actor_loss, self.pi_adam)
            average(self.q_target, self.q, self.c.tau)
            found["actor_loss"] = actor_loss.item()
        return found


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("kind", ["spiking", "dense"])
def test_six_updates_are_the_usual_ones(kind: str, steps: int, first: int) -> None:
    """Each update takes K batches: the proxy learns from all, critics and actor from the last.

    Six updates in one call, and in six calls, agree with plain PyTorch.
    """
    with float64():
        rules: dict[str, Any] = {"proxy_steps": steps, "first_policy_update": first}
        batched, alone = learner(kind, **rules), learner(kind, **rules)
        usual, rows = Usual(batched), transitions(6 * steps * ROWS, torch.float64)
        found = batched.run_updates(rows, 6)
        each = cut(rows, steps * ROWS)
        for number, batch in enumerate(each):
            expected = pytest.approx(usual.update(number, cut(batch, ROWS)), rel=1e-6)
            assert {k: float(v) for k, v in found[number].items()} == expected
            assert {k: float(v) for k, v in alone.run_updates(batch, 1)[0].items()} == expected
        nets: dict[str, nn.Module] = {"critic": usual.q, "actor": usual.pi, "proxy": usual.proxy}
        weights = {f"{name}.weights": flat(net) for name, net in nets.items()}
        weights["target.critic"] = flat(usual.q_target)
        adams = [usual.q_adam, usual.pi_adam, usual.proxy_adam]
        for ours in (batched, alone):
            ours.check()
            assert ours.updates == 6
            for name, tensor in weights.items():
                torch.testing.assert_close(ours.state()[name], tensor, rtol=1e-6, atol=1e-8)
            steppers = (ours.critic_optimizer, ours.actor_optimizer, ours.optimizers["proxy"])
            lengths = [stepper.gradient.vector[:-1].norm().item() for stepper in steppers]
            assert lengths == pytest.approx([length(adam) for adam in adams], rel=1e-5)


def test_the_kernels_updates_are_the_definitions() -> None:
    plain, ours = (learner(dtype=torch.float32, kernel=kernel) for kernel in ("reference", CPU))
    rows = transitions(4 * 3 * ROWS, torch.float32)
    for one, other in zip(ours.run_updates(rows, 4), plain.run_updates(rows, 4), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    for name, tensor in plain.state().items():
        torch.testing.assert_close(ours.state()[name], tensor, rtol=1e-3, atol=1e-4)


def test_there_is_no_target_actor_and_no_averaged_proxy() -> None:
    names = set(learner().state())
    kept = {"weights", "step", "exp_avg", "exp_avg_sq"}
    assert {n for n in names if n.startswith("proxy.")} == {f"proxy.{part}" for part in kept}
    assert {n for n in names if n.startswith("target.")} == {"target.critic"}


def test_it_imitates_what_acts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proxy's goals are the actions with CaRe-BN's running moments, not with the batch's."""
    torch.manual_seed(0)
    parts = ActorConfig(
        actor=care_bn_config([16]), encoder=POPULATION, neuron=CUBA_LIF, decoder=RATE
    )
    actor, generator = build_actor(parts, 3, 2), torch.Generator().manual_seed(0)
    td3 = ProxyTD3(
        actor, Critics(3, 2, [8]), proxy_td3_config(), actor_lr=1e-3, generator=generator
    )
    for seed in range(3):  # so that the moments differ from their start
        td3.run_updates(transitions(3 * ROWS, torch.float32, seed), 1)
    rows = transitions(3 * ROWS, torch.float32, 3)
    with torch.no_grad():
        expected = actor(rows.obs)
    goals: list[Tensor] = []
    imitate = reference.mse_backward

    def noting(net: DenseNet, obs: Tensor, goal: Tensor, into: Gradient) -> None:
        goals.append(goal.clone())
        imitate(net, obs, goal, into)

    monkeypatch.setattr(reference, "mse_backward", noting)
    td3.run_updates(rows, 1)
    assert torch.equal(torch.cat(goals), expected)


def test_a_burst_draws_its_batches_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each update takes K = 3 batches, and one draw at most 64: 21, 21 and 8 updates."""
    td3, replay = learner("dense", torch.float32), Replay(100, 3, 2)
    rows = [field.numpy() for field in transitions(100, torch.float32)]
    obs, act, rew, next_obs, terminated, _ = rows
    replay.add(obs, act, rew, next_obs, terminated, terminated, 0.9)
    drawn: list[int] = []
    sample = replay.sample

    def noting(count: int, *args: Any) -> Batch:
        drawn.append(count)
        return sample(count, *args)

    monkeypatch.setattr(replay, "sample", noting)
    found = td3.train(Sampler(replay, torch.Generator(), lambda x: x), 50, 8)
    assert drawn == [21 * 3 * 8, 21 * 3 * 8, 8 * 3 * 8]
    assert td3.updates == len(found) == 50
    assert int(td3.optimizers["proxy"].moments.step) == 150


def test_in_a_warm_up_the_proxy_learns_too() -> None:
    """While the policy is fixed, the proxy learns to imitate it, and the critics learn."""
    with float64():
        td3 = learner("dense", critic_warmup=2, proxy_steps=1)
        before = {name: own.flat.clone() for name, own in td3.optimizers.items()}
        td3.run_updates(transitions(16, torch.float64), 2)
        after = {name: own.flat for name, own in td3.optimizers.items()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"critic", "proxy"}
