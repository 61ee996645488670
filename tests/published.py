"""Where a policy lies that the authors of PopSAN published; it is not part of this repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("POPSAN_HALFCHEETAH", "/nowhere"))
MODEL, STATS = FOLDER / "model0_e100.pt", FOLDER / "model0_e100_mean_var.p"

needs_published_policy = pytest.mark.skipif(
    not (MODEL.is_file() and STATS.is_file()),
    reason=f"POPSAN_HALFCHEETAH names no folder with {MODEL.name} and {STATS.name}",
)
