"""Gymnasium's own wrappers, by name and with plain arguments.

Only those that map what passes through them, and remember nothing from one episode to the next: an
evaluation, a resume and a loaded policy then see the same task. None of them writes files, opens
windows or calls functions, since a name may come from somebody else's file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np

from spikerl.errors import BadRequest, first_line

ACCEPTED = (
    "AtariPreprocessing",
    "ClipReward",
    "DelayObservation",
    "DtypeObservation",
    "FilterObservation",
    "FlattenObservation",
    "FrameStackObservation",
    "GrayscaleObservation",
    "MaxAndSkipObservation",
    "RepeatAction",
    "RescaleAction",
    "RescaleObservation",
    "ReshapeObservation",
    "ResizeObservation",
    "StickyAction",
    "TimeAwareObservation",
)
INSTEAD = {
    "ClipAction": "actions are always clipped",
    "NormalizeObservation": "algo.norm_interval normalises, and the policy keeps the moments",
    "NormalizeReward": "env.reward_scale scales by a constant",
    "TimeLimit": "set env.max_episode_steps",
}
MOST = 10_000  # of a whole number among the arguments: frames, steps, pixels
MOST_VALUES = 4_000_000  # of a shape


class MaxAndSkip(gym.wrappers.MaxAndSkipObservation[Any, Any, Any]):
    """Where an episode ends amid a step, this sees the frames of that step alone. Gymnasium's has
    those of the step before, of another episode too, in the place of what did not come any more.
    """

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        frames, total = list[np.ndarray](), 0.0
        for _ in range(self._skip):
            obs, rew, terminated, truncated, info = self.env.step(action)
            frames = [*frames[-1:], np.array(obs, self._obs_buffer.dtype)]
            total += float(rew)
            if terminated or truncated:
                break
        return np.max(frames, axis=0), total, terminated, truncated, info


OWN = {"MaxAndSkipObservation": MaxAndSkip}


def check_wrappers(wrappers: Sequence[Any]) -> None:
    """BadRequest for what is not a list of accepted wrappers."""
    for one in wrappers:
        name, arguments = _parts(one)
        if name not in ACCEPTED:
            instead = INSTEAD.get(name, f"one of {', '.join(ACCEPTED)}")
            raise BadRequest("env.wrappers", name, f"not accepted; {instead}")
        for key, value in arguments.items():
            counts = [n for n in (value if isinstance(value, list) else [value]) if type(n) is int]
            if any(abs(n) > MOST for n in counts):
                raise BadRequest("env.wrappers", name, f"give {key} of at most {MOST}")
            if math.prod(counts) > MOST_VALUES:
                raise BadRequest(
                    "env.wrappers", name, f"give {key} of at most {MOST_VALUES} values"
                )


def wrapped(env: gym.Env[Any, Any], wrappers: Sequence[Any]) -> gym.Env[Any, Any]:
    for one in wrappers:
        name, arguments = _parts(one)
        try:
            plain = {key: _argument(name, value) for key, value in arguments.items()}
            env = (OWN.get(name) or getattr(gym.wrappers, name))(env, **plain)
        except Exception as error:  # each checks its arguments in its own way
            reason = first_line(error)
            if isinstance(error, gym.error.DependencyNotInstalled):
                reason = "it needs opencv; pip install 'spikerl[atari]'"
            raise BadRequest("env.wrappers", name, f"does not fit here: {reason}") from error
    return env


def _parts(one: Any) -> tuple[str, dict[str, Any]]:
    if isinstance(one, str):
        return one, {}
    if not isinstance(one, Mapping) or not isinstance(one.get("name"), str):
        raise BadRequest("env.wrappers", one, "give a list such as [{name: RescaleAction, ...}]")
    return str(one["name"]), {str(key): value for key, value in one.items() if key != "name"}


def _argument(wrapper: str, value: Any) -> Any:
    """A list as the wrapper wants it: bounds as an array, a shape as a tuple."""
    if not isinstance(value, list | tuple):
        return value
    return np.array(value, np.float32) if wrapper.startswith("Rescale") else tuple(value)
