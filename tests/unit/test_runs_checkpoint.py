"""Checkpoints: incomplete ones, two of the same step, and replays with gaps."""

from __future__ import annotations

import json
import os
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import small_config
from shell import refusal

from spikerl.algos.replay import Replay
from spikerl.envs.make import make_env, task_of
from spikerl.files import checksum
from spikerl.runs import checkpoint
from spikerl.runs.checkpoint import check_fit, remove_unreferenced
from spikerl.training.state import load_checkpoint, shard_of
from spikerl.training.trainer import Trainer
from spikerl.types import Row


@pytest.mark.parametrize("odd", [
    {}, {"x": torch.zeros(1)}, {"x": torch.zeros(2).double()},
    {"x": torch.tensor([0.0, torch.nan])}, {"x": torch.zeros(2), "y": torch.zeros(2)},
])  # fmt: skip
def test_tensors_of_another_run(odd: dict[str, torch.Tensor]) -> None:
    check_fit({"x": torch.ones(2)}, {"x": torch.zeros(2)})
    with pytest.raises(ValueError, match="it"):
        check_fit(odd, {"x": torch.zeros(2)})


def test_what_is_half_written(tmp_path: Path) -> None:
    """Partial files of the run itself are removed, those of exports and videos are kept."""
    own = ["manifest.json", "policy.safetensors", "best/policy.json", "checkpoints/latest",
           "replay/worker_0_of_1/rows_0_1.f32"]  # fmt: skip
    others = ["policy.onnx", "policy.onnx.json", "videos/seed0_episode0.mp4"]
    for path in [tmp_path / name for name in (*own, *others)]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(f".{path.name}.7.partial").touch()
    (tmp_path / "checkpoints" / ".step_1.partial").mkdir()
    remove_unreferenced(tmp_path)
    left = {path.name for path in tmp_path.rglob(".*")}
    assert left == {f".{Path(name).name}.7.partial" for name in others}


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
        save_checkpoint(tmp_path, ALONE, shard_of(trainer), state, facts, files)
        found = verified(tmp_path, print)
        load_checkpoint(trainer, found)
        found.manifest["segments"].clear()
        with pytest.raises(ValueError, match="its replay lacks rows"):
            load_checkpoint(trainer, found)


def test_a_second_one_of_the_same_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If saving is killed before its first rename the old checkpoint counts, else the new one."""
    from spikerl.distributed.world import ALONE
    from spikerl.runs.checkpoint import Shard, remove_newer, save_checkpoint, verified

    def save(epoch: int) -> None:
        facts = {"step": 30, "epoch": epoch, "world_size": 1}
        shard = Shard({}, {}, Replay(10, 1, 1))
        save_checkpoint(tmp_path, ALONE, shard, {}, facts, {})

    rename, calls = os.rename, [0]

    def killed_at(last: int) -> None:
        def renamed(*paths: Path) -> None:
            if calls[0] == last:
                raise GeneratorExit
            calls[0] += 1
            rename(*paths)

        calls[0] = 0
        monkeypatch.setattr(os, "rename", renamed)

    save(0)
    for last in range(2):
        killed_at(last)
        with suppress(GeneratorExit):
            save(1)
        assert verified(tmp_path, print).manifest["epoch"] == last
        assert calls[0] == last
    monkeypatch.setattr(os, "rename", rename)
    for epoch in range(2, 15):
        save(epoch)
        found = verified(tmp_path, print)
        assert (found.step, found.manifest["epoch"]) == (30, epoch)
        remove_newer(found)
        assert os.readlink(tmp_path / "checkpoints/latest") == found.folder.name
    assert len(list((tmp_path / "checkpoints").glob("step_*"))) == checkpoint.KEEP


def test_a_manifest_names_nothing_outside_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "step_0000000001"
    folder.mkdir(parents=True)
    (tmp_path / "secret.json").write_bytes(b"{}")
    manifest = {
        "schema": checkpoint.SCHEMA, "step": 1, "world_size": 1, "segments": {},
        "files": {"../../secret.json": checksum(b"{}")},
    }  # fmt: skip
    manifest["seal"] = checkpoint._checksum(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    said = str(refusal(checkpoint.verified, tmp_path, print))
    assert said.endswith("step_0000000001 has no sound manifest.json")


def test_steps_with_a_gap(tmp_path: Path) -> None:
    """The replay has steps 0 and 1, then 4 and 5, with 2 + 1 + 4 columns."""
    paths = [f"replay/worker_0_of_1/rows_{rows}.f32" for rows in ("0_2", "4_6")]
    (tmp_path / "replay/worker_0_of_1").mkdir(parents=True)
    for path in paths:
        np.zeros((2, 7), np.float32).tofile(tmp_path / path)
    found = checkpoint.Checkpoint(tmp_path, tmp_path, {"segments": dict.fromkeys(paths, "")})
    with pytest.raises(ValueError, match="its replay lacks rows"):
        found.steps_of(0, 1, Row(1, 1))
