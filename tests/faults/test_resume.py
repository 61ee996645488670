"""A run that was killed or stopped, then resumed, equals an undisturbed run."""

from __future__ import annotations

import errno
import json
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from disks import Undisturbed, before_each_call
from processes import Run, computed, record, resume, rows, train
from soaks import CASES, Whole, soak

from spikerl.errors import PREEMPTED, BadRequest, Stopped
from spikerl.runs import checkpoint
from spikerl.runs import folder as run_folder
from spikerl.runs.rows import cut_back, read_rows
from spikerl.training.evaluator import Evaluator
from spikerl.training.session import Session
from spikerl.training.trainer import Trainer

SHORT = ("td3", "ppo", pytest.param("workers", marks=pytest.mark.slow))  # scripts/soak: all
HOPPER = ["env=Hopper", "num_envs=2"]


def done(run: Run) -> None:
    assert run.wait() == 0, run.said()


@pytest.mark.parametrize("case", SHORT)
def test_killed_at_random_instants(case: str, tmp_path: Path) -> None:
    whole = Whole(tmp_path / "whole", CASES[case])
    outcome = soak(whole, tmp_path / "killed", random.Random(case), again=0.25)
    assert outcome.kills
    assert outcome.equal
    events = record(tmp_path / "killed" / "run")["resumed"]
    assert all(event["exact"] for event in events)
    assert sum(event["discarded_rows"] for event in events) == outcome.discarded


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of a run that nothing disturbed."""
    home = tmp_path_factory.mktemp("whole")
    done(train(home, *HOPPER))
    return home


def test_signals_commit_within_an_epoch(whole: Path, tmp_path: Path) -> None:
    """The run is stopped by each of three signals in turn, at least once in mid-epoch."""
    ends = {
        signal.SIGTERM: (75, "preempted"),
        signal.SIGUSR1: (75, "preempted"),
        signal.SIGINT: (130, "interrupted"),
    }
    run = train(tmp_path, *HOPPER)
    steps = []
    for number, (status, word) in ends.items():
        run.until(run.begun)
        assert run.kill(number) == status, run.said()
        manifest = record(tmp_path / "run")
        assert manifest["status"] == word
        stopped = record(tmp_path / "run" / "checkpoints" / "latest")
        assert f"stopped at step {stopped['step']} on {number.name}" in run.said()
        assert record(tmp_path / "run", "summary.json")["steps"] == stopped["step"]
        steps.append(stopped["step"])
        run = resume(tmp_path)
    done(run)
    assert steps == sorted(steps)
    assert all(step % 2 == 0 for step in steps)  # both environments have stepped
    assert any(step % 100 for step in steps)
    assert computed(tmp_path / "run") == computed(whole / "run")
    assert not rows(tmp_path / "run", "discarded.jsonl")
    assert [event["step"] for event in record(tmp_path / "run")["resumed"]] == steps


def test_a_finished_run_says_so_and_goes_on_with_more_steps(whole: Path, tmp_path: Path) -> None:
    """A plain resume prints a line and changes nothing; with total_steps it makes 200 steps more,
    and equals a run with all steps from the start.
    """
    shutil.copytree(whole / "run", tmp_path / "run", symlinks=True)
    before = computed(tmp_path / "run")
    command = [sys.executable, "-m", "spikerl", "train", f"resume={tmp_path / 'run'}"]
    said = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert said.stdout.startswith("run is done at step 400; a larger total_steps")
    assert not said.stderr
    assert computed(tmp_path / "run") == before
    longer = resume(tmp_path, "total_steps=600")
    longer.until(longer.begun)
    assert longer.kill(signal.SIGTERM) == 75, longer.said()
    done(resume(tmp_path))  # the command that it printed, which names no total_steps
    done(train(tmp_path / "longer", *HOPPER, "total_steps=600"))
    assert computed(tmp_path / "run") == computed(tmp_path / "longer" / "run")
    assert len(rows(tmp_path / "run")) == 6


def test_rows_beyond_the_commit_are_kept_and_counted(whole: Path, tmp_path: Path) -> None:
    """A folder as of a run killed after it wrote the last row but before its commit, and in the
    middle of writing another row.
    """
    run = tmp_path / "run"
    shutil.copytree(whole / "run", run, symlinks=True)
    shutil.rmtree(run / "checkpoints" / "step_0000000400")
    last = rows(run)[-1]
    with (run / "metrics.jsonl").open("a") as f:
        f.write('{"epoch": 5, "st')
    done(resume(tmp_path))
    assert computed(run) == computed(whole / "run")
    assert rows(run, "discarded.jsonl") == [last]
    assert (run / "discarded.jsonl").read_text().count("\n") == 1
    assert record(run, "summary.json")["discarded_rows"] == 1
    event, summary = record(run)["resumed"][0], record(run, "summary.json")
    assert event["discarded_rows"] == 1
    assert 0.0 < event["discarded_s"] == summary["wall_discarded_s"] < last["wall_s"]
    assert summary["wall_s"] > summary["wall_discarded_s"] + rows(run)[-1]["wall_s"]


# Loads the policy again and again while the run commits several times a second.
LOOK_ON = """
import sys, time, numpy
from spikerl import load_policy
until = time.monotonic() + 1.5
while time.monotonic() < until:
    assert load_policy(sys.argv[1])(numpy.zeros(11)).shape == (3,)
print("looked on")
"""


def test_one_process_at_a_time(tmp_path: Path) -> None:
    first = train(tmp_path, *HOPPER, "total_steps=100000")
    first.until(first.begun)
    manifest = (tmp_path / "run" / "manifest.json").read_bytes()
    home = tmp_path / "second"
    second = Run(home, f"resume={tmp_path / 'run'}")
    assert second.wait() == 2
    (line,) = second.err.read_text().splitlines()
    assert f"process {first.pid} on " in line
    assert "is running it; stop that first" in line
    assert (tmp_path / "run" / "manifest.json").read_bytes() == manifest
    # Another process may read the run while it is written.
    answers = subprocess.run(
        [sys.executable, "-c", LOOK_ON, str(tmp_path / "run")], capture_output=True, check=True
    )
    assert answers.stdout.split() == [b"looked", b"on"]
    assert first.kill(signal.SIGINT) == 130


def test_rewinding_can_be_interrupted(tmp_path: Path) -> None:
    """Rows are added to discarded.jsonl only once, however often the rewind starts over."""
    metrics = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step}) + "\n" for step in (1, 2, 3)]
    (tmp_path / "discarded.jsonl").write_text(json.dumps({"step": 9}) + "\n")
    metrics.write_text("".join(lines) + '{"step"')
    whole = metrics.read_bytes()
    assert cut_back(tmp_path, len(lines[0])) == [{"step": 2}, {"step": 3}]
    metrics.write_bytes(whole)  # as if killed before metrics.jsonl was cut
    assert cut_back(tmp_path, len(lines[0])) == [{"step": 2}, {"step": 3}]
    assert [row["step"] for row in read_rows(metrics)] == [1]
    discarded = read_rows(tmp_path / "discarded.jsonl")
    assert [row["step"] for row in discarded] == [9, 2, 3]
    with pytest.raises(BadRequest, match="shorter"):
        cut_back(tmp_path, 1000)


def test_what_a_run_left_that_was_killed_before_its_folder_appeared(tmp_path: Path) -> None:
    """The next run beside it removes its partial folder, but not that of a living process."""
    raw = {"seed": 0}
    partials = [tmp_path / f".run{i}.{100 + i}.partial" for i in range(2)]
    held = [
        run_folder.fill_partial(partial, "run", raw, {"status": "running"}) for partial in partials
    ]
    held[1].close()  # release its lock, as the end of its process would
    strange = tmp_path / ".mine.partial"
    strange.mkdir()
    run = train(tmp_path, *HOPPER, "total_steps=20", "algo.learning_starts=20")
    assert run.wait() == 0, run.said()
    assert [path.exists() for path in (*partials, strange)] == [True, False, True]
    assert record(partials[0])["status"] == "running"
    held[0].close()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(tmp_path_factory.mktemp("undisturbed"))


def test_killed_while_it_resumes(
    undisturbed: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resume is killed before any disk call of its rewind, with one row beyond the commit: the
    folder as it is then resumes to the same result.
    """
    run = tmp_path / "run"
    left: list[Path] = []
    shutil.copytree(undisturbed.raw["run_dir"], run, symlinks=True)
    (run / "checkpoints" / "step_0000000060" / "learner.safetensors").write_bytes(b"")
    rewind = Session.rewind

    def look(name: str) -> None:
        left.append(tmp_path / f"{len(left)}")
        shutil.copytree(run, left[-1], symlinks=True)

    def watched(*args: Any) -> None:
        with before_each_call(look):
            rewind(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "rewind", watched)
        assert undisturbed.train(resume=str(run)) == 0
    assert len(left) > 30
    for folder in [run, *left[::5]]:
        if folder != run:
            assert undisturbed.train(resume=str(folder)) == 0
        assert undisturbed.equals(folder)
        assert [row["step"] for row in rows(folder, "discarded.jsonl")] == [60]


def test_an_environment_of_unknown_kind_goes_on_from_a_reset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gym = ["env=gym", "env.id=MountainCarContinuous-v0"]
    run = Undisturbed(tmp_path, *gym)
    folder = tmp_path / "whole"
    before = capsys.readouterr().out
    assert run.train(resume=str(folder), total_steps=80) == 0
    said = capsys.readouterr().out
    assert "reset" in said
    assert "not exact" in said
    assert "not exact" not in before
    assert [event["exact"] for event in record(folder)["resumed"]] == [False]
    assert [row["step"] for row in rows(folder)] == [20, 40, 60, 80]


def test_what_else_makes_numbers_others_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another kernel, other threads, and more steps, over all of which a slope moves."""
    run = Undisturbed(tmp_path, "neuron.surrogate=atan", "neuron.surrogate_slope_end=4")
    folder = tmp_path / "whole"
    assert record(folder)["resolved"]["kernel"]["choice"] != "reference"
    capsys.readouterr()
    reference = {"name": "reference", "path": None}
    assert run.train(resume=str(folder), total_steps=80, kernel=reference) == 0
    (event,) = record(folder)["resumed"]
    assert not event["exact"]
    kernel, slope = event["not_exact_because"].split("; ")
    assert re.fullmatch(r"kernel cpu/\w+ became reference: sums are in another order", kernel)
    assert slope == "total_steps 60 became 80, over which the surrogates' slope moves"
    assert f"not exact: {kernel}; {slope}" in capsys.readouterr().out
    assert record(folder)["resolved"]["kernel"]["choice"] == "reference"
    assert run.train(resume=str(folder), total_steps=80, kernel=reference, threads=2) == 0
    assert len(record(folder)["resumed"]) == 1  # the run was done already
    assert run.train(resume=str(folder), total_steps=100, kernel=reference, threads=2) == 0
    threads, _ = record(folder)["resumed"][1]["not_exact_because"].split("; ")
    assert threads == "threads 1 became 2: sums are in another order"
    assert run.train(resume=str(folder), total_steps=120, threads=2) == 0
    assert run.train(resume=str(folder), total_steps=140, threads=1) == 0
    # The sums of the kernel do not depend on the number of threads.
    assert "threads" not in record(folder)["resumed"][3]["not_exact_because"]


def test_fewer_steps_than_it_has_are_refused(tmp_path: Path) -> None:
    run = Undisturbed(tmp_path)
    folder = tmp_path / "whole"
    before = (folder / "config.yaml").read_bytes()
    with pytest.raises(BadRequest) as refused:
        run.train(resume=str(folder), total_steps=40)
    assert str(refused.value) == "total_steps=40: the run is at step 60; give that or more"
    assert (folder / "config.yaml").read_bytes() == before


def test_deterministic_runs_are_equal_bitwise(tmp_path: Path) -> None:
    run = Undisturbed(tmp_path, "deterministic=true", "encoder=poisson", "num_envs=2")
    try:
        assert torch.are_deterministic_algorithms_enabled()
        assert run.train(run_dir=str(tmp_path / "again")) == 0
        assert run.equals(tmp_path / "again")
        assert run.train(run_dir=str(tmp_path / "other"), seed=1) == 0
        assert not run.equals(tmp_path / "other")
    finally:
        torch.use_deterministic_algorithms(False)


def test_an_evaluation_in_mid_epoch_is_said(tmp_path: Path) -> None:
    """Epochs have 20 steps: step 60 ends one, step 70 does not."""
    run = Undisturbed(tmp_path)
    folder = tmp_path / "whole"
    for total_steps in (70, 80):
        assert run.train(resume=str(folder), total_steps=total_steps) == 0
    assert [event["not_exact_because"] for event in record(folder)["resumed"]] == [
        None, "an evaluation in mid-epoch, at step 70: later ones differ",
    ]  # fmt: skip


def test_an_evaluation_that_never_took_place_is_not_said(tmp_path: Path) -> None:
    """The run is stopped as its last evaluation begins, in mid-epoch, and then extended."""
    run = Undisturbed(tmp_path)
    folder = tmp_path / "stopped"

    def stopped(self: Evaluator, *args: Any) -> Any:
        raise Stopped(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluator, "run", stopped)
        assert run.train(run_dir=str(folder), total_steps=10) == PREEMPTED
    assert record(folder / "checkpoints" / "latest")["step"] == 10
    assert run.train(resume=str(folder), total_steps=60) == 0
    assert [event["exact"] for event in record(folder)["resumed"]] == [True]
    assert run.equals(folder)


def test_why_it_is_not_exact_outlives_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slope moves over all steps. The first resume ends before it saves a checkpoint, but when
    config.yaml has the new total_steps already; the second one must still give the reason.
    """
    run = Undisturbed(tmp_path, "neuron.surrogate=atan", "neuron.surrogate_slope_end=4")
    folder = tmp_path / "whole"

    def killed(self: Trainer, *args: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "epochs", killed)
        patch.setattr(Session, "fail", lambda self, error: None)
        with pytest.raises(KeyboardInterrupt):
            run.train(resume=str(folder), total_steps=80)
    assert "\ntotal_steps: 80\n" in (folder / "config.yaml").read_text()
    assert run.train(resume=str(folder), total_steps=80) == 0
    reason = "total_steps 60 became 80, over which the surrogates' slope moves"
    assert [event["not_exact_because"] for event in record(folder)["resumed"]] == [reason] * 2


def test_a_checkpoint_that_cannot_be_read_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it is an older one, commits go on, and its segments of the replay are kept; if it is the
    newest, a resume is refused, as the checkpoint may be intact.
    """
    run = Undisturbed(tmp_path)
    folder = tmp_path / "whole"
    sound = checkpoint.read_json
    lost = {"step_0000000020"}

    def reads(path: Path, *args: Any) -> Any:
        if path.parent.name in lost:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return sound(path, *args)

    monkeypatch.setattr(checkpoint, "read_json", reads)
    before = sorted(folder.glob("replay/*/*"))
    assert run.train(resume=str(folder), total_steps=80) == 0
    assert record(folder / "checkpoints" / "latest")["step"] == 80
    assert set(before) <= set(folder.glob("replay/*/*"))
    lost |= {"step_0000000080"}
    with pytest.raises(BadRequest, match=r"^resume=.*Permission denied.*; nothing was started$"):
        run.train(resume=str(folder), total_steps=100)
