"""Whether a resumed run computes what it would have, had it never been stopped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from spikerl import machine
from spikerl.config.build import Config
from spikerl.distributed.world import World
from spikerl.runs.checkpoint import Checkpoint
from spikerl.training.trainer import Trainer, crossed

REORDER = ("kernel", "threads", "backend", "GPU")  # a change of these changes the order of sums
SETTINGS_ONLY = ("hydra-core", "omegaconf")  # packages that compute no number of a run


def computed_by(config: Config, world: World) -> dict[str, Any]:
    """What a run's numbers depend on besides its settings; each checkpoint records it."""
    chosen, hardware = config.resolved, machine.describe()
    versions = machine.versions()
    return {
        "kernel": chosen.kernel.choice,
        "threads": chosen.threads.choice,
        "backend": chosen.backend.choice + ", in shared memory" * bool(world.shm),
        "GPU": ", ".join(sorted(set(hardware["gpus"]))),
        "processor": hardware["cpu"],
        **{name: versions[name] for name in versions if name not in SETTINGS_ONLY},
        "code": machine.code_version(),
        "total_steps": config.run.total_steps,
    }


def inexact_because(
    checkpoint: Checkpoint, now: Mapping[str, Any], config: Config, trainer: Trainer
) -> list[str]:
    """Why numbers from `checkpoint` on will differ from those of a run that was never stopped; if
    there is no reason, the resume is exact. `now`: `computed_by` of the run that goes on.
    """
    size, had, was = trainer.world.size, checkpoint.workers, checkpoint.manifest.get("computed_by")
    reasons = []
    if had != size:
        reasons.append(
            f"{had} workers became {size}: random streams and batches differ from here on"
        )
    if not isinstance(was, dict):
        return [*reasons, "an earlier version of this program saved it"]
    summed_alike = size < 3 and had == size  # two numbers have one sum in either order
    reasons += _computed_otherwise(was, now, config, summed_alike=summed_alike)
    reasons += _scheduled_otherwise(was, config)
    return [*reasons, *_evaluated_amid(config, trainer)]


def _computed_otherwise(
    was: Mapping[str, Any], now: Mapping[str, Any], config: Config, *, summed_alike: bool
) -> Iterator[str]:
    on_gpu = config.resolved.device.choice != "cpu"
    passed_over = {"total_steps"} if on_gpu else {"total_steps", "GPU"}
    if on_gpu or config.own_products:
        passed_over.add("threads")
    if summed_alike:
        passed_over.add("backend")
    for name, value in now.items():
        before = was.get(name)
        if name not in passed_over and before and value and before != value:
            order = ": sums are in another order" * (name in REORDER)
            yield f"{name} {before} became {value}{order}"


def _scheduled_otherwise(was: Mapping[str, Any], config: Config) -> Iterator[str]:
    neuron = config.actor.neuron
    moves = ["the learning rate"] * config.algo.anneals
    moves += ["the surrogates' slope"] * bool(neuron and neuron.slope_moves)
    before, total = was.get("total_steps"), config.run.total_steps
    if moves and before != total:
        yield f"total_steps {before} became {total}, over which {' and '.join(moves)} moves"


def _evaluated_amid(config: Config, trainer: Trainer) -> Iterator[str]:
    """The reason if the checkpoint ended a run within an epoch: its next epoch begins there."""
    step = trainer.step
    before = step - (1 if trainer.offline else config.num_envs)
    on_time = crossed(before, step, config.run.steps_per_epoch)
    began = 0 < step == trainer.progress.first_step
    if began and step < config.run.total_steps and not on_time:
        # Offline, updates that are made in one call share noise and spike cost; a call ends there.
        updates = ", and updates may" * trainer.offline
        yield f"an evaluation in mid-epoch, at step {step}: later ones differ{updates}"
