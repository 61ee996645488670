"""A run while it runs: what it refuses to go on from, and how it goes on."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from shell import SHORT, refusal, spikerl

from spikerl.errors import PREEMPTED, Stopped
from spikerl.training.evaluator import Evaluation, Evaluator
from spikerl.training.session import Session


def test_a_checkpoint_of_another_run_is_refused_in_a_line(tmp_path: Path) -> None:
    class Session_(Session):
        def __init__(self, trainer: Any) -> None:
            self.trainer, self.folder = trainer, tmp_path

    class Broken:
        def load(self, checkpoint: Any) -> bool:
            raise RuntimeError("first\nsecond")

    named: Any = type("Named", (), {"folder": tmp_path / "step_7"})
    line = str(refusal(Session_(Broken()).restore, named))
    assert line == f"resume={tmp_path}: its step_7 does not fit this run (RuntimeError: first)"


def test_an_evaluation_that_is_stopped_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command that is printed goes on, though the last step went beyond total_steps, and what
    each attempt spent is kept.
    """
    monkeypatch.chdir(tmp_path)
    run, stops, spent = Evaluator.run, [0, 0], []

    def stopped(self: Evaluator, policy: Any, evaluation: int, *stop: Any) -> Evaluation:
        if evaluation and stops:
            stops.pop()
            raise Stopped(signal.SIGTERM)
        return run(self, policy, evaluation, *stop)

    monkeypatch.setattr(Evaluator, "run", stopped)
    request = [*SHORT, "num_envs=2", "total_steps=151", "steps_per_epoch=200", "run_dir=r"]
    for args in (request, ["resume=r"]):
        said = spikerl("train", *args)
        assert said.status == PREEMPTED, said.err
        assert "stopped at step 152 on SIGTERM; spikerl train resume=r goes on" in said.out
        notes = json.loads((tmp_path / "r/checkpoints/latest/worker_0.json").read_text())
        spent.append(notes["progress"]["cpu_s"])
    assert 0.0 < spent[0] < spent[1]
    said = spikerl("train", "resume=r")
    assert (said.status, said.err) == (0, "")
    assert "r is done at step 152" in spikerl("train", "resume=r").out
    line = spikerl("train", "resume=r", "total_steps=150").line
    assert line == "total_steps=150: the run is at step 152; give that or more"
