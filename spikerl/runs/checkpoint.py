"""Checkpoints: the points that a stopped or killed run goes on from.

A checkpoint is a folder `checkpoints/step_N`, or `step_N_` where the step has one already, and so
on; the last by name is the newest. It is complete or absent: every worker writes its shard
into a hidden folder, then rank 0 adds `manifest.json` (each file with its checksum, the schema
version, the length of metrics.jsonl, and a checksum of all this) and renames the folder into place.
Replay rows are written once, into segments below `replay/` (`segments.py`) that successive
checkpoints share. All of it is plain data; loading it executes nothing.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save
from torch import Tensor

from spikerl.algos.replay import Replay
from spikerl.distributed.world import World
from spikerl.errors import BadRequest, DiskError
from spikerl.files import (
    checksum_of,
    json_bytes,
    link_to,
    make_folder,
    parse_json,
    read_json,
    sync_folder,
    write_synced,
)
from spikerl.runs.segments import Segment, append_segment, fill_replay, reaches, steps_of
from spikerl.types import Row

SCHEMA = 3  # 3: segments are named by the number of workers too
KEEP = 3
FILE = r"(best/)?[a-z0-9_]+\.(safetensors|json)"  # names of files of a checkpoint
# Files that a run first writes as .NAME.*.partial; other partial files may be of other programs.
WHOLE = (
    "config.yaml", "manifest.json", "summary.json", "evaluation.json", "error.txt",
    "discarded.jsonl", "loggers.json", "metrics.prom", "policy.json", "policy.safetensors",
)  # fmt: skip
PARTIALS = ("checkpoints/.*.partial", "replay/*/.*.partial", "best/.*.partial",
            *(f".{name}.*.partial" for name in WHOLE))  # fmt: skip
MAX_BYTES = 1 << 26  # of a JSON file; a manifest names some hundred segments


@dataclass
class Shard:
    """One worker's part of a checkpoint: its tensors, its plain numbers, its replay."""

    tensors: Mapping[str, Tensor]
    notes: Mapping[str, Any]
    replay: Replay


def save_checkpoint(
    run: Path,
    world: World,
    shard: Shard,
    learner: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    policy: Mapping[str, bytes],
) -> None:
    """Save a checkpoint; all workers call this together. Rank 0 writes `learner`, `facts` and
    `policy`, the policy's files and those of best/; of the others' only `facts["step"]` is read.

    DiskError: a write failed on one of them. Earlier checkpoints stay, and the next call saves
    what this one did not.
    """
    root = run / "checkpoints"
    name = f"step_{facts['step']:010d}"
    partial = root / f".{name}.partial"
    replay = shard.replay
    notes = {**shard.notes, "replay_added": replay.added}
    mine = {
        f"worker_{world.rank}.safetensors": _tensor_bytes(shard.tensors),
        f"worker_{world.rank}.json": json_bytes(notes),
    }
    if world.rank == 0:
        mine |= {"learner.safetensors": _tensor_bytes(learner), **policy}

    def begin() -> dict[str, str] | None:
        if world.rank > 0:
            return None
        make_folder(root)
        remove_unreferenced(run)
        partial.mkdir()
        return _last_segments(run, replay.saved * world.size)

    def write() -> tuple[dict[str, str], dict[str, str]]:
        for folder in {(partial / name).parent for name in mine} - {partial}:
            make_folder(folder)
        files = {name: write_synced(partial / name, content) for name, content in mine.items()}
        return files, append_segment(run, world, replay)

    def commit() -> None:
        if world.rank > 0:
            return
        files = {name: sums for part in parts for name, sums in part[0].items()}
        segments = dict(before or {})
        for part in parts:
            segments |= part[1]
        manifest = {
            "schema": SCHEMA,
            **facts,
            "files": files,
            "segments": {p: s for p, s in segments.items() if reaches(p, world, replay)},
        }
        manifest["seal"] = _checksum(manifest)
        write_synced(partial / "manifest.json", json_bytes(manifest))
        for folder in {(partial / file).parent for file in files}:
            sync_folder(folder)
        of_step = [folder.name for folder in _folders(run) if folder.name.startswith(name)]
        place = root / (f"{of_step[0]}_" if of_step else name)
        os.rename(partial, place)
        link_to(root / "latest", place.name)
        for folder in _folders(run)[KEEP:]:
            shutil.rmtree(folder)
        remove_unreferenced(run)

    try:
        before = world.run_on_all(begin)[0]
        if before is None:  # nothing to add to: all of the replay is written
            replay.saved = 0
        parts = world.run_on_all(write)
        world.run_on_all(commit)
    except DiskError:
        if world.rank == 0:
            with suppress(OSError):
                remove_unreferenced(run)  # frees the space
        raise
    replay.saved = replay.added


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose manifest was read and whose files have the checksums it names."""

    run: Path
    folder: Path
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, run: Path, name: str) -> Checkpoint:
        """Open a checkpoint that `verified` chose."""
        folder = run / "checkpoints" / name
        return cls(run, folder, read_json(folder / "manifest.json", MAX_BYTES))

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    @property
    def workers(self) -> int:
        """The number of workers that wrote it."""
        return int(self.manifest["world_size"])

    def best(self) -> dict[str, bytes]:
        """The files of the best policy so far; empty before the first evaluation."""
        named = [name for name in self.manifest["files"] if name.startswith("best/")]
        return {Path(name).name: (self.folder / name).read_bytes() for name in named}

    def learner(self) -> dict[str, Tensor]:
        return load_file(self.folder / "learner.safetensors")

    def worker(self, rank: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        notes = read_json(self.folder / f"worker_{rank}.json", MAX_BYTES)
        return load_file(self.folder / f"worker_{rank}.safetensors"), notes

    def fill_replay(self, rank: int, size: int, replay: Replay) -> None:
        """Put back the rows of the environments that worker `rank` of `size` has."""
        rows = int(self.worker(0)[1]["replay_added"]) * self.workers
        fill_replay(self.run, self.manifest["segments"], rows, rank, size, replay)

    def steps_of(self, env: int, num_envs: int, row: Row) -> tuple[int, list[np.ndarray]]:
        """The rows of an environment's steps, memory-mapped: see `segments.steps_of`."""
        return steps_of(self.run, self.manifest["segments"], env, num_envs, row)


def verified(run: Path, report: Callable[[str], None], *, key: str = "resume") -> Checkpoint:
    """The newest checkpoint that verifies; each damaged one is named to `report`."""
    said = "start anew"
    for folder in _folders(run):
        manifest = _read_manifest(folder)
        if manifest is None:
            said = f"checkpoint {folder.name} has no sound manifest.json"
            report(f"{said}; trying the one before")
            continue
        if manifest.get("schema") != SCHEMA:
            schema = manifest.get("schema")
            remedy = f"{folder.name} has schema {schema}, this version reads {SCHEMA}"
            raise BadRequest(key, run, remedy)
        damaged = list(_damaged(run, folder, manifest))
        if not damaged:
            return Checkpoint(run, folder, manifest)
        said = f"checkpoint {folder.name} is damaged ({damaged[0]})"
        report(f"{said}; trying the one before")
    raise BadRequest(key, run, f"holds no complete checkpoint; {said}")


def remove_newer(checkpoint: Checkpoint) -> None:
    """Remove checkpoints newer than the one that a run goes on from, and unfinished files."""
    for folder in _folders(checkpoint.run):
        if folder.name > checkpoint.folder.name:
            shutil.rmtree(folder)
    remove_unreferenced(checkpoint.run)
    link_to(checkpoint.folder.parent / "latest", checkpoint.folder.name)


def remove_unreferenced(run: Path) -> None:
    """Remove unfinished files, and replay segments that no checkpoint names."""
    for path in [path for pattern in PARTIALS for path in run.glob(pattern)]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    manifests = [_known_manifest(folder) for folder in _folders(run)]
    if None in manifests:  # its segments are not known
        return
    named = {path for manifest in manifests if manifest for path in manifest["segments"]}
    for path in run.glob("replay/worker_*/rows_*"):
        if str(path.relative_to(run)) not in named:
            path.unlink()


def _folders(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step_*"), reverse=True)


def _last_segments(run: Path, saved: int) -> dict[str, str] | None:
    """The segments, with checksums, that the newest checkpoint names; None if there is none, if a
    segment is missing, or if together they do not reach row number `saved`.
    """
    manifest = _known_manifest(folder) if (folder := next(iter(_folders(run)), None)) else None
    if manifest is None or not all((run / path).is_file() for path in manifest["segments"]):
        return None
    ends = [segment.stop * segment.workers for segment in map(Segment.parse, manifest["segments"])]
    return None if max(ends, default=0) < saved else dict(manifest["segments"])


def _known_manifest(folder: Path) -> dict[str, Any] | None:
    """As `_read_manifest`, but None also where the file cannot be read now."""
    try:
        return _read_manifest(folder)
    except OSError:
        return None


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """A checkpoint's manifest; None if missing or damaged, OSError if it cannot be read now."""
    try:
        manifest = read_json(folder / "manifest.json", MAX_BYTES)
        if manifest.pop("seal", None) != _checksum(manifest):
            return None
        if manifest["schema"] == SCHEMA:
            _check(manifest)
    except OSError as error:  # one that cannot be read now, as on a network, may be sound
        if error.errno not in (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP):
            raise
        return None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return dict(manifest)


def _check(manifest: Mapping[str, Any]) -> None:
    """Raise ValueError unless its counts are sound and all that it names lies in the run."""
    counts = (manifest["step"], manifest["world_size"] - 1, manifest.get("metrics_bytes", 0))
    if not all(type(count) is int and 0 <= count < 1 << 63 for count in counts):
        raise ValueError("step, world_size or metrics_bytes")
    for name, sums in manifest["files"].items():
        if not isinstance(sums, str) or not re.fullmatch(FILE, name):
            raise ValueError(f"{name} is not a file of a checkpoint")
    for path, _ in manifest["segments"].items():
        Segment.parse(path)


def check_fit(
    saved: Mapping[str, Tensor], own: Mapping[str, Tensor], texts: Collection[str] = ()
) -> None:
    """Raise ValueError unless `saved` can take the place of `own`, and is finite.

    `texts` names tensors that may have another length.
    """
    if odd := saved.keys() ^ own.keys():
        raise ValueError(f"it lacks {min(odd)}, or this run does")
    for name, tensor in own.items():
        one = saved[name]
        alike = one.dim() == tensor.dim() if name in texts else one.shape == tensor.shape
        if not alike or one.dtype != tensor.dtype:
            raise ValueError(f"its {name} is {one.dtype} {tuple(one.shape)}")
        if not one.isfinite().all():
            raise ValueError(f"its {name} holds a NaN or an infinity")


def _checksum(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _damaged(run: Path, folder: Path, manifest: Mapping[str, Any]) -> Iterator[str]:
    yield from _damaged_rows(run / "metrics.jsonl", manifest.get("metrics_bytes", 0))
    named = [(folder / name, sums) for name, sums in manifest["files"].items()]
    named += [(run / path, sums) for path, sums in manifest["segments"].items()]
    for path, sums in named:
        if not path.is_file():
            yield f"{path.name} is missing"
        elif checksum_of(path) != sums:
            yield f"{path.name} has changed"


def _damaged_rows(path: Path, length: int) -> Iterator[str]:
    rows = path.read_bytes()[:length] if path.exists() else b""
    if len(rows) < length:
        yield f"{path.name} is shorter than it says"
    for number, line in enumerate(rows.splitlines()):
        try:
            parse_json(line)
        except ValueError:
            yield f"{path.name} has changed in line {number + 1}"


def _tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    return save({name: t.detach().cpu().clone() for name, t in tensors.items()})
