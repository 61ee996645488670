"""Signals that stop a run, even if an environment sets handlers; SIGHUP does not under nohup."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import own_envs
import pytest
from processes import computed, record, rows, train
from shell import SHORT, spikerl, tree

from spikerl.distributed import launch
from spikerl.distributed.shared_folder import stop_requested
from spikerl.signals import stop_signals
from spikerl.training import evaluator

TAKES = ["env=gym", "env.id=own_envs:Handlers-v0", "total_steps=100000", "energy=none"]


@pytest.mark.parametrize(("number", "status", "state"), [
    (signal.SIGTERM, 75, "preempted"),
    (signal.SIGHUP, 75, "preempted"),
])  # fmt: skip
def test_a_run_answers_them_whoever_else_would(
    tmp_path: Path, number: int, status: int, state: str
) -> None:
    run = train(tmp_path / "home", *TAKES, PYTHONPATH=str(Path(own_envs.__file__).parent))
    metrics = run.home / "run" / "metrics.jsonl"
    run.until(lambda: metrics.exists() and metrics.read_text())  # its handlers are set by then
    assert run.kill(number) == status
    assert record(run.home / "run")["status"] == state


@pytest.fixture
def nohup() -> Iterator[None]:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGHUP, before)


def test_what_nohup_started_goes_on_when_the_terminal_ends(nohup: None, tmp_path: Path) -> None:
    with stop_signals() as stop_signal:
        signal.raise_signal(signal.SIGHUP)
        assert stop_signal() == 0
        signal.raise_signal(signal.SIGTERM)
        assert stop_signal() == signal.SIGTERM
    with launch.forward_signals(tmp_path):
        signal.raise_signal(signal.SIGHUP)
        assert stop_requested(tmp_path) is None
        signal.raise_signal(signal.SIGUSR1)
        assert stop_requested(tmp_path) == signal.SIGUSR1


def test_the_end_of_the_terminal_is_passed_on(tmp_path: Path) -> None:
    with launch.forward_signals(tmp_path):
        signal.raise_signal(signal.SIGHUP)
        assert stop_requested(tmp_path) == signal.SIGHUP
    with stop_signals(
        lambda: stop_requested(tmp_path)
    ) as stop_signal:  # a worker that installed its handlers later
        assert stop_signal() == signal.SIGHUP


# The slope changes over the run, so window_fraction depends on the step at which it is measured.
SLOPES = ["neuron.surrogate=atan", "neuron.surrogate_slope_end=40", "algo.update_interval=40"]


class Strike:
    """Sends this process the signal `number` before step `at` of its evaluations."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.number, self.at, self.steps = 0, 0, 0
        look = evaluator.StopWatch.look

        def striking(watch: evaluator.StopWatch) -> None:
            self.steps += 1
            if self.steps == self.at:
                signal.raise_signal(self.number)
            look(watch)

        patch.setattr(evaluator, "ASK_S", 0.0)
        patch.setattr(evaluator.StopWatch, "look", striking)

    def next(self, number: int, at: int) -> None:
        self.number, self.at, self.steps = number, at, 0


@pytest.mark.slow
def test_a_stop_amid_an_evaluation_which_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped twice during the first evaluation, then before the first step of the last one."""
    monkeypatch.chdir(tmp_path)
    strike = Strike(monkeypatch)
    strike.next(0, 0)
    assert spikerl("train", *SHORT, *SLOPES, "run_dir=whole").status == 0
    whole = rows(tmp_path / "whole")
    assert strike.steps == sum(row["eval_length"] for row in whole)
    assert whole[0]["eval_length"] >= 3
    run = tmp_path / "run"
    ends = [
        (signal.SIGTERM, 75, "preempted", 2, 150, 0),
        (signal.SIGINT, 130, "interrupted", 3, 150, 0),
        (signal.SIGHUP, 75, "preempted", int(whole[0]["eval_length"]) + 1, 300, 1),
    ]
    args = [*SHORT, *SLOPES, "run_dir=run"]
    for number, status, word, at, step, evaluated in ends:
        strike.next(number, at)
        said = spikerl("train", *args)
        assert said.status == status, said.err
        assert strike.steps == at  # none after it
        assert f"stopped at step {step} on {number.name}" in said.out
        assert record(run)["status"] == word
        assert record(run / "checkpoints" / "latest")["step"] == step
        assert len(rows(run)) == record(run, "summary.json")["evaluations"] == evaluated
        args = ["resume=run"]
    strike.next(0, 0)
    assert spikerl("train", *args).status == 0
    assert computed(run) == computed(tmp_path / "whole")
    manifest = record(run)
    assert [event["exact"] for event in manifest["resumed"]] == [True] * 3
    assert all(event["git"] == manifest["git"] != {} for event in manifest["resumed"])
    assert not rows(run, "discarded.jsonl")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_stopped_eval_has_no_result(
    number: signal.Signals, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert spikerl("train", *SHORT, "total_steps=1", "run_dir=run").status == 0
    strike = Strike(monkeypatch)
    strike.next(number, 2)
    said = spikerl("eval", "run=run", "json=true")
    assert (said.status, said.out) == (status, "")
    assert said.err == f"spikerl: stopped on {number.name}; the evaluation has no result\n"
    assert strike.steps == 2


@pytest.fixture
def told() -> Iterator[None]:
    """Set a handler of SIGTERM that fails the test, in place of the default, which ends pytest."""

    def missed(number: int, frame: object) -> None:
        raise AssertionError("nobody listened")

    before = signal.signal(signal.SIGTERM, missed)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    "command",
    [
        ["export", "format=loihi"],
        ["compress", "bits=8", "run_dir=new/small"],
        ["convert", "run_dir=new/spiking", "spike_steps=4"],
        ["compress", "-m", "bits=8,4", "run_dir=new/small"],
    ],
)
def test_commands_that_make_something_leave_nothing(
    command: list[str], told: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    kind = ["actor=mlp"] * (command[0] == "convert")
    assert spikerl("train", *kind, *SHORT, "total_steps=1", "run_dir=run").status == 0
    before = tree(tmp_path)
    strike = Strike(monkeypatch)
    strike.next(signal.SIGTERM, 2)
    said = spikerl(*command, "run=run")
    assert said.status == 75, said.err
    if "-m" in command:
        assert "not started: the sweep was stopped" in said.out
    else:
        assert said.err == "spikerl: stopped on SIGTERM\n"
    assert strike.steps == 2
    assert tree(tmp_path) == before


def test_a_sweep_that_is_stopped_between_two_jobs(
    told: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(
        "spikerl.cli.sweep.Sweep.progress",
        lambda self: signal.raise_signal(signal.SIGTERM) if self.noted() else "",
    )
    said = spikerl("compress", "-m", "bits=8,4", "run=nowhere")
    assert said.status == 75
    assert "0 of 2 jobs done" in said.out
    assert list(tmp_path.iterdir()) == []


def test_a_result_that_is_being_written_is_whole_or_absent(
    told: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here it is absent, and so are the folders above it that were made for it."""
    monkeypatch.chdir(tmp_path)
    assert spikerl("train", *SHORT, "total_steps=1", "run_dir=run").status == 0
    before = tree(tmp_path)
    monkeypatch.setattr(
        "spikerl.commands.compress.write_json", lambda *_: signal.raise_signal(signal.SIGTERM)
    )
    said = spikerl("compress", "run=run", "bits=8", "episodes=1", "run_dir=new/small")
    assert (said.status, said.err) == (75, "spikerl: stopped on SIGTERM\n")
    assert tree(tmp_path) == before
