"""The numbers of summary.json, from a run's rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from spikerl.energy.meter import JOULES_PER_KWH, joules_to_reach, power_over, total_joules


def seconds_discarded(resumed: object) -> float:
    """Seconds that discarded rows took, by the resumes of a manifest, which may hold anything."""
    events = resumed if isinstance(resumed, list) else []
    seconds = [event.get("discarded_s") for event in events if isinstance(event, dict)]
    return math.fsum(s for s in seconds if type(s) is float and 0.0 < s < math.inf)


def summary_of(
    rows: Sequence[Mapping[str, Any]],
    discarded: Sequence[Mapping[str, Any]],
    energy_to: Mapping[str, float] | None,
) -> dict[str, Any]:
    """The summary of `rows`, those of metrics.jsonl, and of the rows of discarded work.

    Returns are of evaluations. Joules are of all rows, discarded ones too, and null where one was
    not measured; those up to a return are of the rows that led there.
    """
    returns = [row["eval_return"] for row in rows if row["eval_return"] is not None]
    last_ten = returns[-10:]
    joules, (mean, peak) = total_joules([*rows, *discarded]), power_over(rows)
    summary = {
        "evaluations": len(returns),
        "last_eval_return": returns[-1] if returns else None,
        "best_eval_return": max(returns) if returns else None,
        "last_ten_mean_eval_return": sum(last_ten) / len(last_ten) if returns else None,
        "discarded_rows": len(discarded),
        "energy_j": joules,
        "energy_kwh": None if joules is None else joules / JOULES_PER_KWH,
        "energy_discarded_j": total_joules(discarded),
        "energy_to_best_j": joules_to_reach(rows, max(returns)) if returns else None,
        "power_mean_w": mean,
        "power_peak_w": peak,
    }
    if energy_to:
        wanted = energy_to["return"]
        summary["energy_to"] = {"return": wanted, "energy_j": joules_to_reach(rows, wanted)}
    return summary
