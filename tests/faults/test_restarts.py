"""max_restarts: a run that lost a worker restarts by itself, and ends as if it had lost none."""

from __future__ import annotations

import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import test_mpi
from processes import Run, computed, gone, record, rows, train
from test_lost_workers import TWO, torchrun, workers

RESTARTS = "max_restarts=1"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    home = tmp_path_factory.mktemp("whole") / "home"
    run = train(home, *TWO)
    assert run.wait() == 0, run.said()
    return home / "run"


def hit(run: Run, rank: str, number: int = signal.SIGKILL) -> None:
    os.kill(workers(run)[rank], number)


def over_mpi(run: Run, rank: str) -> None:
    run.until(lambda: run.begun() and rows(run.home / "run"))
    os.kill(test_mpi.worker(run, rank), signal.SIGKILL)


def check(run: Run, whole: Path, cause: str) -> None:
    assert run.wait() == 0, run.said()
    gone(run.home)
    folder = run.home / "run"
    assert computed(folder) == computed(whole)
    manifest = record(folder)
    (event,) = manifest["resumed"]
    assert manifest["status"] == "done"
    assert re.fullmatch(cause, event["after"])
    (line,) = run.err.read_text().splitlines()
    assert line == f"spikerl: {event['after']}; restarting all (1 of 1 restarts were left)"


@pytest.mark.parametrize("backend", ["gloo", pytest.param("mpi", marks=pytest.mark.slow)])
def test_a_killed_worker(backend: str, whole: Path, tmp_path: Path) -> None:
    run = train(tmp_path, *TWO, RESTARTS, f"backend={backend}")
    (over_mpi if backend == "mpi" else hit)(run, "1")
    check(run, whole, "worker 1 of 2 was killed by SIGKILL")


def test_a_wrong_request_that_workers_find_is_one(tmp_path: Path) -> None:
    """As with one worker: status 2, only its line on stderr, no restart, and no folder is left."""
    run = train(tmp_path, *TWO, RESTARTS, "actor.prune=0.0001")
    assert run.wait() == 2
    (line,) = run.err.read_text().splitlines()
    assert line.startswith("spikerl: actor.prune=0.0001: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_a_run_was_started_from_may_be_gone(tmp_path: Path) -> None:
    first = train(tmp_path / "first", *TWO)
    assert first.wait() == 0
    shutil.copytree(tmp_path / "first" / "run", tmp_path / "again" / "first")
    run = train(tmp_path / "again", *TWO, RESTARTS, "init_from=first")
    run.until(run.begun)
    shutil.rmtree(tmp_path / "again" / "first")
    hit(run, "1")
    assert run.wait() == 0, run.said()
    assert record(tmp_path / "again" / "run")["status"] == "done"


@pytest.mark.slow
def test_a_restart_that_fails_is_recorded(tmp_path: Path) -> None:
    """No checkpoint is valid, so the new workers fail before they report the run's folder."""
    run = train(tmp_path, *TWO, RESTARTS)
    run.until(lambda: run.begun() and rows(run.home / "run"))
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        for file in checkpoint.glob("learner*"):
            file.write_bytes(b"")
    hit(run, "1")
    assert run.wait() == 1
    assert record(tmp_path / "run")["status"] == "failed"
    assert (tmp_path / "run" / "error.txt").exists()


@pytest.mark.slow
def test_a_worker_that_hangs(whole: Path, tmp_path: Path) -> None:
    run = train(tmp_path, *TWO, RESTARTS, "backend.timeout_s=2")
    hit(run, "1", signal.SIGSTOP)
    where = "(worker 1 did not come within 2 s|Timed out waiting 2000ms .*)"
    check(run, whole, f"worker 0 of 2: lost the others: {where}")


@pytest.mark.slow
def test_a_worker_that_hangs_over_mpi(whole: Path, tmp_path: Path) -> None:
    run = train(tmp_path, *TWO, RESTARTS, "backend=mpi", "backend.timeout_s=2")
    run.until(lambda: run.begun() and rows(run.home / "run"))
    os.kill(test_mpi.worker(run, "1"), signal.SIGSTOP)
    late = "lost the others: a worker did not come to a collective within 2 s"
    check(run, whole, f"worker 0 of 2: {late}")


@pytest.mark.slow
def test_one_worker_alone(tmp_path: Path) -> None:
    alone = ["env=HalfCheetah", "num_envs=2", "env.vectorizer=async"]
    undisturbed = train(tmp_path / "whole", *alone)
    assert undisturbed.wait() == 0
    run = train(tmp_path / "home", *alone, RESTARTS)
    hit(run, "0")
    check(run, tmp_path / "whole" / "run", "worker 0 of 1 was killed by SIGKILL")


@pytest.mark.slow
def test_no_more_than_asked_for(tmp_path: Path) -> None:
    run = train(tmp_path, *TWO, RESTARTS)
    hit(run, "0")
    run.until(lambda: run.out.read_text().count("run folder:") == 2)
    hit(run, "1")
    assert run.wait() == 1
    gone(tmp_path)
    assert record(tmp_path / "run")["status"] == "failed"
    assert len(record(tmp_path / "run")["resumed"]) == 1
    last = run.err.read_text().splitlines()[-1]
    assert last.startswith("spikerl: worker 1 of 2 was killed by SIGKILL (spikerl train resume=run")


@pytest.mark.slow
def test_a_run_that_was_told_to_stop_stays_stopped(tmp_path: Path) -> None:
    """It does not restart when, after SIGTERM, a worker that does not react is killed."""
    run = train(tmp_path, *TWO, RESTARTS)
    hit(run, "1", signal.SIGSTOP)
    run.send(signal.SIGTERM)
    hit(run, "1")
    assert run.wait() == 1
    gone(tmp_path)
    assert "restarting" not in run.err.read_text()


@pytest.mark.slow
def test_restarts_are_the_launchers(tmp_path: Path) -> None:
    alone = [arg for arg in TWO if not arg.startswith("world_size")]
    ended = torchrun(tmp_path / "home", *alone, RESTARTS)
    assert ended.returncode != 0
    line = (
        "max_restarts=1: a launcher has started the workers; leave it out, and resume=RUN goes on"
    )
    assert f"spikerl: {line}" in ended.stderr
    assert not (tmp_path / "home" / "run").exists()
