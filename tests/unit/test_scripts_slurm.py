"""scripts/slurm.sbatch with a stub of srun: the commands of a job and of a requeued one."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from pathlib import Path

import pytest
from shell import SHORT, spikerl

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/slurm.sbatch"
MODULE = """
import gymnasium as gym
gym.register("Own-v0", entry_point="gymnasium.envs.mujoco.inverted_pendulum_v5:InvertedPendulumEnv")
"""


def with_tools(tmp_path: Path, **scripts: str) -> dict[str, str]:
    """The environment of a job with these scripts as srun and other tools."""
    tools = tmp_path / "tools"
    tools.mkdir(exist_ok=True)
    for name, text in scripts.items():
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)
    return {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "1"}


def typed_by_job(tmp_path: Path, *args: str) -> tuple[list[str], list[str]]:
    """The arguments of srun after its flag and the program; the lines that the job printed."""
    given = 'printf "%s\\n" "$@" >srun.args'
    environ = with_tools(tmp_path, srun=given, squeue="echo RUNNING")
    said = subprocess.run(
        ["bash", str(SCRIPT), *args], cwd=tmp_path, env=environ, check=True, text=True,
        stdout=subprocess.PIPE,
    ).stdout  # fmt: skip
    return (tmp_path / "srun.args").read_text().splitlines()[2:], said.splitlines()


def test_a_job_and_the_same_job_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resume must confirm a user's own environment, so the requeued job passes env.id itself."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/own_slurm.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path / "lib")
    given = [*SHORT, "env=gym", "env.id=own_slurm:Own-v0", "total_steps=150"]
    first, said_first = typed_by_job(tmp_path, "a run", *given)
    assert first == ["train", "run_dir=a run", *given]
    assert len(said_first) == 1  # the exit status
    assert spikerl(*first).status == 0
    given[-1] = "total_steps=160"
    again, said_again = typed_by_job(tmp_path, "a run", *given)
    ignored = [word for word in given if not word.startswith(("env.id=", "total_steps="))]
    line = f"a run is resumed with its own config, whatever was typed: {' '.join(ignored)}"
    assert said_again[:-1] == [line]
    assert len(typed_by_job(tmp_path, "a run", "total_steps=160")[1]) == 1
    assert again[:2] == ["train", "resume=a run"]
    assert sorted(again[2:]) == sorted(
        ["total_steps=300", "env.id=own_slurm:Own-v0", "total_steps=160"]
    )
    said = spikerl(*again)
    assert (said.status, said.err) == (0, ""), shlex.join(again)
    assert "resumed at step 150 of 160" in said.out


def test_the_environment_is_confirmed_in_quotes_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert spikerl("train", *SHORT, "env=gym", "env.id='Pendulum-v1'", "run_dir=r").status == 0
    assert spikerl("train", "resume=r", "env.id='Pendulum-v1'").status == 0


def test_a_sweep_needs_no_confirmation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """submitit repeats the whole command, which names the environment."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_sweep.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    typed = ["train", "-m", *SHORT, "env=gym", "env.id=own_sweep:Own-v0", "run_dir=s"]
    assert spikerl(*typed, "total_steps=150").status == 0
    said = spikerl(*typed, "total_steps=160")
    assert (said.status, said.err) == (0, ""), said
    assert "resumed at step 150 of 160" in said.out


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (1, False), (75, True)])
def test_a_step_that_ends_as_it_is_told_to_stop(
    status: int, requeued: bool, tmp_path: Path
) -> None:
    """The step's status counts, not that of `wait`, which the signal interrupts."""
    srun = f"trap 'exit {status}' USR1; sleep 1; echo up; for i in {{1..99}}; do sleep 0.1; done"
    environ = with_tools(tmp_path, srun=srun, squeue="echo RUNNING", scontrol="echo requeued")
    slow = tmp_path / "slow"
    slow.write_text('kill() { builtin kill "$@" && sleep 0.5; }\n')  # so that the step ends first
    with subprocess.Popen(
        ["bash", str(SCRIPT), "run"], cwd=tmp_path, env={**environ, "BASH_ENV": str(slow)},
        stdout=subprocess.PIPE, text=True,
    ) as job:  # fmt: skip
        assert job.stdout is not None
        assert job.stdout.readline() == "up\n"
        job.send_signal(signal.SIGUSR1)
        ended, *after = job.stdout.read().splitlines()
    assert ended.endswith(f"ended with status {status}")
    assert (after, job.returncode) == ((["requeued"], 0) if requeued else ([], status))
