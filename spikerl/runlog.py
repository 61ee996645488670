"""A run's record on disk: metrics.jsonl first, TensorBoard and log.txt as views of it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

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
    """Appends rows and lines to the files of one run folder."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # a second to import

        self.metrics = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self.log = (folder / "log.txt").open("a", encoding="utf-8")
        self.tensorboard = SummaryWriter(str(folder / "tb"), purge_step=step + 1)

    def row(self, row: Mapping[str, Any]) -> None:
        self.metrics.write(json.dumps(row, allow_nan=False) + "\n")
        self.metrics.flush()
        os.fsync(self.metrics.fileno())
        for key, tag in TAGS.items():
            if (value := row.get(key)) is not None:
                self.tensorboard.add_scalar(tag, value, row["step"])
        self.tensorboard.flush()

    def line(self, text: str) -> None:
        self.log.write(f"{datetime.now().isoformat(' ', 'seconds')} {text}\n")
        self.log.flush()

    def close(self) -> None:
        self.metrics.close()
        self.log.close()
        self.tensorboard.close()
