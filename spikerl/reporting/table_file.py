"""A published table as a file, conf/table/NAME.yaml: rows, columns, protocol, published values.

Its cells are runs: a row's experiment on a column's task, once per seed. docs/reproduce.md says
what each key means.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from spikerl.config.yaml_file import group_options, option_file, read_config
from spikerl.errors import BadRequest, nearest
from spikerl.reporting.records import METRIC_NAMES, METRICS, number
from spikerl.schema import parse

ROOT = Path("outputs/reproduced")
MOST_SEEDS = 1000
NAME = r"[A-Za-z0-9][A-Za-z0-9_]*"
# Keys that a table cannot override, as its cells set them: they name a run or place it.
PLACED = ("env", "env.version", "env.id", "seed", "total_steps", "run_dir", "resume", "config",
          "init_from", "dataset", "threads", "experiment")  # fmt: skip


@dataclass(kw_only=True)
class Protocol:
    total_steps: int
    seeds: int  # how many, from first_seed on
    eval_episodes: int
    metric: str  # of METRICS
    first_seed: int = 0
    core_hours: list[float] = field(default_factory=list)  # after which returns are given too
    overrides: list[str] = field(default_factory=list)  # of every run


@dataclass(kw_only=True)
class Published:
    """Values of the source's own table; `values` are [mean, sd or null] by column."""

    source: str
    version: str  # of the tasks there
    seeds: int
    metric: str
    figure: bool = False  # read off a figure, not printed there as numbers
    note: str | None = None
    values: dict[str, Any] = field(default_factory=dict)
    aggregate: float | None = None  # as printed there, in the table's own terms


@dataclass(kw_only=True)
class Row:
    """`experiment`, `same_as` or `convert` says which runs its cells are; else it has no cells."""

    label: str
    experiment: str | None = None
    same_as: str | None = None  # TABLE/ROW: its cells are those of that row
    convert: str | None = None  # its cells are made by `spikerl convert` from those of this row
    overrides: list[str] = field(default_factory=list)
    times_steps: int = 1  # its runs have so many times the protocol's steps
    columns: list[str] | None = None  # in which it has cells; null: in all
    published: Published | None = None


@dataclass(kw_only=True)
class Column:
    env: str
    version: str
    dataset: str | None = None  # what its runs learn from, a folder of `spikerl collect`
    overrides: dict[str, list[str]] = field(default_factory=dict)  # by row


@dataclass(kw_only=True)
class _Head:
    """The keys of a table file beside `protocol`, `rows` and `columns`."""

    name: str
    title: str
    source: str
    baseline: str | None = None  # the row to which gains are relative
    aggregate: str | None = None  # what the published aggregate is called
    caveats: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class Table(_Head):
    protocol: Protocol
    rows: dict[str, Row]
    columns: dict[str, Column]

    def label(self, column: str) -> str:
        """The task's id, with the column's name where that says more."""
        c = self.columns[column]
        task = f"{c.env}-{c.version}"
        return task if column == c.env else f"{task} ({column})"

    def has(self, row: str, column: str) -> bool:
        wanted = self.rows[row].columns
        return wanted is None or column in wanted

    def owner(self, row: str) -> tuple[Table, str]:
        """The table and row that a row's cells belong to."""
        same_as = self.rows[row].same_as
        if same_as is None:
            return self, row
        table, _, other = same_as.partition("/")
        return read_table(table), other

    def converts(self, row: str) -> bool:
        """Whether the row's policies were converted: each has one evaluation, and no training."""
        owner, name = self.owner(row)
        return owner.rows[name].convert is not None


@dataclass(frozen=True)
class Cell:
    """One run of a table."""

    row: str
    column: str
    seed: int
    folder: Path
    command: str  # train or convert
    overrides: tuple[str, ...]  # of that command, without its folder and total_steps
    times_steps: int
    source: Path | None = None  # what is converted

    @property
    def name(self) -> str:
        return f"{self.row}/{self.column}/seed{self.seed}"


def cell_of(table: Table, row: str, column: str, seed: int, root: Path = ROOT) -> Cell | None:
    """One run of a table; None if the row has published values alone, or no cell in the column."""
    if not table.has(row, column):
        return None
    owner, name = table.owner(row)
    if not owner.has(name, column):
        return None
    r, c, protocol = owner.rows[name], owner.columns[column], owner.protocol
    folder = root / owner.name / name / column / f"seed{seed}"
    own = (*r.overrides, *c.overrides.get(name, []))
    if r.convert is not None:
        source = cell_of(owner, r.convert, column, seed, root)
        if source is None:
            return None
        return Cell(row, column, seed, folder, "convert", own, source.times_steps, source.folder)
    if r.experiment is None:
        return None
    overrides = (
        f"experiment={r.experiment}",
        f"env={c.env}",
        f"env.version={c.version}",
        f"eval_episodes={protocol.eval_episodes}",
        *([f"dataset={c.dataset}"] if c.dataset else []),
        *own,
        *protocol.overrides,
        f"seed={seed}",
    )
    return Cell(row, column, seed, folder, "train", overrides, r.times_steps)


@cache
def read_table(name: str) -> Table:
    """A table of conf/table by its name."""
    known = group_options("table")
    if name not in known:
        raise BadRequest("table", name, f"no such table; {nearest(name, known)}")
    return table_of(read_config(option_file("table", name)))


def table_of(data: Mapping[str, Any]) -> Table:
    """A table file's content, validated; a BadRequest names the key that is wrong."""
    parts = {key: data.get(key) for key in ("rows", "columns")}
    for key, part in parts.items():
        if not isinstance(part, Mapping) or not part:
            raise BadRequest(f"table.{key}", part, f"give at least one of the {key}, by name")
        for name in part:
            if not re.fullmatch(NAME, str(name)):
                raise BadRequest(f"table.{key}", name, "give a name of letters, digits and _")
    # Parsed apart, so that an error lists the keys that are known at the place of the wrong one.
    plain = {key: value for key, value in data.items() if key not in (*parts, "protocol")}
    whole = parse(_Head, plain, key="table")
    table = Table(
        **vars(whole),
        protocol=parse(Protocol, data.get("protocol") or {}, key="table.protocol"),
        rows={n: _row(r, f"table.rows.{n}") for n, r in data["rows"].items()},
        columns={n: parse(Column, c, key=f"table.columns.{n}") for n, c in data["columns"].items()},
    )
    check(table)
    return table


def _row(data: Any, key: str) -> Row:
    if not isinstance(data, Mapping):
        raise BadRequest(key, data, "give its keys and their values")
    row: Row = parse(Row, {k: v for k, v in data.items() if k != "published"}, key=key)
    if data.get("published") is not None:
        row.published = parse(Published, data["published"], key=f"{key}.published")
    return row


def check(table: Table) -> None:
    """Refuse what would only be noticed after hours, or make the table print what is false."""
    if not re.fullmatch(NAME, table.name):
        raise BadRequest("table.name", table.name, "give a name of letters, digits and _")
    p = table.protocol
    for name in ("total_steps", "seeds", "eval_episodes"):
        if getattr(p, name) < 1:
            raise BadRequest(f"table.protocol.{name}", getattr(p, name), "give at least 1")
    if p.seeds > MOST_SEEDS:
        raise BadRequest("table.protocol.seeds", p.seeds, f"give 1 to {MOST_SEEDS}")
    if not 0 <= p.first_seed < 1 << 62:
        raise BadRequest("table.protocol.first_seed", p.first_seed, "give 0 or more")
    if p.metric not in METRICS:
        raise BadRequest("table.protocol.metric", p.metric, f"one of {', '.join(METRICS)}")
    for hours in p.core_hours:
        if not 0.0 < hours < math.inf:
            raise BadRequest("table.protocol.core_hours", hours, "give hours above 0")
    _check_overrides("table.protocol.overrides", p.overrides)
    if table.baseline is not None and table.baseline not in table.rows:
        remedy = f"no such row; {nearest(table.baseline, list(table.rows))}"
        raise BadRequest("table.baseline", table.baseline, remedy)
    labels = [row.label for row in table.rows.values()]
    for name, row in table.rows.items():
        if labels.count(row.label) > 1:
            raise BadRequest(f"table.rows.{name}.label", row.label, "another row has it, too")
    for name, column in table.columns.items():
        _check_column(table, f"table.columns.{name}", column)
    for name, row in table.rows.items():
        _check_row(table, name, row)
    _check_overlaps(table)


def _check_overrides(key: str, overrides: Sequence[str]) -> None:
    for override in overrides:
        name, equals, _ = override.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][\w.]*", name):
            raise BadRequest(key, override, "cannot be read; write key=value")
        if name in PLACED:
            raise BadRequest(key, override, "a cell sets it; say it by experiment, env, version")


def _check_column(table: Table, key: str, column: Column) -> None:
    envs = group_options("env")
    if column.env not in envs:
        raise BadRequest(f"{key}.env", column.env, f"no such option; {nearest(column.env, envs)}")
    if not re.fullmatch(r"v\d+", column.version):
        raise BadRequest(f"{key}.version", column.version, "give a version such as v5")
    for row, overrides in column.overrides.items():
        if row not in table.rows:
            remedy = f"no such row; {nearest(row, list(table.rows))}"
            raise BadRequest(f"{key}.overrides", row, remedy)
        _check_overrides(f"{key}.overrides.{row}", overrides)


def _check_row(table: Table, name: str, row: Row) -> None:
    key = f"table.rows.{name}"
    kinds = [kind for kind in ("experiment", "same_as", "convert") if getattr(row, kind)]
    if len(kinds) > 1:
        raise BadRequest(f"{key}.{kinds[1]}", getattr(row, kinds[1]), f"it has {kinds[0]} already")
    if not kinds and row.published is None:
        raise BadRequest(f"{key}.experiment", None, "give one, or published values")
    known = group_options("experiment")
    if row.experiment is not None and row.experiment not in known:
        remedy = f"no such option; {nearest(row.experiment, known)}"
        raise BadRequest(f"{key}.experiment", row.experiment, remedy)
    _check_overrides(f"{key}.overrides", row.overrides)
    if row.times_steps < 1:
        raise BadRequest(f"{key}.times_steps", row.times_steps, "give at least 1")
    select(list(table.columns), row.columns, key=f"{key}.columns")
    if row.convert is not None:
        source = table.rows.get(row.convert)
        if source is None or source.experiment is None:
            remedy = "give a row of this table that has an experiment"
            raise BadRequest(f"{key}.convert", row.convert, remedy)
    if row.same_as is not None:
        _check_same(table, key, row)
    if row.published is not None:
        _check_published(table, f"{key}.published", row.published)


def _check_same(table: Table, key: str, own_row: Row) -> None:
    same_as = own_row.same_as or ""
    for what, plain in (("overrides", []), ("times_steps", 1)):
        if (value := getattr(own_row, what)) != plain:
            raise BadRequest(f"{key}.{what}", value, f"its cells are {same_as}; leave it out")
    name, _, row = same_as.partition("/")
    if name == table.name or name not in group_options("table"):
        remedy = f"give TABLE/ROW; {nearest(name, group_options('table'))}"
        raise BadRequest(f"{key}.same_as", same_as, remedy)
    other = read_table(name)
    if row not in other.rows or other.rows[row].same_as is not None:
        remedy = f"no such row there; {nearest(row, list(other.rows))}"
        raise BadRequest(f"{key}.same_as", same_as, remedy)
    for column, own in table.columns.items():
        there = other.columns.get(column)
        task = (own.env, own.version, own.dataset)
        if there is None or (there.env, there.version, there.dataset) != task:
            raise BadRequest(f"{key}.same_as", same_as, f"its column {column} is another")
    for what, one in (("steps", "total_steps"), ("evaluation episodes", "eval_episodes")):
        ours, theirs = getattr(table.protocol, one), getattr(other.protocol, one)
        if ours != theirs:
            remedy = f"it has {theirs} {what}, this table {ours}"
            raise BadRequest(f"{key}.same_as", same_as, remedy)


def _check_published(table: Table, key: str, published: Published) -> None:
    if not published.source.strip():
        raise BadRequest(f"{key}.source", "", "say where the values were read")
    if published.seeds < 1:
        raise BadRequest(f"{key}.seeds", published.seeds, "give at least 1")
    if published.metric not in METRIC_NAMES:
        remedy = f"one of {', '.join(METRIC_NAMES)}"
        raise BadRequest(f"{key}.metric", published.metric, remedy)
    if not published.values and published.aggregate is None:
        raise BadRequest(f"{key}.values", {}, "give [mean, sd or null] by column")
    if published.aggregate is not None and table.aggregate is None:
        raise BadRequest("table.aggregate", None, "say what the published aggregates are")
    for column, value in published.values.items():
        if column not in table.columns:
            remedy = f"no such column; {nearest(column, list(table.columns))}"
            raise BadRequest(f"{key}.values", column, remedy)
        sound = isinstance(value, list) and len(value) == 2 and number(value[0]) is not None
        if not sound or (value[1] is not None and not (number(value[1]) or -1.0) > 0.0):
            raise BadRequest(f"{key}.values.{column}", value, "give [mean, sd], or [mean, null]")


def _check_overlaps(table: Table) -> None:
    """Refuse two cells that are the same run, as they would pass for two results."""
    seen: dict[tuple[Any, ...], str] = {}
    for row, r in table.rows.items():
        if r.experiment is None and r.convert is None and r.same_as is None:
            continue
        for column, c in table.columns.items():
            if not table.has(row, column):
                continue
            overrides = frozenset((*r.overrides, *c.overrides.get(row, [])))
            task = (c.env, c.version, c.dataset)
            what = (r.experiment, r.convert, r.same_as, overrides, *task)
            if what in seen:
                remedy = f"the cell {row}/{column} is the same run as {seen[what]}"
                raise BadRequest("table.rows", row, remedy)
            seen[what] = f"{row}/{column}"


def select(names: Sequence[str], asked: Any, *, key: str) -> list[str]:
    """The rows or columns of a table that were asked for, in the table's order."""
    if asked is None:
        return list(names)
    wanted = [asked] if isinstance(asked, str) else asked
    if not isinstance(wanted, list) or not all(isinstance(name, str) for name in wanted):
        raise BadRequest(key, asked, f"give names, such as {key}=[{names[0]}]")
    for name in wanted:
        if name not in names:
            raise BadRequest(key, name, f"no such name; {nearest(name, names)}")
    if not wanted:
        raise BadRequest(key, asked, "no cell is selected")
    return [name for name in names if name in wanted]
