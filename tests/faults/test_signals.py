"""Signals that stop a run, also where an environment takes them, and one that need not."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import own_envs
import pytest
from processes import record, train

from spikerl.commands.train import stop_signals
from spikerl.distributed import launch

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
    run.until(lambda: metrics.exists() and metrics.read_text())  # it has taken them by then
    assert run.kill(number) == status
    assert record(run.home / "run")["status"] == state


@pytest.fixture
def nohup() -> Iterator[None]:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGHUP, before)


def test_what_nohup_started_goes_on_when_the_terminal_ends(nohup: None, tmp_path: Path) -> None:
    with stop_signals(None) as received:
        signal.raise_signal(signal.SIGHUP)
        assert received == []
        signal.raise_signal(signal.SIGTERM)
        assert received == [signal.SIGTERM]
    with launch.forward_signals(tmp_path):
        signal.raise_signal(signal.SIGHUP)
        assert launch.stop_requested(tmp_path) is None
        signal.raise_signal(signal.SIGUSR1)
        assert launch.stop_requested(tmp_path) == signal.SIGUSR1


def test_the_end_of_the_terminal_is_passed_on(tmp_path: Path) -> None:
    with launch.forward_signals(tmp_path):
        signal.raise_signal(signal.SIGHUP)
        assert launch.stop_requested(tmp_path) == signal.SIGHUP
    with stop_signals(tmp_path) as received:  # a worker that had not listened yet
        assert received == [signal.SIGHUP]
