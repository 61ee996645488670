"""The energy counter of a real GPU; skipped without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
import torch

from spikerl.energy.meter import EnergyConfig, Reading, energy_row, open_meter

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible"),
]

PROGRAM = """
import json, time, torch
from spikerl.energy.meter import EnergyConfig, open_meter
device = torch.device("cuda:0")
meter = open_meter(EnergyConfig(name="zeus", file=None), device=device, local_rank=1)
meter.begin("w")
time.sleep(1.0)
print(json.dumps([meter.source, str(torch.cuda.get_device_properties(0).uuid),
                  meter.end("w").joules]))
"""


def work(device: torch.device, seconds: float) -> None:
    a = torch.randn(4096, 4096, device=device)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for _ in range(20):
            a = (a @ a).clamp(-1, 1)
        torch.cuda.synchronize(device)


def test_a_live_window_is_above_0_j() -> None:
    """Work takes more energy than idling, and no more than a board of 3000 W could use."""
    device = torch.device("cuda:0")
    meter = open_meter(EnergyConfig(name="zeus", file=None), device=device, local_rank=0)
    assert meter.source in ("zeus:nvml", "zeus:nvml+rapl")
    gpu = f"gpu:{torch.cuda.get_device_properties(device).uuid}"
    work(device, 0.5)

    def measured(busy: bool) -> Reading:
        meter.begin("w")
        work(device, 2.0) if busy else time.sleep(2.0)
        return meter.end("w")

    busy, idle = measured(True), measured(False)
    assert busy.missing == idle.missing == {}
    assert 0.0 < idle.joules[gpu] < busy.joules[gpu] < 3000.0 * busy.seconds
    row = energy_row(busy, idle, meter.source)
    assert row["energy_gpu_j"] == pytest.approx(busy.joules[gpu] + idle.joules[gpu])
    assert row["energy_j"] == pytest.approx(row["energy_gpu_j"] + (row["energy_cpu_j"] or 0.0))


def test_a_device_that_was_made_visible_by_uuid() -> None:
    """Zeus by itself fails if CUDA_VISIBLE_DEVICES names a UUID."""
    uuid = str(torch.cuda.get_device_properties(0).uuid)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": f"GPU-{uuid}"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    source, seen, joules = json.loads(done.stdout)
    assert (source, seen, list(joules)) == ("zeus:nvml", uuid, [f"gpu:{uuid}"])
    assert joules[f"gpu:{uuid}"] > 0.0
