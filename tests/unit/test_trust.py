"""A folder or a file from somebody else: what it may not lead to."""

from __future__ import annotations

import json
import os
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import small_config
from shell import refusal, spikerl
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from spikerl.cli.compose import expand
from spikerl.config.build import build
from spikerl.config.memory import least_bytes
from spikerl.config.yaml_file import overrides_of
from spikerl.envs.make import make_env, task_of
from spikerl.files import read_bytes, read_json
from spikerl.runs import folder as run_folder
from spikerl.runs.checkpoint import check_fit
from spikerl.runs.record import RunLog
from spikerl.training.session import Session
from spikerl.training.trainer import Trainer, progress_of


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "log.txt", ".lock", "checkpoints", "replay", "tb"]
)
def test_a_resume_writes_through_no_link(name: str, tmp_path: Path) -> None:
    run, theirs = tmp_path / "run", tmp_path / "mine"
    run.mkdir()
    theirs.mkdir() if "." not in name else theirs.write_text("kept")
    run_folder.check_own(run)
    (run / name).symlink_to(theirs)
    assert f"its {name} is a link" in str(refusal(run_folder.check_own, run))
    (run / name).unlink()
    os.mkfifo(run / name)
    assert "neither file nor folder" in str(refusal(run_folder.check_own, run))


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "sparse").open("wb") as f:
        f.truncate(1 << 40)
    for path in (tmp_path / "pipe", tmp_path / "sparse", Path("/dev/zero"), tmp_path):
        with pytest.raises(OSError, match=r"regular|larger|directory"):
            read_bytes(path, 100)
    (tmp_path / "small").write_bytes(b"x")
    assert read_bytes(tmp_path / "small", 1 << 50) == b"x"  # of which nothing is reserved


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", "-1e999", "[" * 100_000, "9" * 5000, "{"])
def test_json_that_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r".+"):
        read_json(tmp_path / "x.json", 1 << 20)


@pytest.mark.parametrize("key", ["init_from", "energy.file"])
@pytest.mark.parametrize("path", ["/etc/x", "../x", "a/../../x"])
def test_a_config_leads_nowhere_else(key: str, path: str, tmp_path: Path) -> None:
    group, _, name = key.partition(".")
    data: dict[str, Any] = {group: {"name": "replay", name: path} if name else path}
    (tmp_path / "c.yaml").write_text(json.dumps(data))
    line = str(refusal(overrides_of, tmp_path / "c.yaml", []))
    assert line.startswith(f"{key}={path}: not accepted from ")
    assert not any(path in arg for arg in overrides_of(tmp_path / "c.yaml", [f"{key}={path}"]))
    resumed = overrides_of(tmp_path / "c.yaml", [], resumes=True)
    assert any(path in arg for arg in resumed) == (key != "init_from")


@pytest.mark.parametrize("typed", [
    "+hydra={callbacks:{x:{_target_:os.system}}}", "hydra.callbacks=${x}", "+hydra.callbacks.x=1",
    "+hydra.job_logging.handlers.x={class:subprocess.Popen,args:[touch,hit]}", "hydra.run.dir=x",
    "hydra.launcher.x=${oc.env:HOME}", "hydra/callbacks=x", "env@hydra.callbacks.x=Ant",
    "hydra.job.env_set.LD_PRELOAD=x", "~hydra.launcher", "+hydra.searchpath=[x]",
])  # fmt: skip
def test_hydra_settings_that_could_run_code(typed: str) -> None:
    key = typed.partition("=")[0]
    assert str(refusal(expand, "train", [typed])).startswith(f"{key}=")
    expand("train", ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweeper.max=3"])


@pytest.mark.parametrize("odd", [
    {}, {"x": torch.zeros(1)}, {"x": torch.zeros(2).double()},
    {"x": torch.tensor([0.0, torch.nan])}, {"x": torch.zeros(2), "y": torch.zeros(2)},
])  # fmt: skip
def test_tensors_of_another_run(odd: dict[str, torch.Tensor]) -> None:
    check_fit({"x": torch.ones(2)}, {"x": torch.zeros(2)})
    with pytest.raises(ValueError, match="it"):
        check_fit(odd, {"x": torch.zeros(2)})


@pytest.mark.parametrize("odd", [
    {"step": 3}, {"updates": -1}, {"epoch": 1.5}, {"updates": 2**70}, {"train_s": float("nan")},
    {"losses": {"x": "1"}}, {"returns": [None]}, {"sums": {"x": [1.0, "2"]}}, {"more": 1},
    {"energy": [1.0, {"gpu:0": "1"}, {}]}, {"energy": [1.0, {}, {"gpu:0": 1}]}, {"energy": [1.0]},
])  # fmt: skip
def test_progress_that_is_none(odd: dict[str, Any]) -> None:
    assert progress_of({"step": 2, "energy": [1.0, {"gpu:0": 1.0}, {}]}, 2).step == 2
    with pytest.raises((ValueError, TypeError)):
        progress_of({"step": 2} | odd, 2)


def test_a_checkpoint_of_another_run_is_refused_in_a_line(tmp_path: Path) -> None:
    class Session_(Session):
        def __init__(self, trainer: Any) -> None:
            self.trainer, self.folder = trainer, tmp_path

    class Broken:
        def load(self, checkpoint: Any) -> bool:
            raise RuntimeError("first\nsecond")

    named: Any = type("Named", (), {"folder": tmp_path / "step_7"})
    line = str(refusal(Session_(Broken()).restore, named))
    assert line == f"resume={tmp_path}: its step_7 does not fit this run (RuntimeError: first)"


HUGE = [
    ("algo.batch_size=4000000000", "algo.batch_size"),
    ("actor.hidden_sizes=[2000000,2000000]", "actor.hidden_sizes"),
    ("algo.critic_hidden_sizes=[2000000,2000000]", "algo.critic_hidden_sizes"),
    ("algo.replay_capacity=100000000000 total_steps=100000000000", "algo.replay_capacity"),
    ("world_size=4000 num_envs=4000 algo.batch_size=4000", "world_size"),
    ("num_envs=100000", "num_envs"),
    ("threads=100000", "threads"),
    (f"total_steps={1 << 63}", "total_steps"),
]


@pytest.mark.parametrize(("typed", "key"), HUGE)
def test_sizes_are_bounded_before_they_are_allocated(typed: str, key: str) -> None:
    assert spikerl("train", "device=cpu", *typed.split()).line.startswith(f"{key}=")


def test_every_published_setting_fits_a_small_machine(default: dict[str, Any]) -> None:
    config = build(default)
    with closing(make_env(config.env)) as env:
        needs = least_bytes(config, task_of(env))
    assert needs["algo.replay_capacity"] == 1_000_000 * (2 * 17 + 6 + 4) * 4
    assert sum(needs.values()) < 1 << 28


def test_steps_of_the_views_never_go_back(tmp_path: Path) -> None:
    """A resume at step 2, after rows 3 and 4 were written and discarded."""
    first = RunLog(tmp_path, 0)
    for step in (1, 2, 3, 4):
        first.row({"step": step, "eval_return": float(step)})
    first.write()
    for name in (tmp_path / "tb").iterdir():  # as if it were of a second before
        name.rename(name.with_name(name.name.replace("tfevents.1", "tfevents.0")))
    second = RunLog(tmp_path, 2)
    for step in (3, 4, 5):
        second.row({"step": step, "eval_return": 10.0 + step})
    second.write()
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    shown = [(e.step, e.value) for e in events.Scalars("eval/mean_reward")]
    assert shown == [(1, 1.0), (2, 2.0), (3, 13.0), (4, 14.0), (5, 15.0)]


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
