"""The signals that stop a run, and how they are handled."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from spikerl.errors import Interrupted

STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


def listened_to() -> list[signal.Signals]:
    """The signals that stop a run, without SIGHUP where nohup has it ignored."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in STOPS if not (ignored and number == signal.SIGHUP)]


def signal_name(number: int) -> str:
    """The signal's name, or its number where it has none, as between SIGRTMIN and SIGRTMAX."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


@contextmanager
def handled(
    handler: Callable[[int, FrameType | None], None], numbers: Sequence[signal.Signals]
) -> Iterator[None]:
    """Inside, `handler` receives these signals."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextmanager
def stop_signals(passed_on: Callable[[], int | None] | None = None) -> Iterator[Callable[[], int]]:
    """Yield a function that gives the first SIGTERM, SIGUSR1, SIGHUP or Ctrl-C so far, or 0.

    A Ctrl-C after another signal raises Interrupted at once. `passed_on`, given in a worker,
    returns the signal that its parent received before, or None.
    """
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        if received and number == signal.SIGINT:
            raise Interrupted
        received.append(number)

    with handled(receive, STOPS if passed_on else listened_to()):
        if passed_on and (number := passed_on()) is not None:
            received.append(number)  # before this worker listened
        yield lambda: received[0] if received else 0
