"""TD3+BC: TD3 on a dataset, with an actor that also imitates the dataset's actions (Fujimoto and
Gu, 2021, arXiv:2106.06860).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from spikerl.algos.base import Metrics
from spikerl.algos.bc import add_imitation
from spikerl.algos.offpolicy import (
    DelayConfig,
    OfflineConfig,
    OffPolicy,
    TargetConfig,
    batches,
)
from spikerl.algos.td3 import SmoothingConfig
from spikerl.models.actor import Actor
from spikerl.models.critic import Critics
from spikerl.types import Batch


@dataclass(kw_only=True)
class TD3BCConfig(OfflineConfig, TargetConfig, DelayConfig, SmoothingConfig):
    alpha: float  # weight of the critic's value against imitation; 0: imitation alone

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("give 0 or more", lambda x: x >= 0.0, "alpha")


class TD3BC(OffPolicy):
    config: TD3BCConfig
    metrics = ("value_weight",)

    def __init__(self, actor: Actor, critic: Critics, config: TD3BCConfig, **settings: Any) -> None:
        super().__init__(actor, critic, config, **settings)
        self.actor_target = self.add_target("actor", actor)

    def update(self, rows: Batch, numbers: range) -> list[Metrics]:
        """Make the updates with these numbers, each on an equal share of the rows.

        Only the last of them may change the target networks, so the target values of all are
        computed first, in one pass.
        """
        c, actor_opt = self.config, self.actor_optimizer

        with torch.no_grad():
            # a' = clip(pi'(s') + clip(eps, -noise_clip, noise_clip), -1, 1), eps ~ N(0,
            # target_noise); y = r + gamma (1 - terminated) min_i Q_i'(s', a').
            next_act = self.actor_target(rows.next_obs, self.generator)
            next_act = self.add_noise(next_act, self.generator, c.target_noise, c.noise_clip)
            q_target = self.critic_target.td_target(rows, next_act)

        metrics = []
        for number, (obs, act, y) in zip(
            numbers, batches(len(numbers), rows.obs, rows.act, q_target), strict=True
        ):
            # Critics: minimise sum_i mean (Q_i(s, a) - y)^2.
            metric = self.critic_step(obs, act, y)

            # Delayed policy update: minimise -lambda mean Q_1(s, pi(s)) + mean (pi(s) - a)^2,
            # where lambda = alpha / mean |Q_1(s, pi(s))| has no gradient.
            if self.is_policy_update(number):
                pi, backward = self.actor.vjp(obs, self.generator)
                with torch.no_grad():
                    size = self.critic(obs, pi)[0].abs().mean() * actor_opt.gradient.weight
                    self.world.sum_(size)  # over the rows of all workers
                    value_weight = c.alpha / size
                grad = self.critic.actor_loss_grad(obs, pi, actor_opt.gradient) * value_weight
                actor_opt.gradient.loss *= value_weight
                grad += add_imitation(pi, act, actor_opt.gradient)
                metric |= backward(grad, actor_opt.gradient)
                metric |= {"actor_loss": actor_opt.step(), "value_weight": value_weight}
                self.update_targets()

            self.guard.end_update()
            metrics.append(metric)
        return metrics
