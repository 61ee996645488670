"""Checkpoints: the points that a stopped or killed run goes on from.

A checkpoint is a folder `checkpoints/step_N`, complete or absent: every worker writes its shard
into a hidden folder, then rank 0 adds `manifest.json` (each file with its checksum, the schema
version, the length of metrics.jsonl, and a checksum of all this) and renames the folder into place.
Replay rows are written once, into segments below `replay/` that successive checkpoints share; a
segment's name says which worker of how many wrote it, hence whose environments' rows it holds, and
which rows. All of it is plain data; loading it executes nothing.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
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
    write_atomic,
    write_synced,
)
from spikerl.types import Row

SCHEMA = 3  # 3: segments are named by the number of workers too
KEEP = 3
FILE = r"(best/)?[a-z0-9_]+\.(safetensors|json)"  # of a checkpoint
# A run's own files that are half written as .NAME.*.partial; others write into its folder, too.
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
    """Save, all workers together. `learner`, `facts` and `policy`, its files and those of best/,
    are written by rank 0; of the others, `facts["step"]` alone is read.

    DiskError: a disk refused. What was there before stays, and the next call makes up for it.
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
            "segments": {p: s for p, s in segments.items() if _reaches(p, world, replay)},
        }
        manifest["seal"] = _checksum(manifest)
        write_synced(partial / "manifest.json", json_bytes(manifest))
        for folder in {(partial / file).parent for file in files}:
            sync_folder(folder)
        place = root / name
        replaced = root / f".{name}.replaced.partial"
        if again := place.exists():  # the same step
            os.rename(place, replaced)
        try:
            os.rename(partial, place)
        except OSError:
            if again:
                os.rename(replaced, place)
            raise
        link_to(root / "latest", name)
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
                remove_unreferenced(run)  # room for the others
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
        """One that `verified` chose."""
        folder = run / "checkpoints" / name
        return cls(run, folder, read_json(folder / "manifest.json", MAX_BYTES))

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    @property
    def workers(self) -> int:
        """How many wrote it."""
        return int(self.manifest["world_size"])

    def best(self) -> dict[str, bytes]:
        """The files of the best policy so far; none where no evaluation had been."""
        named = [name for name in self.manifest["files"] if name.startswith("best/")]
        return {Path(name).name: (self.folder / name).read_bytes() for name in named}

    def learner(self) -> dict[str, Tensor]:
        return load_file(self.folder / "learner.safetensors")

    def worker(self, rank: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        notes = read_json(self.folder / f"worker_{rank}.json", MAX_BYTES)
        return load_file(self.folder / f"worker_{rank}.safetensors"), notes

    def fill_replay(self, rank: int, size: int, replay: Replay) -> None:
        """Put back the rows of the environments that worker `rank` of `size` has, as if there had
        always been so many: row k is of vector step k // width.
        """
        width = replay.width  # environments of each worker
        steps = int(self.worker(0)[1]["replay_added"]) * self.workers // (width * size)
        replay.added = replay.saved = steps * width
        replay.reserve(replay.size)
        replay.rows[: replay.size] = math.nan  # so that one that no segment holds is noticed
        oldest = max(0, replay.added - replay.capacity) // width
        for path in self.manifest["segments"]:
            segment = _parse(path)
            theirs = width * size // segment.workers
            offset = rank * width - segment.worker * theirs  # of our first environment from theirs
            mine = slice(max(offset, 0), max(min(offset + width, theirs), 0))
            first, last = segment.start // theirs, segment.stop // theirs
            if mine.start >= mine.stop or last <= oldest:
                continue
            rows = np.fromfile(self.run / path, np.float32)
            rows_TNC = segment.of(replay.row, rows.reshape(last - first, theirs, -1))
            begin, end = max(first, oldest), min(last, steps)
            number_T1 = torch.arange(begin, end, dtype=torch.int64).unsqueeze(1) * width - offset
            number_TN = number_T1 + torch.arange(mine.start, mine.stop, dtype=torch.int64)
            held = torch.from_numpy(rows_TNC[begin - first : end - first, mine])
            replay.restore(number_TN, held)
        if not replay.sound():
            raise ValueError("its replay lacks rows, or holds a NaN or an infinity")

    def steps_of(self, env: int, num_envs: int, row: Row) -> tuple[int, list[np.ndarray]]:
        """The rows of an environment, (T, C) of each segment, mapped; the number of its step that
        the first is of. A ValueError where rows are missing in between, or are of another kind.
        """
        parts: dict[int, np.ndarray] = {}
        for path in self.manifest["segments"]:
            segment = _parse(path)
            theirs, odd = divmod(num_envs, segment.workers or num_envs + 1)
            if odd or segment.start % theirs or segment.stop % theirs:
                raise ValueError(f"{num_envs} environments did not fill {path}")
            if segment.worker == env // theirs:
                rows = np.memmap(self.run / path, np.float32, "r")
                rows_TNC = rows.reshape((segment.stop - segment.start) // theirs, theirs, -1)
                parts[segment.start // theirs] = segment.of(row, rows_TNC[:, env % theirs])
        first = due = min(parts, default=0)
        for start in sorted(parts):
            if start != due:
                raise ValueError("its replay lacks rows")
            due += len(parts[start])
        return first, [parts[start] for start in sorted(parts)]


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
    """Remove checkpoints newer than the one that a run goes on from, and what is half written."""
    for folder in _folders(checkpoint.run):
        if folder.name > checkpoint.folder.name:
            shutil.rmtree(folder)
    remove_unreferenced(checkpoint.run)
    link_to(checkpoint.folder.parent / "latest", checkpoint.folder.name)


def remove_unreferenced(run: Path) -> None:
    """Remove what is half written, and replay segments that no checkpoint names."""
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


def append_segment(run: Path, world: World, replay: Replay) -> dict[str, str]:
    """Write the rows that came since the last segment; its path below the run, and checksum."""
    start = max(replay.saved, replay.added - replay.capacity)
    if start == replay.added:
        return {}
    writer = f"worker_{world.rank}_of_{world.size}"
    kind = "u8" if replay.row.obs_bytes else "f32"
    path = Path("replay") / writer / f"rows_{start:012d}_{replay.added:012d}.{kind}"
    make_folder(run / "replay")
    make_folder((run / path).parent)
    rows = replay.between(start, replay.added).cpu().numpy()
    return {str(path): write_atomic(run / path, rows.reshape(-1).view(np.uint8).data)}


class _Segment(NamedTuple):
    """Rows `start` to `stop` of those that a worker ever stored, of one among `workers`."""

    worker: int
    workers: int
    start: int
    stop: int
    obs_bytes: bool

    def of(self, row: Row, rows: np.ndarray) -> np.ndarray:
        """Its rows (..., C) as `row` says; observations of bytes were once held as numbers."""
        held = replace(row, obs_bytes=self.obs_bytes)
        if rows.shape[-1] != held.columns or self.obs_bytes > row.obs_bytes:
            raise ValueError("its replay holds other observations or actions")
        return rows if held == row else row.packed(rows)


def _parse(path: str) -> _Segment:
    match = re.fullmatch(r"replay/worker_(\d+)_of_(\d+)/rows_(\d+)_(\d+)\.(f32|u8)", path)
    if match is None:
        raise ValueError(f"{path} is not a replay segment")
    *numbers, kind = match.groups()
    worker, workers, start, stop = map(int, numbers)
    return _Segment(worker, workers, start, stop, kind == "u8")


def _reaches(path: str, world: World, replay: Replay) -> bool:
    """Whether a replay still holds a row of the segment; they all hold the same steps."""
    segment = _parse(path)
    return segment.stop * segment.workers > (replay.added - replay.capacity) * world.size


def _folders(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step_*"), reverse=True)


def _last_segments(run: Path, saved: int) -> dict[str, str] | None:
    """Those that the last commit names; None if it, or one of them, is not there, or if together
    they do not reach to row number `saved`.
    """
    manifest = _known_manifest(folder) if (folder := next(iter(_folders(run)), None)) else None
    if manifest is None or not all((run / path).is_file() for path in manifest["segments"]):
        return None
    ends = [segment.stop * segment.workers for segment in map(_parse, manifest["segments"])]
    return None if max(ends, default=0) < saved else dict(manifest["segments"])


def _known_manifest(folder: Path) -> dict[str, Any] | None:
    """None where it cannot be read now, too."""
    try:
        return _read_manifest(folder)
    except OSError:
        return None


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """None where it is missing or was damaged."""
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
    """A ValueError unless it names only what lies in the run."""
    counts = (manifest["step"], manifest["world_size"] - 1, manifest.get("metrics_bytes", 0))
    if not all(type(count) is int and 0 <= count < 1 << 63 for count in counts):
        raise ValueError("step, world_size or metrics_bytes")
    for name, sums in manifest["files"].items():
        if not isinstance(sums, str) or not re.fullmatch(FILE, name):
            raise ValueError(f"{name} is not a file of a checkpoint")
    for path, _ in manifest["segments"].items():
        _parse(path)


def check_fit(
    saved: Mapping[str, Tensor], own: Mapping[str, Tensor], texts: Collection[str] = ()
) -> None:
    """A ValueError unless `saved` can take the place of `own`, and is finite.

    `texts` are those that may have another length.
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
