"""Workers over MPI compute the same run as over gloo, and no process hangs when another ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import TINY, Run, computed, gone, living, rank_of, record, resume, train
from test_lost_workers import FAILING, SECONDS, TWO, is_child

from spikerl.distributed import mpi
from spikerl.distributed.world import BackendConfig, resolve_backend
from spikerl.errors import BadRequest
from spikerl.seeding import RESET_BITS, reset_seed

OVER_MPI = [*TWO, "backend=mpi"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two workers over gloo."""
    home = tmp_path_factory.mktemp("gloo") / "home"
    run = train(home, *TWO, "backend=gloo")
    assert run.wait() == 0, run.said()
    return home / "run"


@pytest.mark.slow
def test_the_same_bits_as_over_gloo(whole: Path, tmp_path: Path) -> None:
    run = train(tmp_path, *OVER_MPI)
    assert run.wait() == 0, run.said()
    assert "gradients are summed over mpi" in run.said()
    assert computed(tmp_path / "run") == computed(whole)
    gone(tmp_path)


def mpiexec(home: Path, *args: str) -> subprocess.CompletedProcess[str]:
    start = mpi.mpiexec(2)
    assert start
    alone = [arg for arg in TWO if not arg.startswith("world_size")]
    command = [*start, sys.executable, "-m", "spikerl", "train", *TINY, *alone, "run_dir=run"]
    return subprocess.run([*command, *args], cwd=home, capture_output=True, text=True, timeout=100)


@pytest.mark.slow
def test_mpiexec_starts_the_workers(whole: Path, tmp_path: Path) -> None:
    ended = mpiexec(tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "backend=mpi (mpiexec started the workers)" in ended.stdout
    assert ended.stdout.count("done: 400 steps") == 1
    assert computed(tmp_path / "run") == computed(whole)


@pytest.mark.slow
def test_mpiexec_and_another_request(tmp_path: Path) -> None:
    for asked, line in (
        ("backend=gloo", "backend=gloo: mpiexec started the workers; use backend=mpi"),
        ("world_size=3", "world_size=3: the launcher started 2 workers; leave world_size out"),
    ):
        ended = mpiexec(tmp_path, asked)
        assert ended.returncode == 2
        assert f"spikerl: {line}" in ended.stderr
    assert not (tmp_path / "run").exists()


def workers(run: Run, rank: str) -> list[int]:
    """The process of the worker of this rank, without its parent, which mpiexec started, and
    without the processes of its environments, which have the same rank in their environment.
    """
    ranked = [pid for pid in living(run.home) if rank_of(pid) == rank]
    tops = [pid for pid in ranked if not any(is_child(pid, other) for other in ranked)]
    return [pid for pid in ranked if any(is_child(pid, top) for top in tops)]


def worker(run: Run, rank: str) -> int:
    (found,) = workers(run, rank)
    return found


@pytest.mark.slow
def test_a_worker_killed_before_it_joined_the_others(tmp_path: Path) -> None:
    run = train(tmp_path, *OVER_MPI)
    run.until(lambda: workers(run, "1"))
    os.kill(worker(run, "1"), signal.SIGKILL)
    assert run.wait(2 * SECONDS) == 1
    gone(tmp_path)
    assert run.err.read_text() == "spikerl: worker 1 of 2 was killed by SIGKILL\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_killed_worker_ends_the_run_and_the_rest_can_be_resumed(
    whole: Path, tmp_path: Path
) -> None:
    run = train(tmp_path, *OVER_MPI)
    run.until(run.begun)
    pid = worker(run, "1")
    begun = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    assert run.wait(2 * SECONDS) == 1
    gone(tmp_path)
    assert time.monotonic() - begun < SECONDS
    (line,) = run.err.read_text().splitlines()
    assert line.startswith("spikerl: worker 1 of 2 was killed by SIGKILL (")
    assert record(tmp_path / "run")["status"] == "failed"
    for number, status in ((signal.SIGTERM, 75), (signal.SIGKILL, -9)):
        run = resume(tmp_path)
        run.until(run.begun)
        assert run.kill(number) == status, run.said()
        gone(tmp_path)
    run = resume(tmp_path)
    assert run.wait() == 0, run.said()
    assert computed(tmp_path / "run") == computed(whole)


@pytest.mark.slow
def test_an_environment_that_fails_in_one_worker(tmp_path: Path) -> None:
    text = FAILING.replace("SEED", str(reset_seed(RESET_BITS, 0, "env", 1)))  # worker 1's
    (tmp_path / "burning.py").write_text(text)
    asked = ["env=gym", "env.id=burning:Fails-v0", "num_envs=2"]
    run = train(tmp_path, *asked, "world_size=2", "backend=mpi", PYTHONPATH=str(tmp_path))
    assert run.wait(2 * SECONDS) == 1
    gone(tmp_path)
    (line,) = run.err.read_text().splitlines()
    failure = "EnvironmentFailed: step 59: Fails-v0 raised ValueError: the motor burnt out ("
    assert line.startswith(f"spikerl: worker 1 of 2: {failure}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
        ended = mpiexec(tmp_path, *asked, "run_dir=other")
    assert ended.returncode != 0
    assert "ValueError: the motor burnt out" in ended.stderr
    gone(tmp_path)


def test_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def line(size: int = 2) -> str:
        with pytest.raises(BadRequest) as refused:
            resolve_backend(BackendConfig(name="mpi"), "cpu", size)
        return str(refused.value)

    for name, value in (("RANK", "0"), ("MASTER_ADDR", "a"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert line().startswith("backend=mpi: mpiexec has not started the workers; ")
    with monkeypatch.context() as patch:
        patch.setattr(mpi, "mpiexec", lambda workers: None)
        assert line() == f"backend=mpi: no mpiexec; {mpi.EXTRA}"
    for name in ("mpi4py", "mpi4py.MPI"):
        monkeypatch.setitem(sys.modules, name, None)
    assert line() == f"backend=mpi: mpi4py is not installed; {mpi.EXTRA}"
