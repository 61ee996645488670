"""A run's record, metrics.jsonl: read, checked, and cut back to a commit."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spikerl.errors import BadRequest
from spikerl.files import parse_json, read_bytes, write_text

MAX_BYTES = 1 << 28  # of a file that is read whole; a record of 100 000 epochs has half of that


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a record that may be growing: a last line without its end is left out. ValueError
    names a line that is not a row.
    """
    if not path.exists():
        return []
    content = read_bytes(path, MAX_BYTES)
    return _rows(content[: content.rfind(b"\n") + 1], path.name)


def cut_back(folder: Path, length: int) -> list[dict[str, Any]]:
    """Cut metrics.jsonl back to the commit's `length`; return the rows beyond, which are moved to
    discarded.jsonl.
    """
    path = folder / "metrics.jsonl"
    content = read_bytes(path, MAX_BYTES)
    if len(content) < length:
        raise BadRequest("resume", folder, "its metrics.jsonl is shorter than its checkpoint says")
    beyond = content[length:].splitlines(keepends=True)
    whole = [line for line in beyond if line.endswith(b"\n") and _row(line) is not None]
    discarded = folder / "discarded.jsonl"
    before = read_bytes(discarded, MAX_BYTES) if discarded.exists() else b""
    rows = b"".join(whole)
    if not before.endswith(rows):  # else an earlier resume moved them, and was killed before it cut
        write_text(discarded, (before + rows).decode("utf-8"))
    if len(content) != length:
        with path.open("r+b") as f:
            f.truncate(length)
            os.fsync(f.fileno())
    return [row for line in whole if (row := _row(line)) is not None]


def seconds_beyond(rows: Sequence[Mapping[str, Any]], wall_s: float) -> float:
    """How much later than `wall_s` the last of these rows was written; 0 where they do not say."""
    return max([0.0, *(row["wall_s"] - wall_s for row in rows if _finite(row.get("wall_s")))])


def check_record(folder: Path, facts: Mapping[str, Any]) -> None:
    """Refuse a record that does not agree with `facts`, a checkpoint's manifest."""
    step, length, wall_s = facts["step"], facts.get("metrics_bytes"), facts.get("wall_s")
    try:
        if type(length) is not int or length < 0 or not _finite(wall_s):
            raise ValueError("its checkpoint does not say where it ends")
        path = folder / "metrics.jsonl"
        rows = _rows(read_bytes(path, MAX_BYTES)[:length], path.name)
        steps = [row["step"] for row in rows]
        if steps != sorted(set(steps)) or not all(0 < n <= step for n in steps):
            raise ValueError("its steps do not rise up to its checkpoint's")
        sound = [
            (_finite(row["eval_return"]) or row["eval_return"] is None)
            and isinstance(row["energy_source"], str)
            for row in rows
        ]
        if not all(sound):
            raise ValueError("a line lacks eval_return or energy_source")
        read_rows(folder / "discarded.jsonl")
    except (OSError, ValueError, KeyError) as error:
        raise BadRequest("resume", folder, f"its record cannot be read: {error}") from None


def _rows(content: bytes, name: str) -> list[dict[str, Any]]:
    rows = [_row(line) for line in content.splitlines()]
    if None in rows:
        raise ValueError(f"line {rows.index(None) + 1} of {name} is not a row")
    return [row for row in rows if row is not None]


def _row(line: bytes) -> dict[str, Any] | None:
    """The row that a line holds; None if it is not one, such as what a power cut leaves of it."""
    try:
        row = parse_json(line)
    except ValueError:
        return None
    step = row.get("step") if isinstance(row, dict) else None
    if not isinstance(row, dict) or type(step) is not int or not 0 <= step < 1 << 63:
        return None
    return row if row.get("energy_j") is None or _finite(row["energy_j"]) else None


def _finite(value: object) -> bool:
    return type(value) is float and math.isfinite(value)
