"""TD3, twin delayed DDPG (Fujimoto et al., 2018, arXiv:1802.09477).

Values: conf/algo/td3.yaml. Differences from the paper: docs/td3.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spikerl.algos.base import CriticsConfig, Metrics
from spikerl.algos.offpolicy import DelayConfig, OffPolicy, OffPolicyConfig, batches
from spikerl.models.actor import Actor
from spikerl.models.critic import Critics
from spikerl.types import Batch


@dataclass(kw_only=True)
class SmoothingConfig(CriticsConfig):
    """Target policy smoothing."""

    target_noise: float  # std of target smoothing noise, in units of half the action range
    noise_clip: float  # bound of target smoothing noise, same unit

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("give 0 or more", lambda x: x >= 0, "target_noise", "noise_clip")


@dataclass(kw_only=True)
class TD3Config(OffPolicyConfig, DelayConfig, SmoothingConfig):
    explore_noise: float  # std of acting noise, in units of half the action range

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("give 0 or more", lambda x: x >= 0, "explore_noise")


class TD3(OffPolicy):
    config: TD3Config
    has_graphs = True

    def __init__(self, actor: Actor, critic: Critics, config: TD3Config, **settings: Any) -> None:
        super().__init__(actor, critic, config, **settings)
        self.actor_target = self.add_target("actor", actor)

    def update(self, rows: Batch, numbers: range) -> list[Metrics]:
        """Make the updates with these numbers, each on an equal share of the rows.

        Only the last of them may change the target networks (`run_updates` ensures that), so the
        target values of all are computed first, in one pass.
        """
        c, actor_opt = self.config, self.actor_optimizer

        with torch.no_grad():
            # Target policy smoothing, with eps ~ N(0, target_noise):
            # a' = clip(pi'(s') + clip(eps, -noise_clip, noise_clip), -1, 1).
            next_act = self.actor_target(rows.next_obs, self.generator)
            next_act = self.add_noise(next_act, self.generator, c.target_noise, c.noise_clip)
            # Clipped double Q-learning: y = r + gamma (1 - terminated) min_i Q_i'(s', a').
            q_target = self.critic_target.td_target(rows, next_act)

        metrics = []
        for number, (obs, act, y) in zip(
            numbers, batches(len(numbers), rows.obs, rows.act, q_target), strict=True
        ):
            # Critics: minimise sum_i mean (Q_i(s, a) - y)^2.
            metric = self.critic_step(obs, act, y)

            # Delayed policy update: minimise -mean Q_1(s, pi(s)). The kernels differentiate, not
            # autograd: the critic gives the gradient with respect to the actions, the actor takes
            # it back to its weights. Then targets <- (1 - tau) targets + tau online.
            if self.is_policy_update(number):
                act, backward = self.actor.vjp(obs, self.generator)
                grad = self.critic.actor_loss_grad(obs, act, actor_opt.gradient)
                metric |= backward(grad, actor_opt.gradient)
                metric["actor_loss"] = actor_opt.step()
                self.update_targets()

            self.guard.end_update()
            metrics.append(metric)
        return metrics

    @torch.no_grad()
    def explore(self, obs: Tensor, generator: torch.Generator) -> Tensor:
        return self.explore_with_noise(obs, generator, self.config.explore_noise)
