"""Environments: any registered Gymnasium task with Box observations, or dictionaries of them, and
bounded Box or Discrete actions.

Shape legend   N environments, O observation entries, A action entries.
"""

from __future__ import annotations

import difflib
import math
import os
import traceback
import warnings
from dataclasses import dataclass
from typing import Any, NoReturn

import gymnasium as gym
import mujoco
import numpy as np

from spikerl.envs import extras
from spikerl.envs.snapshot import Snapshot, restore, snapshot
from spikerl.envs.wrappers import check_wrappers, wrapped
from spikerl.errors import BadRequest, EnvironmentFailed, Interrupted
from spikerl.isolation import UserCode, end_if_forked
from spikerl.types import MAX_EPISODE_STEPS, Entry, Task, flat

# For an environment that sets no limit of its own, so that every episode ends.
DEFAULT_EPISODE_STEPS = 1000
PATIENCE_S = 300.0  # for one step of environments in processes of their own
UNREGISTERED = "is not a registered environment"


@dataclass(kw_only=True)
class EnvConfig:
    name: str
    version: str | None  # v5, v4: the id is NAME-VERSION; null where `id` is given whole
    id: str
    max_episode_steps: int | None  # null: the environment's own limit
    vectorizer: str  # sync: all in this process; async: one process each, for slow environments
    # each: every action entry has its own bounds; first: all have plus and minus the first one's
    # upper bound, as in the code of PopSAN and SpikeRL
    action_bounds: str = "each"
    kwargs: dict[str, Any] | None = None  # of the environment's constructor
    wrappers: list[Any] | None = None  # Gymnasium's, from the inside out
    reward_scale: float = 1.0  # what learning sees of a reward; returns are in the task's units

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
    """Whether all numbers in it are, however deep they lie."""
    values = [value]
    while values:
        one = values.pop()
        if isinstance(one, dict | list | tuple):
            values += one.values() if isinstance(one, dict) else one
        elif isinstance(one, float) and not math.isfinite(one):
            return False
    return True


MADE_WITH = {"id", "max_episode_steps"}  # what has keys of its own


class CheckedEnv(gym.Wrapper[np.ndarray, Any, Any, Any]):
    """Observations as flat float64 arrays that are the caller's own, and no infos.

    EnvironmentFailed: the environment raised anything at all, be it SystemExit, or returned what is
    no number, or of another shape than it said. Only Ctrl-C passes.

    Environments may reuse their observation array; a copy keeps a final observation from being
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
            if self.failed:  # which was said, and this is what comes of it
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
        # From a process of its own, no other trace of it arrives.
        failure.trace = "".join(traceback.format_exception(error))  # type: ignore[attr-defined]
        raise failure

    @property
    def snapshot(self) -> Snapshot | None:
        """Its exact state, None where its kind is unknown; assigning one goes on from there.

        A property, because `set_attr` is what gives each environment of a vector its own value.
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


REAL = "biuf"  # numpy's kinds of numbers


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


def _message(error: BaseException) -> str:
    try:
        return (str(error).strip().splitlines() or [""])[0][:300]
    except BaseException:  # its own code, too
        return ""


def describe_raised(error: BaseException) -> str:
    """What an environment raised, in one line, and where."""
    message = f": {line}" if (line := _message(error)) else ""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if len(frames) > 1 else ""
    return f"raised {type(error).__name__}{message}{where}"


def make_env(config: EnvConfig) -> CheckedEnv:
    """One environment; what cannot be made or trained on is a BadRequest that names the remedy."""
    _quiet_mujoco()
    if missing := extras.why_missing(config.id):
        raise BadRequest("env.id", config.id, missing)
    extras.register_ale(config.id)
    named = config.id == f"{config.name}-{config.version}"
    key, value = ("env.version", config.version) if named else ("env.id", config.id)
    try:
        with UserCode():
            return _made(config, key, value)
    except (BadRequest, Interrupted):
        raise
    except gym.error.UnregisteredEnv:
        known = sorted(gym.registry)
        near = difflib.get_close_matches(config.id, known, 3, 0.4)
        hint = f"nearest: {', '.join(near)}" if near else f"{len(known)} are registered"
        raise BadRequest(key, value, f"{config.id} {UNREGISTERED}; {hint}") from None
    except BaseException as error:  # its own code raises any, and calls sys.exit
        plain = _message(error) if isinstance(error, Exception) else ""
        reason = plain or describe_raised(error)
        remedy = f"{config.id} cannot be made here: {reason}"
        if config.kwargs and isinstance(error, TypeError):
            raise BadRequest("env.kwargs", config.kwargs, remedy) from error
        hint = "; env.kwargs={...} gives it arguments" * isinstance(error, TypeError)
        raise BadRequest(key, value, f"{remedy}{hint}") from error


def _made(config: EnvConfig, key: str, value: str | None) -> CheckedEnv:
    with warnings.catch_warnings():  # its advice on versions, once for each environment
        warnings.filterwarnings("ignore", module=r"gymnasium\.")
        env: gym.Env[Any, Any] = gym.make(
            config.id,
            max_episode_steps=config.max_episode_steps,
            disable_env_checker=True,
            **(config.kwargs or {}),
        )
        if _step_limit(env) is None:  # where gym.make has one: below what may repeat actions
            env = gym.wrappers.TimeLimit(env, DEFAULT_EPISODE_STEPS)
        try:
            env = wrapped(env, config.wrappers or [])
            _check_spaces(env, config)
        except BadRequest:
            env.close()
            raise
    limit = _step_limit(env)
    if limit is not None and limit > MAX_EPISODE_STEPS:
        env.close()
        remedy = f"its episodes last up to {limit} steps; set env.max_episode_steps"
        raise BadRequest(key, value, remedy)
    return CheckedEnv(env, config)


def task_of(env: CheckedEnv) -> Task:
    """What a policy must know of `env`."""
    space = env.action_space
    assert env.spec is not None
    limit = _step_limit(env)
    assert limit is not None
    choices, bounds = None, (np.empty(0), np.empty(0))
    if isinstance(space, gym.spaces.Discrete):
        choices = range(int(space.start), int(space.start + space.n))
    else:
        assert isinstance(space, gym.spaces.Box)
        bounds = (np.array(space.low, np.float64).ravel(), np.array(space.high, np.float64).ravel())
    return Task(
        env.spec.id,
        env.shape,
        tuple(space.shape or ()),
        *bounds,
        limit,
        act_dtype="float16" if space.dtype == np.float16 else "float32",
        choices=choices,
        layout=env.layout,
        obs_bytes=env.obs_bytes,
        env_kwargs=env.config.kwargs or {},
        env_wrappers=tuple(env.config.wrappers or ()),
    )


def layout_of(space: gym.Space[Any], path: tuple[str | int, ...] = ()) -> tuple[Entry, ...]:
    """How a dictionary's or tuple's entries follow each other when flat; empty for a Box.

    ValueError: an entry cannot be flattened.
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


def _step_limit(env: gym.Env[Any, Any]) -> int | None:
    layer: Any = env
    while isinstance(layer, gym.Wrapper):
        if isinstance(layer, gym.wrappers.TimeLimit):
            return int(layer._max_episode_steps)
        layer = layer.env
    return None


def _check_spaces(env: gym.Env[Any, Any], config: EnvConfig) -> None:
    obs, act, env_id = env.observation_space, env.action_space, config.id
    try:
        layout = layout_of(obs)
        size = sum(part.size for part in layout) if obs.shape is None else math.prod(obs.shape)
    except ValueError as error:
        remedy = f"its observations {error}; a Box, or a Dict of such, is needed"
        raise BadRequest("env.id", env_id, remedy) from None
    if not size:
        raise BadRequest("env.id", env_id, "its observations are empty")
    if isinstance(act, gym.spaces.Discrete):
        if act.n < 2:
            raise BadRequest("env.id", env_id, "it has one action, which leaves no choice")
        if config.action_bounds == "first":
            raise BadRequest("env.action_bounds", "first", "its actions have no bounds; give each")
        return
    if not isinstance(act, gym.spaces.Box) or not np.prod(act.shape):
        remedy = f"its actions are {type(act).__name__}; a Box (continuous) or Discrete is needed"
        raise BadRequest("env.id", env_id, remedy)
    if not np.issubdtype(act.dtype, np.floating):
        raise BadRequest("env.id", env_id, f"its actions are {act.dtype}; floats are needed")
    if not (np.isfinite(act.low).all() and np.isfinite(act.high).all()):
        remedy = "its actions are unbounded; give its action_space finite bounds"
        raise BadRequest("env.id", env_id, remedy)
    if not (act.low < act.high).all():
        raise BadRequest("env.id", env_id, "an action entry has no room between its bounds")
    if config.action_bounds == "first" and not act.high.flat[0] > 0:
        remedy = f"the first entry's upper bound is {act.high.flat[0]:g}; give each"
        raise BadRequest("env.action_bounds", config.action_bounds, remedy)


def _quiet_mujoco() -> None:
    """MuJoCo otherwise writes warnings to MUJOCO_LOG.TXT in the working directory and to stderr."""
    mujoco.set_mju_user_warning(_ignore)  # type: ignore[attr-defined]


def _ignore(message: str) -> None:
    pass
