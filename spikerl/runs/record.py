"""A run's record on disk: metrics.jsonl first, TensorBoard and log.txt as views of it."""

from __future__ import annotations

import io
import json
import os
import platform
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from spikerl.files import Journal, make_folder

# TensorBoard tag, as users of other libraries know it, by metrics.jsonl key.
TAGS = {
    "train_return": "rollout/ep_rew_mean",
    "eval_return": "eval/mean_reward",
    "eval_return_std": "eval/std_reward",
    "eval_length": "eval/mean_ep_length",
    "critic_loss": "train/critic_loss",
    "actor_loss": "train/actor_loss",
    "q_mean": "train/q_mean",
    "updates": "train/n_updates",
    "firing_rate": "train/firing_rate",
    "window_fraction": "train/window_fraction",
    "env_steps_per_s": "time/fps",
    "updates_per_s": "time/updates_per_s",
    "wall_s": "time/time_elapsed",
    "energy_j": "energy/joules",
    "power_w": "energy/watts",
}


class RunLog:
    """The files of one run folder that grow; they are written by `write` alone."""

    def __init__(self, folder: Path, step: int) -> None:
        self.metrics = Journal(folder / "metrics.jsonl")
        self.log = Journal(folder / "log.txt")
        self.tensorboard = Events(folder / "tb", step + 1)

    def row(self, row: Mapping[str, Any]) -> None:
        self.metrics.add((json.dumps(row, allow_nan=False) + "\n").encode())
        shown = {tag: row[key] for key, tag in TAGS.items() if row.get(key) is not None}
        self.tensorboard.scalars(row["step"], shown)

    def line(self, text: str) -> None:
        self.log.add(f"{datetime.now().isoformat(' ', 'seconds')} {text}\n".encode())

    def write(self) -> int:
        """What came since the last time; the length of metrics.jsonl. OSError: not yet, or not all
        of it. What only views it waits for the next time where it cannot be written.
        """
        for view in (self.log, self.tensorboard):
            with suppress(OSError):
                view.write(sync=False)
        self.metrics.write(sync=True)
        return self.metrics.length


class Events(Journal):
    """A file of TensorBoard events.

    Its own writer does this in a thread, which dies with the first write that fails.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        name = f"events.out.tfevents.{int(time.time()):010d}.{platform.node()}.{os.getpid()}.0"
        super().__init__(folder / name)
        self.event(file_version="brain.Event:2")
        # Later steps in earlier files were discarded.
        self.event(step=first_step, session_log=SessionLog(status=SessionLog.START))

    def event(self, **content: Any) -> None:
        record = io.BytesIO()
        RecordWriter(record).write(Event(wall_time=time.time(), **content).SerializeToString())
        self.add(record.getvalue())

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for tag, value in values.items():
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
            self.event(step=step, summary=summary)

    def write(self, *, sync: bool) -> None:
        make_folder(self.path.parent)
        super().write(sync=sync)
