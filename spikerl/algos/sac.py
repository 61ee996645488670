"""SAC, soft actor-critic (Haarnoja et al., 2018, arXiv:1801.01290 and 1812.05905).

Shape legend   B batch, A action entries.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spikerl.algos.base import Metrics, flatten
from spikerl.algos.offpolicy import OffPolicy, OffPolicyConfig
from spikerl.errors import BadRequest
from spikerl.models.actor import Actor, MLPActor, MLPConfig
from spikerl.schema import check_sizes
from spikerl.types import Batch


@dataclass(kw_only=True)
class SACConfig(OffPolicyConfig):
    temperature: float  # alpha, what a unit of entropy is worth; where it is learned, the first
    learn_temperature: bool
    target_entropy: float | None  # of a learned temperature; null: minus the action's entries
    temperature_lr: float
    log_std: str  # separate: a dense network of its own; shared: more outputs of the actor
    log_std_hidden_sizes: list[int]  # of the separate network
    log_std_lr: float
    log_std_range: list[float]  # log deviations are clipped to it

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("give a value above 0", lambda x: x > 0.0, "temperature", "temperature_lr",
                   "log_std_lr")  # fmt: skip
        check_sizes("algo.log_std_hidden_sizes", self.log_std_hidden_sizes)
        self.check("give separate or shared", lambda x: x in ("separate", "shared"), "log_std")
        if len(self.log_std_range) != 2 or self.log_std_range[0] > self.log_std_range[1]:
            raise BadRequest("algo.log_std_range", self.log_std_range, "give [low, high]")

    def outputs(self, act_dim: int) -> int:
        return act_dim if self.log_std == "separate" else 2 * act_dim


class LogTemperature(nn.Module):
    def __init__(self, first: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor([math.log(first)]))


def squashed(mean_BA: Tensor, log_std_BA: Tensor, noise_BA: Tensor) -> tuple[Tensor, Tensor]:
    """a = tanh(u) with u = mean + std noise, and log pi(a), (B,).

    log pi(a) = sum log N(u; mean, std) - log(1 - tanh(u)^2), the last in a form that does not
    overflow: 2 (log 2 - u - softplus(-2 u)).
    """
    u = mean_BA + log_std_BA.exp() * noise_BA
    normal = -0.5 * noise_BA.square() - log_std_BA - 0.5 * math.log(2.0 * math.pi)
    slope = 2.0 * (math.log(2.0) - u - nn.functional.softplus(-2.0 * u))
    return torch.tanh(u), (normal - slope).sum(-1)


class SAC(OffPolicy):
    """A squashed Gaussian whose mean is the actor's; two critics; entropy has a price."""

    config: SACConfig
    metrics = ("entropy", "temperature")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        c, actor, device = self.config, self.actor, self.generator.device
        self.head: MLPActor | None = None
        if c.log_std == "separate":
            dense = MLPConfig(name="mlp", hidden_sizes=c.log_std_hidden_sizes, lr=c.log_std_lr)
            self.head = MLPActor(actor.obs_dim, actor.act_dim, dense).to(device)
            self.step_head = self.stepper(self.head, c.log_std_lr)
        self.acting_head = self.head
        self.log_temperature = LogTemperature(c.temperature).to(device)
        self.step_temperature = self.stepper(self.log_temperature, c.temperature_lr)
        entries = actor.act_dim if self.head else actor.act_dim // 2
        given = c.target_entropy
        self.target_entropy = float(-entries) if given is None else given

    def between_moves(self, rows: Batch, update: int, updates: int) -> list[Metrics]:
        q_target = rows.td_target(self.next_value(rows.next_obs))
        return [self.step(rows.obs, rows.act, q_target)]

    @property
    def temperature(self) -> Tensor:
        """alpha, without a gradient."""
        return self.step_temperature.flat.exp().squeeze(0)

    @torch.no_grad()
    def next_value(self, next_obs: Tensor) -> Tensor:
        """Soft value of what the present policy does: the lower target critic and the entropy."""
        mean, log_std = self.gaussian(self.actor, self.head, next_obs, self.generator)
        act, logp = squashed(mean, log_std, self.noise(mean))
        return self.critic_target(next_obs, act).amin(0) - self.temperature * logp

    def step(self, obs: Tensor, act: Tensor, q_target: Tensor) -> Metrics:
        critic, actor = self.step_critic, self.step_actor
        q_mean = self.critic.critic_backward(obs, act, q_target, critic.gradient)
        metrics = {"critic_loss": critic(), "q_mean": q_mean}

        output, pull = self.actor.vjp(obs, self.generator, False)
        if self.head:
            raw, pull_head = self.head.vjp(obs, None, False)
        else:
            output, raw = output.chunk(2, -1)
        mean, raw = output.detach().requires_grad_(), raw.detach().requires_grad_()
        act, logp = squashed(mean, raw.clamp(*self.config.log_std_range), self.noise(mean))
        # The loss is mean(alpha log pi(a) - min Q(s, a)); the critics tell its slope by a.
        by_act = self.critic.dq_da(obs, act.detach(), actor.gradient, True)
        by_logp = (self.temperature * actor.gradient.factor / len(obs)).expand_as(logp)
        by_mean, by_raw = torch.autograd.grad((act, logp), (mean, raw), (by_act, by_logp))
        entropy = -logp.detach().mean()
        actor.gradient.loss -= self.temperature * entropy * actor.gradient.weight
        if self.head:
            pull(by_mean, actor.gradient)
            pull_head(by_raw, self.step_head.gradient)
            self.step_head()
        else:
            pull(torch.cat([by_mean, by_raw], -1), actor.gradient)
        metrics |= {"actor_loss": actor(), "entropy": entropy, "temperature": self.temperature}
        if self.config.learn_temperature:
            self.price(entropy)
        self.polyak(self.critic_target_flat, critic.flat)
        self.guard.close()
        return metrics

    def price(self, entropy: Tensor) -> None:
        """A step of the temperature, whose loss is log alpha (entropy - target entropy)."""
        gradient = self.step_temperature.gradient
        excess = entropy - self.target_entropy
        gradient.slots[0].copy_(excess * gradient.factor)
        gradient.loss.copy_((self.step_temperature.flat * excess).squeeze(0) * gradient.weight)
        self.step_temperature()

    def gaussian(
        self, actor: Actor, head: MLPActor | None, obs: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Mean and log deviation before tanh."""
        mean = actor.mean(obs, generator)
        mean, raw = (mean, head.mean(obs)) if head else mean.chunk(2, -1)
        return mean, raw.clamp(*self.config.log_std_range)

    def noise(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator, device=like.device)

    def parts(self) -> dict[str, dict[str, Tensor]]:
        parts = {**super().parts(), "temperature": self.step_temperature.state()}
        return {**parts, "log_std": self.step_head.state()} if self.head else parts

    @torch.no_grad()
    def explore(self, obs: Tensor, generator: torch.Generator) -> Tensor:
        """Actions drawn from the policy."""
        mean, log_std = self.gaussian(self.acting, self.acting_head, obs, generator)
        noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        return squashed(mean, log_std, noise)[0]

    def act_on_cpu(self, kernel: str) -> None:
        super().act_on_cpu(kernel)
        if self.head:
            self.acting_head = copy.deepcopy(self.head).cpu().requires_grad_(False)
            self.acting_head_flat = flatten(self.acting_head)

    def refresh(self) -> None:
        super().refresh()
        if self.acting_head is not self.head:
            self.acting_head_flat.copy_(self.step_head.flat)
