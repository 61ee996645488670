"""How a machine's workers start, who gets a signal while they run, which failure is reported."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from shell import SHORT, spikerl, tree

from spikerl.distributed import launch, mpi
from spikerl.distributed.shared_folder import WorkerLost, first_failure, write_failure
from spikerl.errors import RendezvousFailed, Stopped
from spikerl.runs.folder import update_manifest


@pytest.mark.parametrize("stoppable", [True, False])
def test_a_signal_is_passed_on_only_to_workers_that_end_by_it(
    monkeypatch: pytest.MonkeyPatch, stoppable: bool
) -> None:
    """For workers that are not stoppable the signal handler stays as it is."""
    heard: list[Any] = []

    def run(shared_dir: Path, workers: launch.Workers) -> dict[int, int]:
        heard.append(signal.getsignal(signal.SIGINT))
        (shared_dir / "result").write_text("0")
        return {}

    monkeypatch.setattr(launch, "run_under_agent", run)
    workers = launch.Workers(size=2, threads=1, backend="gloo", timeout_s=5.0)
    before = signal.getsignal(signal.SIGINT)
    assert launch.launch({}, workers, stoppable=stoppable) == 0
    assert (heard == [before]) == (not stoppable)
    assert signal.getsignal(signal.SIGINT) is before


def test_of_failures_of_one_kind_the_first_is_named(tmp_path: Path) -> None:
    for rank, second in ((0, 2.0), (1, 1.0), (2, 3.0)):
        reason = {"error": f"E{rank}", "collective": False, "time": second}
        (tmp_path / f"failure.{rank}").write_text(json.dumps(reason))
    lost = first_failure({0: 1, 1: 1, 2: 1}, tmp_path, 3)
    assert str(lost) == "worker 1 of 3: E1"


WORKER = """
import sys
from pathlib import Path
from spikerl.distributed.launch import run_worker
from spikerl.distributed.process_lifetime import watched

shared_dir = Path(sys.argv[1])
sys.exit(run_worker(shared_dir, watched(shared_dir), lambda spec: 0))
"""


def test_mpiexec_with_one_worker(tmp_path: Path) -> None:
    """As with max_restarts. The worker has no rank, since it is the only one."""
    start = mpi.mpiexec(1)
    assert start
    (tmp_path / "spec.json").write_text(json.dumps({launch.THREADS: None}))
    (tmp_path / "result").write_text("  1")
    ended = subprocess.run(
        [*start, sys.executable, "-c", WORKER, str(tmp_path)], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert int((tmp_path / "result").read_text()) == 0
    assert not list(tmp_path.glob("ended.*"))


# Environment variables of Slurm in a job on two machines.
JOB = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NODELIST": "node[1-2]",
    "SLURM_NNODES": "2",
    "SLURM_TASKS_PER_NODE": "2(x2)",
}


def test_mpiexec_starts_workers_on_this_machine_also_in_a_job_of_several() -> None:
    start = mpi.mpiexec(2)
    assert start
    ended = subprocess.run(
        [*start, sys.executable, "-c", "import os; print(os.environ['PMI_RANK'])"],
        env={**os.environ, **JOB}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    # mpiexec may forward a worker's digit before its newline, so lines may be mixed.
    assert sorted("".join(ended.stdout.split())) == ["0", "1"], ended.stderr


BOX = "echo --------------------------; "


@pytest.mark.parametrize(
    ("says", "failures", "out"),
    [
        (f"echo begun; {BOX} echo epoch 1", {}, "begun\n--------------------------\nepoch 1\n"),
        (f"echo begun; echo 9 >$0/ended.1; {BOX} echo killed; exit 9", {1: 9}, "begun\n"),
    ],
    ids=["an environment's own", "mpiexec's"],
)
def test_lines_that_look_like_mpiexecs_last_words(
    says: str,
    failures: dict[int, int],
    out: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """After such lines the output is dropped only if a worker has failed."""
    monkeypatch.setattr(mpi, "mpiexec", lambda workers: ["sh", "-c", says, str(tmp_path)])
    monkeypatch.setattr(launch, "end_all_with_one", lambda *_: None)
    workers = launch.Workers(size=2, threads=1, backend="mpi", timeout_s=5)
    assert launch.run_under_mpiexec(tmp_path, workers) == failures
    assert capsys.readouterr().out == out


def test_an_mpiexec_that_fails_is_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    says = f"{BOX} echo no such host; exit 3"
    monkeypatch.setattr(mpi, "mpiexec", lambda workers: ["sh", "-c", says])
    workers = launch.Workers(size=2, threads=1, backend="mpi", timeout_s=5)
    with pytest.raises(WorkerLost, match=r"^mpiexec ended with status 3; what it said stands"):
        launch.run_under_mpiexec(tmp_path, workers)
    assert "no such host" in capsys.readouterr().out


# --- several machines ----------------------------------------------------------------------------


@pytest.fixture
def machines() -> list[launch.Workers]:
    """Two machines with one worker each, and a free port to meet at."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    first = launch.Workers(size=2, threads=1, backend="gloo", timeout_s=30, nnodes=2, port=port)
    return [first, replace(first, node_rank=1)]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_ends_the_wait_for_other_machines(
    rank: int,
    number: signal.Signals,
    status: int,
    machines: list[launch.Workers],
    capsys: pytest.CaptureFixture[str],
) -> None:
    begun = time.monotonic()
    threading.Timer(1.0, os.kill, [os.getpid(), number]).start()
    assert launch.launch({}, machines[rank]) == status
    assert time.monotonic() - begun < 20
    assert capsys.readouterr().err == f"spikerl: stopped on {number.name} before the machines met\n"


def test_a_signal_that_came_before_the_wait(machines: list[launch.Workers], tmp_path: Path) -> None:
    (tmp_path / "stop").write_text(str(int(signal.SIGHUP)))
    with pytest.raises(Stopped):
        launch.meet(tmp_path, machines[0])


def test_machines_that_meet_and_one_that_does_not_come(
    machines: list[launch.Workers], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "handled", lambda *_: nullcontext())  # threads cannot set handlers
    with ThreadPoolExecutor(2) as pool:
        met = list(pool.map(lambda machine: launch.meet(tmp_path, machine), machines))
    assert all(store.check(["0", "1"]) for store in met)
    del met
    alone = replace(machines[0], timeout_s=1)
    said = f"rdzv=127.0.0.1:{alone.port}: the 2 machines did not meet there: machine 1 did not come"
    with pytest.raises(launch.Apart, match=f"^{said} within 1 s$"):
        launch.meet(tmp_path, alone)


MEETING = ["nnodes=2", "world_size=2", "node_rank=0"]


def test_machines_that_do_not_meet_have_lost_no_worker(
    machines: list[launch.Workers], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No restart at the next port follows, as late machines would still try the first port."""
    monkeypatch.chdir(tmp_path)
    ports = []

    def apart(spec: dict[str, Any], workers: launch.Workers) -> int:
        ports.append(workers.port)
        raise launch.Apart(workers, "nobody")

    monkeypatch.setattr(launch, "launch", apart)
    said = spikerl("train", *SHORT, *MEETING, "rdzv=127.0.0.1:29500", "max_restarts=2")
    assert (said.status, ports) == (1, [29500])
    assert said.err == (
        "spikerl: rdzv=127.0.0.1:29500: the 2 machines did not meet there: nobody\n"
    )


@pytest.mark.parametrize("where", ["machines", "workers"])
def test_a_resume_whose_workers_do_not_meet_changes_nothing(
    where: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It does change the run if the workers had met before and were restarted."""
    monkeypatch.chdir(tmp_path)
    assert spikerl("train", *SHORT, "num_envs=2", "total_steps=2", "run_dir=run").status == 0
    update_manifest(Path("run"), status="preempted")
    before = tree(Path("run"))
    first: list[WorkerLost] = []

    def apart(spec: dict[str, Any], workers: launch.Workers) -> int:
        if first:
            raise first.pop()
        if where == "machines":
            raise launch.Apart(workers, "nobody")
        shared = tmp_path / "shared"
        shared.mkdir(exist_ok=True)
        write_failure(shared, 1, RendezvousFailed("worker 1 of 2 did not meet the others"))
        raise first_failure({1: 1}, shared, 2)

    monkeypatch.setattr(launch, "launch", apart)
    words = [*MEETING, "rdzv=127.0.0.1:29500"] if where == "machines" else ["world_size=2"]
    resume = ["train", "resume=run", "total_steps=4", *words]
    said = spikerl(*resume)
    assert said.status == 1
    assert " did not meet " in said.err
    assert said.err.endswith(" (spikerl train resume=run goes on from its last checkpoint)\n")
    assert tree(Path("run")) == before
    first.append(WorkerLost("worker 1 of 2 was killed by SIGKILL"))
    assert spikerl(*resume, "max_restarts=1").status == 1
    assert json.loads(Path("run/manifest.json").read_text())["status"] == "failed"


def test_restarts_need_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "launch", lambda *_: 0)
    said = spikerl("train", *SHORT, *MEETING, "rdzv=127.0.0.1:65534", "max_restarts=2")
    assert said.status == 2
    why = "each of max_restarts=2 takes the next port; give a lower one"
    assert said.line == f"rdzv=127.0.0.1:65534: {why}"
