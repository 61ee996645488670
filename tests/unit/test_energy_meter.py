"""Sums of joules over devices, windows and rows; and a recorded trace through the same path."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from clock import Clock, window

from spikerl.energy import counters
from spikerl.energy.meter import (
    EnergyConfig,
    Meter,
    Reading,
    energy_row,
    joules_to_reach,
    merge,
    open_meter,
    power,
    power_over,
    resolve,
    source_of,
    total_joules,
)
from spikerl.errors import BadRequest

CPU = torch.device("cpu")


def replay(file: Path) -> EnergyConfig:
    return EnergyConfig(name="replay", file=str(file))


# --- sums -----------------------------------------------------------------------------------


def test_merge_takes_each_device_once_from_the_first_rank_that_has_it() -> None:
    merged = merge(
        [
            Reading(2.0, {"gpu:a": 10.0}, {"cpu:n1:0": "stuck", "gpu:z": "lost"}),
            Reading(3.0, {"gpu:a": 99.0, "gpu:b": 20.0}, {}),
            Reading(1.0, {"cpu:n1:0": 5.0, "gpu:b": 77.0}, {"gpu:z": "later"}),
        ]
    )
    joules = {"gpu:a": 10.0, "gpu:b": 20.0, "cpu:n1:0": 5.0}
    late = merge([Reading(1.0, {"gpu:a": 0.0}, {}), Reading(2.0, {"gpu:a": 90.0}, {})])
    assert late == Reading(2.0, {"gpu:a": 90.0}, {}, {"gpu:a": 2.0})
    lasted = {"gpu:a": 2.0, "gpu:b": 3.0, "cpu:n1:0": 1.0}
    assert merged == Reading(3.0, joules, {"gpu:z": "lost"}, lasted)
    assert merge([]) == Reading(0.0, {}, {}, {})


def test_power_is_the_sum_of_every_devices_own() -> None:
    """10 J in 2 s and 30 J in 3 s are 5 + 10 W: each device has its own time. With 4 J in 2 s and
    6 J in 1 s more: 14 / 4 + 36 / 4.
    """
    first = merge([Reading(2.0, {"gpu:a": 10.0}, {}), Reading(3.0, {"gpu:b": 30.0}, {})])
    second = merge([Reading(2.0, {"gpu:a": 4.0}, {}), Reading(1.0, {"gpu:b": 6.0}, {})])
    assert power(first) == 15.0
    assert power(first, second) == 12.5
    assert energy_row(first, second, "zeus:nvml")["power_w"] == 12.5
    shared = merge([Reading(2.0, {"gpu:a": 10.0}, {}), Reading(5.0, {"gpu:a": 90.0}, {})])
    assert power(shared) == 5.0
    assert power() is None
    assert power(Reading(1.0, {}, {})) is None
    assert power(Reading(1.0, {"gpu:a": 1.0}, {"gpu:b": "lost"})) is None
    assert power(first, Reading(1.0, {"gpu:a": 1.0}, {})) is None


class Ticking:
    """A counter that advances by 100 J once a second."""

    least_s = tick_s = 1.0
    most_w = math.inf

    def __init__(self) -> None:
        self.devices = {"gpu:a"}
        self.began: dict[str, float] = {}

    def begin(self, window: str, now: float) -> None:
        self.began[window] = now

    def end(self, window: str, now: float) -> dict[str, float]:
        return {"gpu:a": 100.0 * (int(now) - int(self.began.pop(window)))}

    def caveat(self, began: float, now: float) -> str | None:
        return None


@pytest.mark.parametrize(
    ("train_s", "eval_s", "energy_j", "train_j", "eval_j"),
    [
        (3.5, 0.25, 300.0, 300.0, None),  # the counter does not move in the evaluation
        (0.25, 3.5, 300.0, None, 300.0),
        (0.25, 0.25, None, None, None),
        (0.75, 0.75, 100.0, None, 100.0),
    ],
)
def test_a_window_too_short_for_its_counter(
    train_s: float, eval_s: float, energy_j: float | None, train_j: float | None,
    eval_j: float | None,
) -> None:  # fmt: skip
    """A window in which the counter did not move is null; the sum over both windows is known."""
    clock = Clock()
    clock.now = 0.0
    meter = Meter("zeus:nvml", [Ticking()], clock=clock)

    def measure(window: str, seconds: float) -> Reading:
        meter.begin(window)
        clock.now += seconds
        return merge([Reading(*meter.end(window).as_data())])

    row = energy_row(measure("train", train_s), measure("eval", eval_s), meter.source)
    assert (row["energy_j"], row["energy_train_j"], row["energy_eval_j"]) == (
        energy_j, train_j, eval_j,
    )  # fmt: skip
    assert row["energy_gpu_j"] == energy_j
    watts = None if energy_j is None else energy_j / (train_s + eval_s)
    assert row["power_w"] == watts
    source = "zeus:nvml" if energy_j else f"none: gpu:a: gave 0 J in {train_s + eval_s:.3g} s"
    assert row["energy_source"] == source


def test_a_still_counter_is_no_energy() -> None:
    """In a window longer than `tick_s`, 0 J mean that the counter does not work."""
    clock = Clock()
    clock.now = 0.0
    still = Ticking()
    still.tick_s = 0.5  # below `least_s` joules are imprecise
    meter = Meter("zeus:nvml", [still], clock=clock)
    meter.begin("train")
    clock.now = 0.75
    reading = meter.end("train")
    assert reading == Reading(0.75, {}, {"gpu:a": "gave 0 J in 0.75 s"})


def test_a_sum_says_why_it_is_missing() -> None:
    """The reason is that of the row without joules, even if a later row has some."""
    lost = {"energy_j": None, "energy_source": "none: gpu:a: lost"}
    good = {"energy_j": 1.0, "energy_source": "zeus:nvml"}
    assert source_of([good, lost, good]) == "none: gpu:a: lost"
    assert source_of([good, good]) == "zeus:nvml"
    assert (
        source_of([{"energy_source": "none: of an older version"}]) == "none: of an older version"
    )
    assert source_of([]) is None


def test_power_over_rows() -> None:
    """100 J at 50 W take 2 s, 30 J at 10 W take 3 s: 130 J in 5 s are 26 W; the peak is 50 W."""
    rows = [{"energy_j": 100.0, "power_w": 50.0}, {"energy_j": 30.0, "power_w": 10.0}]
    assert power_over(rows) == (26.0, 50.0)
    assert power_over([*rows, {"energy_j": None, "power_w": None}]) == (None, 50.0)
    assert power_over([]) == (None, None)


def test_row_of_a_whole_epoch() -> None:
    train = Reading(8.0, {"gpu:a": 100.0, "gpu:b": 60.0, "cpu:n1:0": 30.0, "dram:n1:0": 2.0}, {})
    evaluation = Reading(2.0, {"gpu:a": 10.0, "gpu:b": 6.0, "cpu:n1:0": 3.0, "dram:n1:0": 1.0}, {})
    assert energy_row(train, evaluation, "zeus:nvml+rapl") == {
        "energy_j": 212.0,
        "energy_gpu_j": 176.0,
        "energy_cpu_j": 36.0,
        "energy_source": "zeus:nvml+rapl",
        "power_w": 21.2,
        "energy_train_j": 192.0,
        "energy_eval_j": 20.0,
    }


def test_row_of_one_kind_leaves_the_other_null() -> None:
    row = energy_row(
        Reading(1.0, {"gpu:a": 3.0}, {}), Reading(1.0, {"gpu:a": 1.0}, {}), "zeus:nvml"
    )
    assert (row["energy_j"], row["energy_gpu_j"], row["energy_cpu_j"]) == (4.0, 4.0, None)
    assert row["energy_source"] == "zeus:nvml"


@pytest.mark.parametrize("lacks", ["train", "evaluation"])
def test_no_part_passes_for_the_whole(lacks: str) -> None:
    """The GPU was read in one window only: its sum and the total are null, the packages' is not."""
    both, one = {"gpu:a": 8.0, "cpu:n1:0": 2.0}, {"cpu:n1:0": 1.0}
    windows = (one, both) if lacks == "train" else (both, one)
    train, evaluation = (Reading(1.0, joules, {}) for joules in windows)
    row = energy_row(train, evaluation, "zeus:nvml+rapl")
    assert (row["energy_j"], row["energy_gpu_j"], row["power_w"]) == (None, None, None)
    assert row["energy_cpu_j"] == 3.0
    kept, lost = ("eval", "train") if lacks == "train" else ("train", "eval")
    assert (row[f"energy_{kept}_j"], row[f"energy_{lost}_j"]) == (10.0, None)
    assert row["energy_source"] == "none: no device was read in both windows"


def test_joules_over_rows() -> None:
    rows: list[dict[str, Any]] = [
        {"energy_j": 5.0, "eval_return": 10.0},
        {"energy_j": 7.0, "eval_return": None},
        {"energy_j": 1.0, "eval_return": 30.0},
        {"energy_j": None, "eval_return": 50.0},
    ]
    assert total_joules(rows[:3]) == 13.0
    assert total_joules(rows) is None
    assert total_joules([]) is None
    assert total_joules([{}]) is None
    assert joules_to_reach(rows, 10.0) == 5.0
    assert joules_to_reach(rows, 10.1) == 13.0
    assert joules_to_reach(rows, 31.0) is None  # the row that reaches it was not measured
    assert joules_to_reach(rows, 51.0) is None  # never reached


# --- replayed power -------------------------------------------------------------------------


def write_trace(folder: Path, text: str) -> EnergyConfig:
    file = folder / "trace.csv"
    file.write_text(text)
    return replay(file)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("shared", [True, False])
def test_known_power_gives_its_joules(tmp_path: Path, world_size: int, shared: bool) -> None:
    """Constant 250 W per GPU, 40 W of the package and 8 W of memory give exact joules. Windows of
    worker r are r / 2 s longer than worker 0's; only worker 0 reads devices that all share.
    """
    gpus = [f"gpu:{i}" for i in range(1 if shared else world_size)]
    header = ",".join(["t_s", *gpus, "cpu:n1:0", "dram:n1:0"])
    powers = ",".join(["250"] * len(gpus) + ["40", "8"])
    config = write_trace(tmp_path, f"{header}\n0,{powers}\n0.7,{powers}\n3,{powers}\n")
    clocks = [Clock() for _ in range(world_size)]
    meters = []
    for rank, clock in enumerate(clocks):
        clock.now += 0.01 * rank  # workers do not start together
        meters.append(open_meter(config, device=CPU, local_rank=rank, clock=clock))

    def measure(name: str, seconds: float) -> Reading:
        for rank, (meter, clock) in enumerate(zip(meters, clocks, strict=True)):
            clock.now += 0.3  # between windows, not measured
            meter.begin(name)
            clock.now += seconds + 0.5 * rank
        return merge([meter.end(name) for meter in meters])

    row = energy_row(measure("train", 12.5), measure("eval", 1.5), meters[0].source)
    assert row["energy_source"] == f"replay:{config.file}"
    exactly: dict[str, Any] = {"rel": 1e-9}
    more = 250 * sum(0.5 * rank for rank in range(len(gpus)))  # joules of the additional seconds
    assert row["energy_gpu_j"] == pytest.approx(14 * 250 * len(gpus) + 2 * more, **exactly)
    assert row["energy_cpu_j"] == pytest.approx(14 * 48, **exactly)
    whole = 250 * len(gpus) + 48
    assert row["energy_j"] == pytest.approx(14 * whole + 2 * more, **exactly)
    assert row["energy_train_j"] == pytest.approx(12.5 * whole + more, **exactly)
    assert row["energy_eval_j"] == pytest.approx(1.5 * whole + more, **exactly)
    assert row["power_w"] == pytest.approx(250 * len(gpus) + 48, **exactly)


@pytest.mark.parametrize(
    ("begin", "end", "joules"),
    [
        (0, 4, 600.0),  # 0 to 200 W over 2 s, then 200 W for 2 s
        (1, 3, 350.0),  # 100 to 200 W, then 200 W
        (0.5, 1.5, 100.0),
        (0, 1.95, 190.125),  # just before a row
        (3, 5, 250.0),  # past the end the trace repeats: 200 W, then 0 to 100 W
        (0, 40, 6000.0),
        (7.5, 8.25, 103.125),
        (2, 2, 0.0),
    ],
)
def test_power_is_linear_between_rows_and_repeats(
    tmp_path: Path, begin: float, end: float, joules: float
) -> None:
    config = write_trace(tmp_path, "t_s, gpu:0\n10,0\n12,200\n14,200\n")
    clock = Clock()
    meter = open_meter(config, device=CPU, local_rank=0, clock=clock)
    clock.now += begin
    meter.begin("w")
    clock.now += end - begin
    reading = meter.end("w")
    assert reading.joules.get("gpu:0", 0.0) == pytest.approx(joules, rel=1e-9)
    assert reading.missing == ({} if joules else {"gpu:0": "gave 0 J in 0 s"})


def test_replayed_devices_are_dealt_out_by_local_rank(tmp_path: Path) -> None:
    config = write_trace(tmp_path, "t_s,cpu:a:0,gpu:x,gpu:y,dram:a:0\n0,1,2,3,4\n1,1,2,3,4\n")
    clock = Clock()
    meters = [open_meter(config, device=CPU, local_rank=r, clock=clock) for r in range(3)]
    took = [sorted(window(meter, clock).joules) for meter in meters]
    assert took == [["cpu:a:0", "dram:a:0", "gpu:x"], ["gpu:y"], ["gpu:x"]]


def test_a_trace_that_repeats_says_so_once(tmp_path: Path) -> None:
    clock = Clock()
    config = write_trace(tmp_path, "t_s,gpu:0\n0,10\n4,10\n")
    meter = open_meter(config, device=CPU, local_rank=0, clock=clock)
    window(meter, clock, 4.0)
    assert meter.caveats == []
    for _ in range(2):
        window(meter, clock, 0.5)
        said = "the trace of energy.file is over after 4 s and repeats from here on"
        assert meter.caveats == [said]


def test_idle_power(tmp_path: Path) -> None:
    clock, waited = Clock(), list[float]()

    def wait(seconds: float) -> None:
        waited.append(seconds)
        clock.now += 2.0  # a late wake-up

    config = write_trace(tmp_path, "t_s,gpu:0,cpu:n1:0\n0,10,30\n4,10,30\n")
    meter = open_meter(config, device=CPU, local_rank=0, clock=clock)
    assert power(meter.idle(wait)) == pytest.approx(40.0)
    assert waited == [0.05]
    none = open_meter(EnergyConfig(name="none", file=None), device=CPU, local_rank=0, clock=clock)
    assert power(none.idle(wait)) is None
    assert waited == [0.05]  # without a meter there is no wait


def test_a_trace_may_count_seconds_from_1970(tmp_path: Path) -> None:
    config = write_trace(tmp_path, "t_s,gpu:0\n1700000000.25,10\n1700000000.75,30\n")
    clock = Clock()
    reading = window(open_meter(config, device=CPU, local_rank=0, clock=clock), clock, 0.5)
    assert reading.joules["gpu:0"] == pytest.approx(10.0)


def test_windows_may_overlap(tmp_path: Path) -> None:
    config = write_trace(tmp_path, "t_s,gpu:0\n0,10\n1,10\n")
    clock = Clock()
    meter = open_meter(config, device=CPU, local_rank=0, clock=clock)
    meter.begin("epoch")
    inner = window(meter, clock, 3.0)
    clock.now += 1.0
    assert inner.joules["gpu:0"] == pytest.approx(30.0)
    assert meter.end("epoch").joules["gpu:0"] == pytest.approx(40.0)


HEADER = r"line 1 must be t_s and device names \(gpu:\.\.\., cpu:\.\.\., dram:\.\.\.\)"
SECOND, THIRD = (f"line {n} must be a later t_s and 1 numbers of watts" for n in (2, 3))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", HEADER),
        ("t_s\n0\n1\n", HEADER),
        ("time,gpu:0\n0,1\n1,1\n", HEADER),
        ("t_s,gpu:0,gpu:0\n0,1,1\n1,1,1\n", HEADER),
        ("t_s,fan:0\n0,1\n1,1\n", HEADER),
        ("t_s,gpu:\n0,1\n1,1\n", HEADER),
        ("t_s,gpu:0\n", "needs two rows or more"),
        ("t_s,gpu:0\n0,1\n", "needs two rows or more"),
        ("t_s,gpu:0\n0,1\n1\n", THIRD),
        ("t_s,gpu:0\n0,1\n1,1,1\n", THIRD),
        ("t_s,gpu:0\n0,1\n0,1\n", THIRD),
        ("t_s,gpu:0\n0,1\n\n2,1\n", THIRD),
        ("t_s,gpu:0\n0,much\n1,1\n", SECOND),
        ("t_s,gpu:0\n0,-1\n1,1\n", SECOND),
        ("t_s,gpu:0\n0,nan\n1,1\n", SECOND),
        ("t_s,gpu:0\n0,1e300\n1,1\n", SECOND),
        ("t_s,gpu:0\n-inf,1\n1,1\n", SECOND),
    ],
)
def test_garbage_traces_are_refused(tmp_path: Path, text: str, why: str) -> None:
    config = write_trace(tmp_path, text)
    with pytest.raises(BadRequest, match=rf"^energy\.file=.*trace\.csv: {why}$"):
        resolve(config, device=CPU)
    with pytest.raises(BadRequest):
        open_meter(config, device=CPU, local_rank=0)


def test_files_that_are_no_traces_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    binary, pipe = tmp_path / "binary", tmp_path / "pipe"
    binary.write_bytes(b"t_s,gpu:0\xff\n")
    os.mkfifo(pipe)  # opening it would block
    for file, why in (
        (tmp_path / "absent.csv", "no such file"),
        (tmp_path, "no such file"),
        (pipe, "no such file"),
        (binary, "cannot be read as text"),
    ):
        with pytest.raises(BadRequest, match=why):
            resolve(replay(file), device=CPU)
    config = write_trace(tmp_path, "t_s,gpu:0\n0,10\n1,10\n")
    size = Path(str(config.file)).stat().st_size
    monkeypatch.setattr(counters, "MAX_TRACE_BYTES", size)
    assert resolve(config, device=CPU).choice == f"replay:{config.file}"
    monkeypatch.setattr(counters, "MAX_TRACE_BYTES", size - 1)
    with pytest.raises(BadRequest, match="larger than"):
        resolve(config, device=CPU)


def test_where_a_sum_of_several_sources_comes_from() -> None:
    """Sources are listed if a run went on with another meter; a row without joules says why."""
    rows = [{"energy_j": 1.0, "energy_source": source} for source in ("a", "b", "b")]
    assert source_of(rows) == "a; then b"
    assert source_of([*rows, {"energy_j": None, "energy_source": "none: c"}]) == "none: c"
    assert source_of([]) is None
