"""Checkpoints: the points that a stopped or killed run goes on from.

A checkpoint is a folder `checkpoints/step_N`, complete or absent: every worker writes its shard
into a hidden folder, then rank 0 adds `manifest.json` (each file with its checksum, the schema
version, the length of metrics.jsonl, and a seal on all this) and renames the folder into place.
Replay rows are written once, into segments below `replay/` that successive checkpoints share. All
of it is plain data; loading it executes nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spikerl.buffers import Replay
from spikerl.distributed.world import World
from spikerl.errors import BadRequest
from spikerl.files import sync_folder, write_atomic, write_json

SCHEMA = 2  # 2: replayed rows tell the last of an episode
KEEP = 3


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
    save_policy: Callable[[Path], None],
) -> None:
    """Commit, all workers together; `learner` and `facts` (with the `step`) are the same on all."""
    root = run / "checkpoints"
    name = f"step_{facts['step']:010d}"
    partial = root / f".{name}.partial"
    if world.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _save_tensors(partial / "learner.safetensors", learner)
        save_policy(partial)
    world.barrier()  # the folder is there
    tensors, notes = f"worker_{world.rank}.safetensors", f"worker_{world.rank}.json"
    _save_tensors(partial / tensors, shard.tensors)
    replay = shard.replay
    write_json(partial / notes, {**shard.notes, "replay_added": replay.added})
    added = world.gather_objects(append_segment(run, world.rank, replay))
    oldest = world.gather_objects(replay.added - replay.capacity)
    if world.rank == 0:
        before = _folders(run)[:1]  # the last commit; to guess without it would lose its replay
        segments = dict(Checkpoint.open(run, before[0].name).manifest["segments"]) if before else {}
        for segment in added:
            segments |= segment
        manifest = {
            "schema": SCHEMA,
            **facts,
            "files": {path.name: _checksum(path) for path in sorted(partial.iterdir())},
            "segments": {p: s for p, s in segments.items() if _reaches(p, oldest)},
        }
        write_json(partial / "manifest.json", {**manifest, "seal": _seal(manifest)})
        place = root / name
        replaced = root / f".{name}.replaced.partial"
        if place.exists():  # the same step again
            shutil.rmtree(replaced, ignore_errors=True)
            os.rename(place, replaced)
        os.rename(partial, place)
        shutil.rmtree(replaced, ignore_errors=True)
        _point_latest(root, name)
        _drop_old(run, root)
    world.barrier()  # it is committed
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
        return cls(run, folder, json.loads((folder / "manifest.json").read_text(encoding="utf-8")))

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    def learner(self) -> dict[str, Tensor]:
        return load_file(self.folder / "learner.safetensors")

    def worker(self, rank: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        notes = json.loads((self.folder / f"worker_{rank}.json").read_text(encoding="utf-8"))
        return load_file(self.folder / f"worker_{rank}.safetensors"), notes

    def fill_replay(self, rank: int, replay: Replay) -> None:
        """Put back what worker `rank`'s replay held."""
        added = int(self.worker(rank)[1]["replay_added"])
        oldest = max(0, added - replay.capacity)
        for path in self.manifest["segments"]:
            worker, start, stop = _parse(path)
            first, last = max(start, oldest), min(stop, added)
            if worker == rank and first < last:
                rows = np.fromfile(self.run / path, np.float32).reshape(stop - start, -1)
                replay.put(first, torch.from_numpy(rows[first - start : last - start]))
        replay.added = replay.saved = added


def newest(run: Path) -> Checkpoint | None:
    """The newest checkpoint whose manifest can be read; its files are not verified."""
    for folder in _folders(run):
        manifest = _read_manifest(folder)
        if manifest is not None:
            return Checkpoint(run, folder, manifest)
    return None


def verified(run: Path, report: Callable[[str], None]) -> Checkpoint:
    """The newest checkpoint that verifies; each damaged one is named to `report`."""
    for folder in _folders(run):
        manifest = _read_manifest(folder)
        if manifest is None:
            report(f"checkpoint {folder.name} has no sound manifest.json; trying the one before")
            continue
        if manifest.get("schema") != SCHEMA:
            found = manifest.get("schema")
            remedy = f"{folder.name} has schema {found}, this version reads {SCHEMA}"
            raise BadRequest("resume", run, remedy)
        damaged = list(_damaged(run, folder, manifest))
        if not damaged:
            return Checkpoint(run, folder, manifest)
        report(f"checkpoint {folder.name} is damaged ({damaged[0]}); trying the one before")
    raise BadRequest("resume", run, "holds no complete checkpoint; start anew")


def drop_later(checkpoint: Checkpoint) -> None:
    """Remove checkpoints newer than the one that a run goes on from, and what is half written."""
    for path in list(checkpoint.run.rglob(".*.partial")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for folder in _folders(checkpoint.run):
        if folder.name > checkpoint.folder.name:
            shutil.rmtree(folder)
    _point_latest(checkpoint.folder.parent, checkpoint.folder.name)


def append_segment(run: Path, rank: int, replay: Replay) -> dict[str, Any]:
    """Write the rows that came since the last segment; its path below the run, and checksum."""
    start = max(replay.saved, replay.added - replay.capacity)
    if start == replay.added:
        return {}
    path = Path("replay") / f"worker_{rank}" / f"rows_{start:012d}_{replay.added:012d}.f32"
    (run / path).parent.mkdir(parents=True, exist_ok=True)
    rows = replay.between(start, replay.added).cpu().numpy()
    write_atomic(run / path, lambda partial: rows.tofile(partial))
    return {str(path): _checksum(run / path)}


def _parse(path: str) -> tuple[int, int, int]:
    found = re.fullmatch(r"replay/worker_(\d+)/rows_(\d+)_(\d+)\.f32", path)
    if found is None:
        raise ValueError(f"{path} is no replay segment")
    return int(found[1]), int(found[2]), int(found[3])


def _reaches(path: str, oldest: list[int]) -> bool:
    """Whether its worker's replay still holds a row of the segment."""
    worker, _, stop = _parse(path)
    return stop > oldest[worker]


def _folders(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step_*"), reverse=True)


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """None where it is missing or was damaged."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(manifest, dict):
        return None
    return manifest if manifest.pop("seal", None) == _seal(manifest) else None


def _seal(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _damaged(run: Path, folder: Path, manifest: Mapping[str, Any]) -> Iterator[str]:
    named = [(folder / name, sums) for name, sums in manifest["files"].items()]
    named += [(run / path, sums) for path, sums in manifest["segments"].items()]
    for path, sums in named:
        if not path.is_file():
            yield f"{path.name} is missing"
        elif _checksum(path) != sums:
            yield f"{path.name} has changed"


def _checksum(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    whole = {name: t.detach().cpu().clone() for name, t in tensors.items()}
    write_atomic(path, lambda partial: save_file(whole, partial))


def _point_latest(root: Path, name: str) -> None:
    link = root / ".latest.partial"
    link.unlink(missing_ok=True)
    link.symlink_to(name)
    os.replace(link, root / "latest")
    sync_folder(root)


def _drop_old(run: Path, root: Path) -> None:
    """Keep the last few checkpoints, and the replay segments that one of them names."""
    for folder in _folders(run)[KEEP:]:
        shutil.rmtree(folder)
    kept = [_read_manifest(folder) for folder in _folders(run)]
    if None in kept:  # its segments are not known
        return
    named = {path for manifest in kept if manifest for path in manifest["segments"]}
    for path in run.glob("replay/worker_*/rows_*.f32"):
        if str(path.relative_to(run)) not in named:
            path.unlink()
