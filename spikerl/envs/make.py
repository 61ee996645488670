"""Environments: any registered Gymnasium task with Box observations and bounded Box actions.

Shape legend   N environments, O observation entries, A action entries.
"""

from __future__ import annotations

import difflib
import warnings
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np

from spikerl.envs.snapshot import Snapshot, restore, snapshot
from spikerl.errors import BadRequest, EnvironmentFailed
from spikerl.types import MAX_EPISODE_STEPS, Task

# For an environment that sets no limit of its own, so that every episode ends.
DEFAULT_EPISODE_STEPS = 1000
PATIENCE_S = 300.0  # for one step of environments in processes of their own
FLOAT32_MAX = float(np.finfo(np.float32).max)  # replay and networks hold no larger number


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

    def __post_init__(self) -> None:
        if self.action_bounds not in ("each", "first"):
            raise BadRequest("env.action_bounds", self.action_bounds, "give each or first")
        if self.vectorizer not in ("sync", "async"):
            raise BadRequest("env.vectorizer", self.vectorizer, "give sync or async")
        limit = self.max_episode_steps
        if limit is not None and not 1 <= limit <= MAX_EPISODE_STEPS:
            remedy = f"give 1 to {MAX_EPISODE_STEPS}, or null"
            raise BadRequest("env.max_episode_steps", limit, remedy)


class CheckedEnv(gym.Wrapper[np.ndarray, Any, Any, Any]):
    """Observations as flat float64 arrays that are the caller's own, and no infos.

    EnvironmentFailed: the environment returned what is no number, or of another shape than it said.

    Environments may reuse their observation array; a copy keeps a final observation from being
    overwritten by the reset that follows it.
    """

    def __init__(self, env: gym.Env[Any, Any], *, first_bound: bool = False) -> None:
        super().__init__(env)
        if first_bound:
            bounds: Any = env.action_space
            most = bounds.high.flat[0]
            self.action_space = gym.spaces.Box(-most, most, bounds.shape, bounds.dtype)
        shape = env.observation_space.shape
        assert shape is not None
        self.shape, self.size = shape, int(np.prod(shape))
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (self.size,), np.float64)

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        return self._own(self.env.reset(**kwargs)[0]), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        obs, rew, terminated, truncated, _ = self.env.step(action)
        ends = (_scalar("terminated", terminated, "b"), _scalar("truncated", truncated, "b"))
        return self._own(obs), float(_scalar("reward", rew)), bool(ends[0]), bool(ends[1]), {}

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
        given = np.asarray(obs)
        if given.shape != self.shape or given.dtype.kind not in REAL:
            what = f"an observation {given.shape} of {given.dtype}"
            raise EnvironmentFailed(f"returned {what}; its space says {self.shape} of numbers")
        return np.array(given, np.float64).reshape(self.size)


REAL = "biuf"  # numpy's kinds of numbers


def _scalar(what: str, value: Any, kinds: str = REAL) -> Any:
    given = np.asarray(value)
    if given.size != 1 or given.dtype.kind not in kinds:
        kind = "number" if kinds == REAL else "bool"
        raise EnvironmentFailed(f"returned {value!r:.40} as {what}, which is no {kind}")
    return given.item()


def make_env(config: EnvConfig) -> CheckedEnv:
    """One environment; what cannot be made or trained on is a BadRequest that names the remedy."""
    _quiet_mujoco()
    named = config.id == f"{config.name}-{config.version}"
    key, value = ("env.version", config.version) if named else ("env.id", config.id)
    try:
        with warnings.catch_warnings():  # its advice on versions, once for each environment
            warnings.filterwarnings("ignore", module=r"gymnasium\.")
            env = gym.make(
                config.id, max_episode_steps=config.max_episode_steps, disable_env_checker=True
            )
    except gym.error.UnregisteredEnv:
        known = sorted(gym.registry)
        near = difflib.get_close_matches(config.id, known, 3, 0.4)
        hint = f"nearest: {', '.join(near)}" if near else f"{len(known)} are registered"
        raise BadRequest(key, value, f"{config.id} is no registered environment; {hint}") from None
    except Exception as error:  # its own code raises any
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadRequest(key, value, f"{config.id} cannot be made here: {reason}") from error
    try:
        _check_spaces(env, config)
    except BadRequest:
        env.close()
        raise
    limit = _step_limit(env)
    if limit is None:
        env = gym.wrappers.TimeLimit(env, DEFAULT_EPISODE_STEPS)
    elif limit > MAX_EPISODE_STEPS:
        env.close()
        remedy = f"its episodes last up to {limit} steps; set env.max_episode_steps"
        raise BadRequest(key, value, remedy)
    return CheckedEnv(env, first_bound=config.action_bounds == "first")


def check_confirmed(key: str, value: object, env_id: str, typed: str | None) -> None:
    """Refuse to import the module that a file's environment id names, unless it was typed too."""
    if ":" in env_id and env_id != typed:
        remedy = f"its environment {env_id} names a module to import; confirm with env_id={env_id}"
        raise BadRequest(key, value, remedy)


def task_of(env: CheckedEnv) -> Task:
    """What a policy must know of `env`."""
    inner, space = env.env.observation_space, env.action_space
    assert isinstance(inner, gym.spaces.Box)
    assert isinstance(space, gym.spaces.Box)
    assert env.spec is not None
    low, high = (np.asarray(bound, np.float64).ravel() for bound in (space.low, space.high))
    limit = _step_limit(env)
    assert limit is not None
    return Task(env.spec.id, tuple(inner.shape), tuple(space.shape), low, high, limit)


def _step_limit(env: gym.Env[Any, Any]) -> int | None:
    layer: Any = env
    while isinstance(layer, gym.Wrapper):
        if isinstance(layer, gym.wrappers.TimeLimit):
            return int(layer._max_episode_steps)
        layer = layer.env
    return None


def _check_spaces(env: gym.Env[Any, Any], config: EnvConfig) -> None:
    obs, act, env_id = env.observation_space, env.action_space, config.id
    if not isinstance(obs, gym.spaces.Box) or not np.prod(obs.shape):
        kind = type(obs).__name__
        raise BadRequest("env.id", env_id, f"its observations are {kind}; a Box is needed")
    if not isinstance(act, gym.spaces.Box) or not np.prod(act.shape):
        kind = type(act).__name__
        raise BadRequest("env.id", env_id, f"its actions are {kind}; a Box (continuous) is needed")
    if not np.issubdtype(act.dtype, np.floating):
        raise BadRequest("env.id", env_id, f"its actions are {act.dtype}; floats are needed")
    if not (np.isfinite(act.low).all() and np.isfinite(act.high).all()):
        remedy = "its actions are unbounded; wrap it with gymnasium.wrappers.RescaleAction first"
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
