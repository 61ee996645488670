"""The policy that evaluated best is kept beside the last one, unless its row was discarded."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import INVERTED_PENDULUM
from exports import config, policy_of, saved
from recorded import task_for
from shell import SHORT, spikerl

from spikerl import load_policy
from spikerl.snn.decoders import DecoderConfig
from spikerl.snn.encoders import EncoderConfig
from spikerl.training.evaluator import Evaluation, Evaluator

RUN = Path("r")


@pytest.fixture
def returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A list of the returns that evaluations in training will have, in order."""
    monkeypatch.chdir(tmp_path)
    script: list[float] = []
    run = Evaluator.run

    def scripted(self: Evaluator, policy: Any, evaluation: int, *stop: Any) -> Evaluation:
        result = run(self, policy, evaluation, *stop)
        return replace(result, returns=[script[evaluation - 1]]) if evaluation else result

    monkeypatch.setattr(Evaluator, "run", scripted)
    return script


def train(*args: str) -> None:
    said = spikerl("train", *args)
    assert said.status == 0, said.err


def files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("policy.json", "policy.safetensors")}


def checkpoint(step: int) -> Path:
    return RUN / f"checkpoints/step_{step:010d}"


def test_the_best_is_that_of_its_step(returns: list[float]) -> None:
    returns += [5.0, 9.0, 9.0]  # the first of equal returns is kept
    train(*SHORT, "total_steps=450", "run_dir=r")
    best = files(checkpoint(300))
    assert best != files(checkpoint(450)) == files(RUN)
    assert files(RUN / "best") == best
    assert files(checkpoint(450) / "best") == best
    assert load_policy(RUN, policy="best").norm.count == 300
    assert load_policy(RUN).norm.count == 450


def test_eval_and_init_from(returns: list[float]) -> None:
    returns += [5.0, 4.0]
    train(*SHORT, "run_dir=r")
    answers = [
        json.loads(spikerl("eval", "run=r", "episodes=1", "json=true", f"policy={policy}").out)
        for policy in ("last", "best")
    ]
    assert all(answer["episodes"] == 1 for answer in answers)
    first = load_policy(RUN, policy="best").actor.state_dict()
    train(*SHORT, "init_from=r", "init_policy=best", "run_dir=on")
    begun = load_policy("on/checkpoints/step_0000000000").actor.state_dict()
    last = load_policy(RUN).actor.state_dict()
    assert all(np.array_equal(begun[name], first[name]) for name in first)
    assert not all(np.array_equal(last[name], first[name]) for name in first)
    train("config=on/config.yaml", "init_from=null", "total_steps=150", "run_dir=anew")


def test_before_the_end(returns: list[float]) -> None:
    """A run that was killed has the best policy in its checkpoint."""
    returns += [5.0, 4.0]
    train(*SHORT, "run_dir=r")
    best = files(RUN / "best")
    shutil.rmtree(RUN / "best")
    assert load_policy(RUN, policy="best").norm.count == 150
    (RUN / "checkpoints/latest").unlink()
    assert load_policy(RUN, policy="best").norm.count == 150
    assert files(checkpoint(300) / "best") == best


def test_it_survives_a_resume(returns: list[float]) -> None:
    """The best policy is kept even if the checkpoint of its step was removed."""
    returns += [9.0, 1.0, 2.0, 3.0, 4.0, 9.5]
    train(*SHORT, "total_steps=450", "run_dir=r")
    best = files(RUN / "best")
    train("resume=r", "total_steps=750")
    assert not checkpoint(150).exists()
    assert files(RUN / "best") == best
    train("resume=r", "total_steps=900")
    assert files(RUN / "best") == files(checkpoint(900)) != best


def test_a_best_of_discarded_rows_does_not(returns: list[float]) -> None:
    """If its row was discarded, the best one before counts, until a better one follows."""
    returns += [5.0, 9.0, 4.0]
    train(*SHORT, "run_dir=r")
    assert files(RUN / "best") == files(checkpoint(300))
    shutil.copytree(RUN, "copy", symlinks=True)
    (checkpoint(300) / "manifest.json").write_text("{}")
    returns[1] = 4.5
    train("resume=r", "total_steps=450")
    assert json.loads((RUN / "discarded.jsonl").read_text())["eval_return"] == 9.0
    assert files(RUN / "best") == files(checkpoint(150))
    shutil.rmtree(RUN)
    shutil.move("copy", RUN)
    (checkpoint(300) / "manifest.json").write_text("{}")
    returns[1] = 6.0  # less than the discarded 9
    train("resume=r", "total_steps=450")
    assert files(RUN / "best") == files(checkpoint(300))


def test_a_resumed_run_has_no_best_of_its_end(returns: list[float]) -> None:
    """Until the run ends again, the best policy is that of its checkpoint."""
    returns += [5.0, 9.0]
    train(*SHORT, "run_dir=r")
    from spikerl.runs.folder import remove_results

    for name in ("evaluation.json", "POLICY.md"):  # results of the policy's file
        (RUN / name).touch()
    remove_results(RUN)
    assert not list((RUN / "best").iterdir())
    assert not (RUN / "evaluation.json").exists()
    assert not (RUN / "POLICY.md").exists()
    assert load_policy(RUN, policy="best").norm.count == 300


def test_a_damaged_best_is_a_damaged_checkpoint(returns: list[float]) -> None:
    returns += [5.0, 4.0, 3.0]
    train(*SHORT, "run_dir=r")
    path = checkpoint(300) / "best/policy.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    said = spikerl("train", "resume=r", "total_steps=450")
    assert said.status == 0, said.err
    assert "step_0000000300 is damaged (policy.safetensors has changed)" in said.out


def test_refused(returns: list[float]) -> None:
    returns += [5.0, 4.0]
    train(*SHORT, "run_dir=r")
    assert spikerl("eval", "run=r", "policy=worst").line == "policy=worst: give last or best"
    line = spikerl("train", "init_from=r", "init_policy=worst").line
    assert line == "init_policy=worst: give last or best"
    said = spikerl("eval", "run=r/checkpoints/step_0000000000", "policy=best")
    assert said.line == (
        "run=r/checkpoints/step_0000000000: no best policy there: a run has one once it was"
        " evaluated; give policy=last"
    )
    said = spikerl("train", "init_from=r/checkpoints/step_0000000000", "init_policy=best")
    assert said.line.endswith("; give init_policy=last")


@pytest.mark.parametrize(("encoder", "decoder"), [("learned", "linear"), ("direct", "learned")])
def test_learned_coders_have_weights_for_each_spike_step(
    encoder: str, decoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The policy has weights for five spike steps, so a run with seven or four is refused."""
    monkeypatch.chdir(tmp_path)
    parts = {"encoder": EncoderConfig(name=encoder), "decoder": DecoderConfig(name=decoder)}
    saved(policy_of(config([16], **parts), task_for(INVERTED_PENDULUM)), Path("r"))
    own = [*SHORT, f"encoder={encoder}", f"decoder={decoder}", "total_steps=10", "run_dir=on"]
    kind = f"popsan [16] with {encoder}, cuba_lif, {decoder}, populations None, None"
    for steps in (7, 4):
        line = f"init_from=r: its actor is {kind}, 5 spike steps, this run's is {kind}, {steps} spi"
        said = spikerl("train", *own, "init_from=r", f"actor.spike_steps={steps}")
        assert said.line.startswith(line)
    train(*own, "init_from=r", "actor.spike_steps=5")
