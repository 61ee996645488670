"""Messages between the workers of a run and the process that launched them.

They are files in a shared temporary folder: `spec.json` (what to run), `pid.RANK`, `stop` (a signal
that the parent got), `failure.RANK` (why a worker failed), `ended.RANK` (a failed worker's exit
status, under mpiexec), `folder` (the run's folder, once it trains), `result` (the exit status).
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import time
import traceback
from pathlib import Path
from typing import Any

from spikerl.errors import FAILED, BadRequest, EnvironmentFailed, NonFinite, RendezvousFailed
from spikerl.signals import signal_name

LOST_PEER = ("gloo/transport", "Connection closed", "Connection reset", "Broken pipe")
LATE = ("did not come", "Timed out", "timeout")
LOST_OTHERS = "lost the others"  # reported by a worker that knows no other cause


class WorkerLost(RuntimeError):
    """A worker failed or was killed; the message names its rank and the cause.

    `folder`: the run's folder, if training had begun; `stopping`: the run had been told to stop.
    """

    folder: str | None = None
    stopping = False
    apart = False  # whether the workers did not meet, so that nothing began
    trace = ""  # the worker's traceback, if it left one
    request: list[str] | None = None  # key, value and remedy if the worker raised BadRequest


def write(path: Path, text: str) -> None:
    """Write a message atomically."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    partial.write_text(text, encoding="utf-8")
    partial.rename(path)


def read(path: Path) -> str:
    """The message at `path`, empty if there is none."""
    return path.read_text(encoding="utf-8") if path.exists() else ""


def result_text(status: int) -> str:
    """An exit status as text of constant size."""
    return f"{status:3d}"


def rank_in(path: Path) -> int:
    """The rank of the worker that wrote this file."""
    return int(path.suffix[1:])


def stop_requested(shared_dir: Path) -> signal.Signals | None:
    """The last signal that the parent forwarded; a worker may have started too late to get it."""
    number = read(shared_dir / "stop")
    return signal.Signals(int(number)) if number else None


def announce_folder(shared_dir: Path, folder: Path) -> None:
    """Tell the parent which folder to resume if a worker is lost."""
    write(shared_dir / "folder", str(folder))


def any_failed(shared_dir: Path) -> bool:
    return any(shared_dir.glob("ended.*")) or any(shared_dir.glob("failure.*"))


def write_failure(shared_dir: Path, rank: int, error: BaseException) -> None:
    import torch.distributed as dist

    first = (str(error).splitlines() or [""])[0]
    alone = isinstance(error, dist.DistError) or any(w in str(error) for w in LOST_PEER)
    place = r"\[[^]]*\] "  # a source location, with which PyTorch begins its messages
    reason = {
        "error": f"{LOST_OTHERS}: " + re.sub(place, "", first).partition(". ")[0]
        if alone
        else f"{type(error).__name__}: {first}",
        "collective": alone,
        "environment": isinstance(error, EnvironmentFailed | NonFinite | BadRequest),
        "request": [str(part) for part in error.args] if isinstance(error, BadRequest) else None,
        "apart": isinstance(error, RendezvousFailed),
        "late": alone and any(word in first for word in LATE),
        "traceback": "".join(traceback.format_exception(error)),
        "time": time.time(),
    }
    write(shared_dir / f"failure.{rank}", json.dumps(reason))


def first_failure(failures: dict[int, int], shared_dir: Path, world_size: int) -> WorkerLost:
    """Rank and cause of the original failure.

    A lost worker makes the others fail in a collective, perhaps earlier than its own end is
    noticed. Therefore a worker that was killed comes first, then one that failed by itself. Before
    both come timeouts and failed environments, after which hanging workers are killed.
    """

    def report(rank: int) -> dict[str, Any]:
        return dict(json.loads(read(shared_dir / f"failure.{rank}") or "{}"))

    def status(rank: int) -> int:
        return failures.get(rank, FAILED)

    def order(rank: int) -> tuple[bool, bool, bool, float]:
        killed = status(rank) < 0 and status(rank) != -signal.SIGTERM
        reason = report(rank)
        sure = reason.get("late", False) or reason.get("environment", False)
        return not sure, not killed, reason.get("collective", not reason), reason.get("time", 0.0)

    ranks = {*failures, *map(rank_in, shared_dir.glob("failure.*"))}
    rank = min(ranks, key=order)
    who = f"worker {rank} of {world_size}"
    code, reason = status(rank), report(rank)
    own = reason.get("environment") or reason.get("late") or code == -signal.SIGTERM
    if code < 0 and not (reason and own):
        return WorkerLost(f"{who} was killed by {signal_name(-code)}")
    lost = WorkerLost(f"{who}: {reason['error']}" if reason else f"{who} ended with status {code}")
    lost.trace, lost.request = reason.get("traceback", ""), reason.get("request")
    lost.apart = reason.get("apart", False)
    return lost
