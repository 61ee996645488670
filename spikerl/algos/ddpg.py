"""DDPG, deep deterministic policy gradient (Lillicrap et al., 2016, arXiv:1509.02971)."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from spikerl import kernels
from spikerl.algos.base import Metrics, flatten
from spikerl.algos.offpolicy import OffPolicy, OffPolicyConfig
from spikerl.types import Batch


@dataclass(kw_only=True)
class DDPGConfig(OffPolicyConfig):
    critics: ClassVar[int] = 1

    explore_noise: float  # std of acting noise, in units of half the action range

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("give 0 or more", lambda x: x >= 0, "explore_noise")


class DDPG(OffPolicy):
    """Actor, critics, their targets, and one update of them all."""

    config: DDPGConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.actor_target = copy.deepcopy(self.actor).requires_grad_(False)
        self.actor_target_flat = flatten(self.actor_target)

    def between_moves(self, rows: Batch, update: int, updates: int) -> list[Metrics]:
        q_target = self.q_target(rows)
        size = len(q_target) // updates
        parts = zip(*(field.split(size) for field in (rows.obs, rows.act, q_target)), strict=True)
        return [self.step(*part, moves=self.moves(update + i)) for i, part in enumerate(parts)]

    @torch.no_grad()
    def q_target(self, rows: Batch) -> Tensor:
        """The reward and the target critics' least value of the target's action, (B,)."""
        act = self.smooth(self.target_act(rows.next_obs))
        return kernels.named(self.critic.kernel).td_target(self.critic_target, rows, act)

    def target_act(self, next_obs: Tensor) -> Tensor:
        return self.actor_target(next_obs, self.generator)

    def smooth(self, act: Tensor) -> Tensor:
        """What a target is valued at."""
        return act

    def step(self, obs: Tensor, act: Tensor, q_target: Tensor, *, moves: bool) -> Metrics:
        """A step of the critics; of the actor and the targets too where it `moves`."""
        critic, actor = self.step_critic, self.step_actor
        q_mean = self.critic.critic_backward(obs, act, q_target, critic.gradient)
        metrics = {"critic_loss": critic(), "q_mean": q_mean}
        if moves:
            act, pull = self.actor.vjp(obs, self.generator)
            pull(self.critic.dq_da(obs, act, actor.gradient), actor.gradient)
            metrics["actor_loss"] = actor()
            self.move_targets()
        self.guard.close()
        return metrics

    def move_targets(self) -> None:
        self.polyak(self.critic_target_flat, self.step_critic.flat)
        self.polyak(self.actor_target_flat, self.step_actor.flat)

    def parts(self) -> dict[str, dict[str, Tensor]]:
        parts = super().parts()
        parts["target"]["actor"] = self.actor_target_flat
        return parts

    @torch.no_grad()
    def explore(self, obs: Tensor, generator: torch.Generator) -> Tensor:
        """Actions with Gaussian noise, one draw for every environment and entry, clipped."""
        act = self.acting(obs, generator)
        noise = torch.randn(act.shape, generator=generator, device=act.device)
        add_clipped_noise = kernels.named(self.critic.kernel).add_clipped_noise
        return add_clipped_noise(act, noise, self.config.explore_noise, math.inf)
