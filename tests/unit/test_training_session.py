"""A run while it runs: what it refuses to go on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shell import refusal

from spikerl.training.session import Session


def test_a_checkpoint_of_another_run_is_refused_in_a_line(tmp_path: Path) -> None:
    class Session_(Session):
        def __init__(self, trainer: Any) -> None:
            self.trainer, self.folder = trainer, tmp_path

    class Broken:
        def load(self, checkpoint: Any) -> bool:
            raise RuntimeError("first\nsecond")

    named: Any = type("Named", (), {"folder": tmp_path / "step_7"})
    line = str(refusal(Session_(Broken()).restore, named))
    assert line == f"resume={tmp_path}: its step_7 does not fit this run (RuntimeError: first)"
