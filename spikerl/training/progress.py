"""How far a training is, as plain numbers that a checkpoint holds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from spikerl.energy.meter import Reading, consecutive


@dataclass
class Progress:
    """How far training is, sums since the last epoch, the newest losses: plain numbers.

    A live view shows it between epochs, and a checkpoint in the middle of one records it.
    """

    step: int = 0  # over all workers
    updates: int = 0
    epoch: int = 0
    train_s: float = 0.0  # seconds of training in this epoch, up to the last window that ended
    cpu_s: float | None = 0.0  # this process's processor time in this epoch; None: not known
    energy: list[Any] | None = None  # Reading of training in this epoch, as plain data
    eval_energy: list[Any] | None = None  # the same of its evaluation, which a stop may have ended
    first_step: int = 0  # of this epoch
    first_update: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    returns: list[float] = field(default_factory=list)  # of this worker's finished episodes
    sums: dict[str, tuple[float, float]] = field(default_factory=dict)  # of metrics, and of weights

    def next_epoch(self) -> None:
        self.sums, self.returns, self.train_s, self.cpu_s = {}, [], 0.0, 0.0
        self.energy = self.eval_energy = None
        self.first_step, self.first_update = self.step, self.updates

    def add(self, metrics: list[dict[str, torch.Tensor]], weight: float) -> None:
        """Add the metrics of some updates; `weight` is this worker's share of their batches. The
        host waits for the device here.
        """
        for name in dict.fromkeys(key for m in metrics for key in m):
            values = torch.stack([m[name] for m in metrics if name in m]).double()
            values = values[values.isfinite()]  # fp16: an update that was dropped may have a NaN
            if not len(values):
                continue
            total, weights = self.sums.get(name, (0.0, 0.0))
            own = float(values.sum())
            self.sums[name] = (total + weight * own, weights + weight * len(values))
            self.losses[name] = float(values[-1])


def progress_of(data: Mapping[str, Any], step: int) -> Progress:
    """The progress in a checkpoint of that step; ValueError unless its numbers are sound."""
    progress = Progress(**({"cpu_s": None} | dict(data)))  # older checkpoints do not have it
    sums = [number for pair in progress.sums.values() for number in pair]
    spent, reasons = [progress.train_s, progress.cpu_s or 0.0], list[str]()
    for reading in (progress.energy, progress.eval_energy):
        seconds, joules, missing = reading or (0.0, {}, {})
        spent += [seconds, *joules.values()]
        reasons += missing.values()
    numbers = [*progress.losses.values(), *progress.returns, *sums, *spent]
    counts = (progress.updates, progress.epoch, progress.first_step, progress.first_update)
    whole = all(type(n) is int and 0 <= n < 1 << 63 for n in counts)
    words = all(isinstance(why, str) for why in reasons)
    if not (whole and words and progress.step == step and all(map(math.isfinite, numbers))):
        raise ValueError("its progress is not that of its step")
    return progress


def since(before: list[Any] | None, reading: Reading) -> Reading:
    """A window's reading with what was counted `before` a resume."""
    return reading if before is None else consecutive(Reading(*before), reading)


def mean_of(workers: Sequence[Mapping[str, tuple[float, float]]], name: str) -> float | None:
    """A metric's mean over all updates, from each worker's sums; None where no update had it."""
    parts = [sums[name] for sums in workers if name in sums]
    return sum(total for total, _ in parts) / sum(weight for _, weight in parts) if parts else None
