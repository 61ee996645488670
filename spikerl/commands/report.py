"""`spikerl report`: any runs side by side, as tables, curves and a page."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spikerl.errors import DONE, BadRequest, nearest
from spikerl.files import absolute, shown
from spikerl.output import several
from spikerl.reporting.records import Run, run_folders
from spikerl.reporting.render import missing_extra
from spikerl.reporting.side_by_side import SideBySide, render_runs
from spikerl.schema import parse

WATCH_S = 5.0  # seconds between looks at the runs


@dataclass(kw_only=True)
class ReportRequest:
    runs: str
    group_by: Any
    hours: list[float]
    core_hours: list[float]
    out: str
    watch: bool

    def __post_init__(self) -> None:
        if isinstance(self.group_by, str):
            self.group_by = [self.group_by]
        keys = self.group_by
        if keys is not None and (not isinstance(keys, list) or not all(map(is_key, keys))):
            raise BadRequest("group_by", keys, "give keys of configs, such as [algo.name]")
        if not self.out:
            raise BadRequest("out", self.out, "give a folder")
        for key in ("hours", "core_hours"):
            if not all(0.0 < hours < math.inf for hours in getattr(self, key)):
                raise BadRequest(key, getattr(self, key), "give numbers above 0, such as [0.5,1]")


def is_key(name: object) -> bool:
    return isinstance(name, str) and bool(name)


def main(data: dict[str, Any], argv: Sequence[str]) -> int:
    """`spikerl report`: the exit status."""
    request = parse(ReportRequest, data)
    if lacking := missing_extra():
        raise BadRequest("runs", request.runs, lacking)
    while True:
        before = changed(run_folders(request.runs))
        side_by_side, left_out = read(request)
        written = render_runs(
            side_by_side, Path(request.out), left_out, request.hours, request.core_hours
        )
        runs = several(len(side_by_side.runs), "run")
        print(f"{shown(absolute(request.out))}: {runs}; {', '.join(written)}")
        for line in left_out:
            print(f"left out: {line}")
        if not request.watch or not side_by_side.going_on:
            return DONE
        while changed(run_folders(request.runs)) == before:
            time.sleep(WATCH_S)


def read(request: ReportRequest) -> tuple[SideBySide, list[str]]:
    """The runs that can be read, and why others cannot."""
    runs, left_out = [], []
    for folder in run_folders(request.runs):
        try:
            runs.append(Run.read(folder))
        except BadRequest as error:
            left_out.append(f"{folder}: {error.args[2]}")
    if not runs:
        raise BadRequest("runs", request.runs, f"no run can be read; {left_out[0]}")
    known = sorted({key for run in runs for key in run.settings})
    for key in request.group_by or []:
        if key not in known:
            remedy = nearest(key, known, "give keys of their config.yaml")
            raise BadRequest("group_by", key, f"no run has this key; {remedy}")
    return SideBySide(runs, request.group_by), left_out


def changed(folders: Sequence[Path]) -> list[tuple[str, int, int]]:
    """Times and sizes of the runs' records, which differ once a run has gone on."""
    names = ("metrics.jsonl", "manifest.json")
    paths = [folder / name for folder in folders for name in names]
    stats = [(path, path.stat()) for path in paths if path.exists()]
    return [(str(path), stat.st_mtime_ns, stat.st_size) for path, stat in stats]
