"""TD3, twin delayed DDPG (Fujimoto et al., 2018, arXiv:1802.09477)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from spikerl.algos.ddpg import DDPG, DDPGConfig
from spikerl.errors import BadRequest


@dataclass(kw_only=True)
class TD3Config(DDPGConfig):
    critics: ClassVar[int] = 2

    policy_delay: int  # the actor and all targets move on updates 0, d, 2d, ...
    target_noise: float  # std of target smoothing noise, in units of half the action range
    noise_clip: float  # bound of target smoothing noise, same unit

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.policy_delay < 1:
            raise BadRequest("algo.policy_delay", self.policy_delay, "give at least 1")
        for key in ("target_noise", "noise_clip"):
            if getattr(self, key) < 0:
                raise BadRequest(f"algo.{key}", getattr(self, key), "give 0 or more")


class TD3(DDPG):
    """DDPG with the lower of two critics, smoothed targets, and an actor that moves less often."""

    config: TD3Config

    @property
    def policy_delay(self) -> int:
        return self.config.policy_delay

    def smooth(self, act: Tensor) -> Tensor:
        """Target policy smoothing: clipped noise, then clipped to the action range."""
        c = self.config
        noise = torch.randn(act.shape, generator=self.generator, device=act.device)
        return (act + (noise * c.target_noise).clamp(-c.noise_clip, c.noise_clip)).clamp(-1.0, 1.0)
