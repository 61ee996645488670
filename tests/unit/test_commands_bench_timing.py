"""Turns, ratios and the table of `spikerl bench`, with made-up times."""

from __future__ import annotations

import io
import time
from contextlib import redirect_stdout
from dataclasses import asdict
from functools import partial
from typing import Any

import pytest

from spikerl.commands.bench.progress import BenchProgress
from spikerl.commands.bench.table import show
from spikerl.commands.bench.timing import Benchmark, Measurement, compare, run_interleaved


def test_turns_and_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first round is not counted; a turn's time is divided by its number of repetitions."""
    events: list[str] = []
    now = 0.0
    seconds = {"a": iter([90.0, 1.0, 4.0, 2.0]), "b": iter([90.0, 8.0, 8.0, 8.0])}

    def call(name: str) -> None:
        nonlocal now
        events.append(name)
        now += next(seconds[name])

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    benchmarks = [Benchmark(name, "cpu", "fp32", 7, "run", 2, partial(call, name)) for name in "ab"]
    times = run_interleaved(
        benchmarks,
        3,
        5,
        before_turn=lambda: events.append("-"),
        after_round=lambda: events.append("|"),
    )
    assert "".join(events) == "-a-b|" * 4
    assert [m.median_ms for m in times] == [1000.0, 4000.0]
    assert [m.min_ms for m in times] == [500.0, 4000.0]
    assert [m.per_second for m in times] == [1.0, 0.25]
    assert [(m.batch, m.threads, m.weights) for m in times] == [(7, 5, "run")] * 2


def measured(kernel: str, median_ms: float, **more: Any) -> Measurement:
    facts: dict[str, Any] = {
        "what": "update",
        "precision": "fp32",
        "batch": 100,
        "world_size": 1,
    } | more
    return Measurement(
        kernel=kernel, threads=1, weights="run", median_ms=median_ms, min_ms=median_ms,
        per_second=1e3 / median_ms, **facts,
    )  # fmt: skip


def test_ratios_are_of_the_spiking_actor_over_the_others() -> None:
    measurements = [
        measured("cpu/avx2", 2.0), measured("cpu/avx2", 3.0, precision="bf16"),
        measured("reference", 9.0), measured("dense", 1.0), measured("popsan loop", 8.0),
        measured("dense loop", 4.0),
    ]  # fmt: skip
    ratios = compare(measurements, "cpu/avx2")
    assert {name: r["ratio"] for name, r in ratios.items()} == {
        "update cpu/avx2 fp32 batch 100 / dense": 2.0,
        "update cpu/avx2 fp32 batch 100 / popsan loop": 0.25,
        "update cpu/avx2 fp32 batch 100 / dense loop": 0.5,
        "update cpu/avx2 bf16 batch 100 / dense": 3.0,
        "update cpu/avx2 bf16 batch 100 / popsan loop": 0.375,
        "update cpu/avx2 bf16 batch 100 / dense loop": 0.75,
    }


def test_the_longest_rows_fit_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    strong = "update, strong over shared memory"
    share = "share of exchanges in an update of 128 workers, strong over shared memory"
    measurements = [
        measured("cpu/avx512", 21.234567, what=strong, batch=128, world_size=2),
        measured("", 12345.678, what="exchanges, strong over shared memory", world_size=8),
        measured("cpu/avx512", 0.0125, what="policy(obs)", batch=1, precision="bf16"),
    ]
    answer = {
        "machine": {"cpu": "A processor", "cores": 2, "commit": "0123456789abcdef"},
        "measurements": [asdict(m) for m in measurements],
        "left_out": {"nccl, 2 workers": "no CUDA devices"},
        "roofline": None,
        "ratios": {share: {"ratio": 0.12345}},
    }
    out = io.StringIO()
    with redirect_stdout(out):
        show(answer)
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert max(map(len, lines)) <= 80
    assert [" ".join(line.split()) for line in lines[4:7]] == [
        f"{strong} cpu/avx512 128 x 2 21.23 21.23 47",
        "exchanges, strong over shared memory 100 x 8 12346 12346",
        "policy(obs) cpu/avx512 bf16 1 0.0125 0.0125 80,000",
    ]
    assert lines[0] == "A processor, 2 cores; commit 0123456789"
    assert "not measured: nccl, 2 workers: no CUDA devices" in lines
    assert lines[-1] == f"0.123  {share}"


def test_progress(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part has a line, and INTERVAL seconds apart there is one with the rounds so far."""
    monkeypatch.setattr(BenchProgress, "INTERVAL", -1.0)
    with BenchProgress() as progress:
        progress.part("filling replays")
        progress.part("training", 2)
        for _ in range(3):
            progress.after_round()
    out, err = capsys.readouterr()
    assert (out, err.splitlines()) == ("", [
        "bench: filling replays",
        "bench: training, 2 rounds",
        "bench: training: 0 of 2 rounds",
        "bench: training: 1 of 2 rounds",
        "bench: training: 2 of 2 rounds",
    ])  # fmt: skip
