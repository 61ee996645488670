"""Environments such as users write, a few lines each, registered as CLASS-v0."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import gymnasium as gym
import numpy as np
import torch

LATE = 30  # the step after which some of the environments raise or set handlers


class Base(gym.Env[Any, Any]):
    limit = 50

    def __init__(self) -> None:
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
        self.action_space: gym.Space[Any] = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.t = 0

    @property
    def parent(self) -> int:
        """The parent of the process in which the environment runs."""
        return os.getppid()

    def obs(self) -> Any:
        return np.array([np.sin(self.t), np.cos(self.t), self.t / self.limit])

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.t = 0
        return self.obs(), {}

    def step(self, action: Any) -> Any:
        self.t += 1
        return self.obs(), float(-np.square(action).sum()), self.t >= self.limit, False, {}


class Raises(Base):
    """Raises the exception that `what` names in the method that `where` names."""

    def __init__(self, where: str, what: str) -> None:
        super().__init__()
        self.where, self.what = where, what
        self.may("make")

    def may(self, where: str) -> None:
        if where != self.where:
            return
        if self.what == "SystemExit":
            sys.exit()
        if self.what == "unprintable":
            raise Unprintable
        raise {"KeyboardInterrupt": KeyboardInterrupt, "GeneratorExit": GeneratorExit}[self.what]

    def reset(self, **kwargs: Any) -> Any:
        self.may("reset")
        return super().reset(**kwargs)

    def step(self, action: Any) -> Any:
        if self.t == LATE:
            self.may("step")
        return super().step(action)

    def close(self) -> None:
        self.may("close")


class Unprintable(Exception):
    def __init__(self) -> None:
        super().__init__("no plain", "arguments", lambda: 0)  # a lambda cannot be pickled

    def __str__(self) -> str:
        raise SystemExit


class Handlers(Base):
    """Replaces the handlers of signals by its own, as window libraries do."""

    def step(self, action: Any) -> Any:
        if self.t == LATE:
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1):
                signal.signal(number, lambda *_: None)
        return super().step(action)


class Wanders(Base):
    """Changes the working folder, and fails at a step in any other folder."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        os.chdir(folder)
        self.folder = os.getcwd()

    def step(self, action: Any) -> Any:
        assert os.getcwd() == self.folder
        return super().step(action)


class Learned(Base):
    """Computes in torch with float64 as default, matrices large enough for several threads."""

    def __init__(self) -> None:
        super().__init__()
        torch.set_default_dtype(torch.float64)
        self.net = torch.nn.Linear(400, 400)

    def step(self, action: Any) -> Any:
        with torch.no_grad():
            assert self.net(torch.ones(400, 400)).dtype == torch.float64
        return super().step(action)


class Takes(Base):
    """Has one required argument, and takes any others."""

    def __init__(self, mass: float, **others: Any) -> None:
        super().__init__()
        self.mass, self.others = mass, others

    def obs(self) -> Any:
        return self.mass * super().obs()


class Goal(Base):
    """Observations are dictionaries of arrays, numbers and tuples."""

    def __init__(self) -> None:
        super().__init__()
        box = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
        flags = gym.spaces.Tuple([gym.spaces.MultiBinary(2), gym.spaces.Discrete(3, start=5)])
        self.observation_space: gym.Space[Any] = gym.spaces.Dict(
            {"observation": box, "goal": gym.spaces.Box(0.0, 9.0, (1, 2)), "flags": flags}
        )

    def obs(self) -> Any:
        return {
            "observation": np.array([self.t, -self.t], float),
            "goal": np.full((1, 2), 7.0, np.float32),
            "flags": (np.array([1, 0], np.int8), 5 + self.t % 3),
        }


class Half(Base):
    """Actions are of float16."""

    def __init__(self) -> None:
        super().__init__()
        bounds = np.array([0.1, 0.3], np.float16)
        self.action_space = gym.spaces.Box(-bounds, bounds, dtype=np.float16)

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action), action
        return super().step(action)


class Moves(Base):
    """Discrete actions, used as keys of a dictionary, so that they must be hashable."""

    def __init__(self) -> None:
        super().__init__()
        self.action_space = gym.spaces.Discrete(2)

    def step(self, action: Any) -> Any:
        return super().step(np.array({0: 1.0, 1: 2.0}[action]))


class Doubles(Base):
    """Changes the action array that it is given."""

    def step(self, action: Any) -> Any:
        action *= 2.0
        return super().step(action)


class Only(Base):
    """Can exist only once at a time in a process, as if it drove a real robot."""

    alive = 0

    def __init__(self) -> None:
        super().__init__()
        if Only.alive:
            raise RuntimeError("the robot is taken")
        Only.alive += 1

    def close(self) -> None:
        Only.alive -= 1


class OldGenerator(Base):
    """Its random generator is a RandomState, numpy's older kind."""

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.np_random = np.random.RandomState(seed)  # type: ignore[assignment]
        self.t = 0
        return self.obs(), {}


class Scalars(Base):
    """The observation and the action are each one number, of shape ()."""

    def __init__(self) -> None:
        super().__init__()
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (), np.float64)
        self.action_space = gym.spaces.Box(-2.0, 3.0, (), np.float32)

    def obs(self) -> Any:
        return np.float64(self.t)

    def step(self, action: Any) -> Any:
        assert np.shape(action) == ()
        return super().step(action)


class NothingToSee(Base):
    def __init__(self) -> None:
        super().__init__()
        self.observation_space = gym.spaces.Dict({})


for one in [c for c in list(globals().values()) if isinstance(c, type) and issubclass(c, Base)]:
    gym.register(f"{one.__name__}-v0", entry_point=f"own_envs:{one.__name__}")
