"""Measures how fast a cell's run would be on this machine, by a short run that is discarded."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from signal import SIGTERM

from spikerl.commands.reproduce import cells
from spikerl.distributed.process_lifetime import die_with_parent
from spikerl.errors import Stopped
from spikerl.reporting.cell_config import config_of
from spikerl.reporting.table_file import Cell
from spikerl.signals import stop_signals

POLL = 0.05  # seconds
STEPS = 800  # of an epoch; a multiple of the tables' numbers of workers


def measured_seconds_per_step(cell: Cell, plugins: Sequence[str]) -> float | None:
    """Seconds of a rollout with its updates, or of the last of three epochs, of which the first has
    no updates, per step; evaluations are left out. None: the run failed.

    The replay is nearly empty, the normaliser too, and neurons fire as at the start of training.
    """
    config = config_of(cell)
    rollout = config.get("algo.rollout_steps")
    steps = int(rollout) if rollout else STEPS
    keys = [key for key in ("algo.learning_starts", "algo.random_steps") if key in config]
    starts = [f"{key}={steps}" for key in keys]
    total = steps if rollout else 3 * steps
    lengths = [f"total_steps={total}", f"steps_per_epoch={steps}", "eval_episodes=0"]
    with tempfile.TemporaryDirectory(prefix="spikerl-plan-") as folder:
        run = Path(folder) / "run"
        quiet = ["threads=1", "energy=none", f"run_dir={run}", *cells.naming(plugins)]
        command = [*cells.PROGRAM, "train", *cell.overrides, *starts, *lengths, *quiet]
        if finished(command):
            return None
        rows = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last = json.loads(rows[-1])
    return 1.0 / float(last["env_steps_per_s"] or last["updates_per_s"])  # offline: step = update


def finished(command: list[str]) -> int:
    """Run a command to its end; the exit status. A signal to this process kills it: Stopped."""
    with stop_signals() as stop_signal:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=partial(die_with_parent, os.getpid(), SIGTERM),
        )
        while (status := process.poll()) is None:
            if number := stop_signal():
                process.kill()  # its folder is thrown away
                process.wait()
                raise Stopped(number)
            time.sleep(POLL)
        return status
