"""scripts/scaling fits the constants of made-up measurements, and predicts speeds from them."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "scaling"
FORMS = {
    "shared memory": lambda w: (w, w + 1),
    "gloo": lambda w: (2 * (w - 1), 2 * (w - 1) / w),
    "mpi": lambda w: (2 * math.log2(w), 2 * (w - 1) / w),
}


def measurement(what: str, ms: float, **more: Any) -> dict[str, Any]:
    usual = {"what": what, "kernel": "cpu/avx2", "precision": "fp32", "batch": 1, "world_size": 1}
    return {**usual, "min_ms": ms, **more}


def measured() -> dict[str, Any]:
    """Measurements on 2 cores with latencies of 5 us, or 50 us if workers share cores, 4 GB/s, and
    updates of 1 ms + 20 us a row.
    """
    found = []
    for way, form in FORMS.items():
        for w in (2, 4, 8):
            latencies, vectors = form(w)
            turns, latency = w / 2, 5e-3 if w == 2 else 50e-3
            for n in (1, 1024, 65536, 1 << 20):
                ms = turns * (latencies * latency + vectors * 4 * n / 4e6)
                ms = 99.0 if n == 1 else ms  # ignored by the fit
                found.append(measurement(f"sum of {n} numbers over {way}", ms, world_size=w))
    for batch in (25, 100):
        found.append(measurement("update", 1.0 + 0.02 * batch, batch=batch))
        found.append(measurement("update", 9.0, batch=batch, kernel="popsan loop"))
    found.append(measurement("training", 3.5, batch=100))
    return {"machine": {"cores": 2}, "measurements": found}


def test_constants_and_what_follows(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(measured()))
    said = subprocess.run(
        [sys.executable, str(SCRIPT), str(file)], capture_output=True, text=True, check=True
    ).stdout
    for way in FORMS:
        (line,) = (each for each in said.splitlines() if each.startswith(f"{way}, as"))
        assert ": 5 us, 50 us where workers share cores, 4 GB/s; errors: median 0%" in line
    assert "update: 1 ms + 20 us a row; errors: median 0%" in said
    assert "a step beside its update: 0.5 ms" in said
    # 4 workers in shared memory, batch 100: on average 1.5 sums an update, of 578 and 502 kB.
    sums = 1.5 * 4 * 5e-3 + 5 * 4 * (144_387 + 125_395 / 2) / 4e6
    strong, weak = 3.5 / (0.5 / 4 + 1.0 + 0.02 * 25 + sums), 4 * 3.5 / (3.5 + sums)
    rows = said[said.index("hidden 256, batch 100: steps") :].splitlines()
    cells = next(row for row in rows if row.startswith("| 4 |")).split("|")[2].split("/")
    assert [float(cell) for cell in cells] == pytest.approx([strong, weak], rel=5e-3)
