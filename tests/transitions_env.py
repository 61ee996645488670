"""Environments whose every number is known beforehand, so that tests can check each transition.

Shape legend   A action entries.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

from spikerl.envs.config import EnvConfig
from spikerl.envs.vector import Envs

# The bounds differ between the two entries, and none are symmetric.
LOW = np.array([-1.0, 0.0], np.float32)
HIGH = np.array([3.0, 0.5], np.float32)
# Episodes with all kinds of ends, some of one step: length, then t terminated, x truncated, b both.
SCRIPT = "3t 1x 4x 1t 2b 1b 5t 2x"

# What is spoilt ("reward", "observation" or "reset"), at which time (from 1), the wrong value.
Fault = tuple[str, int, float]


def parse(script: str) -> list[tuple[int, str]]:
    return [(int(word[:-1]), word[-1]) for word in script.split()]


class CounterEnv(gym.Env[np.ndarray, np.ndarray]):
    """Observes [step, episode] in one array that it overwrites; the reward encodes the action.

    `script` gives the lengths and ends of the episodes, in turn; after the last, it starts over.
    """

    def __init__(self, script: str = SCRIPT, fault: Fault | None = None) -> None:
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
        self.action_space = gym.spaces.Box(LOW, HIGH)
        self.script, self.fault = parse(script), fault
        self.obs = np.zeros(2)
        self.steps, self.episode = 0, -1
        self.lived = 0  # steps over all episodes
        self.seeds: list[int | None] = []  # one for each reset
        self.received: list[list[float]] = []  # actions, one for each step

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.seeds.append(seed)
        self.steps, self.episode = 0, self.episode + 1
        return self._observe("reset", len(self.seeds)), {"noise": self.episode}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), action
        self.received.append([float(entry) for entry in action])
        self.steps, self.lived = self.steps + 1, self.lived + 1
        length, end = self.script[self.episode % len(self.script)]
        assert self.steps <= length, "stepped beyond the end of an episode"
        last = self.steps == length
        reward = self._spoil("reward", self.lived, spell(*self.received[-1]))
        obs = self._observe("observation", self.lived)
        return obs, reward, last and end in "tb", last and end in "xb", {"noise": self.lived}

    def _observe(self, what: str, occasion: int) -> np.ndarray:
        self.obs[:] = self.steps, self._spoil(what, occasion, self.episode)
        return self.obs

    def _spoil(self, what: str, occasion: int, value: float) -> float:
        spoilt = self.fault is not None and self.fault[:2] == (what, occasion)
        return self.fault[2] if spoilt and self.fault else value


def spell(first: float, second: float) -> float:
    """A whole number that encodes both values, `first` a multiple of 1/32, `second` of 1/256.

    It fits a float32, and sums of it are exact.
    """
    return 32.0 * first + 1000.0 * 256.0 * second


class BoxesEnv(gym.Env[Any, Any]):
    """Has any spaces; never ends an episode, and keeps the last action."""

    def __init__(self, obs: gym.Space[Any], act: gym.Space[Any]) -> None:
        self.observation_space, self.action_space = obs, act
        self.action: Any = None
        self.closed = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self._observe(0), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.action = action
        return self._observe(1), 0.0, False, False, {}

    def close(self) -> None:
        self.closed = True

    def _observe(self, start: int) -> Any:
        shape = self.observation_space.shape or ()
        return np.arange(start, start + int(np.prod(shape)), dtype=np.float32).reshape(shape)


def get_attr(envs: Envs, name: str) -> tuple[Any, ...]:
    """The attribute `name` of each environment."""
    vector: Any = envs.vector  # both kinds have get_attr, their base class does not
    return tuple(vector.get_attr(name))


def config(name: str, *, vectorizer: str = "sync", limit: int | None = None) -> EnvConfig:
    return EnvConfig(
        name=name, version="v0", id=f"{name}-v0", max_episode_steps=limit, vectorizer=vectorizer
    )


def registered(name: str, entry: Any, limit: int | None = None, **kwargs: Any) -> EnvConfig:
    """The config of NAME-v0, after registering it, again if need be, with gymnasium."""
    gym.registry.pop(f"{name}-v0", None)
    gym.register(f"{name}-v0", entry_point=entry, max_episode_steps=limit, kwargs=kwargs)
    return config(name)


COUNTER = registered("Counter", CounterEnv, limit=100)
