"""On a real Slurm: srun's ranks, a requeued run, and a sweep through submitit with bad jobs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import TINY, computed, record

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True, scope="module")
def cluster() -> None:
    asked = ["sinfo", "-h", "-o", "%T"]  # it waits long if the controller does not answer
    if shutil.which("sinfo"):
        states = subprocess.run(asked, capture_output=True, text=True, timeout=30).stdout.split()
        if states[:1] in (["idle"], ["mixed"]):
            return
    pytest.skip("needs a Slurm with an idle node (sinfo)")


LONG = [*TINY, "env=HalfCheetah", "num_envs=2", "total_steps=1500", "algo.replay_capacity=1500"]


def call(home: Path, *command: str, seconds: float = 100) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=seconds)


def until(reached: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def state(job: str) -> str:
    asked = ["squeue", "--noheader", f"--jobs={job}", "--format=%T"]
    return subprocess.run(asked, capture_output=True, text=True).stdout.strip()


def test_srun_and_a_requeued_run_that_equals_an_undisturbed_one(tmp_path: Path) -> None:
    srun = ["srun", "-n2", sys.executable, "-m", "spikerl", "train", *LONG]
    ended = call(tmp_path, *srun, "world_size=3", "run_dir=run")
    assert "spikerl: world_size=3: the launcher started 2 workers; leave" in ended.stderr
    assert (ended.returncode, ended.stderr.count("spikerl:")) == (2, 1)
    assert not list(tmp_path.iterdir())
    ended = call(tmp_path, *srun, "run_dir=whole")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("done: 1500 steps") == 1
    assert record(tmp_path / "whole")["world_size"] == 2

    program = tmp_path / "spikerl"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m spikerl "$@"\n')
    program.chmod(0o755)
    script = ["sbatch", "--parsable", "-n2", f"--export=ALL,SPIKERL={program}", "-o", "out"]
    job = call(tmp_path, *script, str(ROOT / "scripts/slurm.sbatch"), "run", *LONG).stdout.strip()
    metrics = tmp_path / "run" / "metrics.jsonl"
    until(lambda: metrics.exists() and metrics.stat().st_size)
    call(tmp_path, "scancel", "--batch", "--signal=USR1", job)
    until(lambda: state(job) == "PENDING")
    assert record(tmp_path / "run")["status"] == "preempted"
    now = ["scontrol", "update", f"JobId={job}", "StartTime=now"]  # not two minutes later
    until(lambda: call(tmp_path, *now).returncode == 0)
    # squeue also prints nothing if the controller is busy.
    until(lambda: state(job) == "" and record(tmp_path / "run")["status"] == "done")
    out = (tmp_path / "out").read_text()
    assert "resumed at step" in out
    assert computed(tmp_path / "run") == computed(tmp_path / "whole")


def test_a_sweep_with_a_bad_job(tmp_path: Path) -> None:
    sweep = [sys.executable, "-m", "spikerl", "train", "-m", *TINY,
             "env=gym", "env.id=Pendulum-v1,CartPole-v1", "seed=0,1",
             "hydra/launcher=submitit_slurm", "run_dir=s"]  # fmt: skip
    ended = call(tmp_path, *sweep)
    assert ended.returncode == 1, ended.stderr
    assert "2 of 4 jobs done" in ended.stdout
    assert "algo=td3: the actions of CartPole-v1 are discrete; use algo=ppo or dqn" in ended.stdout
    for seed in range(2):
        folder = tmp_path / "s" / f"env.id=Pendulum-v1,seed={seed}"
        assert record(folder)["status"] == "done"
    assert os.listdir(tmp_path) == ["s"]
