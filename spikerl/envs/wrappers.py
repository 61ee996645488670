"""Gymnasium's own wrappers, by name and with plain arguments.

Accepts only wrappers that transform what passes through them and keep nothing from one episode to
the next, so that an evaluation, a resume and a loaded policy see the same task. None of them writes
files, opens windows or calls functions, since names may come from an untrusted file.
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
MOST = 10_000  # bound of an integer argument: frames, steps, pixels
MOST_VALUES = 4_000_000  # bound of the product of a shape


class MaxAndSkip(gym.wrappers.MaxAndSkipObservation[Any, Any, Any]):
    """Takes the maximum over frames of the current step alone, also if an episode ends within it.
    Gymnasium's wrapper then includes stale frames of earlier steps, even of another episode.
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
    """Raise BadRequest unless these are accepted wrappers with arguments of accepted sizes."""
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
        except Exception as error:  # each wrapper checks its arguments in its own way
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
    """A list as the wrapper requires it: bounds as an array, a shape as a tuple."""
    if not isinstance(value, list | tuple):
        return value
    return np.array(value, np.float32) if wrapper.startswith("Rescale") else tuple(value)
