"""The replay that a run left on disk, as the episodes that were played.

Shape legend   T steps of an environment, O observation entries, A action entries, C columns
               of a row, W of them of an observation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch

from spikerl.envs.dataset import Recorded
from spikerl.runs.checkpoint import Checkpoint
from spikerl.types import Task


def episodes(checkpoint: Checkpoint, task: Task, num_envs: int) -> Iterator[tuple[Recorded, bool]]:
    """Episodes, environment by environment, and whether each is whole, from a reset to its end; the
    rewards are those that learning saw. ValueError if the rows are not those of such a run.

    Files are memory-mapped: an episode, and one environment's share of a file, are in memory. The
    end is missing of the last episode, and of one after which the run went on from a reset; the
    beginning, of the oldest in a replay that has overwritten it.
    """
    row = task.row
    for env in range(num_envs):
        first, parts = checkpoint.steps_of(env, num_envs, row)
        begun = first == 0
        for rows_TC in cut(parts, row.obs_width):
            if not np.isfinite(rows_TC[:, row.numbers]).all():
                raise ValueError("its replay holds a NaN or an infinity")
            last_1W = rows_TC[-1:, row.obs_width : row.act_start]
            seen_TW = np.concatenate([rows_TC[:, : row.obs_width], last_1W])
            last = np.arange(len(rows_TC)) == len(rows_TC) - 1
            terminated = rows_TC[:, row.rew_column + 1] > 0
            played = Recorded(
                row.unpack(torch.from_numpy(seen_TW)).numpy().astype(task.obs_dtype),
                rows_TC[:, row.act_start : row.rew_column],
                rows_TC[:, row.rew_column].astype(np.float64),
                terminated,
                last & ~terminated,
            )
            yield played, begun and bool(rows_TC[-1, row.rew_column + 2] > 0.0)
            begun = True


def cut(parts: Iterable[np.ndarray], obs_width: int) -> Iterator[np.ndarray]:
    """Rows (T, C), cut after each that ends an episode or that the next row does not follow; an
    observation has W = `obs_width` columns.
    """
    held: np.ndarray | None = None
    for part in parts:
        rows = part if held is None else np.concatenate([held, part])
        seen, then = rows[1:, :obs_width], rows[:-1, obs_width : 2 * obs_width]
        follows = (seen.view(np.int32) == then.view(np.int32)).all(1)  # as bits: they may be bytes
        ends = np.flatnonzero((rows[:-1, -2] > 0.0) | ~follows) + 1
        *whole, held = np.split(rows, ends)
        yield from whole
    if held is not None:
        yield held
