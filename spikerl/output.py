"""Standard output: one that is there, takes every character, and holds only what was asked."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import IO, Any, TypeVar

T = TypeVar("T")
_answers: IO[str] | None = None  # where `answer` writes, if not to standard output
_results: dict[str, Any] = {}  # of the job that runs


class Unwritten(OSError):
    """Standard output took no more."""


class Stream(io.TextIOWrapper):
    """A stream whose reader may go away, which ends no command and fails none."""

    def __init__(self, number: int, encoding: str | None = None) -> None:
        file = open(number, "wb", closefd=False)  # noqa: SIM115
        # What its encoding lacks is shown as its number.
        super().__init__(file, encoding, "backslashreplace", line_buffering=os.isatty(number))

    def write(self, text: str) -> int:
        return self._try(lambda: super(Stream, self).write(text), len(text))

    def flush(self) -> None:
        self._try(super().flush, None)

    def close(self) -> None:
        """Only what is left is written: users' code may close it, and the run has more to say."""
        self.flush()

    def _try(self, act: Callable[[], T], otherwise: T) -> T:
        try:
            return act()
        except BrokenPipeError:
            discard(self)
            return otherwise
        except OSError as error:
            raise Unwritten(error.errno, error.strerror) from None


def prepare() -> None:
    """Before anything is printed or opened: no file ever becomes standard output or error."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # closed by who started us; the lowest number that is free is taken
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout = Stream(1, getattr(sys.stdout, "encoding", None))
    sys.stderr = Stream(2, getattr(sys.stderr, "encoding", None))


def finish(status: int) -> int:
    """Write what is left; the exit status."""
    try:
        sys.stdout.flush()
    except OSError as error:
        return unwritten(error) and (status or 1)
    return status


def unwritten(error: OSError) -> int:
    """Say that standard output took no more; the exit status."""
    print(f"spikerl: standard output: {error.strerror}", file=sys.stderr)
    discard(sys.stdout)
    return 1


def discard(stream: IO[str]) -> None:
    """Nobody reads it any more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextmanager
def only_answers() -> Iterator[None]:
    """Standard output is for `answer` alone: whatever else is printed goes to standard error.

    So do C code, processes that are started meanwhile, and what is printed as the program exits.
    """
    global _answers
    if not isinstance(sys.stdout, Stream):
        _answers = sys.stdout
    elif not isinstance(_answers, Stream):  # which the first job of a sweep opens for all
        sys.stdout.flush()
        _answers = Stream(os.dup(1), "utf-8")
        os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        if not isinstance(_answers, Stream):
            _answers = None


@contextmanager
def results() -> Iterator[dict[str, Any]]:
    """What the command that runs inside says, for the table of a sweep."""
    global _results
    _results = {}
    yield _results


def add_results(**facts: Any) -> None:
    _results.update(facts)


def several(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def duration(seconds: float | None) -> str:
    """As short as it can be read."""
    if seconds is None:
        return "unknown"
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def answer(data: Any) -> None:
    """One JSON object, to standard output."""
    stream = _answers or sys.stdout
    try:
        print(json.dumps(data, allow_nan=False), file=stream, flush=True)
    except BrokenPipeError:
        discard(stream)
