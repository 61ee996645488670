"""The notes below a table: sources, caveats, and what made its runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spikerl.reporting.numbers import PM
from spikerl.reporting.records import METRIC_NAMES, Run
from spikerl.reporting.results import Results


def differing(runs: Sequence[Run], *path: str) -> list[str]:
    """The different values at `path` in the manifests, over every start and every resume."""
    seen: dict[str, None] = {}
    for run in runs:
        for value in attempts(run):
            for key in path:
                value = value.get(key) if isinstance(value, dict) else None
            seen[str(value)] = None
    return list(seen)


def attempts(run: Run) -> list[Any]:
    """The records of its start and of each resume: the code, packages and machine of each."""
    resumed = run.manifest.get("resumed")
    events = resumed if isinstance(resumed, list) else []
    return [
        run.manifest,
        *(event for event in events if isinstance(event, dict) and "git" in event),
    ]


def provenance(runs: Sequence[Run]) -> list[str]:
    """Commits, versions and machines of these runs, and a warning where they are mixed."""
    if not runs:
        return ["no run has begun yet"]
    commits = differing(runs, "git", "commit")
    machines = [
        f"{cpu} ({', '.join(gpus)})" if gpus else str(cpu)
        for cpu, gpus in {
            (str(hw.get("cpu")), tuple(map(str, gpus if isinstance(gpus, list) else [])))
            for hw in (attempt.get("hardware") for run in runs for attempt in attempts(run))
            if isinstance(hw, dict)
            for gpus in [hw.get("gpus")]
        }
    ]
    said = [f"commits: {', '.join(commit[:12] for commit in commits)}"]
    if "True" in differing(runs, "git", "dirty"):
        said.append("warning: some ran from a checkout with changes of its own")
    packages = ("spikerl", "torch", "numpy", "gymnasium", "mujoco")
    versions = {name: differing(runs, "versions", name) for name in packages}
    said.append("versions: " + ", ".join(f"{n} {' and '.join(v)}" for n, v in versions.items()))
    said.append(f"machines: {'; '.join(sorted(machines)) or 'unknown'}")
    mixed = ["commits"] * (len(commits) > 1) + [n for n, v in versions.items() if len(v) > 1]
    mixed += ["machines"] * (len(machines) > 1)
    if mixed:
        said.append(f"warning: these results are of different {', '.join(mixed)}")
    return said


def notes(results: Results) -> list[str]:
    """What a reader must know: sources, other task versions, caveats."""
    table = results.table
    said = [
        f"{PM} is the sample standard deviation over seeds, n their number; the papers report the"
        f" {METRIC_NAMES['max_average']}"
    ]
    if table.baseline:
        said.append(
            "APG is the mean over tasks of the gain over"
            f" {table.rows[table.baseline].label}, in percent of it, on the"
            f" {METRIC_NAMES[table.protocol.metric]}; it is given where every task has a value"
        )
    for version in dict.fromkeys(r.published.version for r in table.rows.values() if r.published):
        other = sorted({c.version for c in table.columns.values()} - {version})
        if other:
            said.append(
                f"published values are of {version} tasks, those of {', '.join(other)} here are"
                " other tasks, for which no differences are given"
            )
    if converted := [row.label for name, row in table.rows.items() if table.converts(name)]:
        said.append(
            f"{'; '.join(converted)}: for every metric the one evaluation of the converted policy,"
            " over 20 episodes, compared with the baseline's of the same seeds; no differences to"
            " published values are given"
        )
    for row in table.rows.values():
        if p := row.published:
            said.append(f"{row.label}, published: {p.source}{f'; {p.note}' if p.note else ''}")
    for name, column in table.columns.items():
        seeds = [seed for row in table.rows for seed in results.by_cell[row, name].seeds]
        learned = [seed.run.manifest.get("dataset") for seed in seeds if column.dataset]
        several = len({str(one.get("sha256")) for one in learned if isinstance(one, dict)})
        if several > 1:
            said.append(f"warning: the runs of {name} learned from {several} different datasets")
    said += [f"left out: {line}" for line in results.left_out]
    return [*said, *_of_joules(results.runs), *table.caveats]


def _of_joules(runs: Sequence[Run]) -> list[str]:
    sources = [run.energy_source or "-" for run in runs if run.joules is not None]
    each = [part for source in sources for part in source.split("; then ")]
    kinds = sorted({part.partition(":/")[0] for part in each})
    said = [
        "joules are of whole devices: runs that went on side by side each count all of them, those"
        f" of epochs that a kill discarded too, which hours do not; measured by {', '.join(kinds)}"
    ] * bool(kinds)
    return said + ["warning: joules are of different devices"] * (len(kinds) > 1)
