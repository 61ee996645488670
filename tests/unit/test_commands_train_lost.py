"""A run of several machines that lost a worker, or that all machines resume at once."""

from __future__ import annotations

import itertools
import json
import threading
from pathlib import Path

import pytest
from shell import SHORT, spikerl

from spikerl.commands.train import record_lost_worker
from spikerl.distributed.shared_folder import WorkerLost
from spikerl.runs import folder as run_folder

CAUSE = "worker 3 of 4 was killed by SIGKILL"
LATER = "worker 2 of 4: ValueError: 7"
ELSEWHERE = ["worker 0 of 4: lost the others: Connection closed by peer",
             "worker 1 of 4: lost the others: Timed out waiting 2000ms"]  # fmt: skip
TRACE = "Traceback (most recent call last):\nRuntimeError: Connection closed by peer\n"


def lost(text: str) -> WorkerLost:
    error = WorkerLost(text)
    error.trace = TRACE
    return error


def error_of(run: Path, *told: str) -> str:
    """The text of error.txt after the machines have recorded their causes in this order."""
    (run / "error.txt").write_text(TRACE)  # written by worker 0
    for text in told:
        assert record_lost_worker(lost(text), str(run)) == 1
    return (run / "error.txt").read_text()


def test_the_cause_stays_whoever_tells_it_first(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"status": "running"}')
    for order in itertools.permutations([CAUSE, *ELSEWHERE]):
        assert error_of(tmp_path, *order) == f"{TRACE}{CAUSE}\n", order
    assert error_of(tmp_path, CAUSE, LATER) == f"{TRACE}{CAUSE}\n"
    assert error_of(tmp_path, *ELSEWHERE) == f"{TRACE}{ELSEWHERE[0]}\n"
    assert json.loads((tmp_path / "manifest.json").read_text())["status"] == "failed"


def test_worker_0_of_another_machine_still_holds_the_folder(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"status": "running"}')
    held = run_folder.lock(tmp_path)
    threading.Timer(0.3, held.close).start()
    record_lost_worker(lost(CAUSE), str(tmp_path))
    assert (tmp_path / "error.txt").read_text() == f"{TRACE}{CAUSE}\n"


def test_machines_that_resume_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run is locked, as while machine 0 checks it; only machine 0 refuses then."""
    monkeypatch.chdir(tmp_path)
    assert spikerl("train", *SHORT, "num_envs=2", "total_steps=2", "run_dir=run").status == 0
    nodes = ["world_size=2", "nnodes=2", "rdzv=127.0.0.1:29500"]
    with run_folder.lock(Path("run")):
        said = spikerl("train", "resume=run", *nodes, "node_rank=1")
        assert (said.status, said.err) == (0, "")
        assert " is running it" in spikerl("train", "resume=run", *nodes, "node_rank=0").line


def test_what_belongs_to_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """max_restarts is refused under torchrun, which would repeat the command of a new run."""
    given = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    args = [*SHORT, "num_envs=2"]
    remedy = "a launcher has started the workers; leave it out, and resume=RUN goes on"
    assert spikerl("train", *args, "max_restarts=1").line == f"max_restarts=1: {remedy}"
    nodes = ["world_size=2", "nnodes=2", "node_rank=0", "rdzv=127.0.0.1:29500"]
    remedy = "the workers have been started; give it to what started them"
    assert spikerl("train", *args, *nodes).line == f"nnodes=2: {remedy}"
