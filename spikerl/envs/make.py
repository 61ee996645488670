"""Makes environments: any registered Gymnasium task with Box observations, or dictionaries of them,
and bounded Box or Discrete actions.
"""

from __future__ import annotations

import difflib
import math
import warnings
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np

from spikerl.envs import extras
from spikerl.envs.checked import CheckedEnv, describe_raised, layout_of, message_of
from spikerl.envs.config import EnvConfig
from spikerl.envs.wrappers import wrapped
from spikerl.errors import BadRequest, Interrupted
from spikerl.isolation import UserCode
from spikerl.types import MAX_EPISODE_STEPS, Task

# Limit for environments that set none of their own, so that every episode ends.
DEFAULT_EPISODE_STEPS = 1000
UNREGISTERED = "is not a registered environment"


def make_env(config: EnvConfig) -> CheckedEnv:
    """Make one environment; BadRequest with a remedy if it cannot be made or trained on."""
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
    except BaseException as error:  # the environment's code may raise anything, even SystemExit
        plain = message_of(error) if isinstance(error, Exception) else ""
        reason = plain or describe_raised(error)
        remedy = f"{config.id} cannot be made here: {reason}"
        if config.kwargs and isinstance(error, TypeError):
            raise BadRequest("env.kwargs", config.kwargs, remedy) from error
        hint = "; env.kwargs={...} gives it arguments" * isinstance(error, TypeError)
        raise BadRequest(key, value, f"{remedy}{hint}") from error


def _made(config: EnvConfig, key: str, value: str | None) -> CheckedEnv:
    with warnings.catch_warnings():  # Gymnasium warns of old versions, once per environment
        warnings.filterwarnings("ignore", module=r"gymnasium\.")
        env: gym.Env[Any, Any] = gym.make(
            config.id,
            max_episode_steps=config.max_episode_steps,
            disable_env_checker=True,
            **(config.kwargs or {}),
        )
        if _step_limit(env) is None:  # placed as by gym.make: inside wrappers that repeat actions
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
    """The description of `env` that a policy needs."""
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
