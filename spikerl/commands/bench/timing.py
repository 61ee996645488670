"""Times of benchmarks that take turns.

Each is timed once a round, so that whatever else the machine does slows all of them alike. Results
are compared as ratios of medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

BASELINES = ("popsan loop", "dense loop")
DENSE = "dense"  # this program's own dense actor
Ratios = dict[str, dict[str, float]]


@dataclass(kw_only=True)
class Measurement:
    """The times of one benchmark: median and least of its rounds, in ms for one repetition."""

    what: str
    kernel: str
    precision: str
    batch: int
    world_size: int
    threads: int
    weights: str
    median_ms: float
    min_ms: float
    per_second: float

    @property
    def name(self) -> str:
        size = f" batch {self.batch}" if self.batch > 1 else ""
        return f"{self.what} {self.kernel} {self.precision}{size}"


@dataclass
class Results:
    measurements: list[Measurement] = field(default_factory=list)
    ratios: Ratios = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)  # what could not be measured, and why

    def add(self, other: Results) -> None:
        self.measurements += other.measurements
        self.ratios |= other.ratios
        self.left_out |= other.left_out


@dataclass
class Benchmark:
    """A call to be timed, which does `what` as often as `times` says."""

    what: str
    kernel: str
    precision: str
    batch: int
    weights: str
    times: int
    call: Callable[[], object]


def do_nothing() -> None:
    pass


def run_interleaved(
    benchmarks: Sequence[Benchmark],
    rounds: int,
    threads: int,
    *,
    before_turn: Callable[[], object] = do_nothing,
    after_round: Callable[[], object] = do_nothing,
) -> list[Measurement]:
    """Time each benchmark once a round; a first round, with cold caches, is not counted."""
    times: list[list[float]] = [[] for _ in benchmarks]
    for round_ in range(rounds + 1):
        for benchmark, own in zip(benchmarks, times, strict=True):
            before_turn()
            start = time.perf_counter()
            benchmark.call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_ > 0:
                own.append((time.perf_counter() - start) / benchmark.times * 1e3)
        after_round()
    return [measurement(b, own, threads) for b, own in zip(benchmarks, times, strict=True)]


def compare(measurements: Sequence[Measurement], kernel: str) -> Ratios:
    """Ratios of the spiking actor under `kernel` to each baseline and this program's dense actor.

    The measurements are of the same work with the same batch.
    """
    return {
        f"{m.name} / {other.kernel}": ratio(m.median_ms, other.median_ms)
        for m in measurements
        for other in measurements
        if m.kernel == kernel and other.kernel in (*BASELINES, DENSE)
    }


def ratio(median_ms: float, other_median_ms: float) -> dict[str, float]:
    return {
        "ratio": median_ms / other_median_ms,
        "median_ms": median_ms,
        "other_median_ms": other_median_ms,
    }


def measurement(benchmark: Benchmark, times: list[float], threads: int) -> Measurement:
    median = statistics.median(times)
    return Measurement(
        what=benchmark.what,
        kernel=benchmark.kernel,
        precision=benchmark.precision,
        batch=benchmark.batch,
        world_size=1,
        threads=threads,
        weights=benchmark.weights,
        median_ms=median,
        min_ms=min(times),
        per_second=1e3 / median,
    )
