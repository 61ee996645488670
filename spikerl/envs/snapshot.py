"""The exact state of one environment as plain arrays, to be saved and restored without pickle.

What a snapshot holds:
- `kind`: the environment's class, as UTF-8.
- `random`: the words of its random generator; resets draw from it.
- `elapsed`: the number of steps that each time limit has counted.
- MuJoCo: `model`, the compiler's signature; `integration`, MuJoCo's integration state (time,
  positions, velocities, activations, controls, warm start of the solver, applied forces, ...);
  `xpos` and `xipos`, the positions of the bodies before the last substep. Ant and Reacher-v4 (xpos)
  and Humanoid (xipos) read these before they step, and they cannot be computed from the rest.
- Classic control: `state`, that of Pendulum (angle and speed), CartPole, Acrobot or MountainCar;
  CartPole: `beyond`, steps since its pole fell, -1 while it stands.
- MinAtar: `mersenne` and `game`, see spikerl/envs/minatar.py.

Left out, because it is computed anew before anything reads it: all else in MjData, goals (which are
among the positions), the spaces' generators (nothing samples a space), and rendering.

Arrays are numpy's, not tensors: numpy sends bytes between processes, torch a handle on shared
memory that becomes invalid when its sender ends. Their types exist in torch and safetensors too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import gymnasium as gym
import mujoco
import numpy as np
from gymnasium.envs.classic_control.acrobot import AcrobotEnv
from gymnasium.envs.classic_control.cartpole import CartPoleEnv
from gymnasium.envs.classic_control.mountain_car import MountainCarEnv
from gymnasium.envs.classic_control.pendulum import PendulumEnv
from gymnasium.envs.mujoco import MujocoEnv
from gymnasium.wrappers import (
    ClipReward,
    FlattenObservation,
    OrderEnforcing,
    RescaleAction,
    RescaleObservation,
    ReshapeObservation,
    TimeLimit,
)

Snapshot = dict[str, np.ndarray]

INTEGRATION = int(mujoco.mjtState.mjSTATE_INTEGRATION)  # type: ignore[attr-defined]
SLEEP = int(mujoco.mjtEnableBit.mjENBL_SLEEP)  # type: ignore[attr-defined]
READ_BEFORE_STEP = ("xpos", "xipos")
WORD = (1 << 64) - 1
# Number of entries of their states.
CLASSIC = {PendulumEnv: 2, CartPoleEnv: 4, AcrobotEnv: 4, MountainCarEnv: 2}
STATELESS = (
    *(ClipReward, FlattenObservation, RescaleAction),
    *(RescaleObservation, ReshapeObservation),
)


class Restorable(gym.Env[Any, Any]):
    """An environment of this program that saves and restores its own inner state."""

    def inner_state(self) -> Snapshot:
        raise NotImplementedError

    def restore_inner(self, state: Snapshot) -> None:
        """Restore; ValueError says why a state does not fit, and then nothing has changed."""
        raise NotImplementedError


def snapshot(env: gym.Env[Any, Any]) -> Snapshot | None:
    """The exact state; None if the kind is unknown or before the first reset, when the caller must
    go on from a reset.
    """
    layers = _layers(env)
    if layers is None or not layers.started:
        return None
    inner = _inner(layers.base)  # first, since np_random of an unknown kind must not be touched
    random = None if inner is None else _words(layers.base.np_random)
    if random is None or inner is None:
        return None
    elapsed = np.array([limit._elapsed_steps for limit in layers.limits], np.int64)
    return {"kind": _kind(layers.base), "random": random, "elapsed": elapsed, **inner}


def restore(env: gym.Env[Any, Any], state: Snapshot) -> None:
    """Bring `env`, fresh or used, to the state of a snapshot; it may then step without a reset.

    ValueError says why a state does not fit; `env` is then unchanged.
    """
    layers = _layers(env)
    inner = None if layers is None else _inner(layers.base)
    if layers is None or inner is None:
        raise ValueError(f"{env} is of a kind that cannot be restored")
    base = layers.base
    fresh = {"random": np.zeros(6, np.int64), "elapsed": np.zeros(len(layers.limits), np.int64)}
    _check_fit(state, {"kind": _kind(base), **fresh, **inner})
    if isinstance(base, Restorable):
        base.restore_inner(state)

    for limit, steps in zip(layers.limits, state["elapsed"], strict=True):
        limit._elapsed_steps = int(steps)
    for order in layers.orders:
        order._has_reset = True
    base.np_random = _generator(state["random"])
    if isinstance(base, Restorable):
        return
    if type(base) in CLASSIC:
        base.state = np.array(state["state"])  # type: ignore[attr-defined]
        if isinstance(base, CartPoleEnv):
            beyond = int(state["beyond"][0])
            steps = None if beyond < 0 else beyond
            base.steps_beyond_terminated = steps  # type: ignore[assignment]
        return
    assert isinstance(base, MujocoEnv)
    mujoco.mj_resetData(base.model, base.data)  # type: ignore[attr-defined]
    whole = state["integration"]
    mujoco.mj_setState(base.model, base.data, whole, INTEGRATION)  # type: ignore[attr-defined]
    for name in READ_BEFORE_STEP:
        getattr(base.data, name)[:] = state[name]


class _Layers(NamedTuple):
    base: gym.Env[Any, Any]
    limits: list[Any]  # TimeLimit
    orders: list[Any]  # OrderEnforcing

    @property
    def started(self) -> bool:
        return all(limit._elapsed_steps is not None for limit in self.limits)


def _layers(env: gym.Env[Any, Any]) -> _Layers | None:
    """The base environment and its wrappers; None if a wrapper may have state unknown here."""
    limits, orders = [], []
    while isinstance(env, gym.Wrapper):
        if type(env) is TimeLimit:
            limits.append(env)
        elif type(env) is OrderEnforcing:
            orders.append(env)
        elif type(env) not in STATELESS:
            return None
        env = env.env
    return _Layers(env, limits, orders) if limits else None


def _inner(base: gym.Env[Any, Any]) -> Snapshot | None:
    """The environment's own state between steps; None if it is not known."""
    if isinstance(base, Restorable):
        return base.inner_state()
    if type(base) in CLASSIC:
        held = getattr(base, "state", None)
        held = np.zeros(CLASSIC[type(base)]) if held is None else np.array(held, np.float64)
        if not isinstance(base, CartPoleEnv):
            return {"state": held}
        beyond = base.steps_beyond_terminated
        return {"state": held, "beyond": np.array([-1 if beyond is None else beyond], np.int64)}
    ours = type(base).__module__.startswith("gymnasium.envs.mujoco.")
    if not (isinstance(base, MujocoEnv) and ours):
        return None
    model, data = base.model, base.data
    # Sleeping trees, flexes and plugins may keep more than the integration state.
    if model.opt.enableflags & SLEEP or model.nflex or model.nplugin:
        return None
    integration = np.empty(mujoco.mj_stateSize(model, INTEGRATION))  # type: ignore[attr-defined]
    mujoco.mj_getState(model, data, integration, INTEGRATION)  # type: ignore[attr-defined]
    signature = np.array([model.signature], np.uint64).view(np.int64)
    bodies = {name: np.array(getattr(data, name)) for name in READ_BEFORE_STEP}
    return {"model": signature, "integration": integration, **bodies}


def _kind(base: gym.Env[Any, Any]) -> np.ndarray:
    name = f"{type(base).__module__}.{type(base).__qualname__}"
    return np.frombuffer(name.encode(), np.uint8).copy()


def _words(generator: np.random.Generator) -> np.ndarray | None:
    """PCG64's state as six words: two 128-bit numbers, low words first, whether a 32-bit draw is
    buffered, and that draw. None for other generators.
    """
    if type(generator.bit_generator) is not np.random.PCG64:
        return None
    whole = generator.bit_generator.state
    pcg = [whole["state"][name] >> shift & WORD for name in ("state", "inc") for shift in (0, 64)]
    words = np.array([*pcg, whole["has_uint32"], whole["uinteger"]], np.uint64)
    return words.view(np.int64)


def _generator(words: np.ndarray) -> np.random.Generator:
    low, high, inc_low, inc_high, has_uint32, draw = (int(word) & WORD for word in words)
    bits = np.random.PCG64(0)
    bits.state = {
        "bit_generator": "PCG64",
        "state": {"state": high << 64 | low, "inc": inc_high << 64 | inc_low},
        "has_uint32": has_uint32,
        "uinteger": draw,
    }
    return np.random.Generator(bits)


def _check_fit(state: Snapshot, own: Snapshot) -> None:
    """Raise ValueError unless `state` has the form of `own`, a snapshot of the environment."""
    if "kind" in state and not np.array_equal(state["kind"], own["kind"]):
        raise ValueError(f"the snapshot is of {_text(state)}, the environment is {_text(own)}")
    if missing := sorted(own.keys() - state.keys()):
        raise ValueError(f"the snapshot lacks {', '.join(missing)}")
    if unknown := sorted(state.keys() - own.keys()):
        raise ValueError(f"the snapshot has {', '.join(unknown)}, which {_text(own)} has not")
    if "model" in own and not np.array_equal(state["model"], own["model"]):
        raise ValueError("the snapshot is of another MuJoCo model")
    if (state["elapsed"] < 0).any():
        raise ValueError("the snapshot counts steps below 0")
    for name, want in own.items():
        got = state[name]
        if name == "game" and got.dtype == np.uint8 and got.ndim == 1:
            continue  # a text, of any length
        if (got.dtype, got.shape) != (want.dtype, want.shape):
            raise ValueError(
                f"the snapshot's {name} is {got.dtype} {got.shape}, not {want.dtype} {want.shape}"
            )


def _text(state: Snapshot) -> str:
    return bytes(np.asarray(state["kind"], np.uint8)).decode(errors="replace")
