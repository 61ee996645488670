"""Records whose rows do not match their commit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from shell import refusal

from spikerl.runs.rows import check_record, seconds_beyond

ORDER = "its steps do not rise up to its checkpoint's"
LINE = "a line lacks eval_return or energy_source"


@pytest.mark.parametrize(
    ("steps", "change", "reason"),
    [
        ((1, 2), {}, None), ((1, 2), {"eval_return": None}, None),
        ((1, 1), {}, ORDER), ((2, 1), {}, ORDER), ((0, 2), {}, ORDER), ((1, 3), {}, ORDER),
        ((1, 2), {"eval_return": "x"}, LINE), ((1, 2), {"energy_source": 3}, LINE),
    ],
)  # fmt: skip
def test_lines_up_to_step_2(
    steps: tuple[int, ...], change: dict[str, Any], reason: str | None, tmp_path: Path
) -> None:
    sound = {"eval_return": 1.0, "energy_source": "none"}
    text = "".join(json.dumps({"step": n, **sound, **change}) + "\n" for n in steps)
    (tmp_path / "metrics.jsonl").write_text(text)
    facts = {"step": 2, "metrics_bytes": len(text), "wall_s": 1.0}
    if reason is None:
        check_record(tmp_path, facts)
    else:
        assert str(refusal(check_record, tmp_path, facts)).endswith(f"cannot be read: {reason}")


@pytest.mark.parametrize(
    ("rows", "seconds"),
    [
        ([], 0.0), ([{"wall_s": 12.0}, {"wall_s": 15.5}], 5.5), ([{"wall_s": 9.0}], 0.0),
        ([{}, {"wall_s": None}, {"wall_s": "20"}, {"wall_s": float("inf")}], 0.0),
    ],
)  # fmt: skip
def test_seconds_beyond_the_tenth(rows: list[dict[str, Any]], seconds: float) -> None:
    assert seconds_beyond(rows, 10.0) == seconds
