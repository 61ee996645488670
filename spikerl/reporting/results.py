"""The results of a table: scores of each row on each column, and aggregates over columns."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from spikerl.errors import BadRequest
from spikerl.files import there
from spikerl.reporting import statistics
from spikerl.reporting.cell_config import apart
from spikerl.reporting.records import Run, values
from spikerl.reporting.statistics import Array, Interval
from spikerl.reporting.table_file import (
    MOST_SEEDS,
    ROOT,
    Cell,
    Protocol,
    Published,
    Table,
    cell_of,
)

EASY = "InvertedDoublePendulum"  # a baseline that fails there makes every gain look large


@dataclass(frozen=True, eq=False)
class Seed:
    """A cell's run."""

    cell: Cell
    run: Run
    step: int | None  # up to which it, or what it was converted from, was trained; None: not known

    def score(self, metric: str) -> float | None:
        if self.cell.command == "convert":  # it has no training to take a maximum over
            return self.run.of_its_file
        return self.run.score(metric)


@dataclass(frozen=True, eq=False)
class Result:
    """A row on a column: one cell of the printed table."""

    table: Table
    row: str
    column: str
    asked: int  # steps
    seeds: tuple[Seed, ...]  # of the runs that were begun

    @cached_property
    def scored(self) -> list[Seed]:
        """The seeds that have a score in the metric of the protocol."""
        return [seed for seed in self.seeds if seed.score(self.table.protocol.metric) is not None]

    def scores(self, metric: str) -> Array:
        return values([seed.score(metric) for seed in self.seeds])

    @property
    def main(self) -> Array:
        return self.scores(self.table.protocol.metric)

    @property
    def failed(self) -> int:
        return sum(seed.run.status == "failed" for seed in self.seeds)

    @property
    def steps(self) -> tuple[int, int] | None:
        """The fewest and the most that its seeds reached."""
        reached = [seed.step for seed in self.scored if seed.step is not None]
        return (min(reached), max(reached)) if reached else None

    @property
    def partial(self) -> bool:
        return self.steps is not None and self.steps[0] < self.most

    @property
    def most(self) -> int:
        """The steps that each seed should have: those asked for, or the most that one has."""
        return max(self.asked, self.steps[1]) if self.steps else self.asked

    @property
    def published(self) -> Published | None:
        """The published values of the row, if this column is among them; else None."""
        published = self.table.rows[self.row].published
        return published if published and self.column in published.values else None

    @property
    def published_value(self) -> tuple[float, float | None] | None:
        if self.published is None:
            return None
        value, spread = self.published.values[self.column]
        return float(value), None if spread is None else float(spread)

    @property
    def comparable(self) -> bool:
        """Whether the source's value is of the same tasks and metric, as printed numbers."""
        p = self.published
        if p is None or p.figure or self.table.converts(self.row):
            return False
        ours = self.table.columns[self.column].version, self.table.protocol.metric
        return (p.version, p.metric) == ours

    @property
    def interval(self) -> Interval | None:
        """The bootstrap interval of the interquartile mean over seeds; None if it is not known."""
        return statistics.bootstrap([self.main], statistics.iqm) if len(self.main) else None

    def spent(self, name: str) -> float | None:
        """Mean over seeds of wall_s or joules; None unless all have it."""
        each = [getattr(seed.run, name) for seed in self.scored]
        return None if None in each or not each else float(np.mean(each))


@dataclass(frozen=True)
class Aggregate:
    """A row over all columns, relative to the table's baseline row."""

    row: str
    columns: int  # how many columns the following are over
    partial: bool  # some of the runs behind them have fewer steps than asked
    iqm: float | None  # of scores over the baseline's mean
    iqm_interval: Interval | None
    improvement: float | None  # probability of improvement on the baseline
    improvement_interval: Interval | None


class Results:
    """All results of a table, as its folders hold them."""

    def __init__(self, table: Table, total_steps: int, root: Path = ROOT) -> None:
        self.table, self.total_steps, self.root = table, total_steps, root
        self.left_out: list[str] = []  # runs that do not count, and why
        self.by_cell = {
            (row, column): self._read(row, column) for row in table.rows for column in table.columns
        }
        whole, asked = table.protocol.total_steps, total_steps
        if any(r.steps and r.steps[1] >= r.asked // asked * whole > r.asked for r in self.all):
            # Where some runs have the protocol's steps, more than asked, all are measured by these.
            self.total_steps = whole
            self.by_cell = {
                key: replace(r, asked=r.asked // asked * whole) for key, r in self.by_cell.items()
            }

    def _read(self, row: str, column: str) -> Result:
        first = cell_of(self.table, row, column, 0, self.root)
        times = first.times_steps if first else 1
        seeds = _seeds_beside(first.folder) if first else []
        every = (cell_of(self.table, row, column, n, self.root) for n in seeds)
        cells = [cell for cell in every if cell]
        read = tuple(seed for cell in cells if (seed := self._seed(cell)))
        return Result(self.table, row, column, times * self.total_steps, read)

    def _seed(self, cell: Cell) -> Seed | None:
        """The cell's run; None if it has not begun, cannot be read, or has other settings."""
        if not there(cell.folder / "manifest.json"):
            return None
        try:
            run = Run.read(cell.folder)
            step: int | None = run.step
            if cell.source:
                kept = there(cell.source / "manifest.json")
                step = Run.read(cell.source).step if kept else None
        except BadRequest as error:
            self.left_out.append(f"{cell.name}: {error.args[2]}")
            return None
        if others := apart(cell, run):
            self.left_out.append(f"{cell.name}: made with other settings: {', '.join(others)}")
            return None
        return Seed(cell, run, step)

    @property
    def all(self) -> list[Result]:
        return list(self.by_cell.values())

    @cached_property
    def runs(self) -> list[Run]:
        return [seed.run for result in self.all for seed in result.seeds]

    def of(self, row: str) -> list[Result]:
        return [self.by_cell[row, column] for column in self.table.columns]

    def published_gain(self, row: str, *, easy: bool = True) -> float | None:
        """APG of the row's published values over the baseline's; None if not comparable."""
        base = self.table.rows.get(self.table.baseline or "")
        ours = self.table.rows[row].published
        theirs = base.published if base else None
        columns = self._columns(easy)
        if not ours or not theirs or not all(c in ours.values for c in columns):
            return None
        kinds = [(p.version, p.metric, p.figure) for p in (ours, theirs)]
        if kinds[0] != kinds[1] or ours.figure:
            return None
        if not columns or not all(c in theirs.values for c in columns):
            return None
        pairs = [(ours.values[c][0], theirs.values[c][0]) for c in columns]
        return statistics.average_performance_gain(*zip(*pairs, strict=True))

    def _columns(self, easy: bool) -> list[str]:
        columns = self.table.columns
        return [name for name, c in columns.items() if easy or c.env != EASY]

    def partial(self, row: str, *, easy: bool = True) -> bool:
        """Whether a gain of the row rests on runs with fewer steps than asked."""
        return any(self._pair_is_partial(row, column) for column in self._columns(easy))

    def _pair_is_partial(self, row: str, column: str) -> bool:
        base = self.table.baseline or row
        return self.by_cell[row, column].partial or self.by_cell[base, column].partial

    def _baseline(self, row: str, column: str) -> Array:
        """The baseline's scores that the row's are compared with. A row of converted policies, with
        one evaluation each, is compared with that of the baseline's policies of the same seeds.
        """
        base = self.by_cell[self.table.baseline or row, column]
        if self.table.converts(row):
            made = {seed.cell.seed for seed in self.by_cell[row, column].scored}
            return values([seed.run.of_its_file for seed in base.seeds if seed.cell.seed in made])
        return base.main

    def gain(self, row: str, *, easy: bool = True) -> float | None:
        """APG of this program's runs; None unless row and baseline have every column."""
        columns = self._columns(easy)
        if self.table.baseline is None or not columns:
            return None
        ours = [self.by_cell[row, c].main for c in columns]
        theirs = [self._baseline(row, c) for c in columns]
        if not all(len(x) for x in (*ours, *theirs)):
            return None
        means = [[float(x.mean()) for x in side] for side in (ours, theirs)]
        return statistics.average_performance_gain(*means)

    def normalised(self, row: str) -> tuple[list[Array], list[Array]]:
        """Scores of the row and of the baseline over the baseline's mean, on shared columns.

        1 is the baseline, also where its returns are negative.
        """
        ours, theirs = [], []
        for column in self._shared(row):
            x, b = self.by_cell[row, column].main, self._baseline(row, column)
            scale = abs(b.mean())
            ours.append(1.0 + (x - b.mean()) / scale)
            theirs.append(1.0 + (b - b.mean()) / scale)
        return ours, theirs

    def _shared(self, row: str) -> list[str]:
        """Columns on which the row can be compared with the baseline."""

        def both(column: str) -> bool:
            b = self._baseline(row, column)
            return bool(len(self.by_cell[row, column].main) and len(b) and b.mean() != 0.0)

        return [c for c in self.table.columns if self.table.baseline and both(c)]

    @cached_property
    def aggregates(self) -> list[Aggregate]:
        return [self._aggregate(row) for row in self.table.rows if self._has_scores(row)]

    def _iqm_interval(self, row: str) -> Interval | None:
        """The interval of a row's normalised IQM; the baseline's mean is resampled, too."""
        if row == self.table.baseline:
            return statistics.bootstrap(self.normalised(row)[0], statistics.iqm)
        columns = self._shared(row)
        ours = [self.by_cell[row, column].main for column in columns]
        return statistics.relative_interval(ours, [self._baseline(row, c) for c in columns])

    def _has_scores(self, row: str) -> bool:
        return any(len(result.main) for result in self.of(row))

    def _aggregate(self, row: str) -> Aggregate:
        ours, theirs = self.normalised(row)
        improves = bool(ours) and row != self.table.baseline
        return Aggregate(
            row=row,
            columns=len(ours),
            partial=any(self._pair_is_partial(row, column) for column in self._shared(row)),
            iqm=float(statistics.iqm(np.concatenate(ours))) if ours else None,
            iqm_interval=self._iqm_interval(row) if ours else None,
            improvement=statistics.probability_of_improvement(ours, theirs) if improves else None,
            improvement_interval=(
                statistics.improvement_interval(ours, theirs) if improves else None
            ),
        )


def _seeds_beside(folder: Path) -> list[int]:
    """The seeds that have a folder, whether they were asked for or not."""
    names = [re.fullmatch(r"seed(0|[1-9]\d*)", path.name) for path in folder.parent.glob("seed*")]
    return sorted(int(name[1]) for name in names if name)


def seeds_of(asked: Any, protocol: Protocol) -> list[int]:
    """The seeds of `seeds=N`, N from the protocol's first on, or of `seeds=[...]`; for None, those
    of the protocol.
    """
    count = protocol.seeds if asked is None else asked
    if type(count) is int and (asked is None or 1 <= count <= MOST_SEEDS):
        return list(range(protocol.first_seed, protocol.first_seed + count))
    known = isinstance(asked, list) and all(type(s) is int and 0 <= s < 1 << 63 for s in asked)
    if not known or not asked or len(set(asked)) < len(asked):
        raise BadRequest("seeds", asked, "give how many, or a list of different seeds")
    return list(asked)
