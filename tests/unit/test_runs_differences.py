"""Results side by side: a line names the differences of runs besides the keys that vary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from spikerl.cli.sweep import Sweep
from spikerl.runs.differences import differences


def run(
    folder: Path, *, commit: str = "a", torch: str = "2", cpu: str = "c", **config: Any
) -> Path:
    folder.mkdir(parents=True)
    manifest = {
        "git": {"commit": commit, "dirty": False},
        "versions": {"torch": torch},
        "hardware": {"cpu": cpu, "gpus": []},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    data = {"seed": 0, "algo": {"name": "td3", "tau": 0.1}, "run_dir": str(folder), **config}
    (folder / "config.yaml").write_text(yaml.safe_dump(data))
    row = {"step": 5, "eval_return": 1.0}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({**row, "step": 9}))
    (folder / "summary.json").write_text(json.dumps({"best_eval_return": 1.0}))
    return folder


APART: list[tuple[dict[str, Any], set[str] | None, str | None]] = [
    ({}, set(), None),
    ({"seed": 1}, {"seed"}, None),
    ({"seed": 1}, set(), "seed"),
    ({"seed": 1}, None, None),
    ({"commit": "b"}, {"seed"}, "git.commit"),
    ({"torch": "3", "cpu": "d"}, None, "hardware.cpu, versions.torch"),
    ({"algo": {"name": "td3", "tau": 0.2}}, {"algo"}, None),
    ({"algo": {"name": "td3", "tau": 0.2}}, {"algo.tau"}, None),
    ({"algo": {"name": "td3", "tau": 0.2}}, {"al", "algo.t"}, "algo.tau"),
    ({"algo": {"name": "sac"}}, {"seed"}, "algo.name"),
    ({"algo": {"name": "td3"}}, {"seed"}, None),  # from before algo.tau existed
]


@pytest.mark.parametrize(("changes", "varied", "odd"), APART)
def test_differences(
    changes: dict[str, Any], varied: set[str] | None, odd: str | None, tmp_path: Path
) -> None:
    runs = [run(tmp_path / "a"), run(tmp_path / "b", **changes)]
    assert differences(runs, varied) == (odd and f"note: these runs differ in {odd}")


def test_a_run_of_unknown_origin(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    line = differences([run(tmp_path / "a"), tmp_path / "b"])
    assert line is not None
    assert line.endswith(f"nothing is known of how {tmp_path / 'b'} came about")
    assert differences([]) is None


def test_a_sweep_says_it(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path / "s", ["seed"])
    jobs: list[dict[str, Any]] = [
        {"folder": str(run(tmp_path / "s" / "0")), "return": 1.0},
        {"folder": str(run(tmp_path / "s" / "1", seed=1, commit="b")), "return": 1.0},
        {"folder": str(tmp_path / "s" / "refused"), "return": None},
    ]
    assert sweep.mixed(jobs) == "note: these runs differ in git.commit"
    assert sweep.mixed(jobs[:1]) is None
    sweep.varied = {"experiment"}
    assert sweep.mixed(jobs) == "note: these runs differ in git.commit"
