"""The workers of a run as trainers in the threads of one process.

Shape legend   N environments, T steps of each.
"""

from __future__ import annotations

from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import torch
from threads import run_in_threads, worlds
from torch import Tensor

from spikerl.config.build import Config
from spikerl.envs.make import make_env, task_of
from spikerl.runs.checkpoint import save_checkpoint, verified
from spikerl.training.state import load_checkpoint, shard_of
from spikerl.training.trainer import Trainer


class Workers:
    def __init__(self, config: Config, size: int) -> None:
        with closing(make_env(config.env)) as env:
            task = task_of(env)
        self.trainers = [Trainer(config, task, world=world) for world in worlds(size)]
        self.first = self.trainers[0]

    def train(self, until: int) -> None:
        while self.first.step < until:
            run_in_threads([trainer.advance for trainer in self.trainers])

    def save(self, run: Path) -> None:
        first = self.first
        facts = {"step": first.step, "epoch": 0, "world_size": len(self.trainers)}
        facts["reset_seed_bits"] = first.seed_bits
        run_in_threads(
            [
                partial(save_checkpoint, run, t.world, shard_of(t), t.learner_state(), facts,
                        t.policy.files()) for t in self.trainers
            ]
        )  # fmt: skip

    def load(self, run: Path) -> None:
        found = verified(run, print)
        for trainer in self.trainers:
            trainer.replay.rows.fill_(float("nan"))
            assert load_checkpoint(trainer, found) == []

    def rows(self) -> Tensor:
        """The replays' rows, ordered by step and, within a step, by environment."""
        assert all(t.replay.added * len(self.trainers) == t.step for t in self.trainers)
        held = [t.replay.between(t.replay.added - t.replay.size, t.replay.added).unflatten(
            0, (-1, t.replay.width)) for t in self.trainers]  # fmt: skip
        return torch.cat(held, 1).flatten(0, 1)

    def envs(self) -> list[dict[str, Tensor]]:
        """The state of each environment, by its index in the run."""
        found = []
        for trainer in self.trainers:
            state = trainer.envs.state()
            for i in range(len(trainer.envs)):
                own = {k.partition(".")[2]: v for k, v in state.items() if k.startswith(f"{i}.")}
                own |= {name: state[name][i] for name in ("obs", "returns", "lengths")}
                found.append(own)
        return found

    def pending(self) -> Tensor:
        """Observations that the normaliser has not merged yet, by step, then by environment."""
        waiting = [
            t.norm.pending_rows().reshape(-1, len(t.envs), t.task.obs_dim) for t in self.trainers
        ]
        return torch.from_numpy(np.concatenate(waiting, 1))

    def close(self) -> None:
        for trainer in self.trainers:
            trainer.close()
