"""Checkpoints of another run, or that lack something."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import torch
from builders import small_config

from spikerl.envs.make import make_env, task_of
from spikerl.runs.checkpoint import check_fit
from spikerl.training.trainer import Trainer


@pytest.mark.parametrize("odd", [
    {}, {"x": torch.zeros(1)}, {"x": torch.zeros(2).double()},
    {"x": torch.tensor([0.0, torch.nan])}, {"x": torch.zeros(2), "y": torch.zeros(2)},
])  # fmt: skip
def test_tensors_of_another_run(odd: dict[str, torch.Tensor]) -> None:
    check_fit({"x": torch.ones(2)}, {"x": torch.zeros(2)})
    with pytest.raises(ValueError, match="it"):
        check_fit(odd, {"x": torch.zeros(2)})


def test_replay_rows_that_no_segment_holds(tmp_path: Path) -> None:
    from spikerl.distributed.world import ALONE
    from spikerl.runs.checkpoint import save_checkpoint, verified

    training = small_config(total_steps=60, steps_per_epoch=60, eval_episodes=1)
    with closing(make_env(training.env)) as env:
        task = task_of(env)
    with closing(Trainer(training, task)) as trainer:
        for _ in range(30):
            trainer.advance()
        facts = {"step": trainer.step, "epoch": 0, "world_size": 1}
        state, files = trainer.learner_state(), trainer.policy.files()
        save_checkpoint(tmp_path, ALONE, trainer.shard(), state, facts, files)
        found = verified(tmp_path, print)
        trainer.load(found)
        found.manifest["segments"].clear()
        with pytest.raises(ValueError, match="its replay lacks rows"):
            trainer.load(found)
