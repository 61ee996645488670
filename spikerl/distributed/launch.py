"""Workers as subprocesses under PyTorch's elastic agent, or mpiexec, watched from the parent.

Parent and workers share a mailbox, a temporary folder: `spec.json` (what to run), `pid.RANK`,
`stop` (a signal that the parent got), `failure.RANK` (why a worker failed), `ended.RANK` (how it
ended, under mpiexec, if not well), `result` (rank 0's exit status). Workers are in sessions of
their own, so the parent passes signals on, and all ask the kernel to die with their parents.
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
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from spikerl.distributed import mpi
from spikerl.distributed.orphans import die_with_parent

PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
LOST_PEER = ("gloo/transport", "Connection closed", "Connection reset", "Broken pipe")
FAILED = 1  # a worker's exit status
SHUTDOWN_S = 4  # how long survivors of a lost worker may take before they are killed


class WorkerLost(RuntimeError):
    """A worker failed or was killed; the message names its rank and the cause."""


def launch(spec: dict[str, Any], world_size: int, threads: int, backend: str) -> int:
    """Run `world_size` workers on `spec`; rank 0's exit status. Raises WorkerLost."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    start = by_mpiexec if backend == "mpi" else by_agent
    with tempfile.TemporaryDirectory(prefix="spikerl-") as name, passing_signals_on(Path(name)):
        mailbox = Path(name)
        (mailbox / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
        if failures := start(mailbox, world_size):
            raise WorkerLost(blame(failures, mailbox, world_size))
        return int((mailbox / "result").read_text())


def by_agent(mailbox: Path, world_size: int) -> dict[int, int]:
    """Exit statuses of workers that failed, by rank."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world_size,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
        signals_to_handle="",  # they are passed on instead
        shutdown_timeout=SHUTDOWN_S,
        logs_specs=DefaultLogsSpecs(log_dir=str(mailbox)),
    )
    worker = ("-m", "spikerl.worker", str(mailbox), str(os.getpid()))
    try:
        elastic_launch(config, sys.executable)(*worker)
    except ChildFailedError as error:
        return {rank: int(failure.exitcode) for rank, failure in error.failures.items()}
    return {}


def by_mpiexec(mailbox: Path, world_size: int) -> dict[int, int]:
    """The same under MPI, where one that fails ends all: only the one that did so is known."""
    start = mpi.mpiexec(world_size)
    assert start is not None  # the config was checked
    command = [*start, sys.executable, "-m", "spikerl.worker", str(mailbox)]
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
    threading.Thread(target=end_together, args=(process, mailbox), daemon=True).start()
    assert process.stdout is not None
    last_words: list[str] = []  # of mpiexec, about one that failed
    for line in process.stdout:
        if last_words or mpi.LAST_WORDS.match(line):
            last_words.append(line)
        else:
            print(line, end="", flush=True)
    status = process.wait()
    if failures := {rank_in(path): int(path.read_text()) for path in mailbox.glob("ended.*")}:
        return failures
    if failures := {rank_in(path): FAILED for path in mailbox.glob("failure.*")}:
        return failures
    if status != 0:
        raise WorkerLost(f"mpiexec ended with status {status}: {''.join(last_words).strip()}")
    return {}


def end_together(process: subprocess.Popen[str], mailbox: Path) -> None:
    """End mpiexec, and with it all workers, when one of them ended badly.

    MPICH's does so itself only if it sees the worker's connection close before its output does, and
    if the worker had joined the others.
    """
    while process.poll() is None:
        time.sleep(0.1)
        if any(mailbox.glob("ended.*")):
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(SHUTDOWN_S)
            process.kill()


def rank_in(path: Path) -> int:
    """The rank of the worker that wrote this file."""
    return int(path.suffix[1:])


def blame(failures: dict[int, int], mailbox: Path, world_size: int) -> str:
    """Rank and cause of what went wrong first.

    A lost worker makes the others fail in a collective, and they may be noticed before it: so a
    worker that was killed comes first, then one that failed on its own account.
    """

    def told(rank: int) -> dict[str, Any]:
        path = mailbox / f"failure.{rank}"
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}

    def status(rank: int) -> int:
        return failures.get(rank, FAILED)

    def order(rank: int) -> tuple[bool, bool, float]:
        killed = status(rank) < 0 and status(rank) != -signal.SIGTERM
        reason = told(rank)
        return not killed, reason.get("collective", not reason), reason.get("time", 0.0)

    ranks = {*failures, *map(rank_in, mailbox.glob("failure.*"))}
    rank = min(ranks, key=order)
    who = f"worker {rank} of {world_size}"
    code, reason = status(rank), told(rank)
    if code < 0 and not (reason and code == -signal.SIGTERM):
        return f"{who} was killed by {signal.Signals(-code).name}"
    return f"{who}: {reason['error']}" if reason else f"{who} ended with status {code}"


@contextmanager
def passing_signals_on(mailbox: Path) -> Iterator[None]:
    """Meanwhile SIGTERM, SIGUSR1 and Ctrl-C reach every worker; a second Ctrl-C ends at once."""
    seen: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        if seen and number == signal.SIGINT:
            raise KeyboardInterrupt
        seen.append(number)
        (mailbox / "stop").write_text(str(number))
        for path in mailbox.glob("pid.*"):
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(int(path.read_text()), number)

    before = {number: signal.signal(number, pass_on) for number in PASSED_ON}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def work(mailbox: Path, parent: int, run: Callable[[dict[str, Any]], int]) -> int:
    """A worker's life: die with the parent, run the spec, leave word of a failure."""
    die_with_parent(parent)
    for number in PASSED_ON:  # until the run listens, and again while it leaves word of a failure
        signal.signal(number, signal.SIG_IGN)
    rank = int(os.environ["RANK"])
    partial = mailbox / f".pid.{rank}"
    partial.write_text(str(os.getpid()))
    partial.rename(mailbox / f"pid.{rank}")
    spec = json.loads((mailbox / "spec.json").read_text(encoding="utf-8"))
    try:
        status = run(spec)
    except Exception as error:
        write_failure(mailbox, rank, error)
        mpi.abort()
        return FAILED
    if rank == 0:
        (mailbox / "result").write_text(str(status))
    return 0


def write_failure(mailbox: Path, rank: int, error: BaseException) -> None:
    import torch.distributed as dist

    text = str(error).splitlines()
    reason = {
        "error": f"{type(error).__name__}: {text[0] if text else ''}",
        "collective": isinstance(error, dist.DistError) or any(w in str(error) for w in LOST_PEER),
        "traceback": "".join(traceback.format_exception(error)),
        "time": time.time(),
    }
    (mailbox / f"failure.{rank}").write_text(json.dumps(reason), encoding="utf-8")


def stop_requested(mailbox: Path) -> signal.Signals | None:
    """A signal that the parent got before this worker could receive it."""
    path = mailbox / "stop"
    return signal.Signals(int(path.read_text())) if path.exists() else None
