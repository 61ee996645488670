"""Datasets as Minari lays them out, written by hand with h5py alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from spikerl.envs.config import EnvConfig
from spikerl.envs.make import make_env, task_of
from spikerl.types import Task

Fields = dict[str, np.ndarray]


def task_for(env: EnvConfig) -> Task:
    made = make_env(env)
    made.close()
    return task_of(made)


def episode(steps: int, first: float = 0.0, terminated: bool = True) -> Fields:
    """An episode of InvertedPendulum: observations count up from `first`, actions go from the lower
    bound to the upper.
    """
    ends = np.arange(steps) == steps - 1
    return {
        "observations": first + np.arange((steps + 1) * 4, dtype=np.float64).reshape(-1, 4),
        "actions": np.linspace(-3.0, 3.0, steps, dtype=np.float32).reshape(-1, 1),
        "rewards": first + np.arange(steps, dtype=np.float64),
        "terminations": ends & terminated,
        "truncations": ends & (not terminated),
    }


def write(
    folder: Path,
    episodes: Sequence[Fields],
    touch: Callable[[Any], None] = lambda file: None,
    **metadata: Any,
) -> Path:
    """A dataset of InvertedPendulum-v5; `touch` changes its HDF5 file, `metadata` its metadata."""
    h5py: Any = import_module("h5py")
    (folder / "data").mkdir(parents=True)
    with h5py.File(folder / "data" / "main_data.hdf5", "w") as file:
        for i, fields in enumerate(episodes):
            for name, values in fields.items():
                file[f"episode_{i}/{name}"] = values
        touch(file)
    space = {"type": "Box", "dtype": "float32", "shape": [1], "low": [-3.0], "high": [3.0]}
    facts = {
        "data_format": "hdf5",
        "total_episodes": len(episodes),
        "total_steps": sum(len(fields["rewards"]) for fields in episodes),
        "env_spec": json.dumps({"id": "InvertedPendulum-v5", "kwargs": {}}),
        "action_space": json.dumps(space),
    }
    text = json.dumps({**facts, **metadata})
    (folder / "data" / "metadata.json").write_text(text)
    return folder
