"""What `spikerl reproduce` prints before and during its runs: plans, time left, the screen."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console
from shell import spikerl
from table_runs import write_run

from spikerl.commands.reproduce.measure import finished
from spikerl.commands.reproduce.scheduler import cell_left_s, left_s
from spikerl.commands.reproduce.screen import Screen, State, summary
from spikerl.errors import Stopped
from spikerl.reporting.table_file import Cell

TABLE = ["reproduce", "table=popsan_table1"]


def state(word: str, step: int, wall_s: float | None) -> State:
    return State(word, step, 100, 5.0 if step else None, wall_s)


def test_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One run took 2 hours for 200 of its 1000 steps: 8 hours to go. The other run takes 10, and so
    do both side by side.
    """
    monkeypatch.chdir(tmp_path)
    place = Path("outputs/reproduced/popsan_table1/popsan_td3/Ant")
    folder = write_run(place / "seed0", status="preempted")
    (folder / "config.yaml").write_text("seed: 0\n")
    request = [*TABLE, "rows=popsan_td3", "columns=Ant", "seeds=2", "total_steps=1000", "jobs=2"]
    said = spikerl(*request, "plan=true")
    assert (said.status, said.err) == (0, "")
    assert said.out.splitlines() == [
        "popsan_table1: 2 runs, 0 done, 1 begun",
        "  popsan_td3: 2 runs, 18.0 h",
        "1800 steps to go, 2 runs side by side: 10.0 h",
    ]


def test_a_plan_says_what_conversions_lack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = spikerl(*TABLE, "rows=convert_5_hard", "columns=Ant", "seeds=[0]", "plan=true")
    dense = "outputs/reproduced/popsan_table1/dense_td3/Ant/seed0"
    line = f"  convert_5_hard: 1 run, 0 s, of which 1 without what is converted: {dense}"
    assert said.out.splitlines()[1] == line


def test_a_short_run_ends_with_who_asked(tmp_path: Path) -> None:
    """A plan that is stopped ends the training that it started."""
    main, place = threading.main_thread().ident, tmp_path / "pid"
    assert main
    sleeps = f"import os, time; open({str(place)!r}, 'w').write(str(os.getpid())); time.sleep(60)"

    def stop() -> None:
        while not (place.exists() and place.read_text()):
            time.sleep(0.01)
        signal.pthread_kill(main, signal.SIGTERM)

    threading.Thread(target=stop).start()
    with pytest.raises(Stopped):
        finished([sys.executable, "-c", sleeps])
    with pytest.raises(ProcessLookupError):
        os.kill(int(place.read_text()), 0)


def test_a_screen() -> None:
    out = io.StringIO()
    screen = Screen("a table", Console(file=out, force_terminal=True, width=120))
    screen.open()
    named = {
        Cell("row", "column", 0, Path("a"), "train", (), 1): state("done", 100, 50.0),
        Cell("row", "column", 1, Path("b"), "train", (), 1): state("running", 50, 30.0),
        Cell("other", "column", 0, Path("c"), "train", (), 1): state("failed", 0, None),
    }
    assert screen.due
    screen.draw(named, left_s(named, 2, {}))
    screen.close()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert "row/column/seed1" in shown
    assert "##########.........." in shown
    # This row took 80 s for 150 steps: 26.7 s for the 50 that are left of one run.
    assert "3 cells: 1 running, 1 failed, 1 done; time left: 27 s" in shown
    assert shown.index("row/column/seed1") < shown.index("other/column") < shown.index("seed0 ")


def test_time_left() -> None:
    """The speed is that of the cell's row, else of all rows: 0.6 s a step; 50 and 100 are left."""
    cells = [Cell(row, "column", 0, Path(row), "train", (), 1) for row in ("a", "b")]
    states = {cells[0]: state("running", 50, 30.0), cells[1]: state("waiting", 0, None)}
    assert cell_left_s(states, cells[0], {}) == 30.0
    assert left_s(states, 1, {}) == 90.0
    assert left_s(states, 1, {"b": 2.0}) == 230.0
    assert left_s(states, 2, {"b": 2.0}) == 200.0  # the longer one
    states[cells[0]] = state("waiting", 0, None)
    assert left_s(states, 1, {}) is None
    assert "time left: unknown" in summary(states, None)


def test_the_own_column_tells_the_time_left() -> None:
    """The run in the same column took 1 s a step; the row's two runs together took 2 s a step."""
    named = [("x", 0), ("y", 0), ("x", 1)]
    cells = [Cell("a", column, seed, Path(f"{column}{seed}"), "train", (), 1)
             for column, seed in named]  # fmt: skip
    known = (state("done", 100, 100.0), state("done", 100, 300.0), state("waiting", 0, None))
    assert cell_left_s(dict(zip(cells, known, strict=True)), cells[2], {}) == 100.0
    assert state("running", 40, 30.0).left_s == 45.0  # 0.75 s a step, 60 to go
    assert state("waiting", 0, None).left_s is None
