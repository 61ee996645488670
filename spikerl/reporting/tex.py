"""A table's results as table.tex."""

from __future__ import annotations

from collections.abc import Sequence

from spikerl.reporting.notes import provenance
from spikerl.reporting.numbers import PM
from spikerl.reporting.records import METRIC_NAMES, METRICS
from spikerl.reporting.results import Results
from spikerl.reporting.tables import Grid, grid

ESCAPED = str.maketrans(
    {
        "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
        "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
        PM: r"$\pm$",
    }
)  # fmt: skip


def table_tex(results: Results) -> str:
    """The main table, and one for each metric that only published values have."""
    table = results.table
    others = [metric for metric in METRIC_NAMES if metric not in METRICS]
    written = [
        grid_tex(lines, [f"{table.title}; {table.source}; {METRIC_NAMES[metric]}"])
        for metric in (table.protocol.metric, *others)
        if len(lines := grid(results, metric)) > 1
    ]
    made_by = "".join(f"% {' '.join(line.split())}\n" for line in provenance(results.runs))
    return made_by + "\n".join(written)


def grid_tex(lines: Grid, comments: Sequence[str]) -> str:
    """A tabular between the rules of the package booktabs."""
    head, *body = lines
    columns = "l" + "r" * (len(head) - 1)
    written = [
        *(f"% {' '.join(comment.split())}" for comment in comments),
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        _tex_line(head),
        r"\midrule",
        *map(_tex_line, body),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(written) + "\n"


def _tex_line(cells: Sequence[str]) -> str:
    # The empty group is needed, or \\ would take a first cell that begins with [ or * as an option.
    return "{}" + " & ".join(cell.translate(ESCAPED) for cell in cells) + r" \\"
