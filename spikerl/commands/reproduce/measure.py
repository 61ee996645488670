"""How fast a cell's run would go on this machine, by a short one that is thrown away."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path

from spikerl.commands.reproduce import cells
from spikerl.reporting.table_file import Cell

STEPS = 800  # of an epoch, a multiple of the workers that tables have


def measured_seconds_per_step(cell: Cell) -> float | None:
    """Of a rollout with its update, or of the third of three epochs, the first without updates;
    evaluations left out. None: the run failed.

    Replay and normaliser are as good as empty, and neurons fire as in the beginning.
    """
    rollout = cells.config_of(cell).get("algo.rollout_steps")
    steps = int(rollout) if rollout else STEPS
    starts = [] if rollout else [f"algo.learning_starts={steps}", f"algo.random_steps={steps}"]
    total = steps if rollout else 3 * steps
    lengths = [f"total_steps={total}", f"steps_per_epoch={steps}", "eval_episodes=0"]
    with tempfile.TemporaryDirectory(prefix="spikerl-plan-") as folder:
        run = Path(folder) / "run"
        quiet = ["threads=1", "energy=none", f"run_dir={run}"]
        command = [*cells.PROGRAM, "train", *cell.overrides, *starts, *lengths, *quiet]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            return None
        rows = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return 1.0 / float(json.loads(rows[-1])["env_steps_per_s"])
