"""A page that is one file: tables, pictures and a card for each run, without outside references.

jinja2 is imported only here, when a page is made. It escapes what comes from run folders.
"""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from spikerl.config.yaml_file import READ, leads_out, quoted
from spikerl.output import several
from spikerl.reporting.numbers import PM, rounded, spread, steps
from spikerl.reporting.records import Run, number, values
from spikerl.reporting.tables import Grid, Section

OVERVIEW = ("run", "task", "status", "seed", "steps", "maximum", "last ten", "firing rate",
            "steps/s", "hours", "joules")  # fmt: skip


DECISION = {  # titles of a policy's numbers per decision
    "macs": "MACs a decision",
    "acs": "ACs a decision",
    "modelled_45nm_nj": "modelled nJ a decision, arithmetic at 45 nm",
    "modelled_memory_nj": "modelled nJ a decision, memory traffic",
}


class Picture(NamedTuple):
    title: str
    base64: str

    @classmethod
    def of(cls, title: str, svg: bytes) -> Picture:
        return cls(title, base64.b64encode(svg).decode("ascii"))


class Card(NamedTuple):
    """A run: what it was, what came out, and how to repeat it."""

    name: str
    anchor: str
    overview: Sequence[str]
    facts: Grid
    layers: Grid
    command: str
    config: str
    manifest: str

    @classmethod
    def of(cls, name: str, index: int, run: Run) -> Card:
        speed = number(run.last("env_steps_per_s"))
        hours = None if run.wall_s is None else run.wall_s / 3600.0
        overview = (
            run.env_id, run.status, str(run.seed), steps(run.trained_to),
            rounded(run.score("max_average")), rounded(run.score("last_ten_mean")),
            fraction(run.last("firing_rate")), rounded(speed),
            "-" if hours is None else f"{hours:.2f}", rounded(run.joules),
        )  # fmt: skip
        return cls(
            name=name,
            anchor=f"run{index}",
            overview=overview,
            facts=facts(run),
            layers=layers(run),
            command=command_of(run),
            config=yaml.safe_dump(run.config, sort_keys=False),
            manifest=json.dumps(run.manifest, indent=1),
        )


def command_of(run: Run) -> str:
    """The command that repeats a run, with the last resume that made it longer.

    For a training of a sweep, it starts from the config of that run alone.
    """
    events = [event for event in run.manifest.get("resumed") or [] if isinstance(event, dict)]
    resumed = [str(event.get("command")) for event in events]
    first = str(run.manifest.get("command"))
    # The last one says how long the run is: earlier ones may have been stopped before their end.
    last = [line for line in resumed if " total_steps=" in line][-1:]
    lengths = {word for line in last for word in line.split() if word.startswith("total_steps=")}
    command = "\n".join([first, *(last if lengths - set(first.split()) else [])])
    words = command.split()
    if "train" not in words[:2] or not {"-m", "--multirun"} & set(words):
        return command
    return shlex.join(["spikerl", "train", f"config={run.folder}/config.yaml", *confirmed(run)])


def confirmed(run: Run) -> list[str]:
    """Overrides that a config file alone is not trusted with, so they have to be typed again."""
    names, env = run.config.get("plugins"), run.config.get("env")
    kwargs = env.get("kwargs") if isinstance(env, dict) else None
    typed = [f"plugins=[{','.join(map(str, names))}]"] if isinstance(names, list) and names else []
    typed += [f"{key}={run.settings[key]}" for key in READ
              if run.settings.get(key) not in (None, "None")]  # fmt: skip
    env_id = run.settings.get("env.id", "")
    typed += [f"env.id={env_id}"] * (":" in env_id)
    paths = {k: v for k, v in kwargs.items() if leads_out(v)} if isinstance(kwargs, dict) else {}
    return typed + [f"env.kwargs.{name}={quoted(value)}" for name, value in paths.items()]


def unbroken(text: str) -> str:
    """Keep a number and its spread on one line."""
    space = "\N{NO-BREAK SPACE}"
    return text.replace(f" {PM} ", f"{space}{PM}{space}")


def fraction(value: Any) -> str:
    known = number(value)
    return "-" if known is None else f"{known:.3f}"


def significant(value: Any) -> str:
    known = number(value)
    return "-" if known is None else f"{known:.3g}" if abs(known) < 100.0 else rounded(known)


def of_a_decision(run: Run, key: str) -> float | None:
    """A number per decision: counted with the policy's file if it was, else as in the pictures."""
    return number(run.evaluation[key]) if key in run.evaluation else run.decision(key)


def facts(run: Run) -> Grid:
    """The numbers of a run's last epoch, and those of its policy's file."""
    git = run.manifest.get("git")
    commit = git.get("commit") if isinstance(git, dict) else None
    lines = [
        ["critic loss", significant(run.last("critic_loss"))],
        ["actor loss", significant(run.last("actor_loss"))],
        ["mean Q", significant(run.last("q_mean"))],
        ["updates/s", rounded(number(run.last("updates_per_s")))],
        *([title, rounded(of_a_decision(run, key))] for key, title in DECISION.items()),
        ["joules measured by", str(run.energy_source or "-")],
        ["commit", str(commit)],
        ["folder", str(run.folder)],
    ]
    if run.evaluation:
        returns = run.evaluation.get("returns")
        known = values([number(r) for r in returns] if isinstance(returns, list) else [])
        text = spread(*(number(run.evaluation.get(key)) for key in ("return_mean", "return_std")))
        lines.insert(
            0, ["return of the policy's file", f"{text} over {several(len(known), 'episode')}"]
        )
        lines.insert(1, ["its firing rate", fraction(run.evaluation.get("firing_rate"))])
    return [["", "at the end"], *lines]


def layers(run: Run) -> Grid:
    """Firing of each layer in the last evaluation; the encoder is layer 0."""
    rates = run.last("layer_firing_rates")
    if not isinstance(rates, list):
        return [[]]
    lines = [["layer", "firing rate", "in the surrogate window", "never fire", "always fire"]]
    keys = ("layer_window_fractions", "layer_silent", "layer_saturated")
    columns = [run.last(key) for key in keys]
    for i, rate in enumerate(rates):
        rest = [c[i - 1] if isinstance(c, list) and 0 < i <= len(c) else None for c in columns]
        lines.append(["encoder" if i == 0 else f"layer {i}", *map(fraction, [rate, *rest])])
    return lines


def page(
    title: str,
    *,
    lines: Sequence[str],
    sections: Sequence[Section],
    pictures: Sequence[Picture],
    notes: Sequence[str],
    provenance: Sequence[str],
    cards: Sequence[Card],
) -> str:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined)
    environment.filters["unbroken"] = unbroken
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        title=title,
        lines=lines,
        sections=sections,
        pictures=pictures,
        notes=notes,
        provenance=provenance,
        cards=cards,
        overview_head=OVERVIEW,
    )
