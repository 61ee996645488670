"""Runs workers as subprocesses, under PyTorch's elastic agent or mpiexec, watched by the parent.

Workers are in sessions of their own, so the parent forwards signals to them, and every worker asks
the kernel to kill it when its parent ends.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from spikerl.children import PYTHON, set_variable
from spikerl.distributed import hosts, mpi
from spikerl.distributed.process_lifetime import die_with_parent
from spikerl.distributed.shared_folder import (
    WorkerLost,
    any_failed,
    first_failure,
    rank_in,
    read,
    result_text,
    stop_requested,
    write,
    write_failure,
)
from spikerl.errors import DONE, FAILED, Interrupted, Stopped, first_line, stop_status
from spikerl.signals import STOPS, handled, listened_to, signal_name

if TYPE_CHECKING:
    from torch.distributed import TCPStore

THREADS = "OMP_NUM_THREADS"
SHUTDOWN_S = 4  # time for the survivors of a lost worker to end before they are killed


class Apart(WorkerLost):
    """The machines did not meet, so no worker started."""

    apart = True

    def __init__(self, workers: Workers, why: str) -> None:
        where, nodes = f"{workers.host}:{workers.port}", workers.nnodes
        super().__init__(f"rdzv={where}: the {nodes} machines did not meet there: {why}")


@dataclass(frozen=True, kw_only=True)
class Workers:
    """The number of workers, the threads of each, and their machines: this one is number
    `node_rank` of `nnodes`, which meet at `host`, an address of machine 0, and `port` (0: any free
    one, for a single machine).
    """

    size: int
    threads: int
    backend: str
    timeout_s: float
    nnodes: int = 1
    node_rank: int = 0
    host: str = "127.0.0.1"
    port: int = 0


def launch(spec: dict[str, Any], workers: Workers, *, stoppable: bool = True) -> int:
    """Run this machine's workers on `spec`; returns the run's exit status. Raises WorkerLost.

    `stoppable`: the workers end by themselves after a signal; others are killed at a Ctrl-C.
    """
    spec = {**spec, THREADS: os.environ.get(THREADS)}
    start = run_under_mpiexec if workers.backend == "mpi" else run_under_agent
    with (
        tempfile.TemporaryDirectory(prefix="spikerl-") as name,
        forward_signals(Path(name)) if stoppable else nullcontext(),
    ):
        shared_dir = Path(name)
        (shared_dir / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
        # Written now at its final size, because the disk may be full when the run is done.
        (shared_dir / "result").write_text(result_text(FAILED))
        os.environ[THREADS] = str(workers.threads)  # libraries read it when they are loaded
        try:
            if failures := start(shared_dir, workers):
                raise first_failure(failures, shared_dir, workers.size)
        except Stopped as stopped:
            name = signal_name(stopped.number)
            print(f"spikerl: stopped on {name} before the machines met", file=sys.stderr)
            return stop_status(stopped.number)
        except WorkerLost as lost:
            lost.folder = read(shared_dir / "folder") or None
            lost.stopping = stop_requested(shared_dir) is not None
            raise
        finally:
            set_variable(THREADS, spec[THREADS])
        return int(read(shared_dir / "result"))


def run_under_agent(shared_dir: Path, workers: Workers) -> dict[int, int]:
    """Run the workers; returns the exit statuses of those that failed, by rank."""
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    several = workers.nnodes > 1
    config = LaunchConfig(
        min_nodes=workers.nnodes,
        max_nodes=workers.nnodes,
        nproc_per_node=workers.size // workers.nnodes,
        run_id="spikerl" if several else uuid.uuid4().hex,
        rdzv_backend="static" if several else "c10d",
        rdzv_endpoint=f"{workers.host}:{workers.port}",
        rdzv_configs={"rank": workers.node_rank, "timeout": int(workers.timeout_s)},
        max_restarts=0,
        signals_to_handle="",  # forward_signals does that
        # On one machine the agent would resolve its own name, which may fail.
        local_addr=None if several else "127.0.0.1",
        logs_specs=DefaultLogsSpecs(log_dir=str(shared_dir)),
    )
    if hasattr(config, "shutdown_timeout"):  # not in torch 2.11, which gives survivors 30 s
        config.shutdown_timeout = SHUTDOWN_S
    python, *flags = PYTHON
    worker = (*flags, "-m", "spikerl.commands.worker", str(shared_dir), str(os.getpid()))
    over = threading.Event()
    threading.Thread(target=kill_hung_workers, args=(shared_dir, over), daemon=True).start()
    try:
        store = meet(shared_dir, workers) if several else None
        elastic_launch(config, python)(*worker)
        del store  # kept alive until here, because the agents use it too
    except ChildFailedError as error:
        return {rank: int(failure.exitcode) for rank, failure in error.failures.items()}
    except DistError as error:
        raise Apart(workers, first_line(error)) from None
    finally:
        over.set()
    return {}


def meet(shared_dir: Path, workers: Workers) -> TCPStore:
    """Wait for the other machines; the agents would not react to signals while they wait."""
    from torch.distributed import TCPStore

    first, host, port = workers.node_rank == 0, workers.host, workers.port
    within_s = workers.timeout_s
    deadline = time.monotonic() + within_s
    with handled(_stop, listened_to()):
        if (number := stop_requested(shared_dir)) is not None:
            raise Stopped(number)  # a signal that came before `handled`
        why = hosts.cannot_listen(host, port) if first else hosts.cannot_reach(host, port, within_s)
        if why:
            raise Apart(workers, why)
        store = TCPStore(host, port, is_master=first, wait_for_workers=False, multi_tenant=True)
        store.set(str(workers.node_rank), "")
        for rank in range(workers.nnodes):
            while not store.check([str(rank)]):
                if time.monotonic() >= deadline:
                    raise Apart(workers, f"machine {rank} did not come within {within_s:g} s")
                time.sleep(0.1)
    return store


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise Stopped(number)


def kill_hung_workers(shared_dir: Path, over: threading.Event) -> None:
    """Kill workers that hang after another's failure, for which the agent would wait 30 s."""
    while not over.wait(0.2):
        if any(shared_dir.glob("failure.*")) and not over.wait(SHUTDOWN_S):
            failed = {rank_in(path) for path in shared_dir.glob("failure.*")}
            for path in shared_dir.glob("pid.*"):
                # A failed worker is gone, and its process id may have been reused.
                if rank_in(path) not in failed:
                    with suppress(ProcessLookupError):
                        os.kill(int(read(path)), signal.SIGKILL)
            return


def run_under_mpiexec(shared_dir: Path, workers: Workers) -> dict[int, int]:
    """As `run_under_agent`, under MPI, where the first failure ends all workers and is the only one
    reported.
    """
    start = mpi.mpiexec(workers.size)
    assert start is not None  # the config was checked
    command = [*start, *PYTHON, "-m", "spikerl.commands.worker", str(shared_dir)]
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        preexec_fn=die_with_parent,
    )
    threading.Thread(target=end_all_with_one, args=(process, shared_dir), daemon=True).start()
    assert process.stdout is not None
    over = False  # whether mpiexec's own report of a failure began; it is replaced by one line
    for line in process.stdout:
        over = over or bool(mpi.LAST_WORDS.match(line) and any_failed(shared_dir))
        if not over:
            print(line, end="", flush=True)
    status = process.wait()
    if failures := {rank_in(path): int(read(path)) for path in shared_dir.glob("ended.*")}:
        return failures
    if failures := {rank_in(path): FAILED for path in shared_dir.glob("failure.*")}:
        return failures
    if status != 0:
        raise WorkerLost(f"mpiexec ended with status {status}; what it said stands above")
    return {}


def end_all_with_one(process: subprocess.Popen[str], shared_dir: Path) -> None:
    """End mpiexec, and with it all workers, when one of them failed.

    MPICH's mpiexec does so itself only if it sees the worker's connection close before its output,
    and if the worker had joined the others.
    """
    while process.poll() is None:
        time.sleep(0.1)
        if any(shared_dir.glob("ended.*")):
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(SHUTDOWN_S)
            process.kill()


@contextmanager
def forward_signals(shared_dir: Path) -> Iterator[None]:
    """Within this context, signals that stop a run reach every worker; a second Ctrl-C raises."""
    seen: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        if seen and number == signal.SIGINT:
            raise Interrupted
        seen.append(number)
        with suppress(OSError):  # a full disk: workers that listen still get the signal below
            write(shared_dir / "stop", str(number))
        for path in shared_dir.glob("pid.*"):
            with suppress(ProcessLookupError):  # the worker has just ended
                os.kill(int(read(path)), number)

    with handled(pass_on, listened_to()):
        yield


def run_worker(shared_dir: Path, parent: int, run: Callable[[dict[str, Any]], int]) -> int:
    """Run a worker: make it die with its parent, run the spec, report a failure."""
    die_with_parent(parent)
    for number in STOPS:  # until the run listens, and again while it reports a failure
        signal.signal(number, signal.SIG_IGN)
    rank = int(os.environ.get("RANK", "0"))  # mpiexec -n 1 gives none
    write(shared_dir / f"pid.{rank}", str(os.getpid()))
    spec = json.loads(read(shared_dir / "spec.json"))
    set_variable(THREADS, spec[THREADS])  # else the run would take it for the user's setting
    try:
        status = run(spec)
    except Exception as error:
        write_failure(shared_dir, rank, error)
        mpi.abort()
        return FAILED
    with (shared_dir / "result").open("r+") as file:
        file.write(result_text(status))  # all workers write the same
    return DONE
