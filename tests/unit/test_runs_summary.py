"""The numbers of summary.json, from rows written by hand."""

from __future__ import annotations

from typing import Any

import pytest
from shell import SHORT, spikerl

from spikerl.runs.summary import seconds_discarded, summary_of


def row(eval_return: float | None, joules: float | None, watts: float | None) -> dict[str, Any]:
    return {"eval_return": eval_return, "energy_j": joules, "power_w": watts}


ROWS = [row(5.0, 100.0, 50.0), row(None, 30.0, 10.0), row(20.0, 50.0, 25.0), row(10.0, 20.0, 20.0)]


def test_a_run() -> None:
    """The rows have 200 J in 8 s; a discarded row has 16 J more."""
    assert summary_of(ROWS, [row(1.0, 16.0, 99.0)], {"return": 6.0}) == {
        "evaluations": 3,
        "last_eval_return": 10.0,
        "best_eval_return": 20.0,
        "last_ten_mean_eval_return": 35.0 / 3.0,
        "discarded_rows": 1,
        "energy_j": 216.0,
        "energy_kwh": 6e-5,
        "energy_discarded_j": 16.0,
        "energy_to_best_j": 180.0,
        "power_mean_w": 25.0,
        "power_peak_w": 50.0,
        "energy_to": {"return": 6.0, "energy_j": 180.0},
    }


def test_seconds_that_were_thrown_away() -> None:
    """Two resumes count; entries of an earlier version or a forged manifest do not."""
    odd = [{}, 7, {"discarded_s": "1"}, {"discarded_s": -3.0}, {"discarded_s": float("nan")}]
    assert seconds_discarded([{"discarded_s": 2.5}, *odd, {"discarded_s": 0.25}]) == 2.75
    assert seconds_discarded(None) == 0.0


def test_what_is_not_known_is_null() -> None:
    """null if the return was not reached, if a row before lacks joules, or if there are no rows."""
    assert summary_of(ROWS, [], {"return": 20.5})["energy_to"]["energy_j"] is None
    gap = [row(5.0, None, None), *ROWS[1:]]
    found = summary_of(gap, [], {"return": 6.0})
    assert found["energy_to"] == {"return": 6.0, "energy_j": None}
    nulls = ("energy_j", "energy_kwh", "energy_to_best_j", "power_mean_w")
    assert [found[key] for key in nulls] == [None] * 4
    empty = summary_of([], [], None)
    assert "energy_to" not in empty
    assert {v for k, v in empty.items() if k not in ("evaluations", "discarded_rows")} == {None}


@pytest.mark.parametrize("value", ["{step: 5}", "{}", "{return: nan}", "{return: 5, step: 3}"])
def test_goals_that_are_none(value: str) -> None:
    said = spikerl("train", *SHORT, f"energy_to={value}")
    assert said.line.startswith("energy_to=")
    assert said.line.endswith(": give {return: NUMBER}, or null")


def test_the_last_ten() -> None:
    """The mean of 3 to 12."""
    rows = [row(float(n), None, None) for n in range(1, 13)]
    assert summary_of(rows, [], None)["last_ten_mean_eval_return"] == 7.5
