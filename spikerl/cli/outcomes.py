"""How the jobs of a sweep ended, as its last lines show it."""

from __future__ import annotations

import os
import re
import statistics
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from spikerl.errors import DONE, FAILED, INTERRUPTED, PREEMPTED, WRONG
from spikerl.files import read_json, shown
from spikerl.runs.rows import MAX_BYTES

STOPPED = {PREEMPTED: "preempted", INTERRUPTED: "interrupted"}


def outcome_of(job: dict[str, Any]) -> dict[str, Any]:
    """The latest note of a job, with its task, its return and, if it has not succeeded, why."""
    job = job | result(job)
    if job["status"] is None:
        job["note"] = "not ended"
        job["error"] = "lost, or still running; the same command goes on with it"
    if job["status"] == FAILED and not job.get("error"):
        error, log = (Path(job["folder"]) / f"{name}.txt" for name in ("error", "log"))
        there = error.exists()
        lines = error.read_text(errors="replace").splitlines() if there else []
        said = "see its log.txt" if log.exists() else "see what it printed"
        job["error"] = lines[-1] if lines else said
    return job


def result(job: dict[str, Any]) -> dict[str, Any]:
    """The task and the return of a job, from its summary.json, or if it has none, from its note."""
    summary = Path(job["folder"]) / "summary.json"
    known = job
    if job["status"] != WRONG:
        with suppress(OSError, ValueError, TypeError):  # there is none, or it is damaged
            known = dict(read_json(summary, MAX_BYTES))
    task = known.get("env_id", "~")  # sorts after all names of tasks
    return {"task": task, "return": known.get("eval_return", known.get("best_eval_return"))}


def print_table(jobs: Sequence[dict[str, Any]], measure: str, screen: IO[str]) -> None:
    """Print a row for each job, the best first: status, return, and its folder or why it failed."""
    from rich.console import Console
    from rich.table import Column, Table

    words = ("job", "status", measure, "reason or folder")
    table = Table(*(Column(word, overflow="fold") for word in words))
    for job in sorted(jobs, key=best_first):
        reached = "-" if job["return"] is None else f"{job['return']:.1f}"
        known = {DONE: "done", WRONG: "refused", **STOPPED}
        state = job.get("note") or known.get(job["status"], f"failed ({job['status']})")
        place = shown(Path(job["folder"])) if os.path.isdir(job["folder"]) else ""
        table.add_row(job["name"], state, reached, job.get("error") or place)
    width = None if screen.isatty() else 200  # a path that is cut cannot be copied
    Console(file=screen, width=width, markup=False, emoji=False).print(table)


def best_first(job: dict[str, Any]) -> tuple[Any, ...]:
    """The sort key of a job: by task, then from the highest return down; without one it is last."""
    return job["task"], job["return"] is None, -(job["return"] or 0.0)


def over_seeds(jobs: Sequence[dict[str, Any]], measure: str) -> list[str]:
    """A line for each setting that several seeds have finished: mean and standard deviation.

    Stopped jobs are left out, as they made fewer steps; jobs of the same name count once, as a
    sweeper may choose one again.
    """
    groups: dict[str, list[float]] = {}
    for name, job in {job["name"]: job for job in jobs}.items():
        setting = [part for part in name.split(",") if not re.match(r"seed=\d+$", part)]
        known = job["status"] == DONE and job["return"] is not None
        if known and len(setting) < len(name.split(",")):
            groups.setdefault(",".join(setting), []).append(job["return"])
    return [
        f"{name or 'all'}: {measure} {statistics.mean(returns):.1f}"
        f" +- {statistics.stdev(returns):.1f} over {len(returns)} seeds"
        for name, returns in groups.items()
        if len(returns) > 1
    ]
