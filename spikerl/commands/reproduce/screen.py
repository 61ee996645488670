"""What a person sees while a table's cells run: one screen on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from typing import NamedTuple

from rich.console import Console
from rich.live import Live
from rich.table import Column, Table

from spikerl.output import duration, several
from spikerl.reporting.numbers import rounded
from spikerl.reporting.table_file import Cell
from spikerl.runs.display import Screen as Output

# In the order in which a screen shows them.
STATES = ("running", "failed", "stopped", "elsewhere", "waiting", "done")
SHOWN = 30  # rows of a screen


class State(NamedTuple):
    """How far a cell is."""

    word: str  # of STATES
    step: int
    total_steps: int
    best: float | None  # return
    wall_s: float | None  # seconds up to that step
    note: str = ""

    @property
    def left_s(self) -> float | None:
        """Seconds left at its own speed so far; None before it has one."""
        if not self.wall_s or not self.step:
            return None
        return self.wall_s / self.step * max(self.total_steps - self.step, 0)


def summary(states: Mapping[Cell, State], left_s: float | None) -> str:
    counts = Counter(state.word for state in states.values())
    parts = [f"{counts[word]} {word}" for word in STATES if counts[word]]
    return f"{several(len(states), 'cell')}: {', '.join(parts)}; time left: {duration(left_s)}"


class Screen:
    """Shows all states now and then; `event` prints what happens once."""

    INTERVAL = 1.0
    PLAIN_INTERVAL = 60.0

    def __init__(self, title: str, console: Console | None = None) -> None:
        self.console = console or Output(file=sys.stdout, highlight=False, soft_wrap=True)
        self.title = title
        self.shown = 0.0 if self.console.is_terminal else time.monotonic()
        self.live: Live | None = None
        if self.console.is_terminal:
            self.live = Live(console=self.console, auto_refresh=False)

    def open(self) -> None:
        if self.live:
            self.live.start()

    @property
    def due(self) -> bool:
        interval = self.INTERVAL if self.live else self.PLAIN_INTERVAL
        return time.monotonic() - self.shown >= interval

    def event(self, text: str) -> None:
        with suppress(OSError):
            self.console.print(text, markup=False, emoji=False)

    def draw(self, states: Mapping[Cell, State], left_s: float | None) -> None:
        self.shown = time.monotonic()
        if self.live is None:
            self.event(summary(states, left_s))
            return
        with suppress(OSError):
            self.live.update(self.table(states, left_s), refresh=True)

    def table(self, states: Mapping[Cell, State], left_s: float | None) -> Table:
        words = ("cell", "state", "steps", "progress", "best return", "left")
        grid = Table(
            *(Column(word) for word in words),
            title=self.title,
            caption=summary(states, left_s),
            expand=True,
        )
        ordered = sorted(states.items(), key=lambda item: STATES.index(item[1].word))
        for cell, state in ordered[:SHOWN]:
            share = min(state.step / state.total_steps, 1.0)
            bar = "#" * round(20 * share)
            left = duration(state.left_s) if state.word == "running" else state.note
            shown = rounded(state.best)
            grid.add_row(cell.name, state.word, str(state.step), f"{bar:.<20}", shown, left)
        if len(ordered) > SHOWN:
            grid.add_row(f"and {len(ordered) - SHOWN} more", "", "", "", "", "")
        return grid

    def close(self) -> None:
        if self.live:
            with suppress(OSError):
                self.live.stop()
