"""Times of benchmarks that take turns, and what is told of them.

Once a round each has its turn, so that whatever else the machine does meets all of them; what
counts are ratios of medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

BASELINES = ("popsan loop", "dense loop")
Ratios = dict[str, dict[str, float]]


@dataclass(kw_only=True)
class Measurement:
    """Times of one benchmark's repetitions, each in ms."""

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
class Benchmark:
    """`call` does the thing `times` times."""

    what: str
    kernel: str
    precision: str
    batch: int
    weights: str
    times: int
    call: Callable[[], object]


def run_interleaved(
    benchmarks: Sequence[Benchmark],
    rounds: int,
    threads: int,
    meet: Callable[[], object] = lambda: None,
) -> list[Measurement]:
    """Time each benchmark once a round; the round before finds nothing in a cache and is free.

    `meet` comes before each turn.
    """
    times: list[list[float]] = [[] for _ in benchmarks]
    for c in benchmarks:
        meet()
        c.call()
    for _ in range(rounds):
        for c, own in zip(benchmarks, times, strict=True):
            meet()
            begun = time.perf_counter()
            c.call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            own.append((time.perf_counter() - begun) / c.times * 1e3)
    return [measurement(c, own, threads) for c, own in zip(benchmarks, times, strict=True)]


def compare(found: Sequence[Measurement]) -> Ratios:
    """Every benchmark of this program over each yardstick, and over its own dense actor."""
    return {
        f"{m.name} / {other.kernel}": ratio(m.median_ms, other.median_ms)
        for m in found
        for other in found
        if other.kernel in (*BASELINES, "dense") and m is not other and m.kernel not in BASELINES
    }


def ratio(median_ms: float, other_median_ms: float) -> dict[str, float]:
    return {
        "ratio": median_ms / other_median_ms,
        "median_ms": median_ms,
        "other_median_ms": other_median_ms,
    }


def measurement(c: Benchmark, times: list[float], threads: int) -> Measurement:
    median = statistics.median(times)
    return Measurement(
        what=c.what,
        kernel=c.kernel,
        precision=c.precision,
        batch=c.batch,
        world_size=1,
        threads=threads,
        weights=c.weights,
        median_ms=median,
        min_ms=min(times),
        per_second=1e3 / median,
    )


def show(answer: dict[str, Any]) -> None:
    machine = answer["machine"]
    console = Console(soft_wrap=True, markup=False, emoji=False)
    console.print(f"{machine['cpu']}, {machine['cores']} cores; commit {machine['commit']}")
    table = Table(
        "what", "who", "batch", "workers", "median ms", "least ms", "per second", box=None
    )
    for m in answer["measurements"]:
        who = f"{m['kernel']} {m['precision']}".strip()
        table.add_row(
            m["what"], who, str(m["batch"]), str(m["world_size"]), f"{m['median_ms']:.4g}",
            f"{m['min_ms']:.4g}", f"{m['per_second']:,.0f}" if m["per_second"] >= 10 else "",
        )  # fmt: skip
    console.print(table)
    if roofline := answer["roofline"]:
        rate = roofline["product_gflops"]
        for batch, gflop in roofline["update_gflop"].items():
            console.print(
                f"roofline, batch {batch}: an update with dense products is {gflop:.3g} GFLOP,"
                f" {gflop / rate * 1e3:.3g} ms at {rate:.3g} GFLOP/s;"
                f" memory is copied at {roofline['copy_gb_s']:.3g} GB/s"
            )
    for what, why in answer["left_out"].items():
        console.print(f"not measured: {what}: {why}")
    if not answer["ratios"]:
        return
    console.print()
    table = Table("time of / time of", "ratio", "ms", "ms", box=None)
    for name, r in answer["ratios"].items():
        times = f"{r['median_ms']:.4g}", f"{r['other_median_ms']:.4g}"
        table.add_row(name, f"{r['ratio']:.3f}", *times)
    console.print(table)
