"""The ONNX file, run by onnxruntime and compared with the policy."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from exports import POLICIES, config, policy_of, saved, task
from shell import refusal, spikerl

from spikerl.export import contract, onnx, proof
from spikerl.models.policy import Policy


def interpreter(policy: Policy, folder: Path) -> onnx.Interpreter:
    file = folder / "policy.onnx"
    onnx.write(policy, file)
    return onnx.Interpreter(file, contract.describe("onnx", policy, None), folder)


@pytest.mark.parametrize("name", POLICIES)
def test_it_acts_as_the_policy(name: str, tmp_path: Path) -> None:
    policy = policy_of(POLICIES[name], task())
    proven = proof.prove(policy, interpreter(policy, tmp_path), None, 1, 0)
    assert proven["observations"] >= 1000
    widths = {"popsan": 30 + 12 + 9 + 20, "converted": 12 + 9, "dense": 0}
    if name in widths:
        assert proven["spikes_compared"] == proven["observations"] * 5 * widths[name]


def test_any_batch(tmp_path: Path) -> None:
    policy = policy_of(config(), task())
    file = interpreter(policy, tmp_path)
    obs = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    one_by_one = np.concatenate([file.actions(obs[i : i + 1]) for i in range(7)])
    np.testing.assert_allclose(file.actions(obs), one_by_one, atol=1e-6)
    assert len(np.unique(one_by_one, axis=0)) > 1


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(onnx, "find_spec", lambda p: None if p == "onnxruntime" else real(p))
    assert str(refusal(onnx.check_here)) == (
        "format=onnx: onnxruntime is not installed; pip install 'spikerl[onnx]'"
    )


def test_export(tmp_path: Path) -> None:
    run = saved(policy_of(config(), task()), tmp_path / "run")
    file = tmp_path / "small.onnx"
    said = spikerl("export", f"run={run}", "format=onnx", f"file={file}")
    assert said.status == 0, said
    assert said.out.splitlines()[2] == (
        "Nowhere-v0 is not registered here: observations drawn, no return;"
        " env_id=MODULE:NAME imports the module that registers it"
    )
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"run", "small.onnx", "small.onnx.json"}
    weights = (run / "policy.safetensors").read_bytes()
    assert json.loads((tmp_path / "small.onnx.json").read_text())["made_from"] == {
        "command": f"spikerl export run={run} format=onnx file={file}",
        "run": str(run), "policy": "last", "sha256": hashlib.sha256(weights).hexdigest(),
    }  # fmt: skip
