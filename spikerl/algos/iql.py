"""IQL, implicit Q-learning (Kostrikov et al., 2021, arXiv:2110.06169): the critics evaluate only
actions that are in the dataset.

Shape legend   B batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spikerl.algos.base import CriticsConfig, Metrics
from spikerl.algos.bc import add_imitation
from spikerl.algos.offpolicy import OfflineConfig, OffPolicy, TargetConfig, batches
from spikerl.kernels import reference
from spikerl.models.actor import Actor
from spikerl.models.critic import Critics
from spikerl.types import Batch

MOST_WEIGHT = 100.0  # bound of a transition's weight in the actor's loss


@dataclass(kw_only=True)
class IQLConfig(OfflineConfig, TargetConfig, CriticsConfig):
    expectile: float  # V(s) is this expectile of the actions' values; 0.5: mean, towards 1: best
    beta: float  # factor of the advantage in the exponent of the actor's weights; 0: imitation

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("give a value between 0 and 1", lambda x: 0.0 < x < 1.0, "expectile")
        self.check("give 0 or more", lambda x: x >= 0.0, "beta")


class IQL(OffPolicy):
    config: IQLConfig
    metrics = ("value_loss", "imitation_weight")

    def __init__(self, actor: Actor, critic: Critics, config: IQLConfig, **settings: Any) -> None:
        super().__init__(actor, critic, config, **settings)
        sizes = config.critic_hidden_sizes
        self.value = Critics(actor.obs_dim, 0, sizes, networks=1).to(self.generator.device)
        self.optimizers["value"] = self.optimizer(self.value, config.critic_lr)

    def update(self, rows: Batch, numbers: range) -> list[Metrics]:
        """Make the updates with these numbers, each on an equal share of the rows."""
        c, metrics, value_opt = self.config, [], self.optimizers["value"]
        actor_opt = self.actor_optimizer
        for fields in batches(len(numbers), *rows):
            batch = Batch(*fields)

            # Value: minimise mean |expectile - [u < 0]| u^2, u = min_i Q_i'(s, a) - V(s).
            with torch.no_grad():
                q = self.critic_target(batch.obs, batch.act).amin(0)
            excess = q - self.state_value(batch.obs)
            asymmetry = torch.where(excess < 0.0, 1.0 - c.expectile, c.expectile)
            value_opt.gradient.differentiate((asymmetry * excess.square()).mean())
            metric = {"value_loss": value_opt.step()}

            # Actor: minimise mean w (pi(s) - a)^2 with w = exp(beta (min_i Q_i'(s, a) - V(s))).
            with torch.no_grad():
                advantage = q - self.state_value(batch.obs)
                weight = (c.beta * advantage).exp().clamp(max=MOST_WEIGHT)
                q_target = batch.td_target(self.state_value(batch.next_obs))
            pi, backward = self.actor.vjp(batch.obs, self.generator)
            actor_opt.gradient.loss.zero_()
            grad = add_imitation(pi, batch.act, actor_opt.gradient, weight.unsqueeze(1))
            metric |= backward(grad, actor_opt.gradient)
            metric |= {"actor_loss": actor_opt.step(), "imitation_weight": weight.mean()}

            # Critics: minimise sum_i mean (Q_i(s, a) - y)^2, y = r + gamma (1 - terminated) V(s').
            metrics.append(metric | self.critic_step(batch.obs, batch.act, q_target))

            self.update_targets()
            self.guard.end_update()
        return metrics

    def state_value(self, obs_BO: Tensor) -> Tensor:
        """V(s), (B,)."""
        return reference.values(self.value, obs_BO, obs_BO.new_empty(len(obs_BO), 0))[0]
