"""Run folders as they are read for a report, untrusted ones and runs that go on included."""

from __future__ import annotations

import glob
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from spikerl.config.yaml_file import read_config
from spikerl.energy.meter import source_of, total_joules
from spikerl.errors import BadRequest
from spikerl.files import read_json
from spikerl.reporting import statistics
from spikerl.reporting.statistics import Array
from spikerl.runs.differences import NAMES
from spikerl.runs.folder import folders_below, read_manifest
from spikerl.runs.rows import MAX_BYTES, read_rows
from spikerl.schema import dotted

METRICS = {
    "max_average": statistics.max_average,
    "last_ten_mean": statistics.last_ten_mean,
}
METRIC_NAMES = {
    "max_average": "per-seed maximum over evaluations",
    "last_ten_mean": "mean of the last ten evaluations",
    "smoothed_mean": "smoothed curve at the end of training",  # of published values alone
}


@dataclass(frozen=True, eq=False)
class Run:
    """A run folder as it was read: its config, manifest and records."""

    folder: Path
    config: dict[str, Any]
    manifest: dict[str, Any]
    rows: list[dict[str, Any]]  # of metrics.jsonl
    discarded: list[dict[str, Any]]  # rows after the checkpoints that resumes started from
    evaluation: dict[str, Any]  # of the final policy, from its file; empty where there is none

    @classmethod
    def read(cls, folder: Path, *, key: str = "runs") -> Run:
        """Read a run folder; BadRequest if it is not one, or cannot be read."""
        manifest = read_manifest(folder, key=key)
        try:
            config = read_config(folder / "config.yaml")
            rows, discarded = (
                read_rows(folder / f"{name}.jsonl") for name in ("metrics", "discarded")
            )
            evaluation = read_evaluation(folder / "evaluation.json")
        except (BadRequest, OSError, ValueError) as error:
            reason = error.args[2] if isinstance(error, BadRequest) else error
            raise BadRequest(key, folder, f"its record or config: {reason}") from None
        return cls(folder, config, manifest, rows, discarded, evaluation)

    @property
    def status(self) -> str:
        return str(self.manifest["status"])

    @property
    def env_id(self) -> str:
        return str(self.manifest.get("env_id", "unknown"))

    @property
    def seed(self) -> Any:
        return self.config.get("seed")

    @cached_property
    def evaluated(self) -> list[dict[str, Any]]:
        """The rows that have an evaluation."""
        return [row for row in self.rows if number(row.get("eval_return")) is not None]

    @property
    def returns(self) -> list[float]:
        return [float(row["eval_return"]) for row in self.evaluated]

    @property
    def step(self) -> int:
        """The step of its last evaluation; 0 before the first."""
        return int(self.evaluated[-1]["step"]) if self.evaluated else 0

    @property
    def trained_to(self) -> int | None:
        """Steps that it was trained for; None if its policy was made from another one."""
        return int(self.rows[-1]["step"]) if self.rows else None

    def score(self, metric: str) -> float | None:
        return METRICS[metric](self.returns) if self.returns else None

    @property
    def of_its_file(self) -> float | None:
        """The return of its policy's file, in one evaluation after training."""
        return number(self.evaluation.get("return_mean"))

    def within(self, hours: float, across: str = "wall") -> tuple[float, int] | None:
        """Return and step of its last evaluation in the first `hours` of "wall" or "cpu" time; None
        if it has not run that long, or had no evaluation by then.
        """
        spent = self.spent(across)
        if not spent or not spent[-1] >= hours:
            return None
        rows = [row for at, row in zip(spent, self.rows, strict=True)
                if at <= hours and number(row.get("eval_return")) is not None]  # fmt: skip
        return (float(rows[-1]["eval_return"]), int(rows[-1]["step"])) if rows else None

    def point(self, keys: Sequence[str]) -> tuple[float | None, float] | None:
        """The final policy: the sum of its `keys`, None unless all are known, and its return.

        Both are means over the last ten evaluations or, if a row lacks one of `keys`, are from the
        evaluation of the policy's file. None if there is neither.
        """
        rows = self.evaluated[-statistics.LAST :]
        if rows and all(key in row for row in rows for key in keys):
            return _mean_sum(rows, keys), statistics.last_ten_mean(self.returns)
        ret = self.of_its_file
        return None if ret is None else (_mean_sum([self.evaluation], keys), ret)

    def decision(self, key: str) -> float | None:
        """The number `key` per decision of the final policy; None if it is not known."""
        point = self.point((key,))
        return point[0] if point else None

    def last(self, key: str) -> Any:
        """The value of `key` in the last row; None where there is none."""
        return self.rows[-1].get(key) if self.rows else None

    @property
    def wall_s(self) -> float | None:
        return number(self.last("wall_s"))

    @property
    def joules(self) -> float | None:
        """Spent on all rows, discarded ones included; None unless each was measured."""
        return total_joules([*self.rows, *self.discarded])

    @property
    def energy_source(self) -> str | None:
        """What measured the joules, or why there are none."""
        return source_of([*self.rows, *self.discarded])

    @cached_property
    def settings(self) -> dict[str, str]:
        """Its config by dotted keys, without what names it or does not change its numbers."""
        own = {key: value for key, value in self.config.items() if key not in NAMES}
        return {key: str(value) for key, value in dotted(own)}

    def spent(self, across: str) -> list[float]:
        """What was spent up to each row: steps, hours ("wall", or "cpu" of processors) or "joules";
        NaN where that is not known.
        """
        key = {"step": "step", "wall": "wall_s", "cpu": "cpu_s", "joules": "energy_j"}[across]
        known = [number(row.get(key)) for row in self.rows]
        each = np.array([math.nan if value is None else value for value in known])
        if across in ("cpu", "joules"):  # a row has those of its own epoch
            each = np.cumsum(each)
        spent: list[float] = (each / 3600.0 if key.endswith("_s") else each).tolist()
        return spent

    def curve(self, key: str, across: str = "step") -> tuple[Array, Array]:
        """`key` over what was `spent`, where both are known.

        If `key` is a list, such as of numbers for each layer, `key.i` is an entry of it.
        """
        name, _, index = key.partition(".")
        points = []
        for x, row in zip(self.spent(across), self.rows, strict=True):
            y = number(_entry(row.get(name), index))
            if y is not None and math.isfinite(x):
                points.append((x, y))
        array = np.array(points, dtype=np.float64).reshape(-1, 2)
        return array[:, 0], array[:, 1]


def _mean_sum(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> float | None:
    """The sum of these keys, mean over rows; None unless each is known in each row."""
    known = values([number(row.get(key)) for row in rows for key in keys])
    return float(known.sum()) / len(rows) if len(known) == len(rows) * len(keys) else None


def _entry(value: Any, index: str) -> Any:
    if not index:
        return value
    return value[int(index)] if isinstance(value, list) and int(index) < len(value) else None


def number(value: object) -> float | None:
    """`value` as a float, if it is a finite number of JSON; else None."""
    if type(value) not in (int, float):
        return None
    assert isinstance(value, int | float)
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer beyond float64
        return None


def read_evaluation(path: Path) -> dict[str, Any]:
    """The output of `spikerl eval json=true` for the policy's file; empty if there is none."""
    try:
        evaluation = read_json(path, MAX_BYTES) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None
    if not isinstance(evaluation, dict):
        raise ValueError(f"{path.name} holds no mapping")
    return evaluation


def run_folders(pattern: str) -> list[Path]:
    """The run folders that a glob names, or that lie below the folders which it names."""
    # A sweep's folder may be named hidden_sizes=[64,64], which as a pattern means something else.
    matches = [pattern] if os.path.isdir(pattern) else glob.glob(pattern, recursive=True)
    runs = {run for one in matches if not os.path.isfile(one) for run in folders_below(one)}
    if not runs:
        raise BadRequest(
            "runs", pattern, "no run folder matches; spikerl runs lists those of outputs/"
        )
    once: dict[str, Path] = {}
    for run in sorted(runs):  # a link to a run is not another run
        once.setdefault(os.path.realpath(run), run)
    return list(once.values())


def values(numbers: Sequence[float | None]) -> Array:
    return np.array([n for n in numbers if n is not None], dtype=np.float64)
