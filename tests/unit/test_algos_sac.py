"""SAC against its equations, written the usual way in float64."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from builders import popsan, sac_config
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
from torch import Tensor
from torch.distributions import Normal

from spikerl.algos.sac import SAC
from spikerl.kernels import build as native
from spikerl.models.actor import Actor, MLPActor
from spikerl.models.actor_config import MLPConfig
from spikerl.models.critic import Critics
from spikerl.types import Batch

CPU = f"cpu/{native.supported_paths()[0]}"
LOW, HIGH = -0.15, 0.05  # bounds of log deviations; an untrained network exceeds both


def learner(
    kind: str = "dense", dtype: torch.dtype = torch.float64, kernel: str = "reference", **given: Any
) -> SAC:
    own = {"tau": 0.1, "log_std_range": [LOW, HIGH], "log_std_hidden_sizes": [12]}
    config = sac_config(**(own | given))
    torch.manual_seed(0)
    outputs = config.outputs(2)
    actor: Actor = popsan(3, outputs, [16, 12], dtype=dtype)
    if kind == "dense":
        layers = MLPConfig(name="mlp", hidden_sizes=[16, 12], lr=1e-3)
        actor = MLPActor(3, outputs, layers, dtype=dtype)
    else:
        actor.kernel = kernel
    critic = Critics(3, 2, [24, 16], dtype=dtype, kernel=kernel)
    generator = torch.Generator().manual_seed(0)
    sac = SAC(actor, critic, config, actor_lr=2e-3, generator=generator)
    if sac.log_std:
        sac.log_std.dtype = dtype
    return doubled(sac) if dtype == torch.float64 else sac


class Usual:
    """A network, an optimiser and a loss for each of its parts."""

    def __init__(self, ours: SAC) -> None:
        self.c = c = ours.config
        self.pi = copy.deepcopy(ours.actor)
        self.head = dense(ours.log_std) if ours.log_std else None
        self.q = q_networks(ours.critic)
        self.q_target = copy.deepcopy(self.q)
        self.log_alpha = torch.tensor([math.log(c.temperature)], requires_grad=True)
        self.draw = torch.Generator().manual_seed(0)
        self.q_adam = torch.optim.Adam(self.q.parameters(), lr=1e-3)
        self.pi_adam = [torch.optim.Adam(self.pi.parameters(), lr=2e-3)]
        if self.head:
            self.pi_adam.append(torch.optim.Adam(self.head.parameters(), lr=c.log_std_lr))
        self.alpha_adam = torch.optim.Adam([self.log_alpha], lr=c.temperature_lr)

    def sample(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        output = self.pi(obs, squash=False)
        mean, log_std = (output, self.head(obs)) if self.head else (output[:, :2], output[:, 2:])
        gaussian = Normal(mean, log_std.clamp(LOW, HIGH).exp())
        u = mean + gaussian.scale * torch.randn(
            mean.shape, generator=self.draw, dtype=torch.float32
        )
        act = torch.tanh(u)
        return act, (gaussian.log_prob(u) - torch.log(1.0 - act**2)).sum(1)

    def update(self, b: Batch) -> dict[str, float]:
        losses = self.critic_step(b, self.targets(b)) | self.policy_step(b)
        average(self.q_target, self.q, self.c.tau)
        return losses

    @torch.no_grad()
    def targets(self, b: Batch) -> Tensor:
        act, logp = self.sample(b.next_obs)
        soft = values(self.q_target, b.next_obs, act).min(0).values - self.alpha() * logp
        return b.rew + 0.9 * (1.0 - b.terminated.float()) * soft

    def critic_step(self, b: Batch, y: Tensor) -> dict[str, float]:
        q1, q2 = values(self.q, b.obs, b.act)
        critic_loss = ((q1 - y) ** 2).mean() + ((q2 - y) ** 2).mean()
        descend(critic_loss, self.q_adam, max_norm=self.c.max_grad_norm)
        return {
            "critic_loss": critic_loss.item(),
            "q_mean": (q1.mean().item() + q2.mean().item()) / 2.0,
        }

    def policy_step(self, b: Batch) -> dict[str, float]:
        alpha = self.alpha()
        act, logp = self.sample(b.obs)
        actor_loss = (alpha * logp - values(self.q, b.obs, act).min(0).values).mean()
        descend(actor_loss, *self.pi_adam, max_norm=self.c.max_grad_norm)
        if self.c.learn_temperature:
            wanted = -2.0 if self.c.target_entropy is None else self.c.target_entropy
            price = -(self.log_alpha * (logp.detach() + wanted)).mean()
            descend(price, self.alpha_adam, max_norm=None)  # only gradients of networks are clipped
        return {
            "actor_loss": actor_loss.item(),
            "entropy": -logp.mean().item(),
            "temperature": alpha,
        }

    def alpha(self) -> float:
        return self.log_alpha.exp().item()

    def lengths(self) -> list[float]:
        adams = [self.q_adam, *self.pi_adam, *[self.alpha_adam] * self.c.learn_temperature]
        return [length(adam) for adam in adams]

    def weights(self) -> dict[str, Tensor]:
        found = {"critic": self.q, "target": self.q_target, "actor": self.pi, "log_std": self.head}
        weights = {name: flat(net) for name, net in found.items() if net is not None}
        return {**weights, "temperature": self.log_alpha.detach()}


def lengths(sac: SAC) -> list[float]:
    """Norms of the gradients of the last update."""
    steppers = [
        sac.critic_optimizer,
        sac.actor_optimizer,
        *([sac.optimizers["log_std"]] if sac.log_std else []),
    ]
    steppers += [sac.optimizers["temperature"]] * sac.config.learn_temperature
    return [stepper.gradient.vector[:-1].norm().item() for stepper in steppers]


def weights(sac: SAC) -> dict[str, Tensor]:
    state = sac.state()
    names = ("critic", "actor", "log_std", "temperature")
    found = {n: state[f"{n}.weights"] for n in names if f"{n}.weights" in state}
    return {**found, "target": state["target.critic"]}


RULES: dict[str, dict[str, Any]] = {
    "fixed": {},
    "learned": {"learn_temperature": True, "temperature_lr": 0.01},
    "towards": {"learn_temperature": True, "temperature_lr": 0.01, "target_entropy": 1.5},
    "shared": {"log_std": "shared", "learn_temperature": True},
    "clipped": {"learn_temperature": True, "max_grad_norm": 0.05},
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ["spiking", "dense"])
def test_six_updates_are_the_usual_ones(kind: str, rule: str) -> None:
    """Each update's losses and gradients agree, and all parameters after the first and the last."""
    with float64():
        ours, rows = learner(kind, **RULES[rule]), transitions(6 * 32, torch.float64)
        usual = Usual(ours)
        for number, batch in enumerate(cut(rows, 32)):
            expected, found = usual.update(batch), ours.run_updates(batch, 1)[0]
            assert {k: float(v) for k, v in found.items()} == pytest.approx(expected, rel=1e-6)
            assert lengths(ours) == pytest.approx(usual.lengths(), rel=1e-5)
            if number in (0, 5):
                theirs = usual.weights()
                assert weights(ours).keys() == theirs.keys()
                for name, tensor in weights(ours).items():
                    torch.testing.assert_close(tensor, theirs[name], rtol=1e-6, atol=1e-8)
        assert ours.updates == 6
        ours.check()


@pytest.mark.parametrize("kind", ["spiking", "dense"])
def test_a_delayed_policy(kind: str) -> None:
    """Policy, temperature and target networks change only on the third and sixth update, so the
    targets of each round of three updates are computed together.
    """
    with float64():
        rule: dict[str, Any] = {"policy_delay": 3, "first_policy_update": 2}
        ours = learner(kind, **rule, learn_temperature=True, temperature_lr=0.01)
        rows, usual = transitions(6 * 32, torch.float64), Usual(ours)
        expected = []
        for of_a_round in cut(rows, 3 * 32):
            y = usual.targets(of_a_round)
            for i, batch in enumerate(cut(of_a_round, 32)):
                expected.append(usual.critic_step(batch, y[32 * i : 32 * (i + 1)]))
            expected[-1] |= usual.policy_step(batch)
            average(usual.q_target, usual.q, usual.c.tau)
        found = [{k: float(v) for k, v in m.items()} for m in ours.run_updates(rows, 6)]
        assert found == [pytest.approx(losses, rel=1e-6) for losses in expected]
        for name, tensor in weights(ours).items():
            torch.testing.assert_close(tensor, usual.weights()[name], rtol=1e-6, atol=1e-8)


def test_the_kernels_updates_are_the_definitions() -> None:
    for rule in ("learned", "shared"):
        plain, ours = (
            learner("spiking", torch.float32, k, **RULES[rule]) for k in ("reference", CPU)
        )
        rows = transitions(4 * 32, torch.float32)
        for one, other in zip(ours.run_updates(rows, 4), plain.run_updates(rows, 4), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        for name, tensor in weights(ours).items():
            torch.testing.assert_close(tensor, weights(plain)[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("log_std", ["separate", "shared"])
@pytest.mark.parametrize("kind", ["spiking", "dense"])
def test_a_copy_that_explores_draws_from_the_policy(kind: str, log_std: str) -> None:
    """Actions are tanh(mean + std noise) before and after learning; `act_on_cpu` makes the copy."""
    sac = learner(kind, torch.float32, log_std=log_std)
    rows = transitions(4 * 32, torch.float32)
    sac.act_on_cpu(CPU)
    found = []
    for _ in range(2):
        noise = torch.randn(128, 2, generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            output = sac.actor(rows.obs, squash=False)
            given = sac.log_std(rows.obs, squash=False) if sac.log_std else None
            mean, raw = output.chunk(2, 1) if given is None else (output, given)
        expected = torch.tanh(mean + raw.clamp(LOW, HIGH).exp() * noise)
        assert (raw < LOW).any()
        assert (raw > HIGH).any()
        found.append(sac.explore(rows.obs, torch.Generator().manual_seed(3)))
        torch.testing.assert_close(found[-1], expected, rtol=0, atol=1e-5)
        sac.run_updates(rows, 4)
    assert float((found[0] - found[1]).abs().max()) > 1e-3


@pytest.mark.parametrize("log_std", ["separate", "shared"])
def test_a_warm_up_leaves_mean_deviation_and_temperature(log_std: str) -> None:
    with float64():
        settings: dict[str, Any] = {"critic_warmup": 2, "learn_temperature": True}
        sac = learner(**settings, log_std=log_std)
        before = {name: own.flat.clone() for name, own in sac.optimizers.items()}
        rows = transitions(24, torch.float64)
        sac.run_updates(Batch(*(field[:16] for field in rows)), 2)
        after = {name: own.flat for name, own in sac.optimizers.items()}
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == {"critic"}
        sac.run_updates(Batch(*(field[16:] for field in rows)), 1)
        assert not any(torch.equal(before[name], own.flat) for name, own in sac.optimizers.items())
