"""The config group `env`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from spikerl.envs.wrappers import check_wrappers
from spikerl.errors import BadRequest
from spikerl.types import MAX_EPISODE_STEPS

MADE_WITH = {"id", "max_episode_steps"}  # arguments of gym.make that have keys of their own


@dataclass(kw_only=True)
class EnvConfig:
    name: str
    version: str | None  # v5, v4: the id is NAME-VERSION; null if `id` is given in full
    id: str
    max_episode_steps: int | None  # null: the environment's own limit
    vectorizer: str  # sync: all in this process; async: one process each, for slow environments
    # each: every action entry has its own bounds; first: all have plus and minus the first one's
    # upper bound, as in the code of PopSAN and SpikeRL
    action_bounds: str = "each"
    kwargs: dict[str, Any] | None = None  # of the environment's constructor
    wrappers: list[Any] | None = None  # Gymnasium's, from the inside out
    reward_scale: float = 1.0  # factor of rewards in learning; returns are in the task's units

    def __post_init__(self) -> None:
        if self.action_bounds not in ("each", "first"):
            raise BadRequest("env.action_bounds", self.action_bounds, "give each or first")
        if self.vectorizer not in ("sync", "async"):
            raise BadRequest("env.vectorizer", self.vectorizer, "give sync or async")
        limit = self.max_episode_steps
        if limit is not None and not 1 <= limit <= MAX_EPISODE_STEPS:
            remedy = f"give 1 to {MAX_EPISODE_STEPS}, or null"
            raise BadRequest("env.max_episode_steps", limit, remedy)
        if not self.reward_scale > 0.0:
            raise BadRequest("env.reward_scale", self.reward_scale, "give a number above 0")
        for name in MADE_WITH & (self.kwargs or {}).keys():
            raise BadRequest("env.kwargs", name, f"set env.{name} instead")
        check_wrappers(self.wrappers or [])
        for key, value in (("env.kwargs", self.kwargs), ("env.wrappers", self.wrappers)):
            if not finite(value):
                remedy = "policy.json holds no NaN and no infinity; give finite numbers"
                raise BadRequest(key, value, remedy)


def finite(value: Any) -> bool:
    """Whether all floats in `value`, at any depth of nesting, are finite."""
    values = [value]
    while values:
        one = values.pop()
        if isinstance(one, dict | list | tuple):
            values += one.values() if isinstance(one, dict) else one
        elif isinstance(one, float) and not math.isfinite(one):
            return False
    return True
