"""An epoch's row, from numbers written by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from builders import td3_config

from spikerl.energy.meter import Reading
from spikerl.training.epoch_row import WorkerEpoch, epoch_row
from spikerl.training.evaluator import Evaluation
from spikerl.training.progress import Progress


def test_speeds_are_of_the_epoch_alone() -> None:
    """200 steps and 100 updates in 4 s; 3 updates were skipped."""
    p = Progress(step=100, updates=30)
    p.next_epoch()
    p.step, p.updates = 300, 130
    nothing = Reading(4.0, {}, {})
    worker = WorkerEpoch([], {}, 4.0, None, nothing, nothing)
    evaluation = Evaluation([], [], None, torch.empty(0, 1), None, {})
    guard = SimpleNamespace(scales_loss=True, skipped=torch.tensor(3))
    algo: Any = SimpleNamespace(config=td3_config(), metrics=(), actor=None, guard=guard)
    row = epoch_row(p, [worker], evaluation, algo, "none: requested")
    speeds = (row["env_steps_per_s"], row["updates_per_s"])
    assert (speeds, row["skipped_updates"]) == ((50.0, 25.0), 3)
