"""The first lines of a run: what it is about to do, and every choice that was made."""

from __future__ import annotations

import re
from collections.abc import Sequence

from spikerl.algos import ALGOS
from spikerl.algos.base import AlgoConfig
from spikerl.algos.offpolicy import OfflineConfig
from spikerl.config.build import Config
from spikerl.distributed.world import share
from spikerl.files import shown
from spikerl.models.precision import why_slow
from spikerl.output import several
from spikerl.training.trainer import Trainer
from spikerl.types import Resolved


def nothing_learned(algo: AlgoConfig) -> str:
    said = "warning: this run makes no update, so its policy is the one that it starts with;"
    if isinstance(algo, OfflineConfig):
        return f"{said} give more total_steps"
    replays = "learning_starts and algo.update_interval"
    keys = "rollout_steps" if ALGOS.part(algo).on_policy else replays
    return f"{said} give more total_steps, or less algo.{keys}"


def announce(config: Config, trainer: Trainer, command: Sequence[str]) -> list[str]:
    """Lines on what `command` is about to run, each worker's share of it, and every choice made."""
    run, size, algo = config.run, trainer.world.size, config.algo
    rows = [share(algo.batch_size, rank, size) for rank in range(size)]
    if run.scaling == "weak":
        rows = [algo.batch_size] * size
    each = str(rows[0]) if len(set(rows)) == 1 else f"{min(rows)} to {max(rows)}"
    task, resolved = trainer.task, vars(config.resolved)

    def why(name: str, resolved: Resolved) -> str:
        """The reason for a choice: "as before", not "requested", if a resumed run keeps it."""
        typed = any(re.match(rf"{name}(\.\w+)?=", arg) for arg in command)
        if not run.resume or typed or name not in ("device", "threads", "kernel"):
            return resolved.reason
        return re.sub("^requested", "as before", resolved.reason)

    over = "in shared memory" if trainer.world.shm else f"over {config.resolved.backend.choice}"
    exchange = f"; gradients are summed {over}" if size > 1 else ""
    lines = [
        f"{task.env_id}: {several(task.obs_dim, 'observation')}, {several(task.act_dim, 'action')};"
        f" {config.actor.actor.name} actor, {algo.name}, seed {run.seed},"
        f" precision {config.precision.name}",
        f"{several(size, 'worker')} x {several(config.num_envs // size, 'environment')};"
        f" global batch {sum(rows)} ({each} per worker, {run.scaling} scaling);"
        f" {trainer.updates_by(config.last_step)} updates in {config.last_step} steps{exchange}",
        "; ".join(f"{name}={r.choice} ({why(name, r)})" for name, r in resolved.items()),
    ]
    if trainer.evaluator.note:
        lines.append(trainer.evaluator.note)
    if trainer.updates_by(config.last_step) == 0:
        lines.append(nothing_learned(algo))
    elif trainer.algo.random_steps > max(config.last_step - config.num_envs, 0):
        # Compared with the step at which all environments begin their last step.
        steps = f"algo.random_steps={trainer.algo.random_steps}"
        said = f"warning: all actions of this run are random ({steps}); give less"
        lines.append(f"{said}, or more total_steps")
    elif trainer.updates_by(config.last_step) <= trainer.algo.critic_warmup:
        warmup = f"algo.critic_warmup={trainer.algo.critic_warmup}"
        lines.append(f"warning: the policy stays as it is in all updates ({warmup}); give less")
    if dataset := trainer.dataset:
        lines.append(
            f"dataset={shown(dataset.folder)}: {dataset.transitions} transitions of"
            f" {several(len(dataset.lengths), 'episode')}, sha256 {dataset.sha256}"
        )
    lines += trainer.algo.notes()
    if (unpruned := trainer.algo.actor_optimizer.unpruned) is not None:
        gone = int((unpruned == 0).sum())
        lines.append(f"actor.prune={config.actor.actor.prune}: {gone} weights are 0 and stay so")
    if slow := why_slow(config.precision, config.resolved.device.choice):
        lines.append(f"note: {slow}")
    if config.run.init_from:
        count = trainer.norm.count
        norm = f" and normaliser ({count} observations)" if count else ", no normaliser"
        lines.append(f"init_from={config.run.init_from}: actor weights{norm}")
    if trainer.init_actor:
        ours, theirs = config.actor.constants(), trainer.init_actor.constants()
        given = [f"{k}={v} (here {ours[k]})" for k, v in theirs.items() if v != ours[k]]
        if given:
            lines.append(f"warning: its policy acts otherwise here, as it had {', '.join(given)}")
    return lines
