"""Data types that every level shares.

Shape legend   B batch, K steps of a context, O observation entries, A action entries,
               W columns of an observation, C columns of a row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

# Bounds every episode, so that each evaluation ends.
MAX_EPISODE_STEPS = 1_000_000


class Resolved(NamedTuple):
    """What "auto" or a named choice resolved to, and why; written into the manifest."""

    choice: str
    reason: str


class Batch(NamedTuple):
    """Transitions as the losses see them; truncation is deliberately not a field."""

    obs: Tensor  # (B, O) normalised
    # (B, A) in [-1, 1]; of discrete actions the largest entry marks the one that was taken
    act: Tensor
    rew: Tensor  # (B,)
    next_obs: Tensor  # (B, O) normalised; the true successor, never a reset observation
    terminated: Tensor  # (B,) bool
    discount: Tensor  # (B,) gamma ** (steps that the transition spans)

    def td_target(self, next_value: Tensor) -> Tensor:
        """rew + discount * next_value, without the second term where the episode terminated."""
        return torch.where(self.terminated, self.rew, self.rew + self.discount * next_value)


class Contexts(NamedTuple):
    """The last K steps of B moments of an episode, the newest last; padding stands before them."""

    obs: Tensor  # (B, K, O) normalised
    act: Tensor  # (B, K, A) in [-1, 1], taken at that step; the newest may not be known yet
    togo: Tensor  # (B, K) return from that step to the episode's end, recorded or aimed at
    time: Tensor  # (B, K) int64, steps since the episode began
    there: Tensor  # (B, K) bool; false for padding, where every other field is 0


class Entry(NamedTuple):
    """A part of a dictionary observation, as it lies in the flat one."""

    path: tuple[str | int, ...]  # keys and indices, from the outside in
    shape: tuple[int, ...]
    start: int | None = None  # the least value of a Discrete, which is flat as one-hot (n,)

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def flat(layout: Sequence[Entry], obs: Any) -> np.ndarray:
    """A dictionary observation, or a batch of them, as float64 (..., O).

    ValueError: an entry is missing, of another shape, or no number.
    """
    parts = []
    for entry in layout:
        name = ".".join(map(str, entry.path))
        value = obs
        try:
            for key in entry.path:
                value = value[key]
        except (KeyError, IndexError, TypeError):
            raise ValueError(f"without {name}") from None
        given = np.asarray(value)
        if given.dtype.kind not in "biuf":
            raise ValueError(f"whose {name} is of {given.dtype}, which is not a number")
        if entry.start is not None:
            given = given[..., None] - entry.start == np.arange(*entry.shape)
            if not given.any(-1).all():
                raise ValueError(f"whose {name} is none of its {entry.size} values")
        lead = given.shape[: given.ndim - len(entry.shape)]
        if given.shape != (*lead, *entry.shape):
            raise ValueError(f"whose {name} is {given.shape}; its space says {entry.shape}")
        parts.append(given.reshape(*lead, entry.size).astype(np.float64))
    if len({part.shape[:-1] for part in parts}) > 1:
        raise ValueError("whose entries are of several batches")
    return np.concatenate(parts, -1)


@dataclass(frozen=True)
class Row:
    """A transition as a replay holds it, C float32: obs next_obs act rew terminated last discount.

    Observations of bytes lie four to a column, as bits that are never read as numbers.
    """

    obs_dim: int
    act_dim: int
    obs_bytes: bool = False

    @property
    def obs_width(self) -> int:
        """Columns of an observation, W."""
        return -(-self.obs_dim // 4) if self.obs_bytes else self.obs_dim

    @property
    def act_start(self) -> int:
        """The action's first column, after both observations."""
        return 2 * self.obs_width

    @property
    def rew_column(self) -> int:
        return self.act_start + self.act_dim

    @property
    def columns(self) -> int:
        """Columns of a row, C."""
        return self.rew_column + 4

    @property
    def numbers(self) -> slice:
        """The columns that must be finite."""
        return slice(self.act_start if self.obs_bytes else 0, self.columns)

    def pack(self, obs: np.ndarray) -> np.ndarray:
        """Observations (..., O) as columns (..., W)."""
        if not self.obs_bytes:
            return obs
        padded = np.zeros((*obs.shape[:-1], 4 * self.obs_width), np.uint8)
        padded[..., : self.obs_dim] = obs
        return padded.view(np.float32)

    def unpack(self, columns: Tensor) -> Tensor:
        """Columns (..., W) as observations (..., O)."""
        if not self.obs_bytes:
            return columns
        return columns.contiguous().view(torch.uint8)[..., : self.obs_dim].float()

    def packed(self, rows: np.ndarray) -> np.ndarray:
        """Rows (..., C) of this kind, made of rows that hold observations as numbers."""
        plain = Row(self.obs_dim, self.act_dim)
        obs, next_obs, rest = np.split(rows, [plain.obs_width, plain.act_start], -1)
        return np.concatenate([self.pack(obs), self.pack(next_obs), rest], -1)


@dataclass(frozen=True)
class Task:
    """What a policy must know of its environment.

    Inside the program every action lies in [-1, 1]; `to_env` is the only place where it gets the
    environment's units, each entry with its own bounds. Where the environment's actions are
    discrete, an action has an entry for each of them, and the largest is the one that is meant.
    """

    env_id: str
    obs_shape: tuple[int, ...]
    act_shape: tuple[int, ...]
    act_low: np.ndarray  # (A,) float64
    act_high: np.ndarray  # (A,) float64
    max_episode_steps: int
    act_dtype: str = "float32"  # or float16
    choices: range | None = None  # the actions of a Discrete space; None where they are continuous
    layout: tuple[Entry, ...] = ()  # of dictionary observations
    obs_bytes: bool = False  # observations are whole numbers from 0 to 255
    env_kwargs: Mapping[str, Any] = field(default_factory=dict)
    env_wrappers: tuple[Any, ...] = ()

    @property
    def obs_dim(self) -> int:
        return math.prod(self.obs_shape)  # exact, whatever a file claims

    @property
    def obs_dtype(self) -> type[np.generic]:
        """The type of recorded observations; bytes take an eighth of the space of float64."""
        return np.uint8 if self.obs_bytes else np.float64

    @property
    def row(self) -> Row:
        return Row(self.obs_dim, self.act_dim, self.obs_bytes)

    @property
    def act_dim(self) -> int:
        return math.prod(self.act_shape) if self.choices is None else len(self.choices)

    @property
    def kind(self) -> str:
        return "continuous" if self.choices is None else "discrete"

    def to_env(self, act: np.ndarray) -> np.ndarray:
        """Map actions (..., A) in [-1, 1] to (..., *act_shape) in the environment's units; if its
        actions are discrete, map values (..., A) of them to the number (...) of the first largest.
        """
        if self.choices is not None:
            return np.asarray(act.argmax(-1) + self.choices.start, np.int64)
        low, half_range, least, most = self.units
        scaled = (low + (act + 1.0) * half_range).astype(np.float32)
        scaled = self.typed(np.minimum(np.maximum(scaled, least), most))
        if len(self.act_shape) == 1:
            return scaled
        return scaled.reshape(*act.shape[:-1], *self.act_shape)

    def typed(self, act: np.ndarray) -> np.ndarray:
        """Actions in the type of the environment's space; they stay inside its bounds."""
        return act if self.act_dtype == "float32" else act.astype(self.act_dtype)

    @cached_property
    def units(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The lower end, half the range, and the least and most of an action in float32.

        A float64 bound may round to a float32 just outside the box; these lie inside.
        """
        low, high = self.act_low, self.act_high
        return low, 0.5 * (high - low), _inside(low, high), _inside(high, low)


def _inside(bound: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The float32 nearest to `bound` among those that lie on it or on the side of `other`."""
    near = bound.astype(np.float32)
    beyond = np.where(other > bound, near < bound, near > bound)
    return np.where(beyond, np.nextafter(near, other.astype(np.float32)), near)
