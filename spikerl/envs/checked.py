"""An environment wrapper that checks every result before learning sees it."""

from __future__ import annotations

import os
import traceback
from typing import Any, NoReturn

import gymnasium as gym
import numpy as np

from spikerl.envs.config import EnvConfig
from spikerl.envs.snapshot import Snapshot, restore, snapshot
from spikerl.errors import EnvironmentFailed, Interrupted
from spikerl.isolation import UserCode, end_if_forked
from spikerl.types import Entry, flat

REAL = "biuf"  # numpy's dtype kinds of real numbers


class CheckedEnv(gym.Wrapper[np.ndarray, Any, Any, Any]):
    """Returns observations as flat float64 copies, and empty infos.

    Raises EnvironmentFailed if the environment raises any exception, including SystemExit, or
    returns non-numbers or another shape than its space's. Only Ctrl-C passes through.

    Environments may reuse their observation array; the copy keeps a final observation from being
    overwritten by the reset that follows it.
    """

    def __init__(self, env: gym.Env[Any, Any], config: EnvConfig) -> None:
        super().__init__(env)
        self.config = config
        if config.action_bounds == "first":
            bounds: Any = env.action_space
            most = bounds.high.flat[0]
            self.action_space = gym.spaces.Box(-most, most, bounds.shape, bounds.dtype)
        self.layout = layout_of(env.observation_space)
        self.obs_bytes = env.observation_space.dtype in (np.uint8, np.bool_)
        shape = env.observation_space.shape
        self.shape = (sum(entry.size for entry in self.layout),) if shape is None else shape
        self.size = int(np.prod(self.shape))
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (self.size,), np.float64)
        self.failed = False
        self.pid = os.getpid()

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        try:
            obs = self.env.reset(**kwargs)[0]
            end_if_forked(self.pid)
            return self._own(obs), {}
        except BaseException as error:
            self._fail(error)

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        try:
            obs, rew, terminated, truncated, _ = self.env.step(action)
            end_if_forked(self.pid)
            ends = (_scalar("terminated", terminated, "b"), _scalar("truncated", truncated, "b"))
            return self._own(obs), float(_scalar("reward", rew)), bool(ends[0]), bool(ends[1]), {}
        except BaseException as error:
            self._fail(error)

    def close(self) -> None:
        try:
            with UserCode():
                self.env.close()
        except Interrupted:
            raise
        except BaseException as error:
            if self.failed:  # a consequence of the failure that was already reported
                return
            name = self.spec.id if self.spec else "the environment"
            raise EnvironmentFailed(f"close: {name} {describe_raised(error)}") from error

    def _fail(self, error: BaseException) -> NoReturn:
        end_if_forked(self.pid)
        if isinstance(error, Interrupted):
            raise error
        self.failed = True
        failure = error
        if not isinstance(error, EnvironmentFailed):
            failure = EnvironmentFailed(describe_raised(error))
            failure.__cause__ = error
        # Text, because a traceback does not survive the way out of a process of its own.
        failure.trace = "".join(traceback.format_exception(error))  # type: ignore[attr-defined]
        raise failure

    @property
    def snapshot(self) -> Snapshot | None:
        """The environment's exact state, None if its kind is unknown; assigning one restores it.

        A property, because a vector's `set_attr` gives each environment its own value.
        """
        return snapshot(self.env)

    @snapshot.setter
    def snapshot(self, state: Snapshot) -> None:
        restore(self.env, state)

    def _own(self, obs: Any) -> np.ndarray:
        if self.layout:
            try:
                return flat(self.layout, obs)
            except ValueError as error:
                raise EnvironmentFailed(f"returned an observation {error}") from error
        given = np.asarray(obs)
        if given.shape != self.shape or given.dtype.kind not in REAL:
            what = f"an observation {given.shape} of {given.dtype}"
            raise EnvironmentFailed(f"returned {what}; its space says {self.shape} of numbers")
        if self.obs_bytes and not are_bytes(given):
            said = "returned an observation that is not of whole numbers from 0 to 255"
            raise EnvironmentFailed(f"{said}, as its space says")
        return np.array(given, np.float64).reshape(self.size)


def are_bytes(obs: np.ndarray) -> bool:
    if obs.dtype in (np.uint8, np.bool_):
        return True
    return bool(((obs >= 0) & (obs <= 255) & (obs % 1 == 0)).all())


def _scalar(what: str, value: Any, kinds: str = REAL) -> Any:
    given = np.asarray(value)
    if given.size != 1 or given.dtype.kind not in kinds:
        kind = "number" if kinds == REAL else "bool"
        raise EnvironmentFailed(f"returned {value!r:.40} as {what}, which is not a {kind}")
    return given.item()


def message_of(error: BaseException) -> str:
    try:
        return (str(error).strip().splitlines() or [""])[0][:300]
    except BaseException:  # an exception's __str__ may be the user's code
        return ""


def describe_raised(error: BaseException) -> str:
    """One line that says what an environment raised, and where."""
    message = f": {line}" if (line := message_of(error)) else ""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if len(frames) > 1 else ""
    return f"raised {type(error).__name__}{message}{where}"


def layout_of(space: gym.Space[Any], path: tuple[str | int, ...] = ()) -> tuple[Entry, ...]:
    """The order of a dictionary's or tuple's entries in the flat observation; empty for a Box.

    Raises ValueError if an entry cannot be flattened.
    """
    if isinstance(space, gym.spaces.Dict | gym.spaces.Tuple):
        parts: Any = space.spaces
        named = parts.items() if isinstance(space, gym.spaces.Dict) else enumerate(parts)
        return tuple(entry for name, part in named for entry in layout_of(part, (*path, name)))
    if not path and isinstance(space, gym.spaces.Box):
        return ()
    if path and isinstance(space, gym.spaces.Discrete):
        return (Entry(path, (int(space.n),), int(space.start)),)
    if path and isinstance(space, gym.spaces.Box | gym.spaces.MultiBinary):
        return (Entry(path, tuple(space.shape)),)
    kind, name = type(space).__name__, ".".join(map(str, path))
    raise ValueError(f"hold a {kind}, {name}" if path else f"are {kind}")
