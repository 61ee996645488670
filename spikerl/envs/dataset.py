"""Recorded transitions of a task, in Minari's format, written and read with h5py alone.

FOLDER/data/metadata.json, and FOLDER/data/main_data.hdf5 whose group episode_i holds observations
(T + 1, *obs_shape), actions (T, *act_shape), rewards, terminations and truncations (T,). A folder
may be untrusted: nothing in it is executed, no link in HDF5 is followed, and every size, type and
number is checked before it is used.

Shape legend   T steps of an episode, O observation entries, A action entries.
"""

from __future__ import annotations

import copy
import errno
import json
import math
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np

from spikerl.envs.checked import are_bytes
from spikerl.envs.vector import Steps
from spikerl.errors import BadRequest
from spikerl.files import checksum_of, read_json, write_json
from spikerl.schema import FLOAT32_MAX
from spikerl.types import MAX_EPISODE_STEPS, Task

METADATA, MAIN = "data/metadata.json", "data/main_data.hdf5"
VERSION = "0.5.4"  # the version of Minari whose format this is
MAX_BYTES = 1 << 24  # of metadata.json
FIELDS = ("observations", "actions", "rewards", "terminations", "truncations")
SHUFFLE, GZIP, CHECKSUM = 2, 1, 3  # accepted HDF5 filters
FILTERS = (SHUFFLE, GZIP, CHECKSUM)  # in the order in which h5py applies them
CHECKSUM_BYTES = 4
DEFLATED = 1032  # largest ratio of unpacked to packed size in deflate
MARGIN = 1 << 20  # bytes for what HDF5 writes beside the numbers
ROUNDING = 1e-5  # tolerance for actions outside their bounds, in units of half their range


class Recorded(NamedTuple):
    """One episode, whole or cut off."""

    obs: np.ndarray  # (T + 1, O), of the task's obs_dtype
    act: np.ndarray  # (T, A) in [-1, 1]; one-hot for discrete actions
    rew: np.ndarray  # (T,)
    terminated: np.ndarray  # (T,) bool
    truncated: np.ndarray  # (T,) bool
    whole: bool = True  # from a reset to its end; other programs' episodes count as whole

    def steps(self) -> Steps:
        """The transitions; the last one ends the episode, whether or not a flag says so."""
        last = self.terminated | self.truncated
        last[-1] = True
        return Steps(self.obs[:-1], self.act, self.rew, self.obs[1:], self.terminated, last)


def check_extra() -> None:
    """Raise BadRequest if h5py is not installed."""
    if find_spec("h5py") is None:
        remedy = "h5py is not installed; pip install 'spikerl[offline]'"
        raise BadRequest("dataset", "hdf5", remedy)


class Writer:
    """Writes episodes into `folder`, a new folder that nobody else uses yet."""

    def __init__(self, folder: Path, task: Task) -> None:
        self.folder, self.task, self.spec = folder, task, environment_of(task)
        self.episodes = self.steps = 0
        (folder / "data").mkdir()
        h5py: Any = import_module("h5py")
        self.file = h5py.File(folder / MAIN, "w", track_order=True)

    def add(self, seed: int | None, obs: np.ndarray, act: np.ndarray, rew: np.ndarray,
            terminated: np.ndarray, truncated: np.ndarray, whole: bool = True) -> None:  # fmt: skip
        """Write an episode; `obs` (T + 1, O), `act` in the environment's units, the others (T,).

        `whole`: it is not a piece of an episode. `seed`: that of its reset, if any.
        """
        obs = obs.astype(self.task.obs_dtype, copy=False)
        self._check_room(obs.nbytes + act.nbytes + rew.nbytes)
        group = self.file.create_group(f"episode_{self.episodes}")
        group.attrs.update({"id": self.episodes, "total_steps": len(rew)})
        if not whole:
            group.attrs["whole"] = False
        if seed is not None:
            group.attrs["seed"] = seed
        shaped = obs.reshape(len(obs), *self.task.obs_shape)
        for name, rows in zip(FIELDS, (shaped, act, rew, terminated, truncated), strict=True):
            group.create_dataset(name, data=rows)
        self.episodes += 1
        self.steps += len(rew)

    def _check_room(self, needed: int) -> None:
        """Raise OSError before the disk is full, when HDF5 could no longer close its file."""
        if shutil.disk_usage(self.folder).free < 2 * needed + MARGIN:
            self.file.close()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def finish(self, name: str, recipe: Mapping[str, Any]) -> None:
        """Write the metadata, which completes the dataset; `recipe`: how it was made."""
        self.file.close()
        size = (self.folder / MAIN).stat().st_size
        low, high = (0, 255) if self.task.obs_bytes else (-math.inf, math.inf)
        dtype = np.dtype(self.task.obs_dtype).name
        facts = {
            "dataset_id": name,
            "minari_version": VERSION,
            "data_format": "hdf5",
            "jpeg_encoding": False,
            "total_episodes": self.episodes,
            "total_steps": self.steps,
            "dataset_size": round(size / 1e6, 1),  # MB, as in Minari
            "observation_space": box(low, high, self.task.obs_shape, dtype),
            "action_space": action_space(self.task),
            "env_spec": self.spec,
            "env_wrappers": list(self.task.env_wrappers),
            "sha256": checksum_of(self.folder / MAIN),
            "recipe": dict(recipe),
        }
        write_json(self.folder / METADATA, facts)


def environment_of(task: Task) -> str:
    """Gymnasium's specification of the task as JSON; ValueError if that cannot be serialised."""
    spec = copy.deepcopy(gym.spec(task.env_id))
    spec.kwargs = {**spec.kwargs, **task.env_kwargs}
    spec.max_episode_steps = task.max_episode_steps
    try:
        return spec.to_json()
    except Exception as error:  # an entry point that is a function, arguments that are objects
        remedy = "register it with entry_point='MODULE:CLASS', and arguments that are data"
        raise ValueError(f"its environment cannot be written down: {error}; {remedy}") from error


def box(low: Any, high: Any, shape: Sequence[int], dtype: str) -> str:
    """A Box space in Minari's JSON."""
    bounds = {
        name: np.broadcast_to(np.reshape(bound, shape) if np.ndim(bound) else bound, shape).tolist()
        for name, bound in (("low", low), ("high", high))
    }
    return json.dumps({"type": "Box", "dtype": dtype, "shape": list(shape), **bounds})


def action_space(task: Task) -> str:
    if task.choices is not None:
        space = {"type": "Discrete", "dtype": "int64", "start": task.choices.start}
        return json.dumps({**space, "n": len(task.choices)})
    return box(task.act_low, task.act_high, task.act_shape, task.act_dtype)


@dataclass(frozen=True)
class Dataset:
    """A dataset whose metadata and sizes fit a task; its numbers are checked as they are read."""

    folder: Path
    task: Task
    lengths: tuple[int, ...]  # steps of each episode
    sha256: str  # of main_data.hdf5

    @classmethod
    def open(cls, folder: Path, task: Task, most_bytes: int) -> Dataset:
        """Open and check; BadRequest if it is missing, damaged, of another task, or larger than
        `most_bytes` in memory.
        """
        check_extra()
        main = folder / MAIN
        with refusing(folder):
            if not main.is_file():
                raise ValueError("no dataset there; give a folder that holds data/main_data.hdf5")
            try:
                metadata = read_json(folder / METADATA, MAX_BYTES)
            except ValueError as error:
                raise ValueError(f"its metadata.json cannot be read: {error}") from None
            if not isinstance(metadata, dict) or metadata.get("data_format") != "hdf5":
                raise ValueError("its metadata.json describes no HDF5 file")
            check_task(metadata, task)
            digest = checksum_of(main)
            if metadata.get("sha256", digest) != digest:
                raise ValueError("its main_data.hdf5 is not the one that metadata.json names")
            with opened(main) as file:
                lengths = tuple(length_of(group, task) for group in groups_of(file, metadata))
            row = task.row.columns * 4
            if (needed := sum(lengths) * row) > most_bytes:
                raise ValueError(
                    f"{sum(lengths)} transitions need {needed / 2**30:.3g} GiB; this machine has"
                    f" {most_bytes / 2**30:.3g}"
                )
        return cls(folder, task, lengths, digest)

    @property
    def transitions(self) -> int:
        return sum(self.lengths)

    def episodes(self) -> Iterator[Recorded]:
        """The episodes in order; BadRequest at the first invalid number."""
        with refusing(self.folder), opened(self.folder / MAIN) as file:
            for i, length in enumerate(self.lengths):
                group = member(file, f"episode_{i}")
                if length_of(group, self.task) != length:
                    raise ValueError(f"episode_{i} has changed")
                yield recorded(group, self.task)

    def check(self) -> None:
        """Read all episodes, so that every number is checked."""
        for _ in self.episodes():
            pass


@contextmanager
def refusing(folder: Path) -> Iterator[None]:
    """Turn whatever an untrusted file raises into a BadRequest."""
    try:
        yield
    except BadRequest:
        raise
    except Exception as error:  # h5py raises almost anything
        first = (str(error).splitlines() or [""])[0]
        reason = first if isinstance(error, ValueError) else f"cannot be read: {first[:200]}"
        raise BadRequest("dataset", folder, reason) from None


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    h5py: Any = import_module("h5py")
    with h5py.File(path, "r", locking=False) as file:
        yield file


def check_task(metadata: Mapping[str, Any], task: Task) -> None:
    """Raise ValueError unless the dataset was recorded on that task."""
    spec = json.loads(metadata.get("env_spec") or "null")
    if not isinstance(spec, dict) or not isinstance(spec.get("id"), str):
        raise ValueError("its metadata.json names no environment (env_spec)")
    if spec["id"] != task.env_id:
        other = f"it was recorded on {spec['id']:.100}, and this is {task.env_id}"
        raise ValueError(f"{other}; give that task by env=")
    ours = {**gym.spec(task.env_id).kwargs, **task.env_kwargs}
    for what, theirs, mine in (
        ("env.kwargs", spec.get("kwargs") or {}, ours),
        ("env.wrappers", metadata.get("env_wrappers", []), list(task.env_wrappers)),
    ):
        if theirs != json.loads(json.dumps(mine)):
            raise ValueError(f"it was recorded with {what}={theirs!s:.100}, and this is {mine}")
    if "action_space" in metadata and not same(metadata["action_space"], action_space(task)):
        raise ValueError(f"its actions have other bounds than those of {task.env_id} here")


def same(theirs: str, ours: str) -> bool:
    """Whether two spaces have the same type, shape and bounds."""
    one, other = json.loads(theirs), json.loads(ours)
    keys = (one.keys() | other.keys()) - {"dtype", "low", "high"}
    return all(one.get(key) == other.get(key) for key in keys) and all(
        np.shape(one[key]) == np.shape(other[key]) and np.allclose(one[key], other[key])
        for key in ("low", "high")
        if key in other
    )


def groups_of(file: Any, metadata: Mapping[str, Any]) -> Iterator[Any]:
    """The file's episodes in order; ValueError if their number is not that of the metadata."""
    count = metadata.get("total_episodes")
    if type(count) is not int or count < 1 or len(file) != count:
        raise ValueError(f"it holds {len(file)} episodes; metadata.json says {count!s:.20}")
    for i in range(count):
        yield member(file, f"episode_{i}")


def member(group: Any, name: str) -> Any:
    """The member of `group` by that name; ValueError if it is missing or a link."""
    h5py: Any = import_module("h5py")
    if name not in group or type(group.get(name, getlink=True)) is not h5py.HardLink:
        raise ValueError(f"{group.name.strip('/') or 'it'} lacks {name}, or it is a link")
    return group[name]


def length_of(group: Any, task: Task) -> int:
    """Number of steps of an episode; ValueError unless its fields fit the task and are stored in an
    accepted way.
    """
    h5py: Any = import_module("h5py")
    if not isinstance(group, h5py.Group):
        raise ValueError(f"{group.name} is not a group")
    rows = [member(group, name) for name in FIELDS]
    length = rows[2].shape[0] if isinstance(rows[2], h5py.Dataset) and rows[2].shape else 0
    if not 1 <= length <= MAX_EPISODE_STEPS:
        raise ValueError(f"{group.name} has {length} rewards; 1 to {MAX_EPISODE_STEPS} can be")
    act_shape = () if task.choices is not None else task.act_shape
    shapes = ((length + 1, *task.obs_shape), (length, *act_shape), *[(length,)] * 3)
    kinds = ("fiu", "iu" if task.choices is not None else "f", "fiu", "b", "b")
    for name, data, shape, kind in zip(FIELDS, rows, shapes, kinds, strict=True):
        if not isinstance(data, h5py.Dataset) or data.dtype.kind not in kind:
            raise ValueError(f"{group.name} has no {name} of numbers")
        if data.shape != shape:
            raise ValueError(f"{group.name} has {name} {data.shape}; {shape} are needed")
        filters, outside = filters_of(data), data.id.get_create_plist().get_external_count()
        known = [one for one in FILTERS if one in filters]  # each at most once, in that order
        if data.is_virtual or outside or filters != known:
            raise ValueError(f"{group.name} has {name} that lie elsewhere, or in a code of others")
        unpacked = math.prod(data.chunks or ()) * data.dtype.itemsize  # HDF5 reads whole chunks
        too_large = unpacked > max(data.nbytes, MARGIN)
        if too_large or data.nbytes > DEFLATED * data.id.get_storage_size():
            raise ValueError(
                f"{group.name} has {name} that would take more memory than it has data"
            )
    return int(length)


def filters_of(data: Any) -> list[int]:
    """The HDF5 filters that the numbers went through, in order."""
    made = data.id.get_create_plist()
    return [made.get_filter(i)[0] for i in range(made.get_nfilters())]


def check_pieces(data: Any) -> None:
    """Raise ValueError unless each chunk unpacks to exactly its size. HDF5 does not compare sizes:
    it allocates whatever a longer chunk needs, and reads beyond the end of a shorter one.
    """
    if data.chunks is None:
        return
    filters, room = filters_of(data), math.prod(data.chunks) * data.id.get_type().get_size()
    for piece in data.iter_chunks():
        place = tuple(side.start for side in piece)
        stored = data.id.get_chunk_info_by_coord(place)
        if stored.byte_offset is None:  # never written: it holds the fill value
            continue
        applied = [one for i, one in enumerate(filters) if not stored.filter_mask >> i & 1]
        size = stored.size - CHECKSUM_BYTES * (CHECKSUM in applied)
        if GZIP in applied:
            packed = data.id.read_direct_chunk(place)[1]
            size = len(zlib.decompressobj().decompress(packed, room + 1))
        if size != room:
            raise ValueError(f"{data.name} has a piece that is not of {room} bytes")


def recorded(group: Any, task: Task) -> Recorded:
    """Read an episode that `length_of` accepted; ValueError if a number in it is invalid."""
    for name in FIELDS:
        check_pieces(group[name])
    obs, act, rew, terminated, truncated = (group[name][()] for name in FIELDS)
    with np.errstate(over="ignore", invalid="ignore"):  # overflow is refused below
        if task.obs_bytes and not are_bytes(obs):
            what = "observations that are no whole numbers from 0 to 255"
            raise ValueError(f"{group.name} has {what}")
        flat = obs.reshape(len(obs), task.obs_dim).astype(task.obs_dtype, copy=False)
        rew = rew.astype(np.float64)
    for name, values in (("observations", flat), ("rewards", rew)):
        if values.dtype != np.uint8 and not (np.abs(values) <= FLOAT32_MAX).all():
            raise ValueError(f"{group.name} has {name} that are NaN, infinite or beyond float32")
    if (terminated | truncated)[:-1].any():
        raise ValueError(f"{group.name} goes on after its end")
    whole = bool(group.attrs.get("whole", True))
    return Recorded(flat, inside(act, task, group.name), rew, terminated, truncated, whole)


def inside(act: np.ndarray, task: Task, where: str) -> np.ndarray:
    """The environment's actions as (T, A) in [-1, 1], the inverse of `Task.to_env`."""
    if task.choices is not None:
        one_hot = act[:, None] == np.array(task.choices)
        if not one_hot.any(-1).all():
            raise ValueError(f"{where} has actions that are none of {task.act_dim}")
        return one_hot.astype(np.float64)
    low, half_range, _, _ = task.units
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = (act.reshape(len(act), task.act_dim).astype(np.float64) - low) / half_range - 1.0
    if not (np.abs(scaled) <= 1.0 + ROUNDING).all():
        raise ValueError(f"{where} has actions outside the bounds of {task.env_id}")
    return np.clip(scaled, -1.0, 1.0)
