"""SAC, soft actor-critic (Haarnoja et al., 2018, arXiv:1801.01290 and 1812.05905).

Shape legend   B batch, A action entries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spikerl.algos.base import Metrics, normal_like
from spikerl.algos.offpolicy import DelayConfig, OffPolicy, OffPolicyConfig, batches
from spikerl.errors import BadRequest
from spikerl.models.actor import Actor, MLPActor
from spikerl.models.actor_config import MLPConfig
from spikerl.models.critic import Critics
from spikerl.schema import check_sizes
from spikerl.types import Batch


@dataclass(kw_only=True)
class SACConfig(OffPolicyConfig, DelayConfig):
    temperature: float  # alpha, the weight of the entropy; if it is learned, its initial value
    learn_temperature: bool
    target_entropy: float | None  # for a learned temperature; null: minus the number of entries
    temperature_lr: float
    log_std: str  # separate: a dense network of its own; shared: further outputs of the actor
    log_std_hidden_sizes: list[int]  # of the separate network
    log_std_lr: float
    log_std_range: list[float]  # log deviations are clipped to it

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("give a value above 0", lambda x: x > 0.0, "temperature", "temperature_lr",
                   "log_std_lr")  # fmt: skip
        check_sizes("algo.log_std_hidden_sizes", self.log_std_hidden_sizes)
        self.check("give separate or shared", lambda x: x in ("separate", "shared"), "log_std")
        if self.target_entropy is not None and not self.learn_temperature:
            remedy = "is of a learned temperature; set algo.learn_temperature, or give null"
            raise BadRequest("algo.target_entropy", self.target_entropy, remedy)
        if len(self.log_std_range) != 2 or self.log_std_range[0] > self.log_std_range[1]:
            raise BadRequest("algo.log_std_range", self.log_std_range, "give [low, high]")

    def unread(self, discrete: bool) -> dict[str, str]:
        keys: dict[str, str] = {}
        if self.log_std == "shared":
            remedy = "algo.log_std=shared has no network of its own for it; leave it out"
            keys |= dict.fromkeys(("log_std_hidden_sizes", "log_std_lr"), remedy)
        if not self.learn_temperature:
            remedy = "is of a learned temperature; set algo.learn_temperature, or leave it out"
            keys["temperature_lr"] = remedy
        return keys

    def outputs(self, act_dim: int) -> int:
        return act_dim if self.log_std == "separate" else 2 * act_dim


class LogTemperature(nn.Module):
    def __init__(self, first: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor([math.log(first)], dtype=torch.float32))


class SAC(OffPolicy):
    """The policy is a squashed Gaussian: the actor gives its mean, a dense network or further
    outputs of the actor give its log deviation.
    """

    config: SACConfig
    has_graphs = True
    metrics = ("entropy", "temperature")
    policy_parts: tuple[str, ...] = ("actor", "temperature")

    def __init__(self, actor: Actor, critic: Critics, config: SACConfig, **settings: Any) -> None:
        super().__init__(actor, critic, config, **settings)
        device = self.generator.device
        self.log_std: MLPActor | None = None
        if config.log_std == "separate":
            sizes, lr = config.log_std_hidden_sizes, config.log_std_lr
            dense = MLPConfig(name="mlp", hidden_sizes=sizes, lr=lr)
            head = MLPActor(actor.obs_dim, actor.act_dim, dense, kernel=critic.kernel)
            self.log_std = head.to(device)
            self.optimizers["log_std"] = self.optimizer(self.log_std, lr)
            self.policy_parts = (*self.policy_parts, "log_std")
        self.acting_log_std = self.log_std
        self.log_temperature = LogTemperature(config.temperature).to(device)
        learned = self.optimizer(self.log_temperature, config.temperature_lr, max_grad_norm=None)
        self.optimizers["temperature"] = learned
        entries = actor.act_dim if self.log_std else actor.act_dim // 2
        given = config.target_entropy
        self.target_entropy = float(-entries) if given is None else given

    @property
    def temperature(self) -> Tensor:
        """alpha, without a gradient."""
        return self.optimizers["temperature"].flat.exp().squeeze(0)

    def update(self, rows: Batch, numbers: range) -> list[Metrics]:
        """Make the updates with these numbers, each on an equal share of the rows.

        Only the last of them may change policy, temperature and target networks, so the target
        values of all are computed first, in one pass.
        """
        alpha = self.temperature
        low, high = self.config.log_std_range

        # A policy draws a = tanh(u), u = mean + std eps with eps ~ N(0, 1), so that
        # log pi(a | s) = sum log N(u; mean, std) - log(1 - tanh(u)^2), over the entries of a.
        # y = r + gamma (1 - terminated) (min_i Q_i'(s', a') - alpha log pi(a' | s')), a' ~ pi(s')
        with torch.no_grad():
            mean, log_std = self.gaussian(self.actor, self.log_std, rows.next_obs, self.generator)
            noise = self.noise(mean)
            next_act, log_prob = self.kernel.squashed(mean, log_std, noise, low, high)
            q_target = self.critic_target.td_target(rows, next_act, -alpha * log_prob)

        metrics = []
        for number, (obs, act, y) in zip(
            numbers, batches(len(numbers), rows.obs, rows.act, q_target), strict=True
        ):
            # Critics: minimise sum_i mean (Q_i(s, a) - y)^2.
            metric = self.critic_step(obs, act, y)
            if self.is_policy_update(number):
                metric |= self.policy_step(obs, alpha)
                self.update_targets()
            self.guard.end_update()
            metrics.append(metric)
        return metrics

    def policy_step(self, obs: Tensor, alpha: Tensor) -> Metrics:
        """One step of actor and deviations, and of the temperature where it is learned."""
        c, actor_opt = self.config, self.actor_optimizer
        low, high = c.log_std_range

        # Actor: minimise mean (alpha log pi(a | s) - min_i Q_i(s, a)), a ~ pi(s). The critics give
        # the gradient with respect to a, alpha is that with respect to log pi; the chain rule takes
        # both back to mean and log std, and from there to the weights.
        output, mean_backward = self.actor.vjp(obs, self.generator, squash=False)
        if self.log_std:
            mean = output
            log_std, log_std_backward = self.log_std.vjp(obs, None, squash=False)
        else:
            mean, log_std = output.chunk(2, -1)
        noise = self.noise(mean)
        act, log_prob, sample_backward = self.kernel.squashed_vjp(mean, log_std, noise, low, high)
        by_act = self.critic.actor_loss_grad(obs, act, actor_opt.gradient, lowest=True)
        by_log_prob = (alpha * actor_opt.gradient.factor / len(obs)).expand_as(log_prob)
        by_mean, by_log_std = sample_backward(by_act, by_log_prob)
        entropy = -log_prob.mean()
        actor_opt.gradient.loss -= alpha * entropy * actor_opt.gradient.weight
        if self.log_std:
            metrics = mean_backward(by_mean, actor_opt.gradient)
            log_std_backward(by_log_std, self.optimizers["log_std"].gradient)
            self.optimizers["log_std"].step()
        else:
            metrics = mean_backward(torch.cat([by_mean, by_log_std], -1), actor_opt.gradient)
        actor_loss = actor_opt.step()
        metrics |= {"actor_loss": actor_loss, "entropy": entropy, "temperature": alpha}

        # Temperature: minimise log alpha (entropy - target entropy).
        if c.learn_temperature:
            learned = self.optimizers["temperature"]
            excess = entropy - self.target_entropy
            learned.gradient.slots[0].copy_(excess * learned.gradient.factor)
            loss = (learned.flat * excess).squeeze(0)
            learned.gradient.loss.copy_(loss * learned.gradient.weight)
            learned.step()
        return metrics

    def gaussian(
        self, actor: Actor, log_std: MLPActor | None, obs: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Mean before tanh, and log deviation before clipping."""
        output = actor(obs, generator, squash=False)
        mean, raw = (output, log_std(obs, squash=False)) if log_std else output.chunk(2, -1)
        return mean, raw

    def noise(self, like: Tensor) -> Tensor:
        return normal_like(like, self.generator)

    @torch.no_grad()
    def explore(self, obs: Tensor, generator: torch.Generator) -> Tensor:
        """Actions drawn from the policy."""
        mean, log_std = self.gaussian(self.acting, self.acting_log_std, obs, generator)
        std = log_std.clamp(*self.config.log_std_range).exp()
        return torch.tanh(mean + std * normal_like(mean, generator))

    def act_on_cpu(self, kernel: str) -> None:
        super().act_on_cpu(kernel)
        if self.log_std:
            self.acting_log_std = self.add_copy("log_std", self.log_std, kernel)
