"""Sources of joules: Zeus, which reads NVML and RAPL, or a recorded trace of power.

Devices are named gpu:<uuid>, cpu:<host>:<package> and dram:<host>:<package>. A counter covers its
whole device, including other users; NVML's change every 20 to 100 ms, so windows should last a
second or more. Zeus (formerly zeus-ml) is imported only if it has something to read.
"""

from __future__ import annotations

import logging
import math
import os
import platform
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch

from spikerl.children import safe_path
from spikerl.errors import BadRequest

KINDS = ("gpu:", "cpu:", "dram:")
# Where Zeus looks for RAPL: the system's folder, or the one that is mounted into a container.
RAPL_FOLDERS = [Path("/sys/class/powercap/intel-rapl"),
                Path("/zeus_sys/class/powercap/intel-rapl")]  # fmt: skip
# NVML's counters change every 20 to 100 ms, RAPL's every millisecond; both plus the time of a read.
LEAST_S = {"gpu": 1.0, "cpu": 0.05}
TICK_S = {"gpu": 0.2, "cpu": 0.01}
# RAPL's counters wrap, which Zeus notices within a second; a window that begins in between has the
# counter's whole range added. 1000 W is also the most that Zeus expects of a package.
MOST_W = {"gpu": math.inf, "cpu": 1000.0}
MAX_TRACE_BYTES = 8 << 20
MAX_TRACE_VALUE = 1e12  # seconds or watts: products stay far from overflow


class Counters(Protocol):
    """Energy counters of some devices; `begin` and `end` may raise."""

    devices: set[str]  # expected in every window; the meter adds devices that a window had
    least_s: float  # seconds of the shortest window that is measured well
    tick_s: float  # seconds within which a working counter changes
    most_w: float  # power of a device above which the counter is at fault

    def begin(self, window: str, now: float) -> None: ...
    def end(self, window: str, now: float) -> Mapping[str, float]: ...

    def caveat(self, began: float, now: float) -> str | None:
        """A remark on the joules of a window from `began` to `now`, if there is one."""


class Measurable(NamedTuple):
    gpus: dict[int, str]  # Zeus's index to UUID; one GPU or none
    packages: dict[int, str]  # Zeus's index to host:package
    reasons: dict[str, str]  # why "gpu" or "cpu" is empty


class NoCounter(Exception):
    """The reason why a kind of device cannot be measured here."""


def find(device: torch.device) -> Measurable:
    """The counters that a worker on `device` can read if it is its host's local rank 0."""
    devices: dict[str, dict[int, str]] = {"gpu": {}, "cpu": {}}
    reasons = {}
    for kind, look in (("gpu", partial(_gpu, device)), ("cpu", _packages)):
        try:
            devices[kind] = look()
        except NoCounter as error:
            reasons[kind] = str(error)
        except Exception as error:
            reasons[kind] = f"{kind}: {one_line(error)}"
    return Measurable(devices["gpu"], devices["cpu"], reasons)


def _gpu(device: torch.device) -> dict[int, str]:
    if device.type != "cuda":
        on = torch.cuda.is_available()
        raise NoCounter(f"the run is on {device}" if on else "no NVIDIA GPU is visible")
    import pynvml  # type: ignore[import-untyped]  # nvidia-ml-py, which Zeus needs too

    # torch numbers devices in CUDA's order, Zeus in NVML's; the UUID identifies one for both.
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    pynvml.nvmlInit()
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        with suppress(pynvml.NVMLError_NotSupported):
            if pynvml.nvmlDeviceGetMigMode(handle)[0]:
                raise NoCounter("the GPU is in MIG mode, whose slices have no energy counter")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)  # raises if there is no counter
        return {pynvml.nvmlDeviceGetIndex(handle): uuid}
    except pynvml.NVMLError as error:
        raise NoCounter(f"no energy counter for GPU-{uuid} (MIG has none): {error}") from None
    finally:
        pynvml.nvmlShutdown()


def _packages() -> dict[int, str]:
    folder = next((f for f in RAPL_FOLDERS if f.is_dir()), None)
    if folder is None:
        raise NoCounter(f"no RAPL ({RAPL_FOLDERS[0]} is absent)")
    zones = [z for z in folder.glob("intel-rapl:*") if z.name.split(":")[1].isdecimal()]
    zones.sort(key=lambda zone: int(zone.name.split(":")[1]))  # the order of Zeus's indices
    names = {i: (zone / "name").read_text().strip() for i, zone in enumerate(zones)}
    # A zone that is not a package (psys) contains packages and would count them twice.
    packages = {i: name for i, name in names.items() if name.startswith("package-")}
    if not packages:
        raise NoCounter(f"no RAPL (no package in {folder})")
    zeusd = os.environ.get("ZEUSD_SOCK_PATH") or os.environ.get("ZEUSD_HOST_PORT")
    try:
        for i in packages if not zeusd else ():
            (zones[i] / "energy_uj").read_text()
    except PermissionError:
        raise NoCounter("RAPL is unreadable: it needs root or zeusd") from None
    return {i: f"{platform.node()}:{name.removeprefix('package-')}" for i, name in packages.items()}


class ZeusCounters:
    """A ZeusMonitor of GPUs or of packages; a trial window shows whether and what it can read.

    For RAPL, Zeus starts a process per zone that notices when the counter wraps. Each imports the
    program's main module again, as `__mp_main__`, and outlives a program that SIGKILL ended unless
    that module makes it die with its parent.
    """

    def __init__(self, kind: str, names: dict[int, str]) -> None:
        self.names, self.kind = names, kind
        self.least_s, self.tick_s, self.most_w = LEAST_S[kind], TICK_S[kind], MOST_W[kind]
        self.devices = {f"{kind}:{name}" for name in names.values()}
        gpus, packages = (list(names), []) if kind == "gpu" else ([], list(names))
        logging.getLogger("zeus").setLevel(logging.ERROR)
        with _every_gpu_visible(), safe_path():
            from zeus.monitor import ZeusMonitor  # type: ignore[import-untyped]

            self.monitor = ZeusMonitor(gpu_indices=gpus, cpu_indices=packages)
        self.begin("trial", 0.0)
        time.sleep(self.tick_s)
        # Expect memory only if it counted in the trial: on some machines its counter never moves.
        self.devices |= {device for device, j in self.end("trial", 0.0).items() if j > 0}

    def begin(self, window: str, now: float) -> None:
        # The meter has synchronised; Zeus would use its GPU index as if it were torch's.
        self.monitor.begin_window(window, sync_execution=False, restart=True)

    def end(self, window: str, now: float) -> dict[str, float]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings of zeros, which the meter handles
            m = self.monitor.end_window(window, sync_execution=False)
        energies = {"gpu": m.gpu_energy, "cpu": m.cpu_energy, "dram": m.dram_energy}
        return {
            f"{kind}:{self.names[i]}": joules
            for kind, by_index in energies.items()
            for i, joules in (by_index or {}).items()
        }

    def caveat(self, began: float, now: float) -> str | None:
        if now - began >= self.least_s:
            return None
        return (
            f"a window of less than {self.least_s:g} s is short for this machine's {self.kind}"
            f" counters, so that its joules are rough; a larger steps_per_epoch or eval_episodes"
            f" makes windows longer"
        )


@contextmanager
def _every_gpu_visible() -> Iterator[None]:
    """Unset CUDA_VISIBLE_DEVICES: Zeus then numbers GPUs as NVML does, and fails on no UUIDs."""
    visible = os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    try:
        yield
    finally:
        if visible is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible


class Trace(NamedTuple):
    """Power over time, linear between rows, and repeated from its end on."""

    seconds: np.ndarray  # (N,) rising, from 0
    watts: dict[str, np.ndarray]  # (N,) by device

    def joules(self, device: str, until: float) -> float:
        """The integral from 0 to `until`."""
        t, p = self.seconds, self.watts[device]
        turns, rest = divmod(until, float(t[-1]))
        past = t < rest
        last_t = np.append(t[past], rest)
        last_p = np.append(p[past], np.interp(rest, t, p))
        return float(turns * np.trapezoid(p, t) + np.trapezoid(last_p, last_t))


class ReplayCounters:
    """Local rank i reads the trace's GPU i (modulo their number), rank 0 also all other devices."""

    least_s = tick_s = 0.0
    most_w = math.inf

    def __init__(self, trace: Trace, local_rank: int, opened: float) -> None:
        gpus = [device for device in trace.watts if device.startswith("gpu:")]
        self.devices = {gpus[local_rank % len(gpus)]} if gpus else set()
        if local_rank == 0:
            self.devices |= trace.watts.keys() - set(gpus)
        self.trace = trace
        self.opened = opened  # when the trace begins
        self.began: dict[str, float] = {}

    def begin(self, window: str, now: float) -> None:
        self.began[window] = now - self.opened

    def end(self, window: str, now: float) -> dict[str, float]:
        began, ended = self.began.pop(window), now - self.opened
        joules = self.trace.joules
        return {d: joules(d, ended) - joules(d, began) for d in sorted(self.devices)}

    def caveat(self, began: float, now: float) -> str | None:
        length = float(self.trace.seconds[-1])
        if now - self.opened <= length:
            return None
        return f"the trace of energy.file is over after {length:g} s and repeats from here on"


def read_trace(path: str) -> Trace:
    """Read a CSV: a header of `t_s` and one column per device, then two or more rows of numbers.

    t_s,gpu:0,cpu:node1:0
    0.0,71.5,30
    1.0,250,42.5
    """

    def refusal(why: str) -> BadRequest:
        return BadRequest("energy.file", path, why)

    try:
        if not Path(path).is_file():
            raise refusal("no such file; give a CSV of t_s and watts by device")
        with open(path, "rb") as f:
            data = f.read(MAX_TRACE_BYTES + 1)
        lines = data.decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise refusal(f"cannot be read as text: {error}") from None
    if len(data) > MAX_TRACE_BYTES:
        raise refusal(f"larger than {MAX_TRACE_BYTES >> 20} MiB; thin the trace out")
    first, *names = [column.strip() for column in (lines[0] if lines else "").split(",")]
    known = all(name.startswith(KINDS) and not name.endswith(":") for name in names)
    if first != "t_s" or not names or len(set(names)) < len(names) or not known:
        raise refusal("line 1 must be t_s and device names (gpu:..., cpu:..., dram:...)")
    rows: list[list[float]] = []
    for number, line in enumerate(lines[1:], 2):
        try:
            row = [float(cell) for cell in line.split(",")]
        except ValueError:
            row = []
        sound = len(row) == 1 + len(names) and all(abs(x) <= MAX_TRACE_VALUE for x in row)
        if not sound or min(row[1:]) < 0 or (rows and row[0] <= rows[-1][0]):
            raise refusal(f"line {number} must be a later t_s and {len(names)} numbers of watts")
        rows.append(row)
    if len(rows) < 2:
        raise refusal("needs two rows or more")
    table = np.array(rows)
    return Trace(table[:, 0] - table[0, 0], dict(zip(names, table[:, 1:].T, strict=True)))


def one_line(error: Exception) -> str:
    text = str(error).splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
