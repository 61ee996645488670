"""A run's record before and after a resume."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from spikerl.runs.record import RunLog
from spikerl.runs.rows import cut_back


def test_steps_of_the_views_never_go_back(tmp_path: Path) -> None:
    """A resume at step 2, after rows 3 and 4 were written and discarded."""
    first = RunLog(tmp_path, 0)
    for step in (1, 2, 3, 4):
        first.row({"step": step, "eval_return": float(step)})
    first.write()
    for name in (tmp_path / "tb").iterdir():  # as of an earlier second
        name.rename(name.with_name(name.name.replace("tfevents.1", "tfevents.0")))
    second = RunLog(tmp_path, 2)
    for step in (3, 4, 5):
        second.row({"step": step, "eval_return": 10.0 + step})
    second.write()
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    shown = [(e.step, e.value) for e in events.Scalars("eval/mean_reward")]
    assert shown == [(1, 1.0), (2, 2.0), (3, 13.0), (4, 14.0), (5, 15.0)]


def test_the_record_is_on_disk_before_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record is synced when written, and when cut back to its first line (12 bytes)."""
    seen: list[str] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        seen.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", noted)
    log = RunLog(tmp_path, 0, [])
    log.row({"step": 1})
    log.row({"step": 2})
    assert log.write() == 24
    assert seen == ["metrics.jsonl"]
    assert cut_back(tmp_path, 12) == [{"step": 2}]
    assert seen[-1] == "metrics.jsonl"
    assert len(seen) > 1
