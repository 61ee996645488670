"""Joules of a window of work by device: measured, or missing with a reason; never 0 or a guess.

Each worker opens a meter for its own CUDA device; that of local rank 0 also reads its host's
processor packages and their memory. `merge` combines the workers' readings, and `energy_row`
derives from them the energy keys of a row of metrics.jsonl.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from spikerl.energy.counters import (
    KINDS,
    Counters,
    Measurable,
    ReplayCounters,
    ZeusCounters,
    find,
    one_line,
    read_trace,
)
from spikerl.errors import BadRequest
from spikerl.files import absolute
from spikerl.schema import Registry
from spikerl.types import Resolved


@dataclass(kw_only=True)
class EnergyConfig:
    name: str
    file: str | None  # the recorded trace of energy=replay

    def __post_init__(self) -> None:
        if self.name == "replay" and not self.file:
            raise BadRequest("energy.file", self.file, "energy=replay needs a recorded trace")
        if self.name != "replay" and self.file is not None:
            raise BadRequest("energy.file", self.file, "only energy=replay reads a file")
        self.file = str(absolute(self.file)) if self.file else self.file


METERS: Registry[EnergyConfig, None] = Registry(
    "energy", **dict.fromkeys(("auto", "zeus", "none", "replay"), (EnergyConfig, type(None)))
)


JOULES_PER_KWH = 3.6e6
IDLE_S = 0.05  # seconds of the idle window before a run, unless a counter needs more
LATE_S = 1.0  # longest delay from a window's end to the reading of a counter


class Reading(NamedTuple):
    """One window. A device is in `joules` or in `missing`, or was not meant to be measured."""

    seconds: float
    # By device: above 0, or 0 if the window was too short for the counter to change. Sums over
    # windows include such zeros, but a sum of zeros alone is missing.
    joules: dict[str, float]
    missing: dict[str, str]  # by device, why this window lacks it
    # In a merged reading, by device: seconds of the worker's window that its joules come from.
    lasted: Mapping[str, float] | None = None

    def as_data(self) -> list[Any]:
        """The window as a checkpoint stores it, as if of a single worker."""
        return [self.seconds, self.joules, self.missing]

    def seconds_of(self, device: str) -> float:
        return self.lasted[device] if self.lasted else self.seconds


class Meter:
    """Measures named windows, which may overlap; an error only makes a window lack devices."""

    def __init__(
        self,
        source: str,
        counters: Sequence[Counters] = (),
        *,
        settle: Callable[[], object] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.source = source
        self.gaps: dict[str, str] = {}  # devices that work but have no counter
        self.caveats: list[str] = []  # remarks on the windows so far, each once
        self._counters = list(counters)
        self._settle = settle  # waits for the device's pending work
        self._clock = clock
        self._begun: dict[str, tuple[float, dict[int, str]]] = {}

    def begin(self, window: str) -> None:
        now = self._settled()
        trouble = {}
        for i, counters in enumerate(self._counters):
            try:
                counters.begin(window, now)
            except Exception as error:
                trouble[i] = one_line(error)
        self._begun[window] = now, trouble

    def end(self, window: str) -> Reading:
        now = self._settled()
        never = now, dict.fromkeys(range(len(self._counters)), "the window was not started")
        began, trouble = self._begun.pop(window, never)
        joules: dict[str, float] = {}
        missing = dict(self.gaps)
        for i, counters in enumerate(self._counters):
            read: dict[str, float] = {}
            try:
                if i not in trouble:
                    read = {d: float(j) for d, j in counters.end(window, now).items()}
            except Exception as error:
                trouble[i] = one_line(error)
            # A counter that does not change gives 0, one that wraps a negative or too large value.
            most = counters.most_w * (now - began + LATE_S)
            good = {d: j for d, j in read.items() if math.isfinite(j) and 0 < j <= most}
            counters.devices |= good.keys()
            if now - began < counters.tick_s:
                good |= {d: j for d, j in read.items() if j == 0 and d in counters.devices}
            joules |= good
            caveat = counters.caveat(began, now)
            if good and caveat and caveat not in self.caveats:
                self.caveats.append(caveat)
            for device in sorted(counters.devices - good.keys()):
                said = f"gave {read[device]:g} J" if device in read else "gave nothing"
                missing[device] = trouble.get(i, f"{said} in {now - began:.3g} s")
        return Reading(now - began, joules, missing)

    def idle(self, wait: Callable[[float], object] = time.sleep) -> Reading:
        """A window in which this process does nothing."""
        self.begin("idle")
        if self._counters:
            wait(max(IDLE_S, *(counters.least_s for counters in self._counters)))
        return self.end("idle")

    def _settled(self) -> float:
        with suppress(Exception):  # training reports the device's own errors
            self._settle()
        return self._clock()


def resolve(config: EnergyConfig, *, device: torch.device) -> Resolved:
    """What a host's local rank 0 will measure, and why not more; does not start Zeus."""
    if config.name == "none":
        return Resolved("none", "requested")
    if config.name == "replay":
        seconds = float(read_trace(str(config.file)).seconds[-1])
        return Resolved(
            f"replay:{config.file}", f"requested; after its {seconds:g} s it begins anew"
        )
    reasons = _find(config, device).reasons
    return Resolved(_source(reasons), "; ".join(reasons.values()) or "every counter was found")


def open_meter(
    config: EnergyConfig,
    *,
    device: torch.device,
    local_rank: int,
    clock: Callable[[], float] = time.monotonic,
) -> Meter:
    """One worker's meter; BadRequest if energy=zeus or energy=replay is not possible."""
    if config.name == "none":
        return Meter("none: requested", clock=clock)
    if config.name == "replay":
        replay = ReplayCounters(read_trace(str(config.file)), local_rank, clock())
        return Meter(f"replay:{config.file}", [replay], clock=clock)
    gpus, packages, reasons = _find(config, device)
    if local_rank and packages:
        packages, reasons["cpu"] = {}, "local rank 0 measures this host's processors"
    counters: list[Counters] = []
    for kind, names in (("gpu", gpus), ("cpu", packages)):
        try:
            if names:  # a monitor for each kind, so that one may fail without the other
                counters.append(ZeusCounters(kind, names))
        except Exception as error:
            reasons[kind] = f"{kind}: Zeus could not start: {one_line(error)}"
    if config.name == "zeus" and (gpus or packages) and not counters:
        raise _refusal(reasons)
    source = _source(reasons) if counters else f"none: {'; '.join(reasons.values())}"
    if device.type != "cuda":
        return Meter(source, counters, clock=clock)
    settle = partial(torch.cuda.synchronize, device)
    meter = Meter(source, counters, settle=settle, clock=clock)
    if "gpu" in reasons:  # the GPU works uncounted: the processors alone must not pass as the total
        meter.gaps[f"gpu:{platform.node()}:{device}"] = reasons["gpu"]
    return meter


def merge(readings: Sequence[Reading]) -> Reading:
    """One window from those of all workers, in rank order: each device once, from the first worker
    with a value above 0, else the first with any.
    """
    joules: dict[str, float] = {}
    missing: dict[str, str] = {}
    lasted: dict[str, float] = {}
    for reading in readings:
        missing = {**reading.missing, **missing}
        for device, j in reading.joules.items():
            if device not in joules or (joules[device] == 0.0 < j):
                joules[device], lasted[device] = j, reading.seconds
    missing = {device: why for device, why in missing.items() if device not in joules}
    return Reading(max((r.seconds for r in readings), default=0.0), joules, missing, lasted)


def power(*windows: Reading) -> float | None:
    """Watts: the sum over devices of the mean power in the windows, each over its own seconds.

    None unless there is a device, every window has every device, and each used energy.
    """
    devices = dict.fromkeys(d for w in windows for d in (*w.joules, *w.missing))
    watts = []
    for device in devices:
        if any(device not in w.joules for w in windows):
            return None
        seconds = math.fsum(w.seconds_of(device) for w in windows)
        if seconds <= 0.0:
            return None
        watts.append(math.fsum(w.joules[device] for w in windows) / seconds)
    return math.fsum(watts) if watts and all(watts) else None


def consecutive(first: Reading, second: Reading) -> Reading:
    """Two windows, one after the other, as one; a device that one of them lacks is missing."""
    joules = {d: j + second.joules[d] for d, j in first.joules.items() if d in second.joules}
    missing = {**first.missing, **second.missing}
    for device in {*first.joules, *second.joules} - joules.keys():
        missing.setdefault(device, "only one part of the window has it")
    return Reading(first.seconds + second.seconds, joules, missing)


def energy_row(train: Reading, evaluation: Reading, source: str) -> dict[str, Any]:
    """The energy keys of an epoch's row, from merged readings.

    `energy_cpu_j` includes processors and their memory. A sum is null if a device that either
    window knows is missing in a window that the sum covers, so that no part passes as the total.
    `energy_source` says where `energy_j` comes from or why it is null; `power_w` is the mean power.
    """
    missing = {**evaluation.missing, **train.missing}
    devices = list(dict.fromkeys([*train.joules, *evaluation.joules, *missing]))

    def total(*windows: Reading, kinds: tuple[str, ...] = KINDS) -> float | None:
        chosen = [device for device in devices if device.startswith(kinds)]
        if any(d not in w.joules for d in chosen for w in windows):
            return None
        sums = [math.fsum(w.joules[d] for w in windows) for d in chosen]
        return math.fsum(sums) if sums and all(sums) else None

    joules = total(train, evaluation)
    if joules is None and not source.startswith("none"):
        still = [d for d in devices if train.joules.get(d) == evaluation.joules.get(d) == 0.0]
        said = f"gave 0 J in {train.seconds + evaluation.seconds:.3g} s"
        reasons = {**missing, **dict.fromkeys(still, said)}
        why = "; ".join(f"{device}: {reason}" for device, reason in reasons.items())
        source = f"none: {why or 'no device was read in both windows'}"
    return {
        "energy_j": joules,
        "energy_gpu_j": total(train, evaluation, kinds=("gpu:",)),
        "energy_cpu_j": total(train, evaluation, kinds=("cpu:", "dram:")),
        "energy_source": source,
        "power_w": None if joules is None else power(train, evaluation),
        "energy_train_j": total(train),
        "energy_eval_j": total(evaluation),
    }


def total_joules(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Sum over these rows of metrics.jsonl; None unless every one was measured."""
    joules = [row.get("energy_j") for row in rows]
    measured = [j for j in joules if j is not None]
    return math.fsum(measured) if measured and len(measured) == len(joules) else None


def source_of(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Where the joules of all these rows come from, or why their sum is null."""
    lacking = [row for row in rows if row.get("energy_j") is None]
    if lacking:
        return lacking[-1].get("energy_source")
    named = dict.fromkeys(str(row["energy_source"]) for row in rows if row.get("energy_source"))
    return "; then ".join(named) or None


def power_over(rows: Sequence[Mapping[str, Any]]) -> tuple[float | None, float | None]:
    """Mean power over these rows, None unless every one was measured, and the highest of a row."""
    watts = [row["power_w"] for row in rows if row.get("power_w")]
    if not watts or len(watts) < len(rows):
        return None, max(watts, default=None)
    joules = [row["energy_j"] for row in rows]
    seconds = math.fsum(j / w for j, w in zip(joules, watts, strict=True))
    return math.fsum(joules) / seconds, max(watts)


def joules_to_reach(rows: Sequence[Mapping[str, Any]], eval_return: float) -> float | None:
    """Joules up to and including the first row whose evaluation reached `eval_return`, if any."""
    for i, row in enumerate(rows):
        if row.get("eval_return") is not None and row["eval_return"] >= eval_return:
            return total_joules(rows[: i + 1])
    return None


def _find(config: EnergyConfig, device: torch.device) -> Measurable:
    counters = find(device)
    if config.name == "zeus" and not counters.gpus and not counters.packages:
        raise _refusal(counters.reasons)
    return counters


def _refusal(reasons: Mapping[str, str]) -> BadRequest:
    why = "; ".join(reasons.values())
    return BadRequest("energy", "zeus", f"{why}; use energy=auto to run without joules")


def _source(reasons: Mapping[str, str]) -> str:
    parts = [name for kind, name in (("gpu", "nvml"), ("cpu", "rapl")) if kind not in reasons]
    return f"zeus:{'+'.join(parts)}" if parts else "none"
