"""An epoch's line of metrics.jsonl, from what all workers did in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from spikerl.algos.base import Learner
from spikerl.algos.offpolicy import OfflineConfig
from spikerl.energy.meter import Reading, energy_row, merge
from spikerl.models.actor import SpikingActor
from spikerl.training.evaluator import Evaluation
from spikerl.training.progress import Progress, mean_of

Row = dict[str, Any]


class WorkerEpoch(NamedTuple):
    """What one worker did in an epoch."""

    returns: Sequence[float]  # of the episodes that ended
    sums: Mapping[str, tuple[float, float]]  # by metric: weighted sum over its updates, weights
    train_s: float
    cpu_s: float | None  # of processor time; None where environments have processes of their own
    trained: Reading  # joules
    evaluated: Reading


def epoch_row(
    p: Progress,
    workers: Sequence[WorkerEpoch],
    evaluation: Evaluation,
    algo: Learner,
    energy_source: str,
) -> Row:
    """The row of an epoch. Of `p`, this worker's, only what is the same on all workers is read."""
    cpu_s = [worker.cpu_s for worker in workers if worker.cpu_s is not None]
    returns = [ret for worker in workers for ret in worker.returns]
    sums = [worker.sums for worker in workers]
    train_s = max(worker.train_s for worker in workers)
    trained = merge([worker.trained for worker in workers])
    evaluated = merge([worker.evaluated for worker in workers])
    activity, acts = evaluation.activity, not isinstance(algo.config, OfflineConfig)
    row: Row = {
        "epoch": p.epoch + 1,
        "step": p.step,
        "updates": p.updates,
        "train_return": float(np.mean(returns)) if returns else None,
        "train_episodes": len(returns),
        "eval_return": evaluation.mean if evaluation.returns else None,
        "eval_return_std": evaluation.std if evaluation.returns else None,
        "eval_length": evaluation.length if evaluation.returns else None,
        "critic_loss": mean_of(sums, "critic_loss"),
        "actor_loss": mean_of(sums, "actor_loss"),
        "q_mean": mean_of(sums, "q_mean"),
        "firing_rate": activity.firing_rate if activity else None,
        "window_fraction": activity.window_fraction if activity else None,
        "layer_firing_rates": activity.layers if activity else None,
        "layer_window_fractions": activity.layer_windows if activity else None,
        "layer_silent": activity.silent if activity else None,
        "layer_saturated": activity.saturated if activity else None,
        **evaluation.decision,
        **{name: mean_of(sums, name) for name in algo.metrics},
        "env_steps_per_s": (p.step - p.first_step) / train_s if acts else None,
        "updates_per_s": (p.updates - p.first_update) / train_s,
        "cpu_s": sum(cpu_s) if len(cpu_s) == len(workers) else None,
        **energy_row(trained, evaluated, energy_source),
    }
    if isinstance(algo.actor, SpikingActor) and algo.actor.spike_costs:
        row["spike_loss"] = mean_of(sums, "spike_loss")
    if algo.guard.scales_loss:
        row["skipped_updates"] = int(algo.guard.skipped)
    return row
