"""The replay that a run left on disk, as the episodes that were played.

Shape legend   T steps of an environment, O observation entries, A action entries, C columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from spikerl.envs.dataset import Recorded
from spikerl.runs.checkpoint import Checkpoint
from spikerl.types import Task


def episodes(checkpoint: Checkpoint, task: Task, num_envs: int) -> Iterator[tuple[Recorded, bool]]:
    """Environment by environment, and whether each goes from a reset to its end; its rewards are
    those that learning saw. A ValueError: the rows are not those of such a run.

    The files are mapped: what is in memory is an episode, and one environment's share of a file.
    What has no end is cut off: the last episode, and one after which the run went on from a reset.
    What has no beginning is the oldest of a replay that has overwritten it.
    """
    O, rew = task.obs_dim, 2 * task.obs_dim + task.act_dim  # noqa: E741
    for env in range(num_envs):
        first, parts = checkpoint.steps_of(env, num_envs)
        if any(part.shape[1] != rew + 4 for part in parts):
            raise ValueError(f"its replay is none of {task.env_id}")
        begun = first == 0
        for rows_TC in cut(parts, O):
            if not np.isfinite(rows_TC).all():
                raise ValueError("its replay holds a NaN or an infinity")
            obs = np.concatenate([rows_TC[:, :O], rows_TC[-1:, O : 2 * O]])
            last, terminated = np.arange(len(rows_TC)) == len(rows_TC) - 1, rows_TC[:, rew + 1] > 0
            played = Recorded(
                obs.astype(np.float64),
                rows_TC[:, 2 * O : rew],
                rows_TC[:, rew].astype(np.float64),
                terminated,
                last & ~terminated,
            )
            yield played, begun and bool(rows_TC[-1, rew + 2] > 0.0)
            begun = True


def cut(parts: Iterable[np.ndarray], obs_dim: int) -> Iterator[np.ndarray]:
    """Rows (T, C) after which an episode ended, or the next row does not follow."""
    held: np.ndarray | None = None
    for part in parts:
        rows = part if held is None else np.concatenate([held, part])
        follows = (rows[1:, :obs_dim] == rows[:-1, obs_dim : 2 * obs_dim]).all(1)
        ends = np.flatnonzero((rows[:-1, -2] > 0.0) | ~follows) + 1
        *whole, held = np.split(rows, ends)
        yield from whole
    if held is not None:
        yield held
