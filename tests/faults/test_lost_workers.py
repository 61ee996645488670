"""Workers or their parent are killed or fail: one line says so, and no process stays behind."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import TINY, Run, computed, gone, living, rank_of, record, resume, rows, train

from spikerl.distributed import mpi
from spikerl.seeding import RESET_BITS, reset_seed

WATTS = 125.0
# Tolerance of joules for several workers: steps per second are counted over the slowest worker's
# seconds, the joules of a shared device over rank 0's. Windows have 0.1 s, of which waking a worker
# on a busy machine can take a good part.
TOGETHER = 0.35
# Tolerance for one worker, whose two clocks are read one after the other.
ALONE = 0.05
SECONDS = 10  # within which a run must end after it lost a process
TWO = ["env=HalfCheetah", "world_size=2", "num_envs=4", "env.vectorizer=async"]
FAILING = """
import gymnasium as gym
import numpy as np

class Fails(gym.Env):
    observation_space = gym.spaces.Box(-1.0, 1.0, (3,))
    action_space = gym.spaces.Box(-1.0, 1.0, (2,))
    steps = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.mine = seed is not None and seed == SEED
        return np.zeros(3, np.float32), {}

    def step(self, action):
        self.steps += 1
        if self.mine and self.steps == 30:
            raise ValueError("the motor burnt out")
        return np.zeros(3, np.float32), 0.0, False, False, {}

gym.register("Fails-v0", Fails, max_episode_steps=1000)
"""


def metered(folder: Path) -> list[str]:
    """Arguments for a recorded constant power of the only device, which all workers share."""
    trace = folder / "trace.csv"
    trace.write_text(f"t_s,gpu:0\n0,{WATTS}\n1,{WATTS}\n")
    return ["energy=replay", f"energy.file={trace}"]


def spikerl(*args: str) -> list[str]:
    return ["-m", "spikerl", "train", *TINY, *args]


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def torchrun(home: Path, *args: str) -> subprocess.CompletedProcess[str]:
    home.mkdir()
    command = [*TORCHRUN, *spikerl("run_dir=run", *args)]
    return subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of a run under torchrun that nothing disturbed."""
    home = tmp_path_factory.mktemp("torchrun") / "home"
    alone = [arg for arg in TWO if not arg.startswith("world_size")]
    ended = torchrun(home, *alone, *metered(home.parent))
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("done: 400 steps") == 1  # only one worker prints
    assert record(home / "run")["world_size"] == 2
    return home


def workers(run: Run) -> dict[str, int]:
    """The process ids of the workers by rank, once the run has a row; environments are left out."""
    run.until(lambda: run.begun() and len(rows(run.home / "run")) >= 1)
    parents = {pid: rank_of(pid) for pid in living(run.home) if pid != run.pid}
    known = {rank: pid for pid, rank in parents.items() if rank and is_child(pid, run.pid)}
    assert len(parents) >= 2 * len(known)
    return known


def is_child(pid: int, parent: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    return f"PPid:\t{parent}\n" in status


def lose(run: Run, rank: int, size: int) -> None:
    """Kill a worker; check what the run then prints and records, and how soon it ends."""
    pid = workers(run)[str(rank)]
    begun = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    assert run.wait(2 * SECONDS) == 1
    gone(run.home)
    assert time.monotonic() - begun < SECONDS
    (line,) = run.err.read_text().splitlines()
    assert line.startswith(f"spikerl: worker {rank} of {size} was killed by SIGKILL (")
    assert "spikerl train resume=run goes on" in line
    manifest = record(run.home / "run")
    assert manifest["status"] == "failed"
    assert manifest["ended"]
    error = (run.home / "run" / "error.txt").read_text().strip()
    assert error == f"worker {rank} of {size} was killed by SIGKILL"


@pytest.mark.slow  # test_restarts.py kills a worker too
@pytest.mark.parametrize("again", [False, True])
def test_a_killed_worker_ends_the_run_and_the_rest_can_be_resumed(
    again: bool, whole: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    lose(train(home, *TWO, *metered(tmp_path)), 1, 2)
    if again:
        lose(resume(home), 0, 2)
    run = resume(home)
    assert run.wait() == 0, run.said()
    assert computed(home / "run") == computed(whole / "run")
    gone(home)
    check_energy(home / "run", TOGETHER)
    check_energy(whole / "run", TOGETHER)


@pytest.mark.slow
def test_signals_to_the_parent(whole: Path, tmp_path: Path) -> None:
    """SIGTERM, SIGINT and SIGKILL, each followed by a resume."""
    run = train(tmp_path, *TWO, *metered(tmp_path))
    for number, status in ((signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGKILL, -9)):
        run.until(run.begun)
        begun = time.monotonic()
        assert run.kill(number) == status, run.said()
        gone(tmp_path)
        assert time.monotonic() - begun < SECONDS
        assert not run.err.read_text()
        if number != signal.SIGKILL:
            assert f"on {number.name}; spikerl train resume=run goes on" in run.said()
        run = resume(tmp_path)
    assert run.wait() == 0, run.said()
    assert computed(tmp_path / "run") == computed(whole / "run")
    check_energy(tmp_path / "run", TOGETHER)


def check_energy(folder: Path, tolerance: float = ALONE) -> None:
    """Joules are watts times the seconds of each row's windows; the summary has the joules' sum."""
    spent = rows(folder) + rows(folder, "discarded.jsonl")
    for row in spent:
        assert row["power_w"] == pytest.approx(WATTS, rel=1e-3)
        train_s = 100 / row["env_steps_per_s"]
        assert row["energy_train_j"] == pytest.approx(WATTS * train_s, rel=tolerance)
        assert row["energy_j"] == pytest.approx(row["energy_train_j"] + row["energy_eval_j"])
        assert row["energy_source"].startswith("replay:")
    summary = record(folder, "summary.json")
    assert summary["energy_j"] == pytest.approx(math.fsum(row["energy_j"] for row in spent))
    late = rows(folder, "discarded.jsonl")
    if late:
        lost = math.fsum(row["energy_j"] for row in late)
        assert summary["energy_discarded_j"] == pytest.approx(lost)


def test_energy_of_one_worker(tmp_path: Path) -> None:
    """Windows follow each other without gaps, so the joules cover most of the run's wall time."""
    run = train(tmp_path, "env=Hopper", *metered(tmp_path))
    assert run.wait() == 0, run.said()
    check_energy(tmp_path / "run")
    summary = record(tmp_path / "run", "summary.json")
    assert 0.5 * summary["wall_s"] * WATTS < summary["energy_j"] <= summary["wall_s"] * WATTS


@pytest.mark.slow
def test_one_of_four_is_killed(tmp_path: Path) -> None:
    four = ["env=HalfCheetah", "world_size=4", "num_envs=4", "env.vectorizer=async"]
    lose(train(tmp_path, *four), 2, 4)


def test_an_environment_that_fails_in_one_worker(tmp_path: Path) -> None:
    text = FAILING.replace("SEED", str(reset_seed(RESET_BITS, 0, "env", 1)))  # worker 1's
    (tmp_path / "burning.py").write_text(text)
    arguments = ["env=gym", "env.id=burning:Fails-v0", "world_size=2"]
    run = train(tmp_path, *arguments, PYTHONPATH=str(tmp_path))
    assert run.wait() == 1
    gone(tmp_path)
    (line,) = run.err.read_text().splitlines()
    failure = "EnvironmentFailed: step 59: Fails-v0 raised ValueError: the motor burnt out ("
    assert line.startswith(f"spikerl: worker 1 of 2: {failure}")
    assert record(tmp_path / "run")["status"] == "failed"


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "mpiexec"])
def test_a_killed_launcher_leaves_nobody_behind(launcher: str, tmp_path: Path) -> None:
    start = mpi.mpiexec(2)
    assert start
    started = TORCHRUN if launcher == "torchrun" else [*start, sys.executable]
    alone = [arg for arg in TWO if not arg.startswith("world_size")]
    with (tmp_path / "said").open("w") as said:
        command = [*started, *spikerl("run_dir=run", "total_steps=100000", *alone)]
        process = subprocess.Popen(command, cwd=tmp_path, stdout=said, stderr=said)
    try:
        deadline = time.monotonic() + 100
        while not rows(tmp_path / "run"):
            assert process.poll() is None, (tmp_path / "said").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert len(living(tmp_path)) >= 2 + 4  # at least the workers and the environments
    finally:
        process.kill()
        process.wait()
    gone(tmp_path)


@pytest.mark.slow
def test_torchrun_and_world_size_must_agree(tmp_path: Path) -> None:
    ended = torchrun(tmp_path / "home", *TWO, "world_size=3")
    assert ended.returncode != 0
    said = "spikerl: world_size=3: the launcher started 2 workers; leave world_size out"
    assert said in ended.stderr
    assert not (tmp_path / "home" / "run").exists()
    gone(tmp_path / "home")
