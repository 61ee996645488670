"""The signals that stop a run, and who hears them."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from spikerl.errors import Interrupted

STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


def listened_to() -> list[signal.Signals]:
    """What stops a run, without the end of the terminal that nohup has it ignore."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in STOPS if not (ignored and number == signal.SIGHUP)]


def signal_name(number: int) -> str:
    """Those between SIGRTMIN and SIGRTMAX have none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


@contextmanager
def handled(
    handler: Callable[[int, FrameType | None], None], numbers: Sequence[signal.Signals]
) -> Iterator[None]:
    """Meanwhile `handler` hears these signals."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextmanager
def stop_signals(passed_on: Callable[[], int | None] | None = None) -> Iterator[Callable[[], int]]:
    """For a loop to ask: the first SIGTERM, SIGUSR1, SIGHUP or Ctrl-C so far, 0 before one.

    A second Ctrl-C ends at once. `passed_on`, of a worker: what its parent has got before.
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
