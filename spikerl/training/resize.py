"""A resume with another number of workers: what each takes from the old workers' shards.

Environment i of N is worker i // (N / W)'s, however many workers W there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from spikerl.energy.meter import Reading, merge

Part = tuple[dict[str, Tensor], dict[str, Any]]  # of a worker: tensors, plain numbers


def share_of(parts: Sequence[Part], rank: int, size: int, num_envs: int) -> Part:
    """What worker `rank` of `size` goes on from: the states of its environments and their
    observations that wait for the normaliser. The sums of the epoch in progress go to worker 0.

    Random streams are left out: they begin anew.
    """
    theirs, ours = num_envs // len(parts), num_envs // size
    mine = slice(rank * ours, (rank + 1) * ours)
    pending = [part["norm.pending"] for part, _ in parts]
    steps = len(pending[0]) // theirs
    waiting_TNO = torch.cat([rows.unflatten(0, (steps, theirs)) for rows in pending], 1)
    tensors = {"norm.pending": waiting_TNO[:, mine].flatten(0, 1).contiguous()}
    exact = all(notes["exact"] for _, notes in parts)
    if exact:
        tensors["envs.steps"] = parts[0][0]["envs.steps"]
        for name in ("envs.obs", "envs.returns", "envs.lengths"):
            tensors[name] = torch.cat([part[name] for part, _ in parts])[mine]
        for i in range(mine.start, mine.stop):
            old, new = f"envs.{i % theirs}.", f"envs.{i - mine.start}."
            source = parts[i // theirs][0]
            tensors |= {
                new + k.removeprefix(old): v for k, v in source.items() if k.startswith(old)
            }
    progress = merge_progress([notes["progress"] for _, notes in parts])
    if rank > 0:
        # All keep the readings, which count once per device, so that no device seems to begin here.
        progress |= {"train_s": 0.0, "cpu_s": 0.0, "returns": [], "sums": {}}
    return tensors, {"progress": progress, "exact": exact}


def merge_progress(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The workers' progress as one."""
    sums = {}
    for name in dict.fromkeys(name for part in parts for name in part["sums"]):
        # A worker that a resize added may not have had an update with this metric yet.
        totals, weights = zip(*(part["sums"].get(name, (0.0, 0)) for part in parts), strict=True)
        sums[name] = (sum(totals), sum(weights))
    return {
        **parts[0],
        "train_s": max(part["train_s"] for part in parts),
        "cpu_s": None if None in (cpu_s := [part.get("cpu_s") for part in parts]) else sum(cpu_s),
        "energy": merged([part["energy"] for part in parts]),
        "eval_energy": merged([part.get("eval_energy") for part in parts]),
        "returns": [ret for part in parts for ret in part["returns"]],
        "sums": sums,
    }


def merged(readings: Sequence[list[Any] | None]) -> list[Any] | None:
    """The workers' readings of one window as one; None if no worker has any."""
    known = [Reading(*reading) for reading in readings if reading is not None]
    return merge(known).as_data() if known else None
