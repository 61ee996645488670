"""Seeds of resets: the number of bits that environments accept, and its record in runs."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from builders import small_config
from transitions_env import CounterEnv, registered

from spikerl.envs.make import make_env, task_of
from spikerl.runs.checkpoint import Checkpoint, save_checkpoint
from spikerl.seeding import reset_seed, seed_for
from spikerl.training.state import load_checkpoint, shard_of
from spikerl.training.trainer import Trainer


class LegacyEnv(CounterEnv):
    """Accepts seeds of 31 bits only, like C code, and seeds numpy's legacy generator, like
    dm_control.
    """

    seen: ClassVar[list[int]] = []

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        if seed is not None:
            np.random.RandomState(seed)
            assert 0 <= seed < 2**31
            LegacyEnv.seen.append(seed)
        return super().reset(seed=seed)


LEGACY = registered("Legacy", LegacyEnv, limit=9)


def trainer_of() -> Trainer:
    with closing(make_env(LEGACY)) as one:
        return Trainer(small_config(env=LEGACY, eval_episodes=2), task_of(one))


def test_reset_seeds_are_the_low_bits() -> None:
    seeds = {reset_seed(31, 7, "eval", 1, i) for i in range(1000)}
    assert len(seeds) == 1000
    assert max(seeds) < 2**31
    assert max(seeds) > 2**30
    assert all(type(seed) is int for seed in seeds)
    assert reset_seed(31, 7, "env", 3) == seed_for(7, "env", 3) % 2**31
    assert reset_seed(63, 7, "env", 3) == seed_for(7, "env", 3)


def test_training_and_evaluation_give_no_more() -> None:
    LegacyEnv.seen.clear()
    with closing(trainer_of()) as trainer:
        trainer.evaluator.run(trainer.policy, 3)
    wanted = [seed_for(0, *key) % 2**31 for key in (("env", 0), ("eval", 3, 0), ("eval", 3, 1))]
    assert LegacyEnv.seen == wanted


@pytest.mark.parametrize("bits", [31, 63, None])
def test_a_run_goes_on_with_the_seeds_that_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int | None
) -> None:
    facts = {"step": 0, "epoch": 0, "world_size": 1, "wall_s": 0.0, "metrics_bytes": 0}
    if bits is not None:
        facts["reset_seed_bits"] = bits
    with closing(trainer_of()) as trainer:
        save_checkpoint(
            tmp_path, trainer.world, shard_of(trainer), trainer.learner_state(), facts, {}
        )
    with closing(trainer_of()) as resumed:
        seeds: list[int] = []
        monkeypatch.setattr(resumed.envs, "reset", seeds.extend)
        name = next((tmp_path / "checkpoints").glob("step_*")).name
        load_checkpoint(resumed, Checkpoint.open(tmp_path, name))
        resumed.reset_if_due()
        resumed.reset_if_due()  # the second call does nothing
        assert seeds == [seed_for(0, "env", 0, 0) % 2 ** (bits or 63)]
        assert resumed.evaluator.seed_bits == resumed.seed_bits == (bits or 63)


def test_on_another_kind_of_device_the_streams_begin_anew(tmp_path: Path) -> None:
    """Random streams restart if the checkpoint has a CUDA generator's state, which is 16 bytes."""
    facts = {"step": 0, "epoch": 0, "world_size": 1, "wall_s": 0.0, "metrics_bytes": 0}
    facts["reset_seed_bits"] = 31
    with closing(trainer_of()) as trainer:
        other = {"stream.update": torch.zeros(16, dtype=torch.uint8)}
        shard = shard_of(trainer)
        shard = replace(shard, tensors={**shard.tensors, **other})
        save_checkpoint(tmp_path, trainer.world, shard, trainer.learner_state(), facts, {})
    with closing(trainer_of()) as resumed:
        name = next((tmp_path / "checkpoints").glob("step_*")).name
        anew = load_checkpoint(resumed, Checkpoint.open(tmp_path, name))
        assert "random streams, which are others on this kind of device" in anew
        for stream in ("explore", "sample", "update"):
            wanted = torch.Generator().manual_seed(seed_for(0, stream, 0, 0)).get_state()
            assert torch.equal(resumed.streams.state()[stream], wanted)


@pytest.mark.parametrize(
    ("bits", "pending", "line"),
    [
        (5, torch.zeros(0, 2, dtype=torch.float64), "its resets have seeds of 5 bits"),
        (31, torch.zeros(1, 5, dtype=torch.float64), "its norm.pending is torch.float64"),
        (31, torch.zeros(1, 2), "its norm.pending is torch.float32"),
    ],
)
def test_a_checkpoint_that_no_run_wrote(
    bits: int, pending: torch.Tensor, line: str, tmp_path: Path
) -> None:
    facts = {"step": 0, "epoch": 0, "world_size": 1, "wall_s": 0.0, "metrics_bytes": 0}
    facts["reset_seed_bits"] = bits
    with closing(trainer_of()) as trainer:
        shard = shard_of(trainer)
        shard = replace(shard, tensors={**shard.tensors, "norm.pending": pending})
        save_checkpoint(tmp_path, trainer.world, shard, trainer.learner_state(), facts, {})
    with closing(trainer_of()) as resumed:
        name = next((tmp_path / "checkpoints").glob("step_*")).name
        with pytest.raises(ValueError, match=line):
            load_checkpoint(resumed, Checkpoint.open(tmp_path, name))
