"""A plan measures the speed of rows that have no runs yet."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from shell import spikerl

from spikerl.commands.reproduce import cells
from spikerl.commands.reproduce.measure import measured_seconds_per_step
from spikerl.reporting.table_file import cell_of, read_table

# A program that records its arguments, and makes 4 steps a second in its last epoch.
PROGRAM = """
import json, pathlib, sys
args = dict(arg.split("=", 1) for arg in sys.argv[2:])
if args.get("env") == "Hopper":
    sys.exit(1)
pathlib.Path("asked").write_text(json.dumps(args))
run = pathlib.Path(args["run_dir"])
run.mkdir()
here, there = ("env_steps_per_s", "updates_per_s")[:: -1 if "dataset" in args else 1]
rows = [json.dumps({here: speed, there: None}) for speed in (900.0, 5.0, 4.0)]
(run / "metrics.jsonl").write_text("\\n".join(rows) + "\\n")
"""


@pytest.fixture(autouse=True)
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cells, "PROGRAM", [sys.executable, str(tmp_path / "program.py")])


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ("popsan_td3", ['"total_steps": "2400"', '"algo.learning_starts": "800"']),
        ("popsan_ppo", ['"total_steps": "10000"', '"steps_per_epoch": "10000"']),
    ],
)
def test_a_short_run(row: str, asked: list[str]) -> None:
    """A short run is one rollout of PPO, or an epoch before the updates and two with them."""
    cell = cell_of(read_table("popsan_algorithms"), row, "Ant", 0)
    assert cell is not None
    assert measured_seconds_per_step(cell, []) == 0.25
    text = Path("asked").read_text()
    assert all(part in text for part in [*asked, '"eval_episodes": "0"', '"threads": "1"'])
    assert ("algo.learning_starts" in text) == (row == "popsan_td3")


def test_a_short_run_on_recorded_data() -> None:
    """Offline a step is an update; there are no random steps and no learning_starts."""
    cell = cell_of(read_table("offline_own"), "td3_bc", "HalfCheetah_medium", 0)
    assert cell is not None
    assert measured_seconds_per_step(cell, ["mine"]) == 0.25
    text = Path("asked").read_text()
    assert '"total_steps": "2400"' in text
    assert '"plugins": "[mine]"' in text
    assert "learning_starts" not in text
    assert "random_steps" not in text


def test_a_plan_measures_each_row_once() -> None:
    """At 4 steps a second a run of 1000 steps takes 250 s, and 3 runs, two at a time, 375 s."""
    request = ["table=popsan_table1", "rows=popsan_td3", "columns=Ant", "seeds=3", "jobs=2"]
    said = spikerl("reproduce", *request, "total_steps=1000", "plan=true")
    assert said.out.splitlines() == [
        "popsan_table1: 3 runs, 0 done, 0 begun",
        "  popsan_td3: 3 runs, 12 min, from a short run on Ant",
        "3000 steps to go, 2 runs side by side: 6 min",
    ]
    assert said.err == "  popsan_td3: a short run on Ant ...\n"


def test_a_short_run_that_fails() -> None:
    request = ["table=popsan_table1", "rows=popsan_td3", "columns=Hopper", "seeds=1"]
    said = spikerl("reproduce", *request, "total_steps=1000", "plan=true")
    assert said.status == 0
    assert "1 run, unknown, from other rows: a short run failed" in said.out
