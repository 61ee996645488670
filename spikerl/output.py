"""Standard output that exists, accepts every character, and holds only what was asked for."""

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
_results: dict[str, Any] = {}  # of the job that is running


class Unwritten(OSError):
    """Standard output could not be written to."""


class Stream(io.TextIOWrapper):
    """A stream that discards what follows once its reader is gone, so that no command fails."""

    def __init__(self, number: int, encoding: str | None = None) -> None:
        file = open(number, "wb", closefd=False)  # noqa: SIM115
        # Characters that the encoding lacks are written as escapes.
        super().__init__(file, encoding, "backslashreplace", line_buffering=os.isatty(number))

    def write(self, text: str) -> int:
        return self._try(lambda: super(Stream, self).write(text), len(text))

    def flush(self) -> None:
        self._try(super().flush, None)

    def close(self) -> None:
        """Flush only: users' code may close the stream, and the run has more to print."""
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
    """Replace the standard streams, and open closed ones, whose numbers a file would get else.

    To be called before anything is printed or opened.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # closed by our parent; open takes the lowest free number
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout = Stream(1, getattr(sys.stdout, "encoding", None))
    sys.stderr = Stream(2, getattr(sys.stderr, "encoding", None))


def finish(status: int) -> int:
    """Flush standard output; return `status`, or 1 if that was 0 and the flush failed."""
    try:
        sys.stdout.flush()
    except OSError as error:
        return unwritten(error) and (status or 1)
    return status


def unwritten(error: OSError) -> int:
    """Report that standard output could not be written to; return the exit status."""
    print(f"spikerl: standard output: {error.strerror}", file=sys.stderr)
    discard(sys.stdout)
    return 1


def discard(stream: IO[str]) -> None:
    """Discard what is written to the stream from now on, as nobody reads it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextmanager
def only_answers() -> Iterator[None]:
    """Standard output is for `answer` alone: whatever else is printed goes to standard error.

    This includes the output of C code, of processes started inside, and of the program's exit.
    """
    global _answers
    if not isinstance(sys.stdout, Stream):
        _answers = sys.stdout
    elif not isinstance(_answers, Stream):  # opened by the first job of a sweep, for all
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
    """What the command inside passes to `add_results`, for the table of a sweep."""
    global _results
    _results = {}
    yield _results


def add_results(**facts: Any) -> None:
    _results.update(facts)


def several(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def duration(seconds: float | None) -> str:
    """A length of time as a short text with one unit."""
    if seconds is None:
        return "unknown"
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def answer(data: Any) -> None:
    """Print `data` as one line of JSON to standard output."""
    stream = _answers or sys.stdout
    try:
        print(json.dumps(data, allow_nan=False), file=stream, flush=True)
    except BrokenPipeError:
        discard(stream)
