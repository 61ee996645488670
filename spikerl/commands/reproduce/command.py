"""`spikerl reproduce`: runs the cells of a published table that are not done, then renders it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spikerl.commands.reproduce.cells import check, shorter
from spikerl.commands.reproduce.measure import measured_seconds_per_step
from spikerl.commands.reproduce.scheduler import Scheduler, cell_left_s, left_s, ready, states_of
from spikerl.commands.reproduce.screen import Screen, State
from spikerl.config.yaml_file import group_options
from spikerl.errors import DONE, FAILED, BadRequest, Stopped, stop_status
from spikerl.files import shown
from spikerl.machine import cores
from spikerl.output import duration, several
from spikerl.reporting.cell_config import config_of
from spikerl.reporting.render import missing_extra, render_table
from spikerl.reporting.results import seeds_of
from spikerl.reporting.table_file import Cell, Table, cell_of, select, table_of
from spikerl.schema import parse

MOST = 4096  # runs at a time


@dataclass(kw_only=True)
class ReproduceRequest:
    rows: Any
    columns: Any
    seeds: Any
    total_steps: int | None
    jobs: int | None
    nice: int
    plan: bool
    render: bool
    out: str
    plugins: list[str]

    def __post_init__(self) -> None:
        for key in ("total_steps", "jobs"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise BadRequest(key, getattr(self, key), "give at least 1, or null")
        if (self.jobs or 0) > MOST:
            raise BadRequest("jobs", self.jobs, f"give 1 to {MOST}, or null")
        if not self.out:
            raise BadRequest("out", self.out, "give a folder")
        self.out = shown(Path(self.out))
        if not 0 <= self.nice <= 19:
            raise BadRequest("nice", self.nice, "give 0 to 19")
        if self.plan and self.render:
            raise BadRequest("render", True, "goes without plan; give one of them")


def main(data: dict[str, Any], argv: Sequence[str]) -> int:
    """`spikerl reproduce`: the exit status."""
    request = parse(ReproduceRequest, {k: v for k, v in data.items() if k != "table"})
    if data.get("table") is None:
        raise BadRequest("table", None, f"give one of {', '.join(group_options('table'))}")
    table = table_of(data["table"])
    check_name(table, argv)
    cells = selected(table, request)
    total_steps = request.total_steps or table.protocol.total_steps
    if request.render:
        if lacking := missing_extra():
            raise BadRequest("render", True, lacking)
        render(table, total_steps, Path(request.out))
        return DONE
    check(table, cells, total_steps)
    for note in filter(None, (shorter(cell, total_steps) for cell in cells)):
        if request.total_steps is not None:
            raise BadRequest("total_steps", total_steps, note)
        print(note, file=sys.stderr)
    slots = slots_of(request.jobs, cells)
    if request.plan:
        try:
            tell_plan(
                table, states_of(cells, total_steps), len(slots), total_steps, request.plugins
            )
        except Stopped as stopped:
            return stop_status(stopped.number)
        return DONE
    scheduler = Scheduler(
        cells,
        total_steps,
        Screen(f"{table.title} ({table.name})"),
        slots=slots,
        nice=request.nice,
        keep=total_steps < table.protocol.total_steps,
        plugins=request.plugins,
    )
    status = scheduler.run()
    tell_rest(scheduler.states)
    if status not in (DONE, FAILED):
        print("the same command goes on with what is not done")
    render(table, total_steps, Path(request.out))
    return status


def check_name(table: Table, argv: Sequence[str]) -> None:
    """Refuse a table that names another file, as a copy may: it would use the other's folder."""
    for arg in argv:
        key, _, option = arg.lstrip("+").partition("=")
        if key == "table" and (option := option.strip("'\"")) != table.name:
            raise BadRequest("table.name", table.name, f"give the name of its file, {option}")


def selected(table: Table, request: ReproduceRequest) -> list[Cell]:
    """The cells asked for, seed by seed, so that every cell of the table soon has some seeds."""
    rows = select(list(table.rows), request.rows, key="rows")
    columns = select(list(table.columns), request.columns, key="columns")
    seeds = seeds_of(request.seeds, table.protocol)
    wanted = [(row, column, seed) for seed in seeds for column in columns for row in rows]
    root = Path(request.out)
    cells = [cell for which in wanted if (cell := cell_of(table, *which, root))]
    if not cells:
        raise BadRequest("rows", request.rows, "no cell is selected: these are published values")
    return cells


def slots_of(jobs: int | None, cells: Sequence[Cell]) -> list[str | None]:
    """A slot for each run that may go on at a time: the name of its GPU, or None on processors."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    gpus = named.split(",") if named else [str(i) for i in range(count)]
    if count == 0:
        return [None] * (jobs or max(cores() // workers(cells), 1))
    return [gpus[i % count] for i in range(jobs or count)]


def workers(cells: Sequence[Cell]) -> int:
    """The most processes that one of these runs has."""
    train = [cell for cell in cells if cell.command == "train"]
    sizes = [config_of(cell)["world_size"] for cell in train]
    return max([int(size) for size in sizes if size.isdecimal()], default=1)


def tell_plan(
    table: Table,
    states: Mapping[Cell, State],
    jobs: int,
    total_steps: int,
    plugins: Sequence[str],
) -> None:
    """Print how many runs and steps are left, and about how long they take: by the speed of each
    row's runs so far, or if there are none, of a short run.
    """
    todo = {cell: state for cell, state in states.items() if state.word != "done"}
    left = sum(s.total_steps - s.step for c, s in todo.items() if c.command == "train")
    begun = sum(state.step > 0 for state in todo.values())
    runs = several(len(states), "run")
    print(f"{table.name}: {runs}, {len(states) - len(todo)} done, {begun} begun")
    measured: dict[str, float] = {}
    for row in table.rows:
        own = [cell for cell in todo if cell.row == row]
        if not own:
            continue
        note = ""
        coming = {cell.folder for cell in states}
        lacking = [c for c in own if not ready(c, total_steps) and c.source not in coming]
        if lacking:
            note = f", of which {len(lacking)} without what is converted: {lacking[0].source}"
        if own[0].command == "train" and not any(c.row == row and states[c].wall_s for c in states):
            print(f"  {row}: a short run on {own[0].column} ...", file=sys.stderr)
            if speed := measured_seconds_per_step(own[0], plugins):
                measured[row] = speed
                note = f", from a short run on {own[0].column}"
            else:
                note = ", from other rows: a short run failed"
        each = [cell_left_s(states, cell, measured) for cell in own]
        whole = None if None in each else sum(seconds or 0.0 for seconds in each)
        print(f"  {row}: {several(len(own), 'run')}, {duration(whole)}{note}", flush=True)
    whole = left_s(states, jobs, measured)
    print(f"{left} steps to go, {several(jobs, 'run')} side by side: {duration(whole)}")


def tell_rest(states: Mapping[Cell, State]) -> None:
    """Print which cells have no result, and why."""
    for cell, state in states.items():
        if state.word == "failed":
            print(f"{cell.name}: failed: {state.note}")
        if state.word == "waiting" and cell.source is not None:
            print(f"{cell.name}: not made: {cell.source} is not done")


def render(table: Table, total_steps: int, root: Path) -> None:
    written = render_table(table, total_steps, root)
    if lacking := missing_extra():
        print(f"note: no curves and no page: {lacking}")
    print(f"{root / table.name}: {', '.join(written)}")
