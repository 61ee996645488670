"""Training sessions: resumes, messages and failures."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from shell import SHORT, refusal, spikerl

from spikerl.distributed.world import World
from spikerl.errors import PREEMPTED, DiskError, EnvironmentFailed, Stopped
from spikerl.models.normalizer import RunningNorm
from spikerl.training.evaluator import Evaluation, Evaluator
from spikerl.training.session import Session
from spikerl.training.trainer import Trainer


def restore(folder: Path, learner: Callable[[], None]) -> list[str]:
    """Have a run go on from a checkpoint that `learner` reads."""
    checkpoint: Any = SimpleNamespace(folder=folder / "step_7", learner=learner)

    class Session_(Session):
        def __init__(self) -> None:
            self.trainer, self.folder = SimpleNamespace(), folder  # type: ignore[assignment]

    return Session_().restore(checkpoint)


def test_a_checkpoint_of_another_run_is_refused_in_a_line(tmp_path: Path) -> None:
    def broken() -> None:
        raise RuntimeError("first\nsecond")

    line = str(refusal(restore, tmp_path, broken))
    assert line == f"resume={tmp_path}: its step_7 does not fit this run (RuntimeError: first)"


def test_an_evaluation_that_is_stopped_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The printed command resumes, although the last step exceeded total_steps, and the time that
    each attempt spent counts.
    """
    monkeypatch.chdir(tmp_path)
    run, stops, spent = Evaluator.run, [0, 0], []

    def stopped(self: Evaluator, policy: Any, evaluation: int, *stop: Any) -> Evaluation:
        if evaluation and stops:
            stops.pop()
            raise Stopped(signal.SIGTERM)
        return run(self, policy, evaluation, *stop)

    monkeypatch.setattr(Evaluator, "run", stopped)
    request = [*SHORT, "num_envs=2", "total_steps=151", "steps_per_epoch=200", "run_dir=r"]
    for args in (request, ["resume=r"]):
        said = spikerl("train", *args)
        assert said.status == PREEMPTED, said.err
        assert "stopped at step 152 on SIGTERM; spikerl train resume=r goes on" in said.out
        notes = json.loads((tmp_path / "r/checkpoints/latest/worker_0.json").read_text())
        spent.append(notes["progress"]["cpu_s"])
    assert 0.0 < spent[0] < spent[1]
    said = spikerl("train", "resume=r")
    assert (said.status, said.err) == (0, "")
    assert "r is done at step 152" in spikerl("train", "resume=r").out
    line = spikerl("train", "resume=r", "total_steps=150").line
    assert line == "total_steps=150: the run is at step 152; give that or more"


def test_a_resume_resets_in_the_thread_that_made_the_environments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some environments work only in the thread that made them; with several workers the checkpoint
    is loaded in another one.
    """
    monkeypatch.chdir(tmp_path)
    threads: list[int] = []
    reset = Trainer.reset_envs

    def noted(self: Trainer, *resumed_at: int) -> None:
        threads.append(threading.get_ident())
        reset(self, *resumed_at)

    class Beside(World):
        def run_on_all(self, act: Callable[[], Any]) -> list[Any]:
            with ThreadPoolExecutor(1) as pool:
                return [pool.submit(act).result()]

    unknown = ["env=gym", "env.id=MountainCarContinuous-v0", "run_dir=r"]
    short = [word for word in SHORT if not word.startswith("env=")]
    assert spikerl("train", *short, *unknown, "total_steps=150").status == 0
    monkeypatch.setattr(Trainer, "reset_envs", noted)
    monkeypatch.setattr("spikerl.commands.train.ALONE", Beside())
    said = spikerl("train", "resume=r", "total_steps=300")
    assert said.status == 0, said.err
    assert threads == [threading.get_ident()] * 2


def test_a_failed_environment_is_no_wrong_request(tmp_path: Path) -> None:
    def fails() -> None:
        raise EnvironmentFailed("step 1: Some-v0 raised RuntimeError")

    with pytest.raises(EnvironmentFailed):
        restore(tmp_path, fails)


def test_what_is_said_of_updates_and_of_random_actions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Messages count the steps taken: eight environments take 16 if 15 are asked for."""
    monkeypatch.chdir(tmp_path)
    ppo = ["algo=ppo", "total_steps=15", "num_envs=8", "algo.rollout_steps=16", "algo.epochs=1",
           "algo.norm_interval=16", "algo.batch_size=8", "steps_per_epoch=16"]  # fmt: skip
    short = [word for word in SHORT if not word.startswith(("algo.l", "algo.r", "steps", "total"))]
    said = spikerl("train", *short, *ppo, "run_dir=p")
    assert said.status == 0, said.err
    assert " 2 updates in 16 steps" in said.out
    assert "warning" not in said.out
    said = spikerl("train", *SHORT, "algo.random_steps=300", "run_dir=r")
    line = "warning: all actions of this run are random (algo.random_steps=300); give less, or more"
    assert line in said.out
    said = spikerl("train", *SHORT, "algo.learning_starts=1000", "run_dir=n")
    assert "or less algo.learning_starts and algo.update_interval\n" in said.out
    said = spikerl("train", *SHORT, "algo.critic_warmup=250", "run_dir=w")
    line = "warning: the policy stays as it is in all updates (algo.critic_warmup=250); give less\n"
    assert line in said.out


def test_coarse_entries_are_named_once_and_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four entries the first three are named, once in two epochs."""
    monkeypatch.chdir(tmp_path)
    lines = {n: f"warning: entry {n}" for n in range(4)}
    monkeypatch.setattr(RunningNorm, "coarse", lambda self: lines)
    assert spikerl("train", *SHORT, "algo.learning_starts=1000", "run_dir=r").status == 0
    log = Path("r/log.txt").read_text().splitlines()
    said = [line.split(" ", 2)[2] for line in log if "warning: entry" in line]
    assert said == [lines[0], lines[1], lines[2]]


def test_a_disk_that_is_full_at_the_first_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No run folder is left, nor folders that were made above it."""
    monkeypatch.chdir(tmp_path)

    def full(*parts: Any) -> None:
        raise DiskError("No space left on device")

    monkeypatch.setattr("spikerl.training.session.save_checkpoint", full)
    line = spikerl("train", *SHORT, "run_dir=above/run").line
    assert line == "run_dir=above/run: No space left on device; nothing was started"
    assert list(tmp_path.iterdir()) == []
