"""A table's results as table.md and table.csv, and the runs behind them as runs.csv."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from textwrap import fill
from typing import Any, NamedTuple

from spikerl.reporting import statistics
from spikerl.reporting.notes import notes, provenance
from spikerl.reporting.numbers import (
    interval,
    mean_of,
    percent,
    spread,
    spread_of,
    steps,
)
from spikerl.reporting.records import METRIC_NAMES, METRICS, Run, values
from spikerl.reporting.results import EASY, Aggregate, Result, Results

WIDTH = 100  # of prose in Markdown


def remarks(result: Result) -> list[str]:
    """What has to be printed beside a cell's number: n, steps if too few, runs that failed."""
    said = [f"n={len(result.scored)}"] if result.scored else []
    if result.partial and result.steps:
        low, high = result.steps
        reached = steps(low) if low == high else f"{steps(low)} to {steps(high)}"
        said.append(f"{reached} of {steps(result.most)} steps")
    if waiting := len(result.seeds) - len(result.scored):
        said.append(f"{waiting} without evaluation")
    if result.failed:
        said.append(f"{result.failed} failed")
    return said


def cell_text(result: Result, metric: str) -> str:
    scores, said = result.scores(metric), remarks(result)
    value = spread_of(scores)
    return f"{value} ({', '.join(said)})" if said else value


def published_label(results: Results, row: str) -> str:
    p = results.table.rows[row].published
    assert p is not None
    how = ", read off a figure" if p.figure else ""
    return f"{results.table.rows[row].label}, published ({p.version}, n={p.seeds}{how})"


Grid = list[list[str]]


class Section(NamedTuple):
    title: str
    grid: Grid


def grid(results: Results, metric: str) -> Grid:
    """The table as text, its header first; published values follow the row that they are of."""
    table = results.table
    gains = {"APG": True} if table.baseline else {}  # by title, whether EASY counts
    if gains and any(c.env == EASY for c in table.columns.values()):
        gains[f"APG without {EASY}"] = False
    lines = [["", *(table.label(column) for column in table.columns), *gains]]
    if table.aggregate:
        lines[0].append(f"{table.aggregate}, as printed")
    primary = metric == table.protocol.metric
    for name, row in table.rows.items():
        printed = [""] * bool(table.aggregate)
        if _has_place(results, name, metric):
            ours = [_gain_text(results, name, easy) if primary else "-" for easy in gains.values()]
            cells = [cell_text(result, metric) for result in results.of(name)]
            lines.append([row.label, *cells, *ours, *printed])
        if row.published and row.published.metric == metric:
            cells = [spread(*(r.published_value or (None, None))) for r in results.of(name)]
            theirs = [percent(results.published_gain(name, easy=easy)) for easy in gains.values()]
            if table.aggregate:
                given = row.published.aggregate
                printed = ["-" if given is None else f"{given:g}"]
            lines.append([published_label(results, name), *cells, *theirs, *printed])
    return lines


def _gain_text(results: Results, row: str, easy: bool) -> str:
    gain = results.gain(row, easy=easy)
    return percent(gain) + _partial(gain is not None and results.partial(row, easy=easy))


def _partial(partial: bool) -> str:
    """A mark for a number some of whose runs have fewer steps than asked."""
    return " (partial)" if partial else ""


def _has_place(results: Results, row: str, metric: str) -> bool:
    """Whether a row's own results are in the table of `metric`: in the main one if the row can be
    run, in others if it was. A metric that only published values have is left to those.
    """
    if metric not in METRICS:
        return False
    r = results.table.rows[row]
    runs = bool(r.experiment or r.same_as or r.convert)
    main = metric == results.table.protocol.metric
    return runs and (main or any(len(result.scores(metric)) for result in results.of(row)))


def aggregate_grid(results: Results) -> Grid:
    """Rows over all columns, relative to the baseline; the header alone where nothing is known."""
    head = ["", "columns", "IQM over the baseline's mean", "95 % interval",
            "P(better than the baseline)", "95 % interval"]  # fmt: skip
    lines = [head]
    for a in results.aggregates:
        if a.columns:
            columns = f"{a.columns}{_partial(a.partial)}"
            lines.append([results.table.rows[a.row].label, columns, *_aggregate_texts(a)])
    return lines


def after(results: Results, core_hours: float) -> Grid:
    """Returns after equal processor time, of the runs that took that much."""

    def text(result: Result) -> str:
        runs = [seed.run for seed in result.seeds]
        return scored_text(runs, lambda run: run.within(core_hours, "cpu"))

    return _rows_with(results, text)


def _rows_with(results: Results, text: Callable[[Result], str]) -> Grid:
    """A grid of the rows in which `text` gives a cell more than a dash."""
    table = results.table
    lines = [["", *(table.label(column) for column in table.columns)]]
    for name, row in table.rows.items():
        cells = [text(result) for result in results.of(name)]
        if any(cell != "-" for cell in cells):
            lines.append([row.label, *cells])
    return lines


def scored_text(runs: Sequence[Run], score: Callable[[Run], tuple[float, int] | None]) -> str:
    """Mean and deviation, n, and steps, of the runs that have a score and a step by `score`."""
    there = [scored for run in runs if (scored := score(run)) is not None]
    scores, said = values([s for s, _ in there]), list[str]()
    if there:
        low, high = (steps(pick(step for _, step in there)) for pick in (min, max))
        said = [f"n={len(scores)}", f"{low if low == high else f'{low} to {high}'} steps"]
    if failed := sum(run.status == "failed" for run in runs):
        said.append(f"{failed} failed")
    value = spread_of(scores)
    return f"{value} ({', '.join(said)})" if said else value


def spent_grid(results: Results) -> Grid:
    """Hours and measured joules of a run; means over seeds."""
    return _rows_with(results, lambda r: spent_text(r.spent("wall_s"), r.spent("joules")))


def spent_text(wall_s: float | None, joules: float | None) -> str:
    if wall_s is None:
        return "-"
    energy = "" if joules is None else f", {joules / 1000.0:.1f} kJ"
    return f"{wall_s / 3600.0:.2f} h{energy}"


def _aggregate_texts(a: Aggregate) -> list[str]:
    numbers = [("-" if v is None else f"{v:.2f}") for v in (a.iqm, a.improvement)]
    return [numbers[0], interval(a.iqm_interval), numbers[1], interval(a.improvement_interval)]


def sections(results: Results) -> list[Section]:
    """The sections that have a line."""
    every = [
        *(Section(f"Return: {METRIC_NAMES[m]}", grid(results, m)) for m in METRIC_NAMES),
        *(
            Section(f"Return after {hours:g} h of processor time", after(results, hours))
            for hours in results.table.protocol.core_hours
        ),
        Section("Over all columns", aggregate_grid(results)),
        Section("A run's time and measured energy", spent_grid(results)),
    ]
    return [section for section in every if len(section.grid) > 1]


def said_of(results: Results) -> dict[str, Any]:
    """The parts of table.md and of the page below the title."""
    return {
        "lines": [f"{results.table.source}. {asked(results)}"],
        "sections": sections(results),
        "notes": notes(results),
        "provenance": provenance(results.runs),
    }


def markdown(
    title: str,
    *,
    lines: Sequence[str],
    sections: Sequence[Section],
    notes: Sequence[str],
    provenance: Sequence[str],
) -> str:
    parts = [f"# {title}", *(fill(line, WIDTH) for line in lines)]
    for section in sections:
        parts += [f"## {section.title}", markdown_grid(section.grid)]
    parts += ["## Notes", bullets(notes), "## Made by", bullets(provenance)]
    return "\n\n".join(parts) + "\n"


def bullets(lines: Sequence[str]) -> str:
    wrapping: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
    return "\n".join(fill(f"- {line}", WIDTH, subsequent_indent="  ", **wrapping) for line in lines)


def asked(results: Results) -> str:
    p = results.table.protocol
    asked, whole = steps(results.total_steps), steps(p.total_steps)
    of = "" if asked == whole else f" (the protocol has {whole})"
    return f"{asked} steps{of}, evaluations of {p.eval_episodes} deterministic episodes."


def markdown_grid(lines: Grid) -> str:
    # A folder's name may hold a line break.
    shown = [[" ".join(cell.replace("|", "\\|").split()) for cell in line] for line in lines]
    head, *body = shown
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *body))


FIELDS = ("table", "row", "label", "column", "env_id", "metric", "n", "mean", "sd", "iqm",
          "iqm_low", "iqm_high", "last_ten_mean", "last_ten_sd", "steps_min", "steps_max",
          "steps_asked", "failed", "wall_s", "energy_j", "published", "published_sd",
          "published_n", "published_version", "published_metric", "published_from_figure",
          "difference")  # fmt: skip


def table_csv(results: Results) -> str:
    """A line for each cell, with its difference to the published value if that is comparable."""
    return as_csv(FIELDS, (_csv_cell(results, result) for result in results.all))


def _csv_cell(results: Results, result: Result) -> list[Any]:
    table, p = results.table, result.published
    scores, last_ten = result.main, result.scores("last_ten_mean")
    low, high = result.interval or (None, None)
    mean, value = mean_of(scores), result.published_value
    column = table.columns[result.column]
    comparable = result.comparable and not result.partial
    difference = mean - value[0] if mean is not None and value and comparable else None
    reached = result.steps or (None, None)
    return [
        table.name, result.row, table.rows[result.row].label, result.column,
        f"{column.env}-{column.version}", table.protocol.metric, len(scores), mean,
        statistics.sd(scores), float(statistics.iqm(scores)) if len(scores) else None, low, high,
        mean_of(last_ten), statistics.sd(last_ten), *reached, result.asked, result.failed,
        result.spent("wall_s"), result.spent("joules"), *(value or (None, None)),
        *((p.seeds, p.version, p.metric, p.figure) if p else (None,) * 4), difference,
    ]  # fmt: skip


LONG = ("exp_name", "env_name", "seed", "metric", "env_step", "value")


def runs_csv(named: Iterable[tuple[str, Run]]) -> str:
    """The long form that other tools exchange: a line for each evaluation of each run."""
    lines = [
        [name, run.env_id, run.seed, "eval_return", row["step"], row["eval_return"]]
        for name, run in named
        for row in run.evaluated
    ]
    return as_csv(LONG, lines)


def as_csv(head: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(lines)
    return out.getvalue()
