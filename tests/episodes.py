"""The steps of an environment as rows of bytes, to be compared bit for bit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from safetensors.torch import load, save

from spikerl.envs.checked import CheckedEnv
from spikerl.envs.config import EnvConfig
from spikerl.envs.make import make_env
from spikerl.envs.snapshot import Snapshot


def make(env_id: str, max_episode_steps: int | None = None) -> CheckedEnv:
    return make_env(
        EnvConfig(
            name="gym",
            version=None,
            id=env_id,
            max_episode_steps=max_episode_steps,
            vectorizer="sync",
        )
    )


def random_actions(space: gym.Space[Any], count: int, seed: int) -> np.ndarray:
    if isinstance(space, gym.spaces.Discrete):
        return np.random.default_rng(seed).integers(space.n, size=count)
    assert isinstance(space, gym.spaces.Box)
    size = (count, *space.shape)
    return np.random.default_rng(seed).uniform(space.low, space.high, size).astype(np.float32)


def rows(env: CheckedEnv, actions: Iterable[np.ndarray]) -> list[tuple[bytes, bool, bool]]:
    """For each step: the bytes of its observation, of its reward and, where an episode ends, of the
    next one's first observation; whether it terminated; whether it was truncated.
    """
    found = []
    for action in actions:
        obs, rew, terminated, truncated, _ = env.step(action)
        seen = obs.tobytes() + np.float64(rew).tobytes()
        if terminated or truncated:
            seen += env.reset()[0].tobytes()
        found.append((seen, terminated, truncated))
    return found


def through_file(state: Snapshot) -> Snapshot:
    """`state` as it is after it was written with safetensors and read again."""
    tensors = {name: torch.from_numpy(array) for name, array in state.items()}
    return {name: tensor.numpy() for name, tensor in load(save(tensors)).items()}
