"""Renders a table: all files of its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from spikerl.errors import BadRequest
from spikerl.files import write_atomic, write_text
from spikerl.reporting import curves, operations, page, tables
from spikerl.reporting.page import Card, Picture
from spikerl.reporting.policy_card import policy_card
from spikerl.reporting.records import Run
from spikerl.reporting.results import Results
from spikerl.reporting.table_file import ROOT, Table
from spikerl.reporting.tex import table_tex

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of each picture: its file, what its x axis is, and its title.
OVER = (
    ("curves", "step", "Return over steps"),
    ("curves_wall", "wall", "Return over wall time"),
    ("curves_joules", "joules", "Return over joules"),
)
# Of each picture: its file, the numbers whose sum is its x axis, its title, and the label of x.
AGAINST = (
    ("against_firing", ("firing_rate",), "Return against firing", "firing rate"),
    ("against_operations", ("macs", "acs"), "Return against operations", "MACs and ACs a decision"),
    ("against_45nm", ("modelled_45nm_nj",), "Return against modelled energy, arithmetic at 45 nm",
     "nJ a decision, modelled"),
    ("against_memory", ("modelled_memory_nj",), "Return against modelled energy, memory traffic",
     "nJ a decision, modelled"),
)  # fmt: skip


def missing_extra() -> str | None:
    """The remedy where pictures and pages cannot be made; None where they can."""
    lacking = [name for name in ("matplotlib", "jinja2") if find_spec(name) is None]
    if not lacking:
        return None
    verb, what = ("is", "it") if len(lacking) == 1 else ("are", "them")
    return f"{' and '.join(lacking)} {verb} missing; pip install 'spikerl[report]' brings {what}"


def render_table(table: Table, total_steps: int, root: Path = ROOT) -> list[str]:
    """Write what there is of the table so far into its folder in `root`; the names of the files."""
    folder = root / table.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return write_all(table, Results(table, total_steps, root), folder)
    except OSError as error:
        place = error.filename2 or error.filename or folder
        remedy = f"{place}: {error.strerror or error}; give another folder"
        raise BadRequest("out", root, remedy) from None


def write_all(table: Table, results: Results, folder: Path) -> list[str]:
    named = [(r.row, s.run) for r in results.all for s in r.seeds]
    said = tables.said_of(results)
    texts = {
        "table.md": tables.markdown(table.title, **said),
        "table.csv": tables.table_csv(results),
        "table.tex": table_tex(results),
        "runs.csv": tables.runs_csv(named),
    }
    pictures: list[Picture] = []
    written = list(texts)
    if missing_extra() is None:
        by_task = runs_by_task(results)
        written += over(folder, by_task, pictures)
        written += against(folder, by_task, pictures)
        scores = {table.rows[row].label: results.normalised(row)[0] for row in table.rows}
        title = "Performance profile"
        written += keep(folder, "profiles", title, curves.profiles(scores), pictures)
        said["notes"] += operations.notes(results.runs)  # its cards show modelled energies
        seeds = [(s.cell.name, s.run) for r in results.all for s in r.seeds]
        cards = [Card.of(name, i, run) for i, (name, run) in enumerate(seeds)]
        texts["index.html"] = page.page(table.title, **said, pictures=pictures, cards=cards)
        written.append("index.html")
    for name, text in texts.items():
        write_text(folder / name, text)
    for result in results.all:
        for seed in result.seeds:
            if seed.run.evaluation and seed.cell.folder.is_relative_to(folder):  # not of another
                label = table.rows[result.row].label
                write_text(seed.cell.folder / "POLICY.md", policy_card(seed.run, label))
    return written


def keep(
    folder: Path,
    name: str,
    title: str,
    figure: Figure | None,
    pictures: list[Picture],
    kinds: Sequence[str] = ("svg", "png"),
) -> list[str]:
    """Write a picture, and add it to those of the page; the names of its files.

    If there is no figure, the files of an earlier rendering are removed.
    """
    files = {kind: folder / f"{name}.{kind}" for kind in kinds}
    if figure is None:
        for path in files.values():
            path.unlink(missing_ok=True)
        return []
    drawn = {kind: curves.encoded(figure, kind) for kind in kinds}
    for kind, path in files.items():
        write_atomic(path, drawn[kind])
    pictures.append(Picture.of(title, drawn["svg"]))
    return [path.name for path in files.values()]


def over(
    folder: Path, by_task: Mapping[str, Mapping[str, Sequence[Run]]], pictures: list[Picture]
) -> list[str]:
    """Draw returns over the course of training; the names of the files."""
    written = []
    for name, across, title in OVER:
        panels = {
            task: {label: curves.lines_of(runs, "eval_return", across)
                   for label, runs in labels.items()}
            for task, labels in by_task.items()
        }  # fmt: skip
        figure = curves.curves(panels, across, "evaluation return")
        written += keep(folder, name, title, figure, pictures)
    return written


def against(
    folder: Path, by_task: Mapping[str, Mapping[str, Sequence[Run]]], pictures: list[Picture]
) -> list[str]:
    """Draw policies' returns against firing, operations and energy; the names of the files."""
    written = []
    for name, keys, title, xlabel in AGAINST:
        panels = {
            task: {label: curves.points_of(runs, keys) for label, runs in labels.items()}
            for task, labels in by_task.items()
        }
        lines = name == "against_firing"  # a dense actor has no firing rate
        figure = curves.scatter(panels, xlabel, "return", lines=lines)
        written += keep(folder, name, title, figure, pictures)
    return written


def runs_by_task(results: Results) -> dict[str, dict[str, list[Run]]]:
    table = results.table
    return {
        table.label(column): {
            row.label: [s.run for s in results.by_cell[name, column].seeds]
            for name, row in table.rows.items()
        }
        for column in table.columns
    }
