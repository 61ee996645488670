"""DDPG, deep deterministic policy gradient (Lillicrap et al., 2016, arXiv:1509.02971)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from spikerl.algos.base import Metrics
from spikerl.algos.offpolicy import OffPolicy, OffPolicyConfig
from spikerl.models.actor import Actor
from spikerl.models.critic import Critics
from spikerl.types import Batch


@dataclass(kw_only=True)
class DDPGConfig(OffPolicyConfig):
    critics: ClassVar[int] = 1

    explore_noise: float  # std of acting noise, in units of half the action range

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("give 0 or more", lambda x: x >= 0, "explore_noise")


class DDPG(OffPolicy):
    config: DDPGConfig
    has_graphs = True

    def __init__(self, actor: Actor, critic: Critics, config: DDPGConfig, **settings: Any) -> None:
        super().__init__(actor, critic, config, **settings)
        self.actor_target = self.add_target("actor", actor)

    def update(self, rows: Batch, numbers: range) -> list[Metrics]:
        actor_opt = self.actor_optimizer

        # y = r + gamma (1 - terminated) Q'(s', pi'(s'))
        with torch.no_grad():
            next_act = self.actor_target(rows.next_obs, self.generator)
            q_target = self.critic_target.td_target(rows, next_act)

        # Critic: minimise mean (Q(s, a) - y)^2.
        metrics = self.critic_step(rows.obs, rows.act, q_target)

        # Actor: minimise -mean Q(s, pi(s)). The kernels differentiate, not autograd: the critic
        # gives the gradient with respect to the actions, the actor takes it back to its weights.
        act, backward = self.actor.vjp(rows.obs, self.generator)
        grad = self.critic.actor_loss_grad(rows.obs, act, actor_opt.gradient)
        metrics |= backward(grad, actor_opt.gradient)
        metrics["actor_loss"] = actor_opt.step()

        self.update_targets()
        self.guard.end_update()
        return [metrics]

    @torch.no_grad()
    def explore(self, obs: Tensor, generator: torch.Generator) -> Tensor:
        return self.explore_with_noise(obs, generator, self.config.explore_noise)
