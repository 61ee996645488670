"""What `spikerl bench` is doing, on standard error: a line for each part, and the rounds done."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from spikerl.output import several


class BenchProgress:
    """A bar of rounds on a terminal; elsewhere a line now and then.

    It draws between rounds only: a thread that redraws would take time from what is timed.
    """

    INTERVAL = 10.0  # seconds between lines of one part

    def __init__(self) -> None:
        self.console = Console(stderr=True, soft_wrap=True, highlight=False)
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("rounds, left"), TimeRemainingColumn(),
            console=self.console, auto_refresh=False, transient=True,
            disable=not self.console.is_terminal,
        )  # fmt: skip
        self.title, self.rounds, self.done = "", 0, 0
        self.shown = time.monotonic()

    def __enter__(self) -> BenchProgress:
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.stop()

    def part(self, title: str, rounds: int = 0) -> None:
        """Show which part begins, and its number of rounds; 0 where they cannot be counted."""
        self.title, self.rounds, self.done = title, rounds, 0
        for task in self.bar.task_ids:
            self.bar.remove_task(task)
        if rounds:
            self.bar.add_task(title, total=rounds)
        self._line(f"{title}, {several(rounds, 'round')}" if rounds else title)
        self.bar.refresh()

    def after_round(self) -> None:
        """Show how many rounds are done; the first call follows the round that is not counted."""
        if not self.bar.disable:
            self.bar.update(self.bar.task_ids[0], completed=self.done, refresh=True)
        elif time.monotonic() - self.shown > self.INTERVAL:
            self._line(f"{self.title}: {self.done} of {several(self.rounds, 'round')}")
        self.done += 1

    def _line(self, text: str) -> None:
        self.shown = time.monotonic()
        self.console.print(f"bench: {text}", markup=False, emoji=False)
