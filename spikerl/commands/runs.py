"""`spikerl runs`: which runs there are, their state, and the space that they take."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from spikerl.energy.meter import total_joules
from spikerl.errors import DONE, BadRequest
from spikerl.files import shown
from spikerl.models.policy_file import read_files
from spikerl.output import answer, several
from spikerl.runs import folder as run_folder
from spikerl.runs.display import number
from spikerl.runs.rows import read_rows
from spikerl.schema import parse

LAST_FIRST = ("steps", "return", "best", "joules", "size")  # sorted from the largest down
UNITS = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"))


@dataclass(kw_only=True)
class RunsRequest:
    path: str
    sort: str
    clean: bool
    json: bool

    def __post_init__(self) -> None:
        known = ("age", "run", "state", *LAST_FIRST)
        if self.sort not in known:
            raise BadRequest("sort", self.sort, f"give one of {', '.join(known)}")


@dataclass
class Run:
    """A run as it is listed; None for what its files do not say."""

    run: str
    env_id: str
    state: str  # as in the manifest, or lost: it says running, but no process runs it
    steps: int | None
    last_return: float | None
    best_return: float | None
    joules: float | None  # including those of discarded work
    size_bytes: int
    age_s: float  # since it ended, or since its record grew


def main(data: dict[str, Any], argv: Sequence[str]) -> int:
    """`spikerl runs`: the exit status."""
    request = parse(RunsRequest, data)
    root = Path(request.path)
    if not root.is_dir():
        raise BadRequest("path", request.path, "no such folder")
    folders = list(run_folder.folders_below(root))
    freed, not_freed = clean(folders) if request.clean else ({}, [])
    runs, unreadable = list[Run](), list[str]()
    for folder in folders:
        try:
            runs.append(describe(folder))
        except BadRequest:
            unreadable.append(shown(folder))
    runs.sort(key=lambda run: order(run, request))
    if request.json:
        rows = [asdict(run) for run in runs]
        answer({"runs": rows, "freed_bytes": sum(freed.values()), "not_freed": not_freed,
                "unreadable": unreadable})  # fmt: skip
        return DONE
    if runs:
        show(runs)
    else:
        print(f"no runs below {shown(root)}")
    for place in unreadable:
        print(f"note: {place} has no readable manifest.json")
    for line in not_freed:
        print(f"note: {line}")
    if request.clean:
        gone = readable(sum(freed.values()))
        print(f"freed {gone}: replay and checkpoints of {several(len(freed), 'finished run')}")
    return DONE


def describe(folder: Path) -> Run:
    manifest = run_folder.read_manifest(folder, key="path")
    state = str(manifest["status"])
    if state == "running" and not run_folder.is_held(folder):
        state = "lost"
    try:
        rows = read_rows(folder / "metrics.jsonl")
        discarded = read_rows(folder / "discarded.jsonl")
    except (OSError, ValueError):
        rows, discarded, state = [], [], f"{state}, metrics.jsonl damaged"
    returns = [row["eval_return"] for row in rows if isinstance(row.get("eval_return"), float)]
    return Run(
        run=shown(folder),
        env_id=str(manifest.get("env_id", "-")),
        state=state,
        steps=rows[-1]["step"] if rows else None,
        last_return=returns[-1] if returns else None,
        best_return=max(returns, default=None),
        joules=total_joules([*rows, *discarded]),
        size_bytes=size_of(folder),
        age_s=max(time.time() - last_change(folder, manifest), 0.0),
    )


def size_of(folder: Path) -> int:
    total = 0
    for place, _, files in os.walk(folder):
        for name in files:
            with suppress(OSError):  # a run that goes on removes files
                total += Path(place, name).lstat().st_size
    return total


def last_change(folder: Path, manifest: dict[str, Any]) -> float:
    if manifest["status"] != "running":
        with suppress(KeyError, TypeError, ValueError):
            return datetime.fromisoformat(manifest["ended"]).timestamp()
    with suppress(OSError):
        return (folder / "metrics.jsonl").stat().st_mtime
    return time.time()


def clean(folders: Sequence[Path]) -> tuple[dict[Path, int], list[str]]:
    """Free finished runs: the bytes that each gave back, and why some did not."""
    freed, not_freed = {}, []
    for folder in folders:
        if not is_done(folder) or not run_folder.for_going_on(folder):
            continue
        try:
            with run_folder.lock(folder):
                if not is_done(folder):
                    continue  # resumed meanwhile
                check_policies(folder)
                if gone := run_folder.free(folder):
                    freed[folder] = gone
        except (BadRequest, OSError) as error:
            why = error.args[2] if isinstance(error, BadRequest) else error
            not_freed.append(f"{shown(folder)} keeps its replay: {why}")
    return freed, not_freed


def is_done(folder: Path) -> bool:
    with suppress(BadRequest):
        return bool(run_folder.read_manifest(folder, key="path")["status"] == "done")
    return False


def check_policies(folder: Path) -> None:
    """Refuse a run with a policy that cannot be read, as its checkpoints may have it whole."""
    if not (folder / "checkpoints").exists():
        return
    for place in (folder, folder / "best"):
        if (place / "policy.json").exists():
            read_files(place, key="path", kernel="reference")


def order(run: Run, request: RunsRequest) -> tuple[Any, ...]:
    names = {"return": "last_return", "best": "best_return", "size": "size_bytes", "age": "age_s"}
    value = getattr(run, names.get(request.sort, request.sort))
    if value is None:
        return (1, 0, run.run)
    return (0, -value if request.sort in LAST_FIRST else value, run.run)


def show(runs: Sequence[Run]) -> None:
    words = ("run", "state", "steps", "return", "best", "joules", "size", "age")
    table = Table(*(Column(word, overflow="fold") for word in words))
    for run in runs:
        measured = (run.steps, run.last_return, run.best_return, run.joules)
        table.add_row(run.run, run.state, *map(number, measured), readable(run.size_bytes),
                      age(run.age_s))  # fmt: skip
    width = None if sys.stdout.isatty() else 200  # a path that is cut cannot be copied
    Console(width=width, markup=False, emoji=False).print(table)
    print(f"{several(len(runs), 'run')}, {readable(sum(run.size_bytes for run in runs))}")


def readable(size: int) -> str:
    for power, unit in ((3, "GB"), (2, "MB"), (1, "kB")):
        if size >= 999.5 * 1000 ** (power - 1):
            return f"{size / 1000**power:.3g} {unit}"
    return f"{size} B"


def age(seconds: float) -> str:
    for (unit, name), (below, _) in pairwise([*UNITS, (0.0, "")]):
        if seconds >= unit - below / 2:  # or is rounded up to it
            return f"{seconds / unit:.0f} {name}"
    return "0 s"
