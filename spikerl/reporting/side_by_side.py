"""Any runs side by side: what sets them apart, and what each group of them reached."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

from spikerl.energy import modelled
from spikerl.errors import BadRequest
from spikerl.files import write_text
from spikerl.output import several
from spikerl.reporting import curves, numbers, operations, page, statistics, tables
from spikerl.reporting.notes import provenance
from spikerl.reporting.page import Card, Picture
from spikerl.reporting.records import METRIC_NAMES, METRICS, Run, values
from spikerl.reporting.render import against, keep, over
from spikerl.reporting.tables import Grid, Section
from spikerl.reporting.tex import grid_tex

IN_WINDOW = "in the surrogate window"
# The numbers of an epoch that are drawn over steps, with their titles.
INSIDE = {
    "train_return": "return of training episodes",
    "critic_loss": "critic loss",
    "actor_loss": "actor loss",
    "q_mean": "mean Q",
    "firing_rate": "firing rate",
    "window_fraction": IN_WINDOW,
    "env_steps_per_s": "steps/s",
    "power_w": "watts",
}
NAMED = 4  # settings in a group's name, at most
FIRST = ("algo.name", "actor.name")  # of these settings, then those that end in .name


class SideBySide:
    """Runs in groups: by the settings of `group_by`, or by all but the seed and the task."""

    def __init__(self, runs: Sequence[Run], group_by: Sequence[str] | None) -> None:
        self.runs = list(runs)
        chosen = [key for key in self.varied if key != "seed" and not self._of_the_task(key)]
        chosen.sort(key=lambda key: (key not in FIRST, not key.endswith(".name")))
        self.group_by = chosen if group_by is None else list(group_by)

    @cached_property
    def varied(self) -> list[str]:
        """The keys of configs that have several values among the runs that have them. A key that a
        run lacks does not set it apart: it is older, or has another part, whose name differs.
        """
        values: dict[str, set[str]] = {}
        for run in self.runs:
            for key, value in run.settings.items():
                values.setdefault(key, set()).add(value)
        return [key for key, several in values.items() if len(several) > 1]

    def _of_the_task(self, key: str) -> bool:
        """Whether an environment's key goes with the task: all runs of a task have one value."""
        by_task: dict[str, set[str]] = {}
        for run in self.runs:
            if key in run.settings:
                by_task.setdefault(run.env_id, set()).add(run.settings[key])
        return key.startswith("env.") and all(len(values) == 1 for values in by_task.values())

    @property
    def again(self) -> int:
        """How many runs repeat the task, seed and settings of another."""
        counted = [run for run in self.runs if run.score("max_average") is not None]
        each = {(run.env_id, *sorted(run.settings.items())) for run in counted}
        return len(counted) - len(each)

    @cached_property
    def groups(self) -> dict[str, list[Run]]:
        by_values: dict[tuple[Any, ...], list[Run]] = {}
        for run in self.runs:
            which = tuple(run.settings.get(key) for key in self.group_by)
            by_values.setdefault(which, []).append(run)
        alike: dict[str, list[tuple[Any, ...]]] = {}
        for which in by_values:
            alike.setdefault(self._name(which), []).append(which)
        named: dict[str, list[Run]] = {}
        for name, same in alike.items():
            for which in same:
                longer = ", ".join([name, *self._apart(which, same)])
                unique = longer if longer not in named else f"{longer} ({len(named) + 1})"
                named[unique] = by_values[which]
        return named

    def _name(self, which: Sequence[Any]) -> str:
        pairs = [(key, value) for key, value in zip(self.group_by, which, strict=True)]
        given = [f"{key}={value}" for key, value in pairs if value is not None]
        more = ["..."] * (len(given) > NAMED)
        return ", ".join([*given[:NAMED], *more]) or "all runs"

    def _apart(self, which: Sequence[Any], alike: Sequence[Sequence[Any]]) -> list[str]:
        """At most NAMED settings in which a group differs from others that have its name."""
        columns = zip(self.group_by, which, zip(*alike, strict=True), strict=True)
        differ = [(key, value) for key, value, values in columns if len(set(map(str, values))) > 1]
        return [f"{key}={'-' if value is None else value}" for key, value in differ[:NAMED]]

    @property
    def tasks(self) -> list[str]:
        return sorted({run.env_id for run in self.runs})

    @property
    def going_on(self) -> bool:
        return any(run.status == "running" for run in self.runs)

    def of(self, group: str, task: str) -> list[Run]:
        return [run for run in self.groups[group] if run.env_id == task]

    def returns(self, metric: str) -> Grid:
        score = METRICS[metric]
        return self._scored(lambda run: (score(run.returns), run.step) if run.step else None)

    def after(self, hours: float, across: str = "wall") -> Grid:
        return self._scored(lambda run: run.within(hours, across))

    def of_files(self) -> Grid:
        """Returns of the final policies of runs, from their files."""
        return self._grid(_file_text)

    def intervals(self) -> Grid:
        """For each group and task: the interquartile mean of maxima, and its interval."""
        return self._grid(_interval_text)

    def _scored(self, score: Callable[[Run], tuple[float, int] | None]) -> Grid:
        return self._grid(lambda runs: tables.scored_text(runs, score))

    def _grid(self, text: Callable[[Sequence[Run]], str]) -> Grid:
        lines = [["", *self.tasks]]
        for group in self.groups:
            lines.append([group, *(text(self.of(group, task)) for task in self.tasks)])
        return lines

    def settings(self, names: Sequence[str]) -> Grid:
        """The settings that differ, a line for each run."""
        lines = [["", *self.varied]]
        for name, run in zip(names, self.runs, strict=True):
            lines.append([name, *(run.settings.get(key, "-") for key in self.varied)])
        return lines


def _file_text(runs: Sequence[Run]) -> str:
    scores = values([run.of_its_file for run in runs])
    return f"{numbers.spread_of(scores)} (n={len(scores)})" if len(scores) else "-"


def _interval_text(runs: Sequence[Run]) -> str:
    scores = values([run.score("max_average") for run in runs])
    if not len(scores):
        return "-"
    interval = statistics.bootstrap([scores], statistics.iqm)
    center = numbers.rounded(float(statistics.iqm(scores)))
    if interval is None:
        return center
    digits = 0 if max(map(abs, interval)) >= 100 else 1
    return f"{center} ({numbers.interval(interval, digits)})"


def names_of(runs: Sequence[Run]) -> list[str]:
    """Names of runs: their paths below the folder that all share."""
    parts = [run.folder.absolute().parts for run in runs]
    shared = 0
    shortest = min(len(part) for part in parts) - 1
    while shared < shortest and len({part[shared] for part in parts}) == 1:
        shared += 1
    return ["/".join(part[shared:]) for part in parts]


FIELDS = ("run", "group", "env_id", "seed", "status", "steps", "max_average", "last_ten_mean",
          "of_its_file", "firing_rate", *modelled.PER_DECISION, "env_steps_per_s", "wall_s",
          "energy_j", "energy_source")  # fmt: skip


def runs_table(report: SideBySide, names: Sequence[str]) -> str:
    """table.csv: one line a run."""
    of = {id(run): group for group, runs in report.groups.items() for run in runs}
    lines = [
        [name, of[id(run)], run.env_id, run.seed, run.status, run.trained_to,
         *(run.score(metric) for metric in METRICS), run.of_its_file, run.decision("firing_rate"),
         *(run.decision(key) for key in modelled.PER_DECISION), run.last("env_steps_per_s"),
         run.wall_s, run.joules, run.energy_source]
        for name, run in zip(names, report.runs, strict=True)
    ]  # fmt: skip
    return tables.as_csv(FIELDS, lines)


def render_runs(
    report: SideBySide,
    folder: Path,
    left_out: Sequence[str],
    hours: Sequence[float] = (),
    core_hours: Sequence[float] = (),
) -> list[str]:
    """Write everything into `folder`; the names of the files."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return write_all(report, folder, left_out, hours, core_hours)
    except OSError as error:
        raise BadRequest("out", folder, f"{error.strerror}; give another folder") from None


def write_all(
    report: SideBySide,
    folder: Path,
    left_out: Sequence[str],
    hours: Sequence[float],
    core_hours: Sequence[float],
) -> list[str]:
    names = names_of(report.runs)
    sections = [
        Section(f"Return: {METRIC_NAMES[metric]}", report.returns(metric)) for metric in METRICS
    ]
    if any(run.of_its_file is not None for run in report.runs):
        sections.append(Section("Return: of the policy's file", report.of_files()))
    sections += [
        Section(f"Return after {h:g} h of {name}", report.after(h, across))
        for across, name, given in (
            ("wall", "wall time", hours),
            ("cpu", "processor time", core_hours),
        )
        for h in given
    ]
    sections.append(Section("Interquartile mean of maxima, and 95 % interval", report.intervals()))
    if len(report.runs) > 1 and report.varied:
        sections.append(Section("Settings that differ", report.settings(names)))
    pictures, written = draw(report, folder)
    title = several(len(report.runs), "run")
    notes = [f"groups are set apart by {', '.join(report.group_by) or 'nothing'}"]
    notes += operations.notes(report.runs)
    if again := report.again:
        verb = "has" if again == 1 else "have"
        has = f"warning: {again} of the runs {verb} seed and settings of another"
        notes.append(f"{has}; n counts them")
    notes += [f"left out: {line}" for line in left_out]
    made_by = provenance(report.runs)
    said: dict[str, Any] = {
        "lines": [], "sections": sections, "notes": notes, "provenance": made_by
    }  # fmt: skip
    named = [(group, run) for group, runs in report.groups.items() for run in runs]
    cards = [
        Card.of(name, i, run) for i, (name, run) in enumerate(zip(names, report.runs, strict=True))
    ]
    texts = {
        "table.md": tables.markdown(title, **said),
        "table.csv": runs_table(report, names),
        "table.tex": grid_tex(report.returns("max_average"), made_by),
        "runs.csv": tables.runs_csv(named),
        "index.html": page.page(title, **said, pictures=pictures, cards=cards),
    }
    for name, text in texts.items():
        write_text(folder / name, text)
    return [*texts, *written]


def draw(report: SideBySide, folder: Path) -> tuple[list[Picture], list[str]]:
    pictures: list[Picture] = []
    by_task = {
        task: {group: report.of(group, task) for group in report.groups} for task in report.tasks
    }
    written = over(folder, by_task, pictures)
    written += against(folder, by_task, pictures)
    layers = max(_count(run.last("layer_firing_rates")) for run in report.runs)
    keys = INSIDE | {f"layer_firing_rates.{i}": f"firing rate, layer {i}" for i in range(1, layers)}
    keys |= {
        f"layer_window_fractions.{i}": f"{IN_WINDOW}, layer {i + 1}" for i in range(layers - 1)
    }
    for task in report.tasks:
        panels = {
            title: {group: curves.lines_of(runs, key, "step")
                    for group, runs in by_task[task].items()}
            for key, title in keys.items()
        }  # fmt: skip
        name = "inside_" + quote(task, safe="")  # so that names stay different
        figure = curves.curves(panels, "step", "")
        title = f"{task}: losses, firing, speed"
        written += keep(folder, name, title, figure, pictures, kinds=("svg",))
    for path in folder.glob("inside_*.svg"):  # of tasks in an earlier report
        if path.name not in written:
            path.unlink(missing_ok=True)
    return pictures, written


def _count(values: Any) -> int:
    return len(values) if isinstance(values, list) else 0
