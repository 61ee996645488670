"""The state of one worker's trainer as a checkpoint holds it: taken, and restored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

import torch
from torch import Tensor

from spikerl.models.spikeformer import Spikeformer
from spikerl.runs.checkpoint import Checkpoint, Shard, check_fit
from spikerl.seeding import RESET_BITS
from spikerl.training.progress import progress_of
from spikerl.training.resize import share_of
from spikerl.training.trainer import Trainer


def shard_of(trainer: Trainer) -> Shard:
    """The part of a checkpoint that is this worker's own."""
    envs = trainer.envs.state()
    tensors = {f"stream.{name}": tensor for name, tensor in trainer.streams.state().items()}
    tensors |= {f"envs.{name}": tensor for name, tensor in envs.items()}
    tensors["norm.pending"] = torch.from_numpy(trainer.norm.pending_rows())
    notes = {"progress": asdict(trainer.progress), "exact": bool(envs)}
    return Shard(tensors, notes, trainer.replay)


def load_checkpoint(trainer: Trainer, checkpoint: Checkpoint) -> list[str]:
    """Restore the trainer from `checkpoint`; return what begins anew, apart from what a different
    number of workers changes.

    If another number of workers wrote it, each takes the parts of its own environments, and the
    random streams begin anew; so they do on another kind of device, as its generators have another
    state. A checkpoint of another run may raise almost anything.
    """
    anew: list[str] = []
    saved = checkpoint.learner()
    check_fit(saved, trainer.learner_state())
    for name, tensor in trainer.algo.state().items():
        tensor.copy_(saved[name])
    trainer.algo.refresh()
    trainer.norm.load(with_prefix("norm.", saved))
    bits = checkpoint.manifest.get("reset_seed_bits", 63)  # those that the run began with
    if bits not in (RESET_BITS, 63):
        raise ValueError(f"its resets have seeds of {bits} bits")
    trainer.seed_bits = trainer.evaluator.seed_bits = bits
    rank, size = trainer.world.rank, trainer.world.size
    if checkpoint.workers != size:
        parts = [checkpoint.worker(old) for old in range(checkpoint.workers)]
        tensors, notes = share_of(parts, rank, size, trainer.config.num_envs)
        trainer.streams.restart(trainer.run.seed, rank, checkpoint.step)
    else:
        tensors, notes = checkpoint.worker(rank)
        anew += load_streams(trainer, with_prefix("stream.", tensors), checkpoint.step)
    trainer.progress = progress_of(notes["progress"], checkpoint.step)
    trainer.algo.updates = trainer.progress.updates
    trainer.algo.total_updates = trainer.updates_by(trainer.run.total_steps)
    trainer.schedule(trainer.last_update())
    if isinstance(trainer.algo.actor, Spikeformer) and trainer.algo.updates:
        trainer.algo.actor.schedule((trainer.algo.updates - 1) / trainer.algo.total_updates)
    pending = tensors["norm.pending"]
    if (pending.dtype, pending.shape[1:]) != (torch.float64, (trainer.task.obs_dim,)):
        raise ValueError(f"its norm.pending is {pending.dtype} {tuple(pending.shape)}")
    trainer.norm.pending = [pending.numpy()]
    checkpoint.fill_replay(rank, size, trainer.replay)
    if notes["exact"]:
        envs, own = with_prefix("envs.", tensors), trainer.envs.state()
        games = [name for name in own if name.endswith(".game")]  # MinAtar's
        check_fit(envs, own, texts=games)
        trainer.envs.load(envs)
    else:
        trainer.reset_due = True
        if not trainer.offline:  # which only evaluates in its environments
            anew.append("environments of this kind, which go on from a reset")
    return anew


def load_streams(trainer: Trainer, streams: Mapping[str, Tensor], step: int) -> list[str]:
    """Load the random streams; return which of them begin anew."""
    own = trainer.streams.state()
    if own.keys() == streams.keys() and any(len(own[k]) != len(streams[k]) for k in own):
        trainer.streams.restart(trainer.run.seed, trainer.world.rank, step)
        return ["random streams, which are others on this kind of device"]
    check_fit(streams, own)
    trainer.streams.load(streams)
    return []


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, by the rest of their names."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
