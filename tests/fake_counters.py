"""Fake energy counters: Zeus, NVML with one GPU, and the folders of RAPL."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

UUID = "8b2f0000-0000-0000-0000-000000000001"


class FakeZeus:
    """Replaces zeus.monitor; `energies` is what the next calls of end_window return."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.energies: dict[str, dict[int, float] | None] = {"gpu": {}, "cpu": None, "dram": None}
        self.fails: dict[str, Exception] = {}
        zeus = self

        class ZeusMonitor:
            def __init__(self, gpu_indices: list[int], cpu_indices: list[int]) -> None:
                zeus.log("open", gpu_indices, cpu_indices, os.environ.get("CUDA_VISIBLE_DEVICES"))
                self.kind = "gpu" if gpu_indices else "cpu"
                self.begun: set[str] = set()

            def begin_window(self, key: str, sync_execution: bool, restart: bool) -> None:
                zeus.log(f"begin {self.kind}", key)
                assert not sync_execution
                if key in self.begun and not restart:
                    raise ValueError(f"window {key} already exists")
                self.begun.add(key)

            def end_window(self, key: str, sync_execution: bool) -> Any:
                zeus.log(f"end {self.kind}", key)
                assert not sync_execution
                self.begun.remove(key)
                gave = zeus.energies
                gpu = gave["gpu"] if self.kind == "gpu" else {}
                cpu, dram = (gave[k] if self.kind == "cpu" else None for k in ("cpu", "dram"))
                return SimpleNamespace(gpu_energy=gpu, cpu_energy=cpu, dram_energy=dram)

        self.module = ModuleType("zeus.monitor")
        self.module.ZeusMonitor = ZeusMonitor  # type: ignore[attr-defined]

    def log(self, what: str, *details: Any) -> None:
        self.calls.append((what, *details))
        if what in self.fails:
            raise self.fails[what]


class FakeNVML(ModuleType):
    """NVML with one GPU, whose index is 2."""

    class NVMLError(Exception):
        pass

    class NVMLError_NotSupported(NVMLError):
        pass

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.mig: bool | None = False  # None: a GPU that does not support MIG
        self.counter = True
        self.open = 0

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != f"GPU-{UUID}":
            raise self.NVMLError("Not Measurable")
        return "handle"

    def nvmlDeviceGetMigMode(self, handle: str) -> list[bool]:
        if self.mig is None:
            raise self.NVMLError_NotSupported("Not Supported")
        return [self.mig, self.mig]

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        if not self.counter:
            raise self.NVMLError_NotSupported("Not Supported")
        return 1

    def nvmlDeviceGetIndex(self, handle: str) -> int:
        return 2


def make_rapl(folder: Path) -> Path:
    """A zone for the whole system and two for packages, the first with a zone for its memory."""
    zones = {"0": "psys", "2": "package-0", "10": "package-1-die-0", "2/intel-rapl:2:0": "dram"}
    for number, name in zones.items():
        zone = folder / f"intel-rapl:{number}"
        zone.mkdir(parents=True)
        for file, text in (("name", name), ("energy_uj", "0"), ("max_energy_range_uj", "9e9")):
            (zone / file).write_text(f"{text}\n")
    return folder
