"""A replay on disk: segments below `replay/`, each written once and named by checkpoints.

A segment's name says which worker of how many wrote it, hence whose environments' rows it holds,
and which rows.

Shape legend   T vector steps, N environments of a worker, C columns of a row.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from spikerl.algos.replay import Replay
from spikerl.distributed.world import World
from spikerl.files import make_folder, write_atomic
from spikerl.types import Row


class Segment(NamedTuple):
    """Rows `start` to `stop` of all that worker `worker` of `workers` ever stored."""

    worker: int
    workers: int
    start: int
    stop: int
    obs_bytes: bool

    @classmethod
    def parse(cls, path: str) -> Segment:
        match = re.fullmatch(r"replay/worker_(\d+)_of_(\d+)/rows_(\d+)_(\d+)\.(f32|u8)", path)
        if match is None:
            raise ValueError(f"{path} is not a replay segment")
        *numbers, kind = match.groups()
        worker, workers, start, stop = map(int, numbers)
        return cls(worker, workers, start, stop, kind == "u8")

    def of(self, row: Row, rows: np.ndarray) -> np.ndarray:
        """Its rows (..., C) in the layout `row`; older segments hold bytes as numbers."""
        held = replace(row, obs_bytes=self.obs_bytes)
        if rows.shape[-1] != held.columns or self.obs_bytes > row.obs_bytes:
            raise ValueError("its replay holds other observations or actions")
        return rows if held == row else row.packed(rows)


def append_segment(run: Path, world: World, replay: Replay) -> dict[str, str]:
    """Write the rows that came since the last segment; return its path in the run, and checksum."""
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


def reaches(path: str, world: World, replay: Replay) -> bool:
    """Whether the replays, which all hold the same steps, still hold a row of the segment."""
    segment = Segment.parse(path)
    return segment.stop * segment.workers > (replay.added - replay.capacity) * world.size


def fill_replay(
    run: Path, paths: Iterable[str], total: int, rank: int, size: int, replay: Replay
) -> None:
    """Put back the rows of the environments that worker `rank` of `size` has, as if there had
    always been so many: row k is of vector step k // width. `total` rows were stored, by all.
    """
    width = replay.width  # environments of each worker
    steps = total // (width * size)
    replay.added = replay.saved = steps * width
    replay.reserve(replay.size)
    replay.rows[: replay.size] = math.nan  # so that a row that no segment holds is noticed
    oldest = max(0, replay.added - replay.capacity) // width
    for path in paths:
        segment = Segment.parse(path)
        theirs = width * size // segment.workers
        offset = rank * width - segment.worker * theirs  # from their first environment to ours
        mine = slice(max(offset, 0), max(min(offset + width, theirs), 0))
        first, last = segment.start // theirs, segment.stop // theirs
        if mine.start >= mine.stop or last <= oldest:
            continue
        rows = np.fromfile(run / path, np.float32)
        rows_TNC = segment.of(replay.row, rows.reshape(last - first, theirs, -1))
        begin, end = max(first, oldest), min(last, steps)
        number_T1 = torch.arange(begin, end, dtype=torch.int64).unsqueeze(1) * width - offset
        number_TN = number_T1 + torch.arange(mine.start, mine.stop, dtype=torch.int64)
        held = torch.from_numpy(rows_TNC[begin - first : end - first, mine])
        replay.restore(number_TN, held)
    if not replay.sound():
        raise ValueError("its replay lacks rows, or holds a NaN or an infinity")


def steps_of(
    run: Path, paths: Iterable[str], env: int, num_envs: int, row: Row
) -> tuple[int, list[np.ndarray]]:
    """The number of an environment's first step that is held, and its rows, memory-mapped: (T, C)
    for each segment. ValueError if rows are missing in between, or are of another kind.
    """
    parts: dict[int, np.ndarray] = {}
    for path in paths:
        segment = Segment.parse(path)
        theirs, odd = divmod(num_envs, segment.workers or num_envs + 1)
        if odd or segment.start % theirs or segment.stop % theirs:
            raise ValueError(f"{num_envs} environments did not fill {path}")
        if segment.worker == env // theirs:
            rows = np.memmap(run / path, np.float32, "r")
            rows_TNC = rows.reshape((segment.stop - segment.start) // theirs, theirs, -1)
            parts[segment.start // theirs] = segment.of(row, rows_TNC[:, env % theirs])
    first = due = min(parts, default=0)
    for start in sorted(parts):
        if start != due:
            raise ValueError("its replay lacks rows")
        due += len(parts[start])
    return first, [parts[start] for start in sorted(parts)]
