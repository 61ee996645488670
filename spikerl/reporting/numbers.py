"""Numbers as tables, pages and cards print them."""

from __future__ import annotations

from spikerl.reporting import statistics
from spikerl.reporting.statistics import Array, Interval

PM = "\N{PLUS-MINUS SIGN}"


def steps(count: int | None) -> str:
    """A number of steps in short: 30k, 1M, 1.025M."""
    if count is None:
        return "-"
    count -= count % 10 ** max(len(str(count)) - 4, 0)  # four digits, rounded down
    for unit, letter in ((1_000_000, "M"), (1_000, "k")):
        if count >= unit:
            return f"{count / unit:.4g}{letter}"
    return str(count)


def rounded(value: float | None) -> str:
    if value is None:
        return "-"
    digits = 0 if abs(value) >= 100 else 1
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0.0 else text


def spread(mean: float | None, sd: float | None) -> str:
    """Mean and standard deviation, both with the decimals that suit the larger one."""
    if mean is None:
        return "-"
    if sd is None:
        return rounded(mean)
    digits = 0 if max(abs(mean), sd) >= 100 else 1
    return f"{mean:.{digits}f} {PM} {sd:.{digits}f}"


def spread_of(scores: Array) -> str:
    """Mean and standard deviation over runs."""
    return spread(mean_of(scores), statistics.sd(scores))


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f} %"


def interval(value: Interval | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value[0]:.{digits}f} to {value[1]:.{digits}f}"


def mean_of(scores: Array) -> float | None:
    return float(scores.mean()) if len(scores) else None
