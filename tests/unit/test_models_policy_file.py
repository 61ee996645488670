"""A policy's files: a loaded policy acts as before; files run no code and refer to no others."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import builders
import numpy as np
import pytest
import torch
from builders import HIGH, LOW, toy_policy
from safetensors.torch import load_file
from shell import refusal

from spikerl.runs.policies import load_policy

DENSE = builders.dense_config([7])
OBS = np.random.default_rng(2).normal(3.0, 4.0, (9, 4))
CONFIGS = {
    "popsan": builders.spiking(builders.POPULATION),
    "poisson": builders.spiking(builders.POISSON),
    "mlp": DENSE,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back(name: str, tmp_path: Path) -> None:
    before = toy_policy(CONFIGS[name])
    before.save(tmp_path)
    after = load_policy(tmp_path)
    assert after.config == before.config
    assert (after.task.env_id, after.task.obs_shape, after.task.max_episode_steps) == (
        "Toy-v0", (4,), 10,
    )  # fmt: skip
    assert (after.norm.count, after.norm.clip) == (50, 2.5)
    np.testing.assert_array_equal(after.norm.mean_O, before.norm.mean_O)
    for _ in range(2):  # a Poisson encoder draws on from the same state
        np.testing.assert_array_equal(after(OBS), before(OBS))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_copy_of_a_copy_has_the_same_bytes(name: str, tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    second.mkdir()
    toy_policy(CONFIGS[name]).save(first)
    data = json.loads((first / "policy.json").read_text())
    data["versions"]["mujoco"] = "0.1"  # as of another machine
    (first / "policy.json").write_text(json.dumps(data))
    load_policy(first).save(second)
    assert json.loads((second / "policy.json").read_text()) == data
    for file in ("policy.json", "policy.safetensors"):
        load_policy(second).save(first)
        assert (first / file).read_bytes() == (second / file).read_bytes()


def test_what_the_files_hold(tmp_path: Path) -> None:
    policy = toy_policy(CONFIGS["popsan"])
    policy.save(tmp_path)
    data = json.loads((tmp_path / "policy.json").read_text())
    assert (data["act_low"], data["act_high"]) == (LOW.tolist(), HIGH.tolist())
    assert (data["env_id"], data["obs_shape"], data["act_shape"]) == ("Toy-v0", [4], [3])
    assert data["actor"]["hidden_sizes"] == [6, 5]
    assert data["neuron"]["name"] == "cuba_lif"
    assert data["versions"]["torch"] == torch.__version__
    tensors = load_file(tmp_path / "policy.safetensors")
    assert {f"actor.{k}" for k in policy.actor.state_dict()} == {
        k for k in tensors if k.startswith("actor.")
    }
    assert {k for k in tensors if k.startswith("norm.")} == {"norm.count", "norm.mean", "norm.var"}
    assert tensors["norm.mean"].dtype == torch.float64
    assert sorted(p.name for p in tmp_path.iterdir()) == ["policy.json", "policy.safetensors"]


HOSTILE: dict[str, dict[str, Any]] = {
    "many layers": {"actor": {"name": "mlp", "hidden_sizes": [1] * 100_000, "lr": 1.0}},
    "long": {"act_low": [0.0] * 500_000},
    "environment": {"actor": {"name": "mlp", "hidden_sizes": [7], "lr": "${oc.decode:'0.1'}"}},
    "variable": {"env_id": "${oc.env:HOME}"},
    "key": {"${oc.env:HOME}": 1},
    "escapes": {"env_id": "Toy-v0\x1b[2J"},
    "lines": {"versions": {"mujoco": "1\nspikerl: all is well"}},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "secret")
    toy_policy(DENSE).save(tmp_path)
    data = json.loads((tmp_path / "policy.json").read_text()) | HOSTILE[name]
    (tmp_path / "policy.json").write_text(json.dumps(data))
    began = time.perf_counter()
    line = str(refusal(load_policy, tmp_path))
    assert time.perf_counter() - began < 2.0
    assert "secret" not in line
    assert line.isprintable()
