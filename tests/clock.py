"""A clock that tests set, and a meter's reading over a window of that clock."""

from __future__ import annotations

from spikerl.energy.meter import Meter, Reading


class Clock:
    """A clock in seconds, which moves only when a test changes `now`."""

    now = 1001.25

    def __call__(self) -> float:
        return self.now


def window(meter: Meter, clock: Clock, seconds: float = 2.0) -> Reading:
    meter.begin("w")
    clock.now += seconds
    return meter.end("w")
