"""Runs the cells of a table, several at a time; other processes may work on the same table."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping, Sequence
from types import FrameType

from spikerl.commands.reproduce.cells import (
    Job,
    claim,
    done,
    goes_on,
    naming,
    next_command,
    read,
    read_folder,
    tidy,
)
from spikerl.commands.reproduce.screen import Screen, State
from spikerl.errors import DONE, FAILED, INTERRUPTED, PREEMPTED, BadRequest, stop_status
from spikerl.reporting.table_file import Cell
from spikerl.signals import handled, listened_to

POLL = 0.2  # seconds


class Scheduler:
    """All cells that were selected, and the jobs that run them; `run` returns the exit status."""

    def __init__(
        self,
        cells: Sequence[Cell],
        total_steps: int,
        screen: Screen,
        *,
        slots: Sequence[str | None],  # one job each: a GPU's name, or None
        nice: int,
        keep: bool,  # what a done cell needs to be resumed
        plugins: Sequence[str] = (),
    ) -> None:
        self.total_steps, self.screen, self.nice, self.keep = total_steps, screen, nice, keep
        self.free = list(slots)
        self.plugins = naming(plugins)
        self.waiting = list(cells)
        self.jobs: list[Job] = []
        self.states = states_of(cells, total_steps)
        self.stopping = 0  # the last signal, 0 before one
        self.unsent: list[int] = []  # signals that the jobs have not got yet

    def run(self) -> int:
        with handled(self.stop, listened_to()):
            try:
                self.screen.open()
                while self.step():
                    time.sleep(POLL)
            finally:
                for job in self.jobs:  # also if this process ends by an error
                    job.signal(signal.SIGTERM)
                self.draw()
                self.screen.close()
        if self.stopping:
            return stop_status(self.stopping)
        words = {state.word for state in self.states.values()}
        if words & {"failed", "waiting"}:
            return FAILED
        return PREEMPTED if "stopped" in words else DONE

    def step(self) -> bool:
        """Look at every job and slot once; return whether anything is left to wait for."""
        while self.unsent:
            number = self.unsent.pop(0)
            for job in self.jobs:
                job.signal(number)
        for job in list(self.jobs):
            if (status := job.status()) is not None:
                self.ended(job, status)
        if not self.stopping:
            self.start()
        if self.screen.due:
            self.draw()
        elsewhere = any(self.states[cell].word == "elsewhere" for cell in self.waiting)
        return bool(self.jobs) or (elsewhere and not self.stopping)

    def draw(self) -> None:
        for cell, state in self.states.items():
            if state.word in ("running", "elsewhere"):
                self.states[cell] = look(cell, state.word, self.total_steps)
        slots = len(self.free) + len(self.jobs)
        self.screen.draw(self.states, left_s(self.states, slots, measured={}))

    def start(self) -> None:
        """Fill the free slots with cells that no other process has claimed."""
        for cell in list(self.waiting):
            if not self.free:
                return
            if not ready(cell, self.total_steps):
                continue
            lock = claim(cell)
            if lock is None:
                if self.states[cell].word != "elsewhere":
                    self.states[cell] = look(cell, "elsewhere", self.total_steps)
                continue
            self.waiting.remove(cell)
            job = Job(cell, lock, self.nice, self.free.pop(0))
            self.jobs.append(job)
            self.go_on(job)

    def go_on(self, job: Job) -> None:
        """Start what the job's cell needs next, or end the job."""
        cell = job.cell
        command = next_command(cell, self.total_steps)  # another may have done some of it
        if command is None:
            if not self.keep:
                tidy(cell)
            self.end(job, "done")
            return
        if self.stopping:
            self.end(job, "stopped")
            return
        resumes = command[1].startswith("resume=")
        self.states[cell] = look(cell, "running", self.total_steps)
        if command[0] != "eval":
            what = f"resumed after step {self.states[cell].step}" if resumes else "started"
            self.screen.event(f"{cell.name}: {what}")
        try:
            job.start([*command, *self.plugins])
        except OSError as error:  # the disk is full, or cannot be written to
            self.end(job, "failed", f"{error.filename}: {error.strerror}")

    def ended(self, job: Job, status: int) -> None:
        """Go on with a cell whose process has ended, if its `status` says that it succeeded."""
        if status in (PREEMPTED, INTERRUPTED) or (self.stopping and status < 0):
            self.end(job, "stopped")
            return
        try:
            if status == 0 and job.doing == "eval":
                job.keep_evaluation()
            reason = job.reason() if status else ""
        except (OSError, ValueError) as error:
            reason = str(error)
        if reason:
            self.end(job, "failed", reason)
        else:
            self.go_on(job)

    def end(self, job: Job, word: str, reason: str = "") -> None:
        """Free the job's slot and cell; print how it ended, if it started a process."""
        self.jobs.remove(job)
        self.free.append(job.device)
        state = self.states[job.cell] = look(job.cell, word, self.total_steps, reason)
        said = {
            "done": f"done, best return {state.best:.1f}" if state.best is not None else "done",
            "stopped": f"stopped after step {state.step}",
            "failed": f"failed: {reason}",
        }
        if job.process is not None:
            self.screen.event(f"{job.cell.name}: {said[word]}")
        job.close()

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Note the signal, which may come in the middle of anything; the next step passes it on."""
        self.stopping = number
        self.unsent.append(number)


def ready(cell: Cell, total_steps: int) -> bool:
    """Whether the run that the cell is converted from, if any, is done and not trained further."""
    if cell.source is None:
        return True
    if not (cell.source / "policy.json").exists():
        return False
    run = read_folder(cell.source)
    return run is not None and run.status == "done" and not goes_on(cell, total_steps)


def look(cell: Cell, word: str, total_steps: int, note: str = "") -> State:
    """The cell's state, by what is in its folder."""
    total = cell.times_steps * total_steps
    try:
        run = read(cell)
    except BadRequest:  # as may be while the folder appears
        run = None
    if run is None:
        return State(word, 0, total, None, None, note)
    return State(word, run.step, total, run.score("max_average"), run.wall_s, note)


def states_of(cells: Sequence[Cell], total_steps: int) -> dict[Cell, State]:
    words = {cell: "done" if done(cell, total_steps) else "waiting" for cell in cells}
    return {cell: look(cell, word, total_steps) for cell, word in words.items()}


def left_s(states: Mapping[Cell, State], slots: int, measured: Mapping[str, float]) -> float | None:
    """Seconds left for all cells neither done nor failed, `slots` at a time; None if unknown."""
    each = [
        cell_left_s(states, cell, measured)
        for cell, state in states.items()
        if state.word not in ("done", "failed")
    ]
    known = [seconds for seconds in each if seconds is not None]
    if len(known) < len(each):
        return None
    return max([sum(known) / slots, *known])  # a single run cannot be shared out


def cell_left_s(
    states: Mapping[Cell, State], cell: Cell, measured: Mapping[str, float]
) -> float | None:
    if cell.command == "convert":
        return 0.0  # seconds, while trainings take hours
    speed = seconds_per_step(states, cell, measured)
    state = states[cell]
    return None if speed is None else speed * max(state.total_steps - state.step, 0)


def seconds_per_step(
    states: Mapping[Cell, State], cell: Cell, measured: Mapping[str, float]
) -> float | None:
    """The speed of runs so far in the cell's row and column, else in its row; else as `measured`
    for the row; else of all runs. None if there are none.
    """
    row = {other for other in states if other.row == cell.row}
    column = {other for other in row if other.column == cell.column}
    speed = _mean_speed(states, column) or _mean_speed(states, row)
    return speed or measured.get(cell.row) or _mean_speed(states, set(states))


def _mean_speed(states: Mapping[Cell, State], cells: set[Cell]) -> float | None:
    known = [(states[c].wall_s or 0.0, states[c].step) for c in cells if states[c].wall_s]
    steps = sum(step for _, step in known)
    return sum(seconds for seconds, _ in known) / steps if steps else None
