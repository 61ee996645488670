"""Makes sure that no process outlives the one that started it, however that one ended."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from pathlib import Path

from spikerl.distributed.launchers import mpi_set

PR_SET_PDEATHSIG = 1
STRAY_S = 5.0  # time for other threads to end when all else is done


def die_if_spawned() -> None:
    """Call `die_with_parent` in a process that multiprocessing spawned.

    Such a process imports its parent's main module anew. Zeus starts one for each processor
    counter and would leave them behind if the run were killed.
    """
    if multiprocessing.parent_process() is not None:
        die_with_parent()


def die_with_parent(parent: int | None = None, number: int = signal.SIGKILL) -> None:
    """Have the kernel signal this process when its parent ends, even by SIGKILL (Linux only).

    `parent`: the expected parent's id; if it has ended already, this process exits at once.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def die_with_launcher() -> None:
    """Call `die_with_parent` if torchrun or mpiexec started this process, since these leave their
    processes behind when they are killed.

    Processes of other parents may be meant to outlive them, and Slurm ends its own.
    """
    env = os.environ
    if ("TORCHELASTIC_RUN_ID" in env and "RANK" in env) or mpi_set():
        die_with_parent()


def end_despite_threads(status: int) -> None:
    """Exit even if a thread of users' code never ends, for which Python would wait forever. Call
    this last.
    """
    timer = threading.Timer(STRAY_S, _end, [status])
    timer.daemon = True
    timer.start()


def _end(status: int) -> None:
    threads = set(threading.enumerate()) - {threading.main_thread()}
    if left := sorted(thread.name for thread in threads if not thread.daemon):
        said = f"spikerl: ends although {', '.join(left)} still runs, as no thread may keep it"
        print(said, file=sys.stderr, flush=True)
        os._exit(status)


def watched(shared_dir: Path) -> int:
    """Fork: the child goes on, and the parent only reports how the child ended if it failed.

    Returns the parent's process id, in the child. Needed because mpiexec does not report which of
    the workers failed.
    """
    parent, rank = os.getpid(), os.environ.get("RANK", "0")  # mpiexec -n 1 gives none
    child = os.fork()
    if child == 0:
        return parent
    die_with_parent()
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code != 0:
        partial = shared_dir / f".ended.{rank}"
        partial.write_text(str(code))
        partial.rename(shared_dir / f"ended.{rank}")
    os._exit(code & 0xFF)
