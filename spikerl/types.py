"""Words that every layer shares.

Shape legend   B batch, O observation entries, A action entries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from torch import Tensor

# Of an episode, so that each evaluation ends.
MAX_EPISODE_STEPS = 1_000_000


class Resolved(NamedTuple):
    """What "auto" or a named choice came to, and why; written into the manifest."""

    choice: str
    reason: str


class Batch(NamedTuple):
    """Transitions as the losses see them; truncation is deliberately not a field."""

    obs: Tensor  # (B, O) normalised
    act: Tensor  # (B, A) in [-1, 1]
    rew: Tensor  # (B,)
    next_obs: Tensor  # (B, O) normalised; the true successor, never a reset observation
    terminated: Tensor  # (B,) bool
    discount: Tensor  # (B,) gamma ** (steps that the transition spans)

    def td_target(self, next_value: Tensor) -> Tensor:
        """rew + discount * next_value, without the second term where the episode terminated."""
        return self.rew + self.discount * (~self.terminated) * next_value


@dataclass(frozen=True)
class Task:
    """What a policy must know of its environment.

    Inside the program every action lies in [-1, 1]; `to_env` is the only place where it gets the
    environment's units, each entry with its own bounds.
    """

    env_id: str
    obs_shape: tuple[int, ...]
    act_shape: tuple[int, ...]
    act_low: np.ndarray  # (A,) float64
    act_high: np.ndarray  # (A,) float64
    max_episode_steps: int

    @property
    def obs_dim(self) -> int:
        return math.prod(self.obs_shape)  # exact, whatever a file claims

    @property
    def act_dim(self) -> int:
        return math.prod(self.act_shape)

    def to_env(self, act: np.ndarray) -> np.ndarray:
        """Map actions (..., A) in [-1, 1] to (..., *act_shape) in the environment's units."""
        low, half_range, least, most = self.units
        scaled = (low + (act + 1.0) * half_range).astype(np.float32)
        scaled = np.minimum(np.maximum(scaled, least), most)
        if len(self.act_shape) == 1:
            return scaled
        return scaled.reshape(*act.shape[:-1], *self.act_shape)

    @cached_property
    def units(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The lower end, half the range, and the least and most of an action in float32.

        A float64 bound may round to a float32 just outside the box; these lie inside.
        """
        low, high = self.act_low, self.act_high
        return low, 0.5 * (high - low), _inside(low, high), _inside(high, low)


def _inside(bound: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The float32 nearest to `bound` that does not lie beyond it, seen from `other`."""
    near = bound.astype(np.float32)
    beyond = np.where(other > bound, near < bound, near > bound)
    return np.where(beyond, np.nextafter(near, other.astype(np.float32)), near)
