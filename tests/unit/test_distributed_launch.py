"""Who hears a signal while a machine's workers run."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from spikerl.distributed import launch


@pytest.mark.parametrize("stoppable", [True, False])
def test_a_signal_is_passed_on_only_to_workers_that_end_by_it(
    monkeypatch: pytest.MonkeyPatch, stoppable: bool
) -> None:
    """Others are killed as the program ends, by its own answer to a Ctrl-C."""
    heard: list[Any] = []

    def run(shared_dir: Path, workers: launch.Workers) -> dict[int, int]:
        heard.append(signal.getsignal(signal.SIGINT))
        (shared_dir / "result").write_text("0")
        return {}

    monkeypatch.setattr(launch, "run_under_agent", run)
    workers = launch.Workers(size=2, threads=1, backend="gloo", timeout_s=5.0)
    before = signal.getsignal(signal.SIGINT)
    assert launch.launch({}, workers, stoppable=stoppable) == 0
    assert (heard == [before]) == (not stoppable)
    assert signal.getsignal(signal.SIGINT) is before


def test_of_failures_of_one_kind_the_first_is_named(tmp_path: Path) -> None:
    for rank, second in ((0, 2.0), (1, 1.0), (2, 3.0)):
        reason = {"error": f"E{rank}", "collective": False, "time": second}
        (tmp_path / f"failure.{rank}").write_text(json.dumps(reason))
    lost = launch.first_failure({0: 1, 1: 1, 2: 1}, tmp_path, 3)
    assert str(lost) == "worker 1 of 3: E1"
