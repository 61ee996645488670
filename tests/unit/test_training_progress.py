"""Sums over an epoch's updates."""

from __future__ import annotations

import math

import torch

from spikerl.training.progress import Progress


def test_updates_that_were_dropped_count_in_no_mean() -> None:
    """Dropped updates of fp16 are NaN or infinite: 2 and 4 count, with weight 0.5; if all were
    dropped there is no mean.
    """
    progress = Progress()
    losses = (2.0, math.inf, 4.0, math.nan)
    metrics = [{"critic_loss": torch.tensor(loss), "q_mean": torch.tensor(math.nan)}
               for loss in losses]  # fmt: skip
    progress.add(metrics, 0.5)
    assert (progress.sums, progress.losses) == ({"critic_loss": (3.0, 1.0)}, {"critic_loss": 4.0})
