"""The ways a run is refused, hindered or stopped by design, and the statuses it exits with."""

import difflib
import errno
import signal
from collections.abc import Sequence

# 75 and 130: stopped on request before the end; resume goes on.
DONE, FAILED, WRONG, PREEMPTED, INTERRUPTED = 0, 1, 2, 75, 130


class BadRequest(ValueError):
    """The request was wrong: the program ends with status 2 and this line, nothing created."""

    def __init__(self, key: str, value: object, remedy: str) -> None:
        super().__init__(key, value, remedy)

    def __str__(self) -> str:
        key, value, remedy = self.args
        return f"{key}={'null' if value is None else value}: {remedy}"


class Exists(BadRequest):
    """What was to be made is there; the value is its folder or file."""


class DiskError(OSError):
    """A disk refused what all workers needed; each of them raises the same."""


class NonFinite(RuntimeError):
    """A NaN or an infinity was met and stopped before it reached the weights."""


class EnvironmentFailed(RuntimeError):
    """An environment raised, died, hung, or returned what its spaces do not say."""


class RendezvousFailed(RuntimeError):
    """The workers did not meet before their first exchange."""


class Stopped(Exception):
    """A signal ended what is begun anew when its run goes on; `number` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def stop_status(number: int) -> int:
    """How the program ends that was stopped by this signal."""
    return INTERRUPTED if number == signal.SIGINT else PREEMPTED


def first_line(error: BaseException) -> str:
    """What it says, in one line; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def with_notes(error: Exception) -> str:
    """What it says, and what was noted on its way."""
    return "; ".join([str(error) or type(error).__name__, *getattr(error, "__notes__", [])])


class Interrupted(KeyboardInterrupt):
    """A signal, such as Ctrl-C's, that ends what runs at once; a KeyboardInterrupt that is none of
    these is an environment's.
    """

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__(f"stopped on {signal.Signals(number).name}")
        self.number = number


def nearest(word: str, known: Sequence[str], of_many: str = "--help lists what there is") -> str:
    """The remedy for a name that is none of the known ones; `of_many`: too many to be listed."""
    near = difflib.get_close_matches(word, known, 3, 0.6)
    group, _, tail = word.rpartition(".")
    same = [name for name in known if name.rpartition(".")[2] == tail][:3]
    if group or not near:  # another group's may be meant
        near = same or [name for name in near if "." in name or not group]
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"known: {', '.join(known)}" if len(known) < 30 else of_many


def disk_is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


# Their message says all.
BY_DESIGN = (RendezvousFailed, DiskError, EnvironmentFailed, NonFinite, MemoryError)
