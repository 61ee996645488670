"""Shared by policies that see the last steps of an episode and the return that is still to come.

Shape legend   B batch, K steps of a context, O observation entries, A action entries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from spikerl.errors import BadRequest
from spikerl.types import Contexts


@dataclass(kw_only=True)
class SequenceConfig:
    """Keys of a network of blocks over the steps of a context."""

    prune: ClassVar[None] = None

    name: str
    context: int  # K, steps of an episode that a decision sees
    dim: int  # D, entries of a token
    layers: int  # blocks
    heads: int
    lr: float

    def __post_init__(self) -> None:
        most = {"context": 1000, "dim": 1 << 14, "layers": 100, "heads": 1 << 14}
        for key, bound in most.items():
            self.check(f"give 1 to {bound}", key, 1 <= getattr(self, key) <= bound)
        remedy = f"give a number that divides actor.dim={self.dim}"
        self.check(remedy, "heads", self.dim % self.heads == 0)
        self.check("give a value above 0", "lr", self.lr > 0.0)

    def check(self, remedy: str, key: str, holds: bool) -> None:
        if not holds:
            raise BadRequest(f"actor.{key}", getattr(self, key), remedy)

    def unread(self) -> dict[str, str]:
        """As `ActorConfig.unread`, with keys relative to the actor."""
        return {}

    def shape(self) -> str:
        """Description of everything that two such actors must share to exchange weights."""
        return f"{self.name} of {self.layers} layers of {self.dim} over {self.context} steps"


@dataclass(kw_only=True)
class ConditionConfig:
    """The return that a saved policy aims at."""

    target_return: float  # of an episode, in the environment's units
    return_scale: float  # returns to go are divided by this before the network sees them

    def __post_init__(self) -> None:
        if not (math.isfinite(self.target_return) and abs(self.target_return) <= 1e30):
            raise BadRequest("conditioning.target_return", self.target_return, "give a number")
        if not 0.0 < self.return_scale <= 1e30:
            remedy = "give a value above 0"
            raise BadRequest("conditioning.return_scale", self.return_scale, remedy)


class History:
    """The contexts of B episodes that run side by side.

    Before each decision but an episode's first, `reward` must be given the last action's reward.
    """

    def __init__(self, context: int, condition: ConditionConfig) -> None:
        self.context, self.condition = context, condition
        self.steps: Contexts | None = None  # as the newest decision saw them
        self.left_B = torch.zeros(0, dtype=torch.float64)  # return that is still to come
        self.waiting = False  # whether the last actions' rewards are missing

    def see(self, obs_BO: Tensor, act_dim: int) -> Contexts:
        """Append normalised observations; returns the contexts that the next decision sees.

        Raises ValueError if the last rewards are missing or the number of episodes has changed.
        """
        if self.waiting:
            raise ValueError("tell carried.reward(rew) first what the last action earned")
        if self.steps is None:
            self.begin(len(obs_BO), obs_BO, act_dim)
        assert self.steps is not None
        if len(self.left_B) != len(obs_BO):
            raise ValueError(f"{len(obs_BO)} observations; this is of {len(self.left_B)} episodes")
        old = self.steps
        togo = (self.left_B / self.condition.return_scale).to(obs_BO)
        newest = Contexts(
            obs=obs_BO,
            act=torch.zeros_like(old.act[:, 0]),
            togo=togo,
            time=torch.where(old.there[:, -1], old.time[:, -1] + 1, 0),
            there=torch.ones_like(old.there[:, 0]),
        )
        self.steps = Contexts(
            *(torch.cat([a[:, 1:], b.unsqueeze(1)], 1) for a, b in zip(old, newest, strict=True))
        )
        return self.steps

    def begin(self, count: int, obs_BO: Tensor, act_dim: int) -> None:
        def zeros(*shape: int, dtype: torch.dtype = obs_BO.dtype) -> Tensor:
            return torch.zeros(count, self.context, *shape, dtype=dtype, device=obs_BO.device)

        self.steps = Contexts(
            obs=zeros(obs_BO.shape[1]),
            act=zeros(act_dim),
            togo=zeros(),
            time=zeros(dtype=torch.int64),
            there=zeros(dtype=torch.bool),
        )
        self.left_B = torch.full((count,), self.condition.target_return, dtype=torch.float64)

    def acted(self, act_BA: Any) -> None:
        """Record the actions that were taken, in [-1, 1]."""
        assert self.steps is not None
        self.steps.act[:, -1] = torch.as_tensor(act_BA).to(self.steps.act)
        self.waiting = True

    def reward(self, rew_B: Any) -> None:
        """Record the last actions' rewards, in the environment's units, one for each episode."""
        rew = torch.as_tensor(rew_B, dtype=torch.float64).reshape(-1).cpu()
        if not self.waiting or len(rew) != len(self.left_B):
            raise ValueError(f"{len(rew)} rewards; {len(self.left_B) * self.waiting} are due")
        self.left_B = self.left_B - rew
        self.waiting = False

    def restart(self, which_B: Tensor) -> None:
        """Clear the contexts of the episodes selected by the mask `which_B`, which begin anew."""
        if self.steps is None:
            return
        for field in self.steps:
            field[which_B] = 0
        self.left_B[which_B.cpu()] = self.condition.target_return
        self.waiting = self.waiting and not bool(which_B.all())
