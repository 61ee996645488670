"""Learning curves and profiles as pictures; matplotlib is imported here alone, to draw them."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from spikerl.reporting import statistics
from spikerl.reporting.records import Run
from spikerl.reporting.statistics import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette for colour-blind readers, then others.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555",
           "#882255", "#117733", "#999933")  # fmt: skip
STYLES = ("-", "--", ":", "-.")  # for lines beyond the number of colours
MARKS = ("o", "s", "^", "D")  # the same for points
REPETITIONS = 2_000  # of a band's bootstrap, at each of its points
POINTS = 100  # of a curve over time or joules, whose runs share no points
ACROSS = {"step": "steps", "wall": "hours", "joules": "joules"}
WIDE, HIGH, PER_LINE = 3.4, 2.7, 5  # inches of a panel; panels in a line, at most
LETTERS, MARK = 15, 8  # letters per inch of a legend; width of a line's mark, in letters
LEGEND_LINE = 0.17  # inches of a line in a legend
SPREAD = 10.0  # ratio of the largest to the smallest x beyond which the axis is logarithmic

Line = tuple[Array, Array]  # x and y of one run
Panel = Mapping[str, Sequence[Line]]  # by label, a line for each seed
Point = tuple[float | None, float]  # x and y of one run; x is None if it has no such number


def band(lines: Sequence[Line], *, shared: bool) -> tuple[Array, Array, Array, Array]:
    """x, the mean over seeds, and both ends of its interval, NaN where only one seed is known.

    With `shared`, x are the points of all runs, and at each the mean is over the runs that reach
    it, interpolated between their own points. Else x are POINTS points up to where the first of
    the runs ends.
    """
    lines = [line for line in lines if len(line[0])]
    if not lines:
        return (np.empty(0),) * 4
    if shared:
        x = np.unique(np.concatenate([line[0] for line in lines]))
    else:
        first, last = max(line[0][0] for line in lines), min(line[0][-1] for line in lines)
        if last < first:
            return (np.empty(0),) * 4
        x = np.linspace(first, last, POINTS) if last > first else np.array([first])
    values_SE = np.full((len(lines), len(x)), math.nan)
    for row, (own, y) in zip(values_SE, lines, strict=True):
        within = (x >= own[0]) & (x <= own[-1])
        row[within] = np.interp(x[within], own, y)
    mean, low, high = (np.full(len(x), math.nan) for _ in range(3))
    there_SE = ~np.isnan(values_SE)
    for seeds in np.unique(there_SE, axis=1).T:
        at = (there_SE == seeds[:, None]).all(0)
        mean[at] = values_SE[np.ix_(seeds, at)].mean(0)
        interval = statistics.bootstrap_means(values_SE[np.ix_(seeds, at)], repetitions=REPETITIONS)
        if interval is not None:
            low[at], high[at] = interval
    return x, mean, low, high


def lines_of(runs: Sequence[Run], key: str, across: str) -> list[Line]:
    return [line for run in runs if len((line := run.curve(key, across))[0])]


def curves(panels: Mapping[str, Panel], across: str, ylabel: str) -> Figure | None:
    """A panel for each name, in it a line for each label; None where there is nothing to draw."""
    from matplotlib.ticker import EngFormatter

    panels = {name: panel for name, panel in panels.items() if any(panel.values())}
    if not panels:
        return None
    figure, axes = _grid(list(panels))
    drawn = [label for panel in panels.values() for label, lines in panel.items() if lines]
    labels = list(dict.fromkeys(drawn))
    for ax, panel in zip(axes, panels.values(), strict=True):
        for label, lines in panel.items():
            if lines:
                _draw(ax, label, _look(labels.index(label)), lines, across)
        ax.set_xlabel(ACROSS[across])
        if across != "wall":
            ax.xaxis.set_major_formatter(EngFormatter(sep=""))  # 200k
    axes[0].set_ylabel(ylabel)
    _legend(figure, axes, list(panels.values()))
    return figure


def _look(i: int) -> dict[str, Any]:
    """Colour and style of line number `i` in a picture."""
    turn, colour = divmod(i, len(COLOURS))
    return {"color": COLOURS[colour], "linestyle": STYLES[turn % len(STYLES)]}


def _draw(ax: Axes, label: str, look: dict[str, Any], lines: Sequence[Line], across: str) -> None:
    x, mean, low, high = band(lines, shared=across == "step")
    mark = "o" if len(x) == 1 else None
    ax.plot(x, mean, **look, linewidth=1.5, marker=mark, markersize=4, label=label)
    ax.fill_between(x, low, high, color=look["color"], alpha=0.2, linewidth=0.0)


def points_of(runs: Sequence[Run], keys: Sequence[str]) -> list[Point]:
    return [point for run in runs if (point := run.point(keys)) is not None]


def scatter(
    panels: Mapping[str, Mapping[str, Sequence[Point]]], xlabel: str, ylabel: str, *, lines: bool
) -> Figure | None:
    """Every run as a point, and the mean of a label's with a cross; None where there is none.

    With `lines`, a label whose runs have no x is drawn as a line at their mean y.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    panels = {
        name: {label: there or points for label, points in panel.items()
               if (there := [p for p in points if p[0] is not None]) or (points and lines)}
        for name, panel in panels.items()
    }  # fmt: skip
    panels = {
        name: panel for name, panel in panels.items()
        if any(x is not None for points in panel.values() for x, _ in points)
    }  # fmt: skip
    if not panels:
        return None
    figure, axes = _grid(list(panels))
    labels = list(dict.fromkeys(label for panel in panels.values() for label in panel))
    for ax, panel in zip(axes, panels.values(), strict=True):
        every = []
        for label, points in panel.items():
            look = _look(labels.index(label))
            colour, mark = look["color"], MARKS[STYLES.index(look["linestyle"])]
            known = np.array([point for point in points if point[0] is not None], np.float64)
            if not len(known):
                mean = float(np.mean([y for _, y in points]))
                ax.axhline(mean, color=colour, linestyle="--", label=label)
                continue
            ax.plot(*known.T, mark, color=colour, markersize=4, alpha=0.7, label=label)
            if len(known) > 1:
                ax.plot(*known.mean(0), "x", color=colour, markersize=9, markeredgewidth=2)
            every += known[:, 0].tolist()
        ax.xaxis.set_major_locator(MaxNLocator(4))  # few enough for long numbers
        if min(every) > 0.0 and max(every) > SPREAD * min(every):
            ax.set_xscale("log")
            ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.xaxis.set_major_formatter("{x:g}")
            ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_xlabel(xlabel)
    axes[0].set_ylabel(ylabel)
    _legend(figure, axes, list(panels.values()))
    return figure


def profiles(scores: Mapping[str, Sequence[Array]]) -> Figure | None:
    """The share of runs above each score, in units of the baseline's mean."""
    scores = {label: tasks for label, tasks in scores.items() if tasks}
    if not scores:
        return None
    highest = max(float(task.max()) for tasks in scores.values() for task in tasks)
    levels = np.linspace(0.0, max(highest, 1.0) * 1.05, 200)
    figure, axes = _grid(["performance profile"])
    for i, (label, tasks) in enumerate(scores.items()):
        shares = statistics.performance_profile(tasks, levels.tolist())
        axes[0].plot(levels, shares, **_look(i), linewidth=1.5, label=label)
    axes[0].set_xlabel("return over the baseline's mean")
    axes[0].set_ylabel("share of runs above")
    _legend(figure, axes)
    return figure


def _grid(titles: Sequence[str]) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    across = min(len(titles), PER_LINE)
    down = math.ceil(len(titles) / across)
    figure = Figure(figsize=(max(WIDE * across, 5.0), HIGH * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).flatten().tolist()
    for ax in axes[len(titles) :]:
        ax.remove()
    for ax, title in zip(axes, titles, strict=False):
        ax.set_title(_plain(title), fontsize=10)
        ax.grid(color="#dddddd", linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
    return figure, axes[: len(titles)]


def _plain(text: str) -> str:
    """Escape dollars, which would begin a formula."""
    return text.replace("$", r"\$")


def _legend(
    figure: Figure, axes: Sequence[Axes], panels: Sequence[Mapping[str, Sequence[Any]]] = ()
) -> None:
    """Add a legend below all axes; behind a label stands how many runs it has in a panel."""
    handles: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        shown = tuple(handles.values())
        runs = {label: {len(p[label]) for p in panels if p.get(label)} for label in handles}
        labels = tuple(f"{label}{_several(runs[label])}" for label in handles)
        letters = int(figure.get_figwidth() * LETTERS) - MARK
        labels = tuple(_plain(textwrap.fill(label, letters)) for label in labels)
        ncols = max(1, min(len(labels), letters // (max(map(len, labels)) + MARK)))
        lines = max(label.count("\n") + 1 for label in labels)
        below = math.ceil(len(labels) / ncols) * lines * LEGEND_LINE
        figure.set_figheight(figure.get_figheight() + below)
        figure.legend(shown, labels, loc="outside lower center", fontsize=8, ncols=ncols,
                      frameon=False)  # fmt: skip


def _several(counts: set[int]) -> str:
    """The numbers of runs in each panel as text, empty if there is one run in each."""
    least, most = min(counts, default=1), max(counts, default=1)
    if most == 1:
        return ""
    return f" (n={least})" if least == most else f" (n={least} to {most})"


def encoded(figure: Figure, kind: str) -> bytes:
    """The figure as `svg` or `png`; the same numbers always give the same bytes."""
    from matplotlib import rc_context

    out = io.BytesIO()
    with rc_context({"svg.hashsalt": "spikerl", "svg.fonttype": "none"}):
        metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(out, format=kind, dpi=150, metadata=metadata if kind == "svg" else None)
    figure.set_layout_engine("none")  # axes stay where they are, for the next format too
    return out.getvalue()
