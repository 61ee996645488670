"""A run folder of version 0.1: it resumes to the same numbers, and its policy acts as it did."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from shell import spikerl

from spikerl.envs.config import EnvConfig
from spikerl.runs.policies import load_policy
from spikerl.training.evaluator import Evaluator

REFERENCE = Path(__file__).parents[1] / "reference"
RUN, RESUMED = REFERENCE / "run_0.1", REFERENCE / "run_0.1_resumed"
MEASURED = ("cpu_s", "env_steps_per_s", "updates_per_s", "wall_s")


def rows(run: Path) -> list[dict[str, Any]]:
    """The rows of a run without the fields that depend on a clock."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in lines]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("old") / "run"
    shutil.copytree(RUN, run, symlinks=True)
    said = spikerl("train", f"resume={run}", "total_steps=450")
    assert said.status == 0, said.err
    return run


def test_a_run_resumes_exactly(resumed: Path) -> None:
    manifest = json.loads((resumed / "manifest.json").read_text())
    assert manifest["status"] == "done"
    assert [event["step"] for event in manifest["resumed"]] == [300]
    reason = manifest["resumed"][0]["not_exact_because"]
    assert reason == "an earlier version of this program saved it"
    ours, theirs = rows(resumed), rows(RESUMED)
    assert [row["step"] for row in theirs] == [150, 300, 450]
    assert ours[:2] == theirs[:2] == rows(RUN)
    new = {"macs", "acs", "modelled_45nm_nj", "modelled_memory_nj"}
    assert ours[2].keys() == theirs[2].keys() | new
    for name, value in theirs[2].items():
        if isinstance(value, float | list):
            np.testing.assert_allclose(ours[2][name], value, rtol=1e-5, err_msg=name)
        else:
            assert ours[2][name] == value, name


def test_it_learns_the_same_policy(resumed: Path) -> None:
    """The tolerance is for other machines, whose products may round the last bits otherwise."""
    before, theirs, ours = (
        load_file(run / "policy.safetensors") for run in (RUN, RESUMED, resumed)
    )
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        assert ours[name].dtype == values.dtype
        np.testing.assert_allclose(ours[name], values, rtol=1e-5, atol=1e-7, err_msg=name)
    moved = [name for name in theirs if not np.array_equal(before[name], theirs[name])]
    assert {"actor.layers.0.weight_IN", "norm.mean"} <= set(moved)


def test_a_policy_acts_as_it_did() -> None:
    """Repeating the evaluation of epoch 2 gives its return and length, and the firing rates."""
    config = EnvConfig(
        name="InvertedPendulum",
        version="v5",
        id="InvertedPendulum-v5",
        max_episode_steps=30,
        vectorizer="sync",
    )
    policy, row = load_policy(RUN), rows(RUN)[1]
    with closing(Evaluator(config, 2, run_seed=5)) as evaluator:
        evaluator.seed_bits = 63  # version 0.1 seeded resets with 63 bits
        found = evaluator.run(policy, 2)
    assert (found.mean, found.length) == (row["eval_return"], row["eval_length"])
    assert found.activity is not None
    assert found.activity.layers == row["layer_firing_rates"]
    assert found.activity.layer_windows == row["layer_window_fractions"]
    said = spikerl("eval", f"run={RUN}", "episodes=2", "json=true")
    assert said.status == 0, said.err
    assert json.loads(said.out)["env_id"] == "InvertedPendulum-v5"
