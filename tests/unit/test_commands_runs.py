"""`spikerl runs` lists runs, and frees the replays that finished runs no longer need."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from exports import config, policy_of, task
from shell import SHORT, spikerl, tree

from spikerl import load_policy
from spikerl.commands import runs
from spikerl.commands.runs import age, readable


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def row(step: int, ret: float | None, joules: float | None) -> dict[str, Any]:
    return {"step": step, "eval_return": ret, "energy_j": joules, "energy_source": "zeus:rapl"}


def make(name: str, status: str, rows: list[dict[str, Any]], *, kept: int = 0) -> Path:
    """A run folder with the files that the list reads, and `kept` bytes that can be freed."""
    folder = Path(name)
    (folder / "checkpoints/step_0000000001").mkdir(parents=True)
    (folder / "checkpoints/step_0000000001/manifest.json").write_text('{"schema": 3}')
    manifest = {"status": status, "env_id": "Ant-v5"}
    if status != "running":
        manifest["ended"] = (datetime.now().astimezone() - timedelta(hours=3)).isoformat()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    policy_of(config(), task()).save(folder)
    (folder / "replay").mkdir()
    (folder / "replay/rows").write_bytes(bytes(kept))
    return folder


def listed(*args: str) -> list[dict[str, Any]]:
    said = spikerl("runs", "path=outputs", "json=true", *args)
    assert said.status == 0, said.err
    return json.loads(said.out)["runs"]


def some_runs() -> None:
    make("outputs/Ant/td3/a", "done", [row(100, 5.0, 2.0), row(200, 4.0, 3.5)], kept=3000)
    make("outputs/Ant/td3/b", "preempted", [row(100, 9.0, None)])
    make("outputs/sweeps/x/seed=1", "running", [row(300, None, 1.0)])
    make("outputs/sweeps/x/seed=2", "failed", [])
    (Path("outputs") / ".a.partial").mkdir()
    (Path("outputs") / ".a.partial/manifest.json").write_text('{"status": "running"}')
    Path("outputs/other").mkdir()
    Path("outputs/other/manifest.json").write_text("[1]")


def test_what_is_listed() -> None:
    some_runs()
    by_name = {run["run"]: run for run in listed()}
    assert by_name.keys() == {
        f"outputs/{n}" for n in ("Ant/td3/a", "Ant/td3/b", "sweeps/x/seed=1", "sweeps/x/seed=2")
    }
    first = by_name["outputs/Ant/td3/a"]
    size = sum(p.stat().st_size for p in Path("outputs/Ant/td3/a").rglob("*") if p.is_file())
    assert first.pop("age_s") == pytest.approx(3 * 3600, abs=60)
    assert first == {
        "run": "outputs/Ant/td3/a", "env_id": "Ant-v5", "state": "done", "steps": 200,
        "last_return": 4.0, "best_return": 5.0, "joules": 5.5, "size_bytes": size,
    }  # fmt: skip
    assert by_name["outputs/Ant/td3/b"]["joules"] is None
    lost = by_name["outputs/sweeps/x/seed=1"]
    assert (lost["state"], lost["last_return"], lost["joules"]) == ("lost", None, 1.0)
    empty = by_name["outputs/sweeps/x/seed=2"]
    assert (empty["steps"], empty["last_return"], empty["joules"]) == (None, None, None)


def test_discarded_work_was_spent() -> None:
    folder = make("outputs/a", "done", [row(100, 5.0, 2.0)])
    (folder / "discarded.jsonl").write_text(json.dumps(row(200, 9.0, 4.0)) + "\n")
    (run,) = listed()
    assert (run["joules"], run["best_return"], run["steps"]) == (6.0, 5.0, 100)
    (folder / "metrics.jsonl").write_text("")  # it was resumed from before its first row
    (run,) = listed()
    assert (run["joules"], run["steps"]) == (4.0, None)


def test_a_run_that_runs() -> None:
    folder = make("outputs/a", "running", [row(100, 5.0, 2.0)])
    with (folder / ".lock").open("w") as file:
        assert [run["state"] for run in listed()] == ["lost"]
        fcntl.flock(file, fcntl.LOCK_EX)
        assert [run["state"] for run in listed()] == ["running"]
        before = time.time() - 7 * 60
        os.utime(folder / "metrics.jsonl", (before, before))
        assert listed()[0]["age_s"] == pytest.approx(7 * 60, abs=30)


@pytest.mark.parametrize(
    ("sort", "names"),
    [
        ("return", "bacd"), ("best", "bacd"), ("joules", "acbd"), ("steps", "cabd"),
        ("run", "abcd"), ("state", "adcb"),
    ],
)  # fmt: skip
def test_sorting(sort: str, names: str) -> None:
    some_runs()
    letters = dict(zip(("Ant/td3/a", "Ant/td3/b", "sweeps/x/seed=1", "sweeps/x/seed=2"), "abcd",
                       strict=True))  # fmt: skip
    runs = [letters[run["run"].removeprefix("outputs/")] for run in listed(f"sort={sort}")]
    assert "".join(runs) == names


def test_the_table() -> None:
    some_runs()
    said = spikerl("runs", "path=outputs")
    assert said.status == 0
    (line,) = (line for line in said.out.splitlines() if "td3/a" in line)
    cells = [cell.strip() for cell in line.strip("│").split("│")]
    assert cells[:6] == ["outputs/Ant/td3/a", "done", "200", "4", "5", "5.5"]
    assert cells[7] == "3 h"
    *_, count, note = said.out.splitlines()
    assert count.startswith("4 runs, ")
    assert note == "note: outputs/other has no readable manifest.json"  # nothing below it is listed


def test_a_damaged_record_is_named() -> None:
    some_runs()
    with Path("outputs/Ant/td3/a/metrics.jsonl").open("a") as f:
        f.write('{"epoch": 3, "st\n')
    (state,) = {run["state"] for run in listed() if run["run"] == "outputs/Ant/td3/a"}
    assert state == "done, metrics.jsonl damaged"


def test_a_line_without_an_end_is_not_there_yet() -> None:
    """A run that was killed while writing a line, or is writing it, leaves a part of it."""
    some_runs()
    with Path("outputs/Ant/td3/a/metrics.jsonl").open("a") as f:
        f.write('{"epoch": 3, "st')
    (run,) = (run for run in listed() if run["run"] == "outputs/Ant/td3/a")
    assert (run["state"], run["steps"]) == ("done", 200)


def test_a_damaged_manifest_is_named() -> None:
    folder = make("outputs/a", "done", [])
    (folder / "config.yaml").write_text("seed: 0\n")
    (folder / "manifest.json").write_text('{"stat')
    said = spikerl("runs", "path=outputs")
    assert "note: outputs/a has no readable manifest.json\n" in said.out
    said = spikerl("runs", "path=outputs", "json=true")
    assert json.loads(said.out)["unreadable"] == ["outputs/a"]
    (folder / "config.yaml").unlink()
    said = spikerl("runs", "path=outputs", "clean=true", "json=true")
    assert json.loads(said.out)["unreadable"] == ["outputs/a"]
    assert (folder / "replay").is_dir()


def test_a_run_that_goes_away_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep or `reproduce` may move a run while it is read: the others are listed."""
    make("outputs/a", "done", [row(100, 5.0, 2.0)])
    make("outputs/b", "done", [])

    def last_change(folder: Path, manifest: dict[str, Any]) -> float:
        Path("outputs/b").rename("elsewhere")
        return time.time()

    monkeypatch.setattr(runs, "last_change", last_change)
    assert [run["run"] for run in listed()] == ["outputs/a"]


def test_no_runs() -> None:
    Path("empty").mkdir()
    assert spikerl("runs", "path=empty").out == "no runs below empty\n"


def test_a_full_disk_takes_the_table() -> None:
    some_runs()
    for i in range(100):
        copytree("outputs/Ant/td3/a", f"outputs/more/{i}")
    process = [sys.executable, "-m", "spikerl", "runs", "path=outputs"]
    with Path("/dev/full").open("w") as full:
        said = subprocess.run(process, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (said.returncode, said.stderr) == (
        1, "spikerl: standard output: No space left on device\n"
    )  # fmt: skip


def test_cleaning() -> None:
    some_runs()
    before = tree(Path("outputs"))
    said = spikerl("runs", "path=outputs", "clean=true")
    assert said.status == 0
    gone = 3000 + len('{"schema": 3}')
    assert said.out.splitlines()[-1] == (
        f"freed {gone / 1000:.3g} kB: replay and checkpoints of 1 finished run"
    )
    after = tree(Path("outputs"))
    removed = {name for name in before if name not in after}
    assert removed
    assert all(n.startswith(("Ant/td3/a/replay", "Ant/td3/a/checkpoints")) for n in removed)
    assert not any(n.startswith(("Ant/td3/a/replay", "Ant/td3/a/checkpoints")) for n in after)
    (Path("outputs/Ant/td3/a") / ".lock").unlink()
    before = tree(Path("outputs"))
    said = spikerl("runs", "path=outputs", "clean=true", "json=true")
    assert json.loads(said.out)["freed_bytes"] == 0
    assert tree(Path("outputs")) == before


@pytest.mark.parametrize("reason", ["link", "held", "no policy", "damaged", "damaged best"])
def test_what_is_not_cleaned(reason: str, here: Path) -> None:
    """A replay is kept if it is a link, the run is locked, or a policy is missing or damaged."""
    folder = make("outputs/a", "done", [row(100, 5.0, 2.0)], kept=10)
    held = (folder / ".lock").open("w")
    if reason == "link":
        (folder / "replay").rename("elsewhere")
        (folder / "replay").symlink_to(here / "elsewhere")
    elif reason == "no policy":
        (folder / "policy.json").unlink()
    elif reason == "damaged":
        os.truncate(folder / "policy.safetensors", 10)
    elif reason == "damaged best":
        (folder / "best").mkdir()
        (folder / "best/policy.json").write_text("{}")
    else:
        fcntl.flock(held, fcntl.LOCK_EX)
    before = {name for name in tree(here) if not name.endswith(".lock")}
    said = spikerl("runs", "path=outputs", "clean=true")
    (line,) = json.loads(spikerl("runs", "path=outputs", "clean=true", "json=true").out)[
        "not_freed"
    ]
    held.close()
    assert said.status == 0
    assert line.startswith("outputs/a keeps its replay: ")
    assert f"note: {line}\n" in said.out
    assert {name for name in tree(here) if not name.endswith(".lock")} == before


def test_a_run_that_keeps_no_replay() -> None:
    said = spikerl("train", *SHORT, "keep_replay=false", "run_dir=outputs/a")
    assert said.status == 0, said.err
    names = set(os.listdir("outputs/a"))
    assert not names & {"replay", "checkpoints"}
    assert {"policy.json", "best", "summary.json"} <= names
    assert load_policy("outputs/a").norm.count == 300
    assert load_policy("outputs/a", policy="best").norm.count in (150, 300)
    assert [run["state"] for run in listed()] == ["done"]
    said = spikerl("train", "resume=outputs/a")
    assert said.status == 0
    further = "init_from=outputs/a starts from its policy"
    assert said.out == f"outputs/a is done at step 300; {further}\n"
    said = spikerl("train", "resume=outputs/a", "total_steps=450")
    assert said.line == (
        f"resume=outputs/a: its replay was removed when it was done, at step 300; {further}"
    )


def test_a_finished_run_that_is_to_keep_no_replay() -> None:
    """A resume that has nothing to do prints the command that removes the replay."""
    assert spikerl("train", *SHORT, "run_dir=outputs/a").status == 0
    done = "outputs/a is done at step 300; a larger total_steps trains it further"
    assert spikerl("train", "resume=outputs/a").out == f"{done}\n"
    said = spikerl("train", "resume=outputs/a", "keep_replay=false")
    words = ["spikerl", "runs", "path=outputs/a", "clean=true"]
    assert said.out == f"{done}, {' '.join(words)} removes its replay\n"
    assert Path("outputs/a/replay").exists()
    assert spikerl(*words[1:]).status == 0
    assert not Path("outputs/a/replay").exists()


def test_a_replay_that_cannot_be_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run is done nevertheless, and a note says why the replay is still there."""

    def busy(folder: Path) -> int:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr("spikerl.runs.folder.free", busy)
    said = spikerl("train", *SHORT, "keep_replay=false", "run_dir=outputs/a")
    assert said.status == 0, said.err
    assert "note: its replay could not be removed ([Errno 16] Device or resource busy)" in said.out
    assert [run["state"] for run in listed()] == ["done"]


def test_refused() -> None:
    assert spikerl("runs", "path=nowhere").line == "path=nowhere: no such folder"
    Path("outputs").mkdir()
    line = spikerl("runs", "sort=size_bytes").line
    assert line == (
        "sort=size_bytes: give one of age, run, state, steps, return, best, joules, size"
    )
    assert listed() == []


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (2_900_000_000, "2.9 GB"),
        (1.5e6, "1.5 MB"),
        (999_400, "999 kB"),
        (999_700, "1 MB"),
        (999_999_999, "1 GB"),
    ],
)
def test_sizes(size: int, text: str) -> None:
    assert readable(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (59.0, "59 s"),
        (61.0, "1 min"),
        (7200.0, "2 h"),
        (90000.0, "1 d"),
        (59.8, "1 min"),
        (3569.0, "59 min"),
        (3599.9, "1 h"),
        (1801.0, "30 min"),
    ],
)
def test_ages(seconds: float, text: str) -> None:
    assert age(seconds) == text
