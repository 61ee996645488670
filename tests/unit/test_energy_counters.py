"""Joules: what is measured, what is missing and why, and the sums."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from clock import Clock, window
from fake_counters import UUID, FakeNVML, FakeZeus, make_rapl
from omegaconf import OmegaConf

from spikerl.energy import counters
from spikerl.energy.meter import (
    METERS,
    EnergyConfig,
    Reading,
    consecutive,
    energy_row,
    open_meter,
    resolve,
)
from spikerl.errors import BadRequest
from spikerl.schema import parse
from spikerl.types import Resolved

CPU = torch.device("cpu")
CUDA = torch.device("cuda:1")
AUTO = EnergyConfig(name="auto", file=None)
ZEUS = EnergyConfig(name="zeus", file=None)
CONF = Path(__file__).parents[2] / "conf" / "energy"
NO_GPU = "no NVIDIA GPU is visible"


# --- a machine made of fakes ----------------------------------------------------------------


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hide this machine's energy counters, so that only a test's own are found."""
    monkeypatch.setattr(counters, "RAPL_FOLDERS", [tmp_path / "no-rapl"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("platform.node", lambda: "n1")
    for variable in ("ZEUSD_SOCK_PATH", "ZEUSD_HOST_PORT", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def zeus(monkeypatch: pytest.MonkeyPatch) -> FakeZeus:
    fake = FakeZeus()
    monkeypatch.setitem(sys.modules, "zeus", ModuleType("zeus"))
    monkeypatch.setitem(sys.modules, "zeus.monitor", fake.module)
    return fake


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch, zeus: FakeZeus) -> FakeNVML:
    fake = FakeNVML()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked = lambda device: SimpleNamespace(uuid=UUID if device == CUDA else "other")  # noqa: E731
    monkeypatch.setattr(torch.cuda, "get_device_properties", asked)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: zeus.log("sync", device))
    return fake


@pytest.fixture
def rapl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    folder = make_rapl(tmp_path / "intel-rapl")
    monkeypatch.setattr(counters, "RAPL_FOLDERS", [tmp_path / "no-rapl", folder])
    return folder


# --- what was asked for ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["auto", "zeus", "none", "replay"])
def test_each_yaml_fits_the_schema(name: str) -> None:
    data: Any = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"))
    if name == "replay":
        with pytest.raises(BadRequest, match=r"(?s)^energy\.file.*: give it a value$"):
            parse(EnergyConfig, data, key="energy")
        data["file"] = "t.csv"
    assert parse(EnergyConfig, data, key="energy").name == name


@pytest.mark.parametrize(
    ("name", "file", "line"),
    [
        ("watts", None, "energy=watts: one of auto, none, replay, zeus"),
        ("replay", None, "energy.file=null: energy=replay needs a recorded trace"),
        ("replay", "", "energy.file=: energy=replay needs a recorded trace"),
        ("auto", "t.csv", "energy.file=t.csv: only energy=replay reads a file"),
    ],
)
def test_config_refuses(name: str, file: str | None, line: str) -> None:
    with pytest.raises(BadRequest) as refused:
        METERS.parse({"name": name, "file": file})
    assert str(refused.value) == line


def test_none_measures_nothing() -> None:
    clock, config = Clock(), EnergyConfig(name="none", file=None)
    assert resolve(config, device=CPU) == Resolved("none", "requested")
    meter = open_meter(config, device=CPU, local_rank=0, clock=clock)
    assert meter.source == "none: requested"
    assert window(meter, clock) == Reading(2.0, {}, {})


def test_auto_without_counters_says_why_of_each(tmp_path: Path) -> None:
    meter = open_meter(AUTO, device=CPU, local_rank=0)
    assert meter.source == f"none: {NO_GPU}; no RAPL ({tmp_path / 'no-rapl'} is absent)"
    assert resolve(AUTO, device=CPU) == Resolved("none", meter.source.removeprefix("none: "))
    row = energy_row(Reading(1.0, {}, {}), Reading(1.0, {}, {}), meter.source)
    assert row.pop("energy_source") == meter.source
    assert set(row.values()) == {None}


def test_zeus_by_name_without_counters_is_refused() -> None:
    for ask in (
        lambda: resolve(ZEUS, device=CPU),
        lambda: open_meter(ZEUS, device=CPU, local_rank=0),
        lambda: open_meter(ZEUS, device=CPU, local_rank=3),
    ):
        with pytest.raises(BadRequest, match=f"^energy=zeus: {NO_GPU}; no RAPL .*energy=auto"):
            ask()


PROGRAM = """
import json, sys, time, torch
from pathlib import Path
from spikerl.energy import counters
from spikerl.energy.meter import EnergyConfig, open_meter

def opened(name):
    config = EnergyConfig(name=name, file=None)
    return open_meter(config, device=torch.device("cpu"), local_rank=0)

counters.RAPL_FOLDERS = [Path("/no/rapl")]
times = []
for _ in range(5):
    began = time.perf_counter()
    meter = opened("auto")
    meter.begin("w")
    meter.end("w")
    times.append(time.perf_counter() - began)
heavy = [m for m in ("zeus", "pandas", "sklearn", "scipy", "amdsmi") if m in sys.modules]
print(json.dumps([meter.source, min(times), heavy]))

import zeus.device.cpu.rapl
folder = Path(sys.argv[1])
zeus.device.cpu.rapl.RAPL_DIR = str(folder)
counters.RAPL_FOLDERS = [folder]
meter = opened("zeus")
readings = []
for uj in (1_500_000, 1_500_000):
    meter.begin("w")
    for zone, times in (("0", 5), ("2", 1), ("10", 2), ("2/intel-rapl:2:0", 3)):
        (folder / f"intel-rapl:{zone}" / "energy_uj").write_text(str(uj * times))
    readings.append(meter.end("w"))
still = sorted(device for device in readings[0].joules if not readings[1].joules.get(device))
print(json.dumps([meter.source, readings[0].joules, still]))
"""


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The output of a process without a counter, then with the real Zeus on a made-up RAPL."""
    folder = make_rapl(tmp_path_factory.mktemp("real") / "intel-rapl")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", PROGRAM, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
    without, real = done.stdout.splitlines()
    return json.loads(without), json.loads(real)


def test_without_counters_nothing_is_imported_and_it_is_quick(printed: tuple[Any, Any]) -> None:
    source, seconds, heavy = printed[0]
    assert source == f"none: {NO_GPU}; no RAPL (/no/rapl is absent)"
    assert heavy == []
    assert seconds < 0.05


def test_the_real_zeus_reads_a_made_up_rapl_silently(printed: tuple[Any, Any]) -> None:
    """Joules of packages and memory are exact; Zeus prints nothing."""
    source, joules, still = printed[1]
    assert source == "zeus:rapl"
    names = {name.replace(os.uname().nodename, "n1"): j for name, j in joules.items()}
    assert names == {"cpu:n1:0": 1.5, "cpu:n1:1-die-0": 3.0, "dram:n1:0": 4.5}
    assert still == sorted(joules)


# --- processors -----------------------------------------------------------------------------


def test_packages_are_counted_as_zeus_counts_zones(zeus: FakeZeus, rapl: Path) -> None:
    """psys is left out, as it contains the packages; zone 10 comes after zone 2."""
    clock = Clock()
    assert resolve(AUTO, device=CPU) == Resolved("zeus:rapl", NO_GPU)
    assert zeus.calls == []
    meter = open_meter(AUTO, device=CPU, local_rank=0, clock=clock)
    assert meter.source == "zeus:rapl"
    zeus.energies |= {"cpu": {1: 30.0, 2: 50.0}, "dram": {1: 4.0}}
    reading = window(meter, clock)
    joules = {"cpu:n1:0": 30.0, "cpu:n1:1-die-0": 50.0, "dram:n1:0": 4.0}
    assert reading == Reading(2.0, joules, {})
    assert zeus.calls == [
        ("open", [], [1, 2], None),
        ("begin cpu", "trial"),
        ("end cpu", "trial"),
        ("begin cpu", "w"),
        ("end cpu", "w"),
    ]


def test_only_local_rank_0_measures_packages(zeus: FakeZeus, rapl: Path) -> None:
    for config in (AUTO, ZEUS):
        meter = open_meter(config, device=CPU, local_rank=1)
        assert meter.source == f"none: {NO_GPU}; local rank 0 measures this host's processors"
        assert window(meter, Clock()).joules == {}
    assert zeus.calls == []


def test_unreadable_rapl_names_the_remedy(
    zeus: FakeZeus, rapl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Path.read_text

    def as_a_user(path: Path) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr(Path, "read_text", as_a_user)
    meter = open_meter(AUTO, device=CPU, local_rank=0)
    assert meter.source == f"none: {NO_GPU}; RAPL is unreadable: it needs root or zeusd"
    assert zeus.calls == []
    monkeypatch.setenv("ZEUSD_SOCK_PATH", "/run/zeusd.sock")
    assert open_meter(AUTO, device=CPU, local_rank=0).source == "zeus:rapl"


def test_a_folder_without_packages_is_no_rapl(tmp_path: Path, rapl: Path) -> None:
    for zone in rapl.iterdir():
        (zone / "name").write_text("psys")
    assert resolve(AUTO, device=CPU).reason == f"{NO_GPU}; no RAPL (no package in {rapl})"


@pytest.mark.parametrize("wrong", [0.0, -2.5, math.nan, math.inf])
def test_what_cannot_be_an_energy_is_missing(zeus: FakeZeus, rapl: Path, wrong: float) -> None:
    clock = Clock()
    meter = open_meter(AUTO, device=CPU, local_rank=0, clock=clock)
    zeus.energies["cpu"] = {1: wrong, 2: 50.0}
    reading = window(meter, clock)
    assert reading.joules == {"cpu:n1:1-die-0": 50.0}
    assert reading.missing == {"cpu:n1:0": f"gave {wrong:g} J in 2 s"}
    zeus.energies["cpu"] = {2: 50.0}
    assert window(meter, clock).missing == {"cpu:n1:0": "gave nothing in 2 s"}
    zeus.energies["cpu"] = {1: 30.0, 2: 50.0}
    assert window(meter, clock).missing == {}


def test_a_counter_that_wrapped_before_its_window_is_not_believed(
    zeus: FakeZeus, rapl: Path
) -> None:
    """Zeus adds the counter's whole range to 120 J in 2 s; 1000 W are accepted."""
    clock = Clock()
    most = {"cpu": {1: 2000.0, 2: 120.0}, "dram": {1: 9.0}}
    zeus.energies |= most
    meter = open_meter(AUTO, device=CPU, local_rank=0, clock=clock)
    zeus.energies |= {"cpu": {1: 262_143.5 + 120.0, 2: 120.0}, "dram": {1: 65_532.5 + 9.0}}
    missing = {"cpu:n1:0": "gave 262264 J in 2 s", "dram:n1:0": "gave 65541.5 J in 2 s"}
    assert window(meter, clock) == Reading(2.0, {"cpu:n1:1-die-0": 120.0}, missing)
    zeus.energies |= most
    joules = {"cpu:n1:0": 2000.0, "cpu:n1:1-die-0": 120.0, "dram:n1:0": 9.0}
    assert window(meter, clock) == Reading(2.0, joules, {})


def test_memory_that_works_is_known_before_the_first_window(zeus: FakeZeus, rapl: Path) -> None:
    """A run that was stopped during an evaluation goes on with an almost empty window of training:
    the joules spent before, those of memory included, must not get lost in the sum.
    """
    clock = Clock()
    zeus.energies |= {"cpu": {1: 0.25, 2: 0.25}, "dram": {1: 0.125}}  # counted in the trial window
    meter = open_meter(AUTO, device=CPU, local_rank=0, clock=clock)
    zeus.energies |= {"cpu": {1: 0.0, 2: 0.0}, "dram": {1: 0.0}}
    spent = Reading(60.0, {"cpu:n1:0": 30.0, "cpu:n1:1-die-0": 20.0, "dram:n1:0": 4.0}, {})
    train = consecutive(spent, window(meter, clock, 0.0001))
    assert (train.joules, train.missing) == (spent.joules, {})


def test_memory_is_demanded_once_it_has_counted(zeus: FakeZeus, rapl: Path) -> None:
    """Memory at 0 J is missing only if it has counted before: on some machines it stays at 0, which
    must not make the packages' sum null.
    """
    clock = Clock()
    meter = open_meter(AUTO, device=CPU, local_rank=0, clock=clock)
    zeus.energies |= {"cpu": {1: 1.0, 2: 1.0}, "dram": {1: 0.0}}
    assert window(meter, clock) == Reading(2.0, {"cpu:n1:0": 1.0, "cpu:n1:1-die-0": 1.0}, {})
    zeus.energies["dram"] = {1: 3.0}
    assert window(meter, clock).joules["dram:n1:0"] == 3.0
    zeus.energies["dram"] = {1: 0.0}
    assert window(meter, clock).missing == {"dram:n1:0": "gave 0 J in 2 s"}


@pytest.mark.parametrize("moment", ["begin cpu", "end cpu"])
def test_a_failing_window_says_why_and_the_next_is_read(
    zeus: FakeZeus, rapl: Path, moment: str
) -> None:
    clock = Clock()
    meter = open_meter(AUTO, device=CPU, local_rank=0, clock=clock)
    zeus.energies["cpu"] = {1: 1.0, 2: 1.0}
    zeus.fails[moment] = OSError("the counter\nis gone")
    reading = window(meter, clock)
    why = "OSError: the counter"
    assert reading == Reading(2.0, {}, {"cpu:n1:0": why, "cpu:n1:1-die-0": why})
    zeus.fails.clear()
    assert sum(window(meter, clock).joules.values()) == 2.0


def test_a_window_that_is_begun_twice_starts_again(zeus: FakeZeus, rapl: Path) -> None:
    clock = Clock()
    meter = open_meter(AUTO, device=CPU, local_rank=0, clock=clock)
    zeus.energies["cpu"] = {1: 1.0, 2: 1.0}
    meter.begin("w")
    clock.now += 5.0
    assert window(meter, clock) == Reading(2.0, {"cpu:n1:0": 1.0, "cpu:n1:1-die-0": 1.0}, {})


def test_a_window_that_was_not_begun_or_is_closed(zeus: FakeZeus, rapl: Path) -> None:
    meter = open_meter(AUTO, device=CPU, local_rank=0)
    never = meter.end("never")
    assert never.joules == {}
    assert set(never.missing.values()) == {"the window was not started"}
    meter.begin("w")
    assert meter.end("w").joules == {}


@pytest.mark.parametrize("moment", ["open", "begin cpu"])
def test_zeus_that_does_not_start(zeus: FakeZeus, rapl: Path, moment: str) -> None:
    zeus.fails[moment] = RuntimeError("no permission")
    why = f"{NO_GPU}; cpu: Zeus could not start: RuntimeError: no permission"
    assert open_meter(AUTO, device=CPU, local_rank=0).source == f"none: {why}"
    with pytest.raises(BadRequest, match=f"^energy=zeus: {why}; use energy=auto"):
        open_meter(ZEUS, device=CPU, local_rank=0)


# --- GPUs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("visible", [None, "1,0", f"GPU-{UUID}", ""])
def test_a_worker_reads_its_own_gpu_and_waits_for_it(
    zeus: FakeZeus, nvml: FakeNVML, monkeypatch: pytest.MonkeyPatch, visible: str | None
) -> None:
    """torch's cuda:1 is NVML's index 2; CUDA_VISIBLE_DEVICES, which Zeus misreads, is restored."""
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    clock = Clock()
    meter = open_meter(AUTO, device=CUDA, local_rank=1, clock=clock)
    assert meter.source == "zeus:nvml"
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible
    zeus.energies["gpu"] = {2: 123.0}
    assert window(meter, clock) == Reading(2.0, {f"gpu:{UUID}": 123.0}, {})
    assert zeus.calls == [
        ("open", [2], [], None),
        ("begin gpu", "trial"),
        ("end gpu", "trial"),
        ("sync", CUDA),
        ("begin gpu", "w"),
        ("sync", CUDA),
        ("end gpu", "w"),
    ]
    assert nvml.open == 0


def test_gpu_and_packages_fail_separately(zeus: FakeZeus, nvml: FakeNVML, rapl: Path) -> None:
    clock = Clock()
    assert resolve(AUTO, device=CUDA) == Resolved("zeus:nvml+rapl", "every counter was found")
    meter = open_meter(ZEUS, device=CUDA, local_rank=0, clock=clock)
    assert meter.source == "zeus:nvml+rapl"
    zeus.energies |= {"gpu": {2: 100.0}, "cpu": {1: 10.0, 2: 20.0}}
    whole = window(meter, clock)
    zeus.fails["end gpu"] = RuntimeError("GPU is lost")
    part = window(meter, clock)
    assert part.joules == {"cpu:n1:0": 10.0, "cpu:n1:1-die-0": 20.0}
    assert part.missing == {f"gpu:{UUID}": "RuntimeError: GPU is lost"}
    row = energy_row(whole, part, meter.source)
    assert row == {
        "energy_j": None,
        "energy_gpu_j": None,
        "energy_cpu_j": 60.0,
        "energy_source": f"none: gpu:{UUID}: RuntimeError: GPU is lost",
        "power_w": None,
        "energy_train_j": 130.0,
        "energy_eval_j": None,
    }


def test_windows_too_short_for_their_counter_say_so(
    zeus: FakeZeus, nvml: FakeNVML, rapl: Path
) -> None:
    """A GPU's counter needs windows of 1 s, a package's 0.05 s; each caveat is noted once."""
    clock, waited = Clock(), list[float]()
    meter = open_meter(AUTO, device=CUDA, local_rank=0, clock=clock)
    zeus.energies |= {"gpu": {2: 100.0}, "cpu": {1: 10.0, 2: 20.0}}
    window(meter, clock, 1.0)
    assert meter.caveats == []
    assert window(meter, clock, 0.875).joules[f"gpu:{UUID}"] == 100.0  # reported, though imprecise
    (said,) = meter.caveats
    assert said.startswith("a window of less than 1 s is short for this machine's gpu counters")
    window(meter, clock, 0.03125)
    window(meter, clock, 0.03125)
    assert [text[:28] for text in meter.caveats[1:]] == ["a window of less than 0.05 s"]
    meter.idle(waited.append)
    assert waited == [1.0]


def test_packages_that_do_not_start_leave_the_gpu(
    zeus: FakeZeus, nvml: FakeNVML, rapl: Path
) -> None:
    zeus.fails["begin cpu"] = OSError("not for you")
    meter = open_meter(ZEUS, device=CUDA, local_rank=0)
    assert meter.source == "zeus:nvml"


def test_an_error_of_the_device_itself_is_not_the_meters(
    zeus: FakeZeus, nvml: FakeNVML, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    meter = open_meter(AUTO, device=CUDA, local_rank=0, clock=clock)
    zeus.energies["gpu"] = {2: 1.0}
    zeus.fails["sync"] = RuntimeError("CUDA error")
    assert window(meter, clock).joules == {f"gpu:{UUID}": 1.0}


def uncounted(nvml: FakeNVML) -> None:
    nvml.counter = False


def in_mig_mode(nvml: FakeNVML) -> None:
    nvml.mig = True


@pytest.mark.parametrize(
    ("state", "why"),
    [
        (in_mig_mode, "the GPU is in MIG mode, whose slices have no energy counter"),
        (uncounted, f"no energy counter for GPU-{UUID} (MIG has none): Not Supported"),
    ],
)
def test_an_uncounted_gpu_keeps_the_packages_from_passing_for_the_whole(
    zeus: FakeZeus, nvml: FakeNVML, rapl: Path, state: Callable[[FakeNVML], None], why: str
) -> None:
    state(nvml)
    clock = Clock()
    meter = open_meter(AUTO, device=CUDA, local_rank=0, clock=clock)
    assert meter.source == "zeus:rapl"
    zeus.energies["cpu"] = {1: 10.0, 2: 20.0}
    train, evaluation = window(meter, clock), window(meter, clock)
    row = energy_row(train, evaluation, meter.source)
    assert (row["energy_j"], row["energy_gpu_j"], row["energy_cpu_j"]) == (None, None, 60.0)
    assert row["energy_source"] == f"none: gpu:n1:cuda:1: {why}"


def test_a_gpu_that_knows_no_mig_is_measured(zeus: FakeZeus, nvml: FakeNVML) -> None:
    nvml.mig = None
    assert open_meter(AUTO, device=CUDA, local_rank=0).source == "zeus:nvml"


def test_a_gpu_that_nvml_does_not_know(zeus: FakeZeus, nvml: FakeNVML) -> None:
    reason = resolve(AUTO, device=torch.device("cuda:0")).reason
    assert reason.startswith(
        "no energy counter for GPU-other (MIG has none): Not Measurable; no RAPL"
    )


def test_a_cpu_run_beside_a_gpu_does_not_claim_there_is_none(nvml: FakeNVML) -> None:
    assert resolve(AUTO, device=CPU).reason.startswith("the run is on cpu; no RAPL")


def test_a_gpu_may_stand_still_for_a_fifth_of_a_second(zeus: FakeZeus, nvml: FakeNVML) -> None:
    clock = Clock()
    meter = open_meter(AUTO, device=CUDA, local_rank=0, clock=clock)
    zeus.energies["gpu"] = {2: 0.0}
    assert window(meter, clock, 0.1875).joules == {f"gpu:{UUID}": 0.0}
    missing = window(meter, clock, 0.25).missing
    assert missing[f"gpu:{UUID}"] == "gave 0 J in 0.25 s"
