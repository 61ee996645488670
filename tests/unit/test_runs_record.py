"""A run's record, over a resume."""

from __future__ import annotations

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from spikerl.runs.record import RunLog


def test_steps_of_the_views_never_go_back(tmp_path: Path) -> None:
    """A resume at step 2, after rows 3 and 4 were written and discarded."""
    first = RunLog(tmp_path, 0)
    for step in (1, 2, 3, 4):
        first.row({"step": step, "eval_return": float(step)})
    first.write()
    for name in (tmp_path / "tb").iterdir():  # as if it were of a second before
        name.rename(name.with_name(name.name.replace("tfevents.1", "tfevents.0")))
    second = RunLog(tmp_path, 2)
    for step in (3, 4, 5):
        second.row({"step": step, "eval_return": 10.0 + step})
    second.write()
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    shown = [(e.step, e.value) for e in events.Scalars("eval/mean_reward")]
    assert shown == [(1, 1.0), (2, 2.0), (3, 13.0), (4, 14.0), (5, 15.0)]
