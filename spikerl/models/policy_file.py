"""A policy as two files: `policy.json` holds the plain data and `policy.safetensors` the tensors.

Loading either executes nothing.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import torch
from safetensors.torch import load
from safetensors.torch import save as tensor_bytes
from torch import Tensor, nn

from spikerl import plugins
from spikerl.errors import BadRequest, first_line
from spikerl.files import json_bytes, read_bytes, read_json
from spikerl.models.actor import Actor, SpikingActor
from spikerl.models.actor_config import ActorConfig
from spikerl.models.compression import Compression
from spikerl.models.networks import SequenceActor, modules_of, parse_actor
from spikerl.models.normalizer import RunningNorm
from spikerl.models.proposals import Proposer, build_policy
from spikerl.models.sequence import SequenceConfig
from spikerl.schema import parse
from spikerl.types import MAX_EPISODE_STEPS, Entry, Task

SCHEMA = 3  # 2: input-major weights; 3: neurons have a reset and a choice of surrogate
MAX_BYTES = 1 << 20  # of a policy.json; action bounds take most of it
MAX_TENSORS = 1 << 30


class Saved(NamedTuple):
    """What the two files hold."""

    task: Task
    config: ActorConfig
    network: Actor | SequenceActor | Proposer
    norm: RunningNorm
    trained_with: dict[str, str]  # package versions
    compression: Compression | None


def to_bytes(saved: Saved) -> dict[str, bytes]:
    """The files, by name."""
    tensors = {f"actor.{k}": v.detach().clone() for k, v in saved.network.state_dict().items()}
    tensors |= {f"norm.{k}": v for k, v in saved.norm.state().items()}
    data = {
        "schema": SCHEMA,
        **task_data(saved.task),
        "norm_clip": saved.norm.clip,
        **_parts(saved.config),
        "versions": saved.trained_with,
    }
    if saved.compression is not None:
        data["compression"] = asdict(saved.compression)
    if needed := plugins.versions_of(modules_of(saved.config)):
        data["plugins"] = needed
    return {"policy.safetensors": tensor_bytes(tensors), "policy.json": json_bytes(data)}


def read_files(folder: Path, *, key: str, kernel: str) -> Saved:
    """Read both files, onto the CPU; BadRequest for `key` unless everything in them is valid."""
    try:
        data = read_json(folder / "policy.json", MAX_BYTES)
        if "${" in json.dumps(data):
            raise ValueError("policy.json refers to something outside it")
        # Not memory-mapped: overwriting a mapped file would crash this process.
        tensors = load(read_bytes(folder / "policy.safetensors", MAX_TENSORS))
    except (OSError, ValueError, KeyError, RecursionError, safetensors.SafetensorError) as error:
        raise BadRequest(key, folder, f"its policy cannot be read: {first_line(error)}") from None
    data = _current(data, folder, key)
    try:
        task = read_task(data)
        clip = float(data["norm_clip"])
        trained_with = {str(k): str(v) for k, v in dict(data["versions"]).items()}
        if not trained_with:
            raise ValueError("versions")
        if not all(text.isprintable() for text in trained_with.values()):
            raise ValueError("versions, which cannot be printed")
        if not (clip > 0.0 and np.isfinite(clip)):
            raise ValueError("norm_clip")
        if len(dict(data["actor"]).get("hidden_sizes", [])) > len(tensors):
            raise ValueError("hidden_sizes")
        config = parse_actor(data)
        if isinstance(config.actor, SequenceConfig) and config.conditioning is None:
            raise KeyError("conditioning")
        with torch.device("meta"):  # so that a hostile size in the JSON allocates nothing
            network = build_policy(config, task.obs_dim, task.act_dim, kernel=kernel)
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise BadRequest(key, folder, f"policy.json lacks or garbles {first_line(error)}") from None
    weights = {k.removeprefix("actor."): v for k, v in tensors.items() if k.startswith("actor.")}
    moments = {k.removeprefix("norm."): v for k, v in tensors.items() if k.startswith("norm.")}
    others = len(tensors) - len(weights) - len(moments)
    if unsound := _unsound(weights, moments, others, network, task):
        raise BadRequest(key, folder, unsound)
    compression = None
    if (compressed := data.get("compression")) is not None:
        try:
            compression = _read_compression(compressed, network, weights, task)
        except (TypeError, ValueError) as error:
            raise BadRequest(key, folder, f"policy.json garbles {error}") from None
    network.load_state_dict(weights, assign=True)
    if compression is not None and isinstance(network, SpikingActor):
        network.early_exit = compression.early_exit
    norm = RunningNorm(task.obs_dim, clip)
    norm.load(moments)
    return Saved(task, config, network, norm, trained_with, compression)


def _current(data: Any, folder: Path, key: str) -> dict[str, Any]:
    """The JSON; BadRequest unless it has this version's schema and its plugins are installed."""
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        schema = data.get("schema") if isinstance(data, dict) else None
        raise BadRequest(
            key, folder, f"policy.json has schema {schema}; this version reads {SCHEMA}"
        )
    needed = data.get("plugins", {})
    if not isinstance(needed, dict):
        raise BadRequest(key, folder, "policy.json garbles plugins")
    plugins.check_there(key, folder, needed)
    return data


def _unsound(
    weights: dict[str, Tensor],
    moments: dict[str, Tensor],
    others: int,
    network: nn.Module,
    task: Task,
) -> str | None:
    """Why the tensors are not those of this policy, else None; `others`: number of unknown ones."""
    expected = {name: (p.shape, p.dtype) for name, p in network.state_dict().items()}
    if {name: (p.shape, p.dtype) for name, p in weights.items()} != expected:
        return "policy.safetensors does not fit the shapes in policy.json"
    wanted = {"count": (), "mean": (task.obs_dim,), "var": (task.obs_dim,)}
    if {name: tuple(v.shape) for name, v in moments.items()} != wanted:
        return "the observation normaliser is missing or does not fit"
    types = {"count": torch.int64, "mean": torch.float64, "var": torch.float64}
    if {name: v.dtype for name, v in moments.items()} != types:
        return "the observation normaliser has other number types"
    if others:
        return "policy.safetensors holds tensors of no policy"
    if not all(v.isfinite().all() for v in (*weights.values(), *moments.values())):
        return "policy.safetensors holds a NaN or an infinity"
    if moments["count"] < 0 or (moments["var"] < 0).any():
        return "the observation normaliser has a negative count or variance"
    return None


def _read_compression(
    data: Any,
    network: Actor | SequenceActor | Proposer,
    weights: dict[str, Tensor],
    task: Task,
) -> Compression:
    """Read and check; raises TypeError or ValueError with the name of the invalid key."""
    if not isinstance(data, dict):
        raise TypeError("compression")
    compression: Compression = parse(Compression, data, key="compression")
    if isinstance(network, Proposer | SequenceActor):
        raise ValueError("compression")
    compression.check(network, weights, task)
    return compression


def task_data(task: Task) -> dict[str, Any]:
    """The task as plain data, which `read_task` reads."""
    return {
        "env_id": task.env_id,
        "obs_shape": list(task.obs_shape),
        "act_shape": list(task.act_shape),
        "act_low": task.act_low.tolist(),
        "act_high": task.act_high.tolist(),
        "max_episode_steps": task.max_episode_steps,
        **_optional(task),
    }


def read_task(data: dict[str, Any]) -> Task:
    """Raises KeyError, TypeError, ValueError or OverflowError with the name of the invalid key."""
    task = Task(
        str(data["env_id"]),
        tuple(int(n) for n in data["obs_shape"]),
        tuple(int(n) for n in data["act_shape"]),
        np.array(data["act_low"], np.float64),
        np.array(data["act_high"], np.float64),
        int(data["max_episode_steps"]),
        **_read_optional(data),
    )
    if not task.env_id.isprintable():
        raise ValueError("env_id, which cannot be printed")
    if min(*task.obs_shape, *task.act_shape, task.max_episode_steps, 1) < 1:
        raise ValueError("obs_shape, act_shape or max_episode_steps")
    if task.max_episode_steps > MAX_EPISODE_STEPS:
        raise ValueError(f"max_episode_steps, which is above {MAX_EPISODE_STEPS}")
    bounded = (task.act_dim if task.choices is None else 0,)
    if task.act_low.shape != bounded or task.act_high.shape != bounded:
        raise ValueError("act_low and act_high, which do not fit act_shape")
    if not np.isfinite([task.act_low, task.act_high]).all():
        raise ValueError("act_low or act_high, which are not finite")
    if not (task.act_low < task.act_high).all():
        raise ValueError("act_low and act_high, which leave no room")
    return task


def _parts(config: ActorConfig) -> dict[str, Any]:
    """The actor's config groups, without the spike costs and pruning, which only training reads."""
    parts = {group: part for group, part in asdict(config).items() if part is not None}
    actor = parts["actor"].items()
    return parts | {"actor": {k: v for k, v in actor if not k.startswith(("spike_cost", "prune"))}}


def _optional(task: Task) -> dict[str, Any]:
    """Keys that only some tasks have."""
    layout = [[list(entry.path), list(entry.shape), entry.start] for entry in task.layout]
    every = {
        "act_dtype": task.act_dtype if task.act_dtype != "float32" else None,
        "act_choices": [task.choices.start, task.choices.stop] if task.choices else None,
        "obs_layout": layout,
        "obs_bytes": task.obs_bytes,
        "env_kwargs": dict(task.env_kwargs),
        "env_wrappers": list(task.env_wrappers),
    }
    return {key: value for key, value in every.items() if value}


def _two(value: Any) -> tuple[int, int]:
    first, last = value
    if not all(type(n) is int and abs(n) < 1 << 62 for n in value):
        raise ValueError("act_choices, which are not whole numbers")
    return first, last


def _read_optional(data: dict[str, Any]) -> dict[str, Any]:
    layout = tuple(
        Entry(tuple(path), tuple(int(n) for n in shape), None if start is None else int(start))
        for path, shape, start in data.get("obs_layout", [])
    )
    obs_shape = [int(n) for n in data["obs_shape"]]
    if layout and [sum(entry.size for entry in layout)] != obs_shape:
        raise ValueError("obs_layout, which does not fit obs_shape")
    names = [name for entry in layout for name in entry.path]
    if not all(type(name) is int or (type(name) is str and name.isprintable()) for name in names):
        raise ValueError("obs_layout, whose names cannot be printed")
    if type(data.get("obs_bytes", False)) is not bool:
        raise ValueError("obs_bytes")
    if data.get("act_dtype", "float32") not in ("float16", "float32"):
        raise ValueError("act_dtype")
    kwargs, wrappers = data.get("env_kwargs", {}), data.get("env_wrappers", [])
    if not isinstance(kwargs, dict) or not isinstance(wrappers, list):
        raise ValueError("env_kwargs or env_wrappers")
    choices = range(*_two(data["act_choices"])) if "act_choices" in data else None
    if choices is not None and (len(choices) < 2 or data["act_shape"] != []):
        raise ValueError("act_choices, which are fewer than 2 or have a shape")
    return {
        "act_dtype": data.get("act_dtype", "float32"),
        "choices": choices,
        "layout": layout,
        "obs_bytes": data.get("obs_bytes", False),
        "env_kwargs": kwargs,
        "env_wrappers": tuple(wrappers),
    }
