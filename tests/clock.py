"""A clock that tests set, and a meter's window on it."""

from __future__ import annotations

from spikerl.energy.meter import Meter, Reading


class Clock:
    """Seconds that pass when a test says so."""

    now = 1001.25

    def __call__(self) -> float:
        return self.now


def window(meter: Meter, clock: Clock, seconds: float = 2.0) -> Reading:
    meter.begin("w")
    clock.now += seconds
    return meter.end("w")
