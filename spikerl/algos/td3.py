"""TD3, twin delayed DDPG (Fujimoto et al., 2018, arXiv:1802.09477)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from spikerl import kernels
from spikerl.algos.ddpg import DDPG, DDPGConfig
from spikerl.errors import BadRequest


@dataclass(kw_only=True)
class TD3Config(DDPGConfig):
    critics: ClassVar[int] = 2

    policy_delay: int  # the actor and all targets move on one update of so many:
    first_policy_update: int  # on this one first, counted from 0
    target_noise: float  # std of target smoothing noise, in units of half the action range
    noise_clip: float  # bound of target smoothing noise, same unit

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("give at least 1", lambda x: x >= 1, "policy_delay")
        self.check("give 0 or more", lambda x: x >= 0, "target_noise", "noise_clip")
        if not 0 <= self.first_policy_update < self.policy_delay:
            remedy = f"give 0 or more, below algo.policy_delay={self.policy_delay}"
            raise BadRequest("algo.first_policy_update", self.first_policy_update, remedy)


class TD3(DDPG):
    """DDPG with the lower of two critics, smoothed targets, and an actor that moves less often."""

    config: TD3Config

    @property
    def policy_delay(self) -> int:
        return self.config.policy_delay

    def moves(self, update: int) -> bool:
        return (update - self.config.first_policy_update) % self.policy_delay == 0

    def smooth(self, act: Tensor) -> Tensor:
        """Target policy smoothing: clipped noise, then clipped to the action range."""
        c = self.config
        noise = torch.randn(act.shape, generator=self.generator, device=act.device)
        add_clipped_noise = kernels.named(self.critic.kernel).add_clipped_noise
        return add_clipped_noise(act, noise, c.target_noise, c.noise_clip)
