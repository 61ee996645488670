"""The ways a run is refused, hindered or stopped by design, and the statuses it exits with."""

import difflib
import errno
import signal
from collections.abc import Sequence

# 75 and 130: stopped on request before the end; resume goes on.
DONE, FAILED, WRONG, PREEMPTED, INTERRUPTED = 0, 1, 2, 75, 130


class BadRequest(ValueError):
    """The request was wrong: the program prints this line, creates nothing, and exits with 2."""

    def __init__(self, key: str, value: object, remedy: str) -> None:
        super().__init__(key, value, remedy)

    def __str__(self) -> str:
        key, value, remedy = self.args
        return f"{key}={'null' if value is None else value}: {remedy}"


class Exists(BadRequest):
    """What was to be made exists already; the value is its folder or file."""


class DiskError(OSError):
    """A read or write failed on one of the workers; each of them raises the same error."""


class NonFinite(RuntimeError):
    """A NaN or an infinity was met and stopped before it reached the weights."""


class EnvironmentFailed(RuntimeError):
    """An environment raised, died, hung, or returned what its spaces do not say."""


class RendezvousFailed(RuntimeError):
    """The workers did not meet before their first exchange."""


class Stopped(Exception):
    """The signal `number` stopped work that is not kept in part, such as an evaluation."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def stop_status(number: int) -> int:
    """The exit status of a program that this signal stopped."""
    return INTERRUPTED if number == signal.SIGINT else PREEMPTED


def first_line(error: BaseException) -> str:
    """The first line of the error's message, at most 300 characters, or the name of its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def with_notes(error: Exception) -> str:
    """The error's message, or the name of its class, and the notes that were added to it."""
    return "; ".join([str(error) or type(error).__name__, *getattr(error, "__notes__", [])])


class Interrupted(KeyboardInterrupt):
    """A signal, such as Ctrl-C's, that ends the work at once. A KeyboardInterrupt of any other
    class was raised by an environment.
    """

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__(f"stopped on {signal.Signals(number).name}")
        self.number = number


def nearest(word: str, known: Sequence[str], of_many: str = "--help lists what there is") -> str:
    """The remedy for a name that is not known; `of_many` is used if too many are known."""
    near = difflib.get_close_matches(word, known, 3, 0.6)
    group, _, tail = word.rpartition(".")
    same = [name for name in known if name.rpartition(".")[2] == tail][:3]
    if group or not near:  # a key of another group may be meant
        near = same or [name for name in near if "." in name or not group]
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"known: {', '.join(known)}" if len(known) < 30 else of_many


def disk_is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


# Errors whose message is all that is printed, without a traceback.
BY_DESIGN = (RendezvousFailed, DiskError, EnvironmentFailed, NonFinite, MemoryError)
