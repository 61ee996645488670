"""What a person sees while a run goes on: a live panel on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from spikerl.energy.meter import JOULES_PER_KWH, total_joules
from spikerl.output import discard


class Stage(Protocol):
    """What the view reads of a training run between epochs."""

    step: int
    updates: int
    epoch: int
    losses: dict[str, float]
    returns: list[float]


def number(value: float | None) -> str:
    """A number as a short text; a dash for what was not measured."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return str(value)
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}"


def epoch_line(row: Mapping[str, Any], total_steps: int, spent: float | None = None) -> str:
    """An epoch as a line; `spent`: joules of the run so far."""
    so_far = "" if spent is None or spent == row.get("energy_j") else f", {number(spent)} J so far"
    critics = row["critic_loss"] is not None or row["actor_loss"] is None
    loss = "critic_loss" if critics else "actor_loss"  # of algorithms without critics
    return (
        f"epoch {row['epoch']}  step {row['step']}/{total_steps}"
        f"  eval {number(row['eval_return'])} +- {number(row['eval_return_std'])}"
        f"  train {number(row['train_return'])}  {loss} {number(row[loss])}"
        f"  q {number(row['q_mean'])}  firing {number(row['firing_rate'])}"
        f"  {number(row['env_steps_per_s'])} steps/s  {row['wall_s']:.0f} s"
        f"  {energy_text(row).partition(' (')[0]}{so_far}"  # source or reason: on other lines
    )


REASON = 60  # characters of why nothing was measured


def energy_text(row: Mapping[str, Any]) -> str:
    """Joules and watts of an epoch, and what measured them; a dash and why, where there are none.

    The path of a meter that is a file is left out: the first lines of a run have it.
    """
    source = str(row.get("energy_source", "none"))
    if row.get("energy_j") is None:
        cut = source[:REASON].rpartition(" ")[0] or source[:REASON]
        return f"energy - ({source if len(source) <= REASON else f'{cut} ...'})"
    power = row.get("power_w")
    watts = f" {number(power)} W" if power else ""
    return f"energy {number(row['energy_j'])} J{watts} ({source.partition(':/')[0]})"


def spent_text(summary: Mapping[str, Any]) -> str:
    """Joules and power of a whole run."""
    said, _, source = energy_text(summary).partition(" (")
    if summary.get("energy_j") is None:
        return f"{said} ({source}"
    watts = [
        f"{number(summary[key])} W {what}"
        for key, what in (("power_mean_w", "on average"), ("power_peak_w", "in its highest epoch"),
                          ("power_idle_w", "idle before"))
        if summary.get(key) is not None
    ]  # fmt: skip
    return ", ".join([f"{said} = {number(summary['energy_kwh'])} kWh", *watts]) + f" ({source}"


def idle_line(watts: float | None) -> list[str]:
    """The line on idle power that a run prints before it begins, if that was measured."""
    return [] if watts is None else [f"idle power before the run: {number(watts)} W"]


# Below this share of voltages inside the surrogate window, a layer passes next to no gradient.
STUCK = 1e-3


def stuck_layers(row: Mapping[str, Any]) -> dict[int, str]:
    """A warning for each layer, by its number from 1 on, that hardly learns any more."""
    said = {}
    windows = row["layer_window_fractions"] or []
    for i, share in enumerate(windows):
        if share < STUCK:
            said[i + 1] = (
                f"warning: spiking layer {i + 1} of {len(windows)} hardly learns any more:"
                f" {share:.2%} of its voltages lie inside the surrogate window"
                f" ({row['layer_silent'][i]:.0%} of its neurons never fire,"
                f" {row['layer_saturated'][i]:.0%} always); docs/neurons.md says what helps"
            )
    return said


class Screen(Console):
    """A console on standard output, whose reader may go away.

    It counts as a terminal only if it is one; rich would take FORCE_COLOR for one.
    """

    def __init__(self, **settings: Any) -> None:
        drawn = sys.stdout.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
        super().__init__(force_terminal=drawn, **settings)

    def on_broken_pipe(self) -> None:  # in place of ending the program
        self.quiet = True
        discard(sys.stdout)


class View:
    """Shows one run. `progress` is cheap: it draws at most a few times a second.

    An output that cannot be written to, such as a file on a full disk, does not stop the run.
    """

    INTERVAL = 0.25  # seconds between redraws on a terminal
    PLAIN_INTERVAL = 60.0  # seconds between progress lines elsewhere

    def __init__(
        self,
        title: str,
        total_steps: int,
        first_step: int = 0,
        past: Sequence[Mapping[str, Any]] = (),
        best: float | None = None,
        console: Console | None = None,
    ) -> None:
        """`past`: rows of the run whose joules are spent already; `best`: the return of best/."""
        self.console = console or Screen(file=sys.stdout, highlight=False, soft_wrap=True)
        self.total_steps = total_steps
        self.started = self.shown = time.monotonic()
        self.first_step = first_step  # where this session began: its speed counts from there
        self.best = best
        self.rows = list(past)
        self.last: Mapping[str, Any] = {}
        self.stage: Stage | None = None
        self.title = title
        self.live: Live | None = None
        # The name of this job, where jobs of a sweep run side by side and share a screen.
        self.job = os.environ.get("SPIKERL_JOB")
        if self.console.is_terminal and not self.job:
            self.bar = Progress(
                TextColumn("step"), BarColumn(None), MofNCompleteColumn(),
                TextColumn("{task.percentage:>3.0f}%"), TimeRemainingColumn(), TextColumn("left"),
                console=self.console, expand=True, speed_estimate_period=600.0,
            )  # fmt: skip
            self.task = self.bar.add_task("", total=total_steps)
            self.live = Live(self._panel(None), console=self.console, auto_refresh=False)
            self.live.start()

    def line(self, text: str) -> None:
        """A line that stays, above the live panel."""
        with suppress(OSError):
            before = f"[{self.job}] " if self.job else ""
            self.console.print(before + text, markup=False, emoji=False)

    def epoch(self, row: Mapping[str, Any]) -> None:
        self.last = row
        self.rows.append(row)
        known = [ret for ret in (self.best, row["eval_return"]) if ret is not None]
        self.best = max(known, default=None)
        self.line(epoch_line(row, self.total_steps, self.spent))
        if self.live:  # the last picture stays on the screen
            self._draw(self.live, row["step"])

    @property
    def spent(self) -> float | None:
        """Joules of all rows so far."""
        return total_joules(self.rows)

    def progress(self, stage: Stage) -> None:
        now, self.stage = time.monotonic(), stage
        if now - self.shown < (self.INTERVAL if self.live else self.PLAIN_INTERVAL):
            return
        self.shown = now
        if self.live:
            self._draw(self.live, stage.step)
            return
        rate = (stage.step - self.first_step) / (now - self.started)
        left = (self.total_steps - stage.step) / rate if rate else float("inf")
        self.line(
            f"step {stage.step}/{self.total_steps}  {number(rate)} steps/s  {left:.0f} s left"
            f"  critic_loss {number(stage.losses.get('critic_loss'))}"
        )

    def close(self) -> None:
        if self.live:
            with suppress(OSError):
                self.live.stop()

    def _draw(self, live: Live, step: int) -> None:
        self.bar.update(self.task, completed=step)
        with suppress(OSError):
            live.update(self._panel(self.stage), refresh=True)

    def _panel(self, stage: Stage | None) -> Panel:
        grid = Table.grid(padding=(0, 3))
        losses = stage.losses if stage else {}
        newest = stage.returns[-1] if stage and stage.returns else self.last.get("train_return")
        elapsed = max(time.monotonic() - self.started, 1e-9)
        rate = (stage.step - self.first_step) / elapsed if stage else None
        rows = [
            ("eval return", self.last.get("eval_return"), "best", self.best),
            ("episode return", newest, "firing rate", self.last.get("firing_rate")),
            ("critic loss", losses.get("critic_loss"), "actor loss", losses.get("actor_loss")),
            ("steps/s", rate, "updates", stage.updates if stage else None),
            ("joules/epoch", self.last.get("energy_j"), "watts", self.last.get("power_w")),
            ("joules so far", self.spent, "kWh", self.spent and self.spent / JOULES_PER_KWH),
        ]
        for left, a, right, b in rows:
            grid.add_row(left, number(a), right, number(b))
        if self.last:
            grid.add_row("", Text(str(self.last.get("energy_source"))[:REASON], style="dim"))
        whole = Table.grid(expand=True)
        whole.add_row(self.bar)
        whole.add_row(grid)
        return Panel(whole, title=Text(self.title), title_align="left")
