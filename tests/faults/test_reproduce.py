"""The cells of a table: none is run twice and none is lost, whichever process is killed."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import pytest
import table_runs
import torch
from rich.console import Console
from shell import refusal, spikerl

from spikerl.commands.reproduce import cells, command
from spikerl.commands.reproduce.scheduler import Scheduler, ready
from spikerl.commands.reproduce.screen import Screen
from spikerl.reporting.table_file import Cell, cell_of, read_table, table_of

ROOT = Path("outputs/reproduced/small")
TRAINED = [
    f"{row}/{column}/seed{seed}"
    for row in ("popsan", "dense")
    for column in ("Ant", "Hopper")
    for seed in (0, 1)
]


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cells, "PROGRAM", cells.PROGRAM)


def start(jobs: int) -> ForkProcess:
    """Another process that runs the table; forked, as importing torch anew would take seconds."""
    process = ForkProcess(target=lambda: os._exit(table_runs.run_cells(jobs)[0]))
    process.start()
    return process


def wait(process: ForkProcess) -> int | None:
    process.join(60)
    return process.exitcode


def returns(name: str) -> list[float]:
    lines = (ROOT / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["eval_return"] for line in lines]


def check_whole() -> None:
    """All cells have the rows of an undisturbed run, each once."""
    for name in TRAINED:
        seed = int(name[-1])
        assert returns(name) == [100.0 * seed + step for step in (10, 20, 30, 40, 50)], name
        assert (ROOT / name / "evaluation.json").exists()
        assert not (ROOT / name / "checkpoints").exists()
        assert "freed" in json.loads((ROOT / name / "manifest.json").read_text())
    for name in ("converted/Ant/seed0", "converted/Hopper/seed1"):
        assert json.loads((ROOT / name / "evaluation.json").read_text())["return_mean"] == 1.0
    assert not list(ROOT.rglob(".*.err"))


def events() -> list[list[str]]:
    return [line.split() for line in Path("events").read_text().splitlines()]


def test_all_cells_then_nothing() -> None:
    status, states = table_runs.run_cells()
    assert status == 0
    assert {state.word for state in states.values()} == {"done"}
    check_whole()
    before = events()
    assert sorted(name for _, name, _ in before) == sorted(TRAINED)
    assert table_runs.run_cells()[0] == 0
    assert events() == before


def test_killed_at_random_instants() -> None:
    """A scheduler is killed: its runs stop at a safe point, and the next one goes on with them."""
    rng = random.Random(0)
    for _ in range(3):
        process = start(2)
        deadline = time.monotonic() + 60
        seen = len(events()) if Path("events").exists() else 0
        while not Path("events").exists() or len(events()) == seen:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(rng.uniform(0.0, 0.3))
        process.kill()
        process.join()
    assert wait(start(2)) == 0
    check_whole()
    began = Counter(name for what, name, _ in events() if what == "started")
    assert began == Counter(TRAINED)
    assert any(what == "resumed" for what, _, _ in events())  # runs ended with their scheduler


def test_two_processes_share_the_work() -> None:
    processes = [start(1), start(1)]
    assert [wait(process) for process in processes] == [0, 0]
    check_whole()
    assert sorted(name for _, name, _ in events()) == sorted(TRAINED)
    assert len({parent for _, _, parent in events()}) == 2


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_stop_is_passed_on(number: int, status: int) -> None:
    process = start(2)
    deadline = time.monotonic() + 60
    while not list(ROOT.glob("*/*/seed0/manifest.json")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert process.pid is not None
    os.kill(process.pid, number)
    assert wait(process) == status
    words = {json.loads(p.read_text())["status"] for p in ROOT.glob("*/*/seed*/manifest.json")}
    assert "running" not in words
    assert "preempted" in words
    assert wait(start(2)) == 0
    check_whole()


def test_a_stop_while_a_run_is_being_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run gets the signal once its process exists."""
    popen = subprocess.Popen

    def interrupted(*args: Any, **settings: Any) -> Any:
        process = popen(*args, **settings)
        signal.raise_signal(signal.SIGTERM)
        return process

    monkeypatch.setattr("subprocess.Popen", interrupted)
    status, states = table_runs.run_cells(1)
    assert status == 75
    assert [state.word for state in states.values()].count("stopped") == 1


def test_a_failure_stops_no_other() -> None:
    Path("fail").touch()
    status, states = table_runs.run_cells()
    assert status == 1
    words = {cell.name: state for cell, state in states.items()}
    failed = words["popsan/Ant/seed1"]
    assert (failed.word, failed.note) == ("failed", "ValueError: it fell over (status 1)")
    assert words["popsan/Hopper/seed0"].word == "done"
    assert words["converted/Ant/seed0"].word == "done"
    assert words["converted/Ant/seed1"].word == "waiting"  # for its source, which failed
    Path("fail").unlink()
    assert table_runs.run_cells()[0] == 0  # a failed cell is tried again from where it was
    check_whole()


@pytest.mark.slow
def test_fewer_steps_first() -> None:
    """A cell that the protocol wants longer keeps its checkpoints, and goes on from them later."""
    assert table_runs.run_cells(total_steps=20)[0] == 0
    assert (ROOT / "popsan/Ant/seed0/checkpoints").exists()
    assert returns("popsan/Ant/seed1") == [110.0, 120.0]
    assert made_of("converted/Ant/seed1") == hashlib.sha256(b"20").hexdigest()
    (ROOT / "popsan/Ant/seed1/evaluation.json").write_text("{}")
    assert table_runs.run_cells()[0] == 0
    check_whole()
    assert json.loads((ROOT / "popsan/Ant/seed1/evaluation.json").read_text()) != {}
    # The policy that was trained further is converted again.
    assert made_of("converted/Ant/seed1") == hashlib.sha256(b"50").hexdigest()


def made_of(name: str) -> str:
    sha256: str = json.loads((ROOT / name / "manifest.json").read_text())["converted_sha256"]
    return sha256


@pytest.mark.slow
def test_a_sweep_over_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each job of a sweep, as given to a launcher, runs its own rows of the table."""
    monkeypatch.setattr(cells, "PROGRAM", [sys.executable, str(Path(table_runs.__file__))])
    request = ["table=popsan_table1", "columns=Ant", "seeds=1", "total_steps=20", "jobs=1"]
    said = spikerl("reproduce", "-m", *request, "rows=[popsan_td3],[dense_td3]")
    assert said.status == 0, said
    assert "2 of 2 jobs done" in said.out
    names = [name for _, name, _ in events()]
    assert names == ["popsan_td3/Ant/seed0", "dense_td3/Ant/seed0"]


def cell(row: str = "popsan", seed: int = 0) -> Cell:
    made = cell_of(table_of(table_runs.TABLE), row, "Ant", seed)
    assert made is not None
    return made


def test_a_conversion_waits_for_a_policy_that_is_done() -> None:
    converted, source = cell("converted"), cell("dense").folder
    assert not ready(converted, 50)
    source.mkdir(parents=True)
    (source / "policy.json").touch()
    for word, is_ready in {"preempted": False, "done": True}.items():
        (source / "config.yaml").write_text("seed: 0\n")
        (source / "manifest.json").write_text(json.dumps({"status": word}))
        assert ready(converted, 50) == is_ready
    (source / "metrics.jsonl").write_text('{"step": 20, "eval_return": 1.0}\n')
    (source / "checkpoints").mkdir()
    assert (ready(converted, 20), ready(converted, 50)) == (True, False)


def test_a_cell_is_held_by_what_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cell's process keeps its lock after the scheduler ended, so that no other starts it."""
    monkeypatch.setattr(cells, "PROGRAM", [sys.executable, "-c", "import time; time.sleep(60)"])
    lock = cells.claim(cell())
    assert lock is not None
    assert cells.claim(cell()) is None
    job = cells.Job(cell(), lock, 0, None)
    job.start(["eval"])
    lock.close()
    assert cells.claim(cell()) is None
    assert job.process is not None
    job.process.kill()
    job.process.wait()
    assert cells.claim(cell()) is not None


def test_a_file_system_without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where locks are not supported, a cell counts as free, not as held by another for ever."""

    def flock(file: Any, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    assert cells.claim(cell()) is not None


def test_priority_and_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import os; print(os.getpriority(0, 0), os.environ['CUDA_VISIBLE_DEVICES'])"
    monkeypatch.setattr(cells, "PROGRAM", [sys.executable, "-c", code])
    lock = cells.claim(cell())
    assert lock is not None
    job = cells.Job(cell(), lock, 19, "3")
    job.start(["eval"])
    assert job.process is not None
    assert job.process.wait(60) == 0
    assert job.output("out").read_text() == "19 3\n"
    job.close()
    assert not job.output("out").exists()


@pytest.mark.parametrize(
    ("gpus", "named", "jobs", "expected"),
    [
        (0, "", 3, [None] * 3),
        (2, "", None, ["0", "1"]),
        (2, "5,7", 3, ["5", "7", "5"]),
    ],
)
def test_slots(
    gpus: int, named: str, jobs: int | None, expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert command.slots_of(jobs, [cell()]) == expected


def test_one_place_for_each_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """With runs of several workers, the cores are divided by the most workers of a run."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(command, "cores", lambda: 16)
    assert len(command.slots_of(None, [cell()])) == 16
    table = read_table("spikerl")
    both = [cell_of(table, row, "Ant", 0) for row in ("popsan_td3", "spikerl")]
    assert len(command.slots_of(None, [c for c in both if c])) == 2


def write_run(config: str, status: str, step: int) -> Path:
    folder = cell().folder
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config)
    (folder / "manifest.json").write_text(json.dumps({"status": status}))
    row = {"step": step, "eval_return": 1.0}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    return folder


REFUSED: list[tuple[str, str, int, int, str]] = [
    ("seed: 0\nalgo: {gamma: 0.5, tau: 0.005}", "done", 50, 50,
     "table=small: {} was made with other settings: algo.gamma=0.5 (here 0.99)"),
    ("seed: 4", "done", 50, 50,
     "table=small: {} was made with other settings: seed=4 (here 0)"),
    ("seed: 0", "running", 50, 40, "total_steps=40: {} has 50 steps already"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "status", "step", "asked", "line"), REFUSED)
def test_other_runs_are_refused(config: str, status: str, step: int, asked: int, line: str) -> None:
    folder = write_run(config, status, step)
    error = refusal(cells.check, table_of(table_runs.TABLE), [cell()], asked)
    assert str(error).startswith(line.format(folder))


def test_a_cell_that_cannot_be_read() -> None:
    folder = write_run("seed: 0", "done", 50)
    (folder / "metrics.jsonl").write_text("{\n")
    error = refusal(cells.check, table_of(table_runs.TABLE), [cell()], 50)
    reason = "its record or config: line 1 of metrics.jsonl is not a row"
    assert str(error) == f"table=small: {folder}: {reason}; move it away"


def test_a_place_that_cannot_be_written_to() -> None:
    """The refusal names the key `out` and the place below it."""
    cell = cell_of(table_of(table_runs.TABLE), "popsan", "Ant", 0)
    assert cell
    cell.folder.parents[1].mkdir(parents=True)
    cell.folder.parent.touch()
    place = "outputs/reproduced/small/popsan/Ant: File exists"
    line = str(refusal(cells.claim, cell))
    assert line == f"out=outputs/reproduced: {place}; give another folder"


def test_a_process_that_cannot_start_fails_its_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    start = cells.Job.start

    def full(self: cells.Job, command: Any) -> None:
        if self.cell.name == "popsan/Ant/seed1":
            raise OSError(errno.ENOSPC, "No space left on device", "x/.seed1.out")
        start(self, command)

    monkeypatch.setattr(cells.Job, "start", full)
    status, states = table_runs.run_cells()
    failed = {c.name: state.note for c, state in states.items() if state.word == "failed"}
    assert (status, failed) == (1, {"popsan/Ant/seed1": "x/.seed1.out: No space left on device"})


def test_packages_set_no_runs_apart() -> None:
    """The scheduler adds plugins=[...] to a run's command, so the run's config has the key; the
    composed config of its cell has not, and the difference must not count.
    """
    write_run("seed: 0\nplugins: [mine]", "done", 50)
    cells.check(table_of(table_runs.TABLE), [cell()], 50)
    assert cells.naming(["a", "b"]) == ["plugins=[a,b]"]
    assert cells.naming([]) == []


def test_what_a_kill_left_of_a_conversion_goes(tmp_path: Path) -> None:
    folder = tmp_path / "seed0"
    for name in ("seed0", ".seed0.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "policy.json").touch()
    cells.clear(folder)
    assert list(tmp_path.iterdir()) == []
    cells.clear(folder)


def test_what_moved_over_fewer_steps_is_not_gone_on_with(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run("total_steps: 40\nalgo: {name: decision_transformer}", "preempted", 40)
    (folder / "checkpoints").mkdir()
    monkeypatch.setattr(cells, "apart", lambda cell, run: [])
    table = table_of(table_runs.TABLE)
    line = f"total_steps=50: {folder} was begun with 40, over which its learning rate or slope"
    assert str(refusal(cells.check, table, [cell()], 50)).startswith(line)
    cells.check(table, [cell()], 40)


def test_a_result_with_fewer_steps_stays_as_it_is() -> None:
    """It does without checkpoints, as results in the repository; with one it is resumed."""
    folder = write_run("seed: 0", "done", 40)
    (folder / "evaluation.json").write_text("{}")
    note = (f"{folder} was done at 40 steps, not 50, and kept no checkpoint to go on from; "
            "move that folder away to train it anew")  # fmt: skip
    assert cells.shorter(cell(), 50) == note
    assert cells.shorter(cell(), 40) is None
    assert cells.next_command(cell(), 50) is None
    assert cells.done(cell(), 50)
    (folder / "checkpoints").mkdir()
    assert cells.shorter(cell(), 50) is None
    assert cells.next_command(cell(), 50) == ["train", f"resume={folder}", "total_steps=50"]


def test_more_steps_are_refused_only_where_they_are_typed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = write_run("seed: 0", "done", 40)
    (folder / "evaluation.json").write_text("{}")
    table = json.loads(json.dumps(table_runs.TABLE))
    table["protocol"]["total_steps"] = 50
    one = {"rows": ["popsan"], "columns": ["Ant"], "seeds": [0], "jobs": 1, "nice": 0}
    request = {"table": table, **one, "total_steps": None, "plan": True, "render": False,
               "out": "outputs/reproduced",
               "plugins": []}  # fmt: skip
    assert command.main(request, []) == 0
    said = capsys.readouterr()
    assert said.err.startswith(f"{folder} was done at 40 steps, not 50")
    assert "small: 1 run, 1 done, 0 begun" in said.out
    error = refusal(command.main, {**request, "total_steps": 60}, [])
    assert str(error).startswith(f"total_steps=60: {folder} was done at 40 steps, not 60")


def test_environments_that_step_together_end_where_they_do() -> None:
    """Eight environments end at step 56 if 50 were asked for, but not if 48 were."""
    folder = write_run("seed: 0", "done", 56)
    (folder / "manifest.json").write_text(json.dumps({"status": "done", "num_envs": 8}))
    table = table_of(table_runs.TABLE)
    cells.check(table, [cell()], 50)
    error = refusal(cells.check, table, [cell()], 48)
    assert str(error).startswith(f"total_steps=48: {folder} has 56 steps already")


def test_what_a_later_version_added_sets_nothing_apart() -> None:
    write_run("seed: 0\nnew_key: 3\ntotal_steps: 7\nthreads: 9\nalgo: {gamma: 0.99}", "done", 50)
    cells.check(table_of(table_runs.TABLE), [cell()], 50)


def test_a_bad_override_is_refused_before_anything_starts() -> None:
    data: dict[str, Any] = json.loads(json.dumps(table_runs.TABLE))
    data["rows"]["popsan"]["overrides"] = ["algo.gama=0.9"]
    made = cell_of(table_of(data), "popsan", "Ant", 0)
    assert made is not None
    assert "cannot be composed: Could not override 'algo.gama'" in str(
        refusal(cells.check, table_of(data), [made], 50)
    )


def test_a_run_that_somebody_else_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The status is 75: the table is not done, and the same command goes on with it."""
    monkeypatch.setattr(cells, "PROGRAM", [sys.executable, "-c", "import sys; sys.exit(75)"])
    screen = Screen("small", Console(file=io.StringIO()))
    running = Scheduler([cell()], 50, screen, slots=[None], nice=0, keep=True)
    assert running.run() == 75
    assert [state.word for state in running.states.values()] == ["stopped"]


def test_what_was_stopped_says_how_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = "the same command goes on with what is not done\n"
    one = {"table": table_runs.TABLE, "rows": ["popsan"], "columns": ["Ant"], "seeds": [0]}
    monkeypatch.setattr(cells, "PROGRAM", [sys.executable, "-c", "import sys; sys.exit(75)"])
    assert command.main(REQUEST | one, []) == 75
    assert line in capsys.readouterr().out
    monkeypatch.setattr(cells, "PROGRAM", [sys.executable, str(Path(table_runs.__file__))])
    assert command.main(REQUEST | one, []) == 0
    assert line not in capsys.readouterr().out


REQUEST: dict[str, Any] = {
    "rows": None, "columns": None, "seeds": 2, "total_steps": None, "jobs": 1, "nice": 0,
    "plan": False, "render": False, "out": "outputs/reproduced", "plugins": [],
}  # fmt: skip


def test_what_goes_on_is_kept_until_the_protocol_is_met(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints are kept after 20 of 50 steps, and removed after all 50."""
    monkeypatch.setattr(cells, "PROGRAM", [sys.executable, str(Path(table_runs.__file__))])
    one = {"table": table_runs.TABLE, "rows": ["popsan"], "columns": ["Ant"], "seeds": [0]}
    kept = cell().folder / "checkpoints"
    assert command.main(REQUEST | one | {"total_steps": 20}, []) == 0
    assert kept.exists()
    assert command.main(REQUEST | one, []) == 0
    assert not kept.exists()


def test_the_first_seed_of_every_cell_comes_first() -> None:
    request = command.ReproduceRequest(**REQUEST)
    found = [cell.name for cell in command.selected(table_of(table_runs.TABLE), request)]
    assert found == [
        f"{row}/{column}/seed{seed}"
        for seed in (0, 1) for column in ("Ant", "Hopper")
        for row in ("popsan", "dense", "converted")
    ]  # fmt: skip


def test_a_run_that_was_killed_says_by_what(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "PROGRAM", [sys.executable, "-c", "import time; time.sleep(60)"])
    lock = cells.claim(cell())
    assert lock is not None
    job = cells.Job(cell(), lock, 0, None)
    job.start(["train"])
    assert job.process is not None
    job.process.kill()
    job.process.wait()
    assert job.reason() == "killed by SIGKILL; the same command goes on with it"
    job.close()
