"""A policy as one artefact: what is saved acts as before, in the environment's units."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import builders
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from shell import refusal

import spikerl
from spikerl import kernels
from spikerl.errors import BadRequest
from spikerl.kernels import KernelConfig
from spikerl.models.actor import ActorConfig, build_actor
from spikerl.models.normalizer import RunningNorm
from spikerl.models.policy import Policy, find_policy, load_policy
from spikerl.types import Task

LOW, HIGH = np.array([-1.0, 0.0, -3.0]), np.array([2.0, 0.4, -1.0])
DENSE = builders.dense_config([7])


CONFIGS = {
    "popsan": builders.spiking(builders.POPULATION),
    "poisson": builders.spiking(builders.POISSON),
    "mlp": DENSE,
}


def make(config: ActorConfig, obs_shape: tuple[int, ...] = (4,)) -> Policy:
    task = Task("Toy-v0", obs_shape, (3,), LOW, HIGH, 10)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kernel = kernels.resolve(KernelConfig(name="auto", path=None), "cpu").choice
        actor = build_actor(config, task.obs_dim, 3, kernel=kernel)
    norm = RunningNorm(task.obs_dim, 2.5)
    norm.add(np.random.default_rng(1).normal(3.0, 2.0, (50, task.obs_dim)))
    norm.merge([norm.collect()])
    return Policy(task, config, actor, norm)


def some_obs(*shape: int) -> np.ndarray:
    return np.random.default_rng(2).normal(3.0, 4.0, shape)


@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back(name: str, tmp_path: Path) -> None:
    before = make(CONFIGS[name])
    before.save(tmp_path)
    after = load_policy(tmp_path)
    assert after.config == before.config
    assert (after.task.env_id, after.task.obs_shape, after.task.max_episode_steps) == (
        "Toy-v0", (4,), 10,
    )  # fmt: skip
    assert (after.norm.count, after.norm.clip) == (50, 2.5)
    np.testing.assert_array_equal(after.norm.mean_O, before.norm.mean_O)
    obs = some_obs(9, 4)
    for _ in range(2):  # a Poisson encoder goes on from the same generator
        np.testing.assert_array_equal(after(obs), before(obs))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_copy_of_a_copy_has_the_same_bytes(name: str, tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    second.mkdir()
    make(CONFIGS[name]).save(first)
    data = json.loads((first / "policy.json").read_text())
    data["versions"]["mujoco"] = "0.1"  # as if it came from elsewhere
    (first / "policy.json").write_text(json.dumps(data))
    load_policy(first).save(second)
    assert json.loads((second / "policy.json").read_text()) == data
    for file in ("policy.json", "policy.safetensors"):
        load_policy(second).save(first)
        assert (first / file).read_bytes() == (second / file).read_bytes()


def test_what_the_files_hold(tmp_path: Path) -> None:
    policy = make(CONFIGS["popsan"])
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


@pytest.mark.parametrize("name", ["popsan", "mlp"])
def test_one_observation_or_many(name: str, tmp_path: Path) -> None:
    make(CONFIGS[name]).save(tmp_path)
    policy = spikerl.load_policy(str(tmp_path))
    obs = some_obs(5, 4)
    batch = policy(obs)
    assert batch.shape == (5, 3)
    assert batch.dtype == np.float32
    for one, act in zip(obs, batch, strict=True):
        assert policy(one).shape == (3,)
        np.testing.assert_allclose(policy(one), act, rtol=0, atol=1e-6)
    assert ((batch >= LOW) & (batch <= HIGH)).all()
    assert policy(np.zeros((0, 4))).shape == (0, 3)
    np.testing.assert_array_equal(policy(obs.tolist()), batch)


def test_actions_are_the_actors_in_the_environments_units(tmp_path: Path) -> None:
    """Equation by equation, for the dense actor."""
    policy = make(DENSE)
    policy.save(tmp_path)
    tensors = {k: t.double().numpy() for k, t in load_file(tmp_path / "policy.safetensors").items()}
    obs = some_obs(6, 4)
    std = np.sqrt(tensors["norm.var"] + np.finfo(np.float32).eps)
    x = np.clip((obs - tensors["norm.mean"]) / std, -2.5, 2.5)
    x = np.maximum(x @ tensors["actor.layers.0.weight_IN"] + tensors["actor.layers.0.bias_N"], 0)
    x = np.tanh(x @ tensors["actor.layers.1.weight_IN"] + tensors["actor.layers.1.bias_N"])
    wanted = LOW + (x + 1) / 2 * (HIGH - LOW)
    np.testing.assert_allclose(load_policy(tmp_path)(obs), wanted, rtol=0, atol=1e-6)


def test_shaped_observations(tmp_path: Path) -> None:
    make(DENSE, (2, 3)).save(tmp_path)
    policy = load_policy(tmp_path)
    obs = some_obs(4, 2, 3)
    assert policy(obs).shape == (4, 3)
    assert policy(obs[0]).shape == (3,)
    for wrong in (obs[0, 0], obs.reshape(4, 6), obs[None]):
        with pytest.raises(ValueError, match="obs has shape"):
            policy(wrong)


def test_the_final_policy_before_a_checkpoints(tmp_path: Path) -> None:
    latest = tmp_path / "checkpoints" / "latest"
    latest.mkdir(parents=True)
    make(DENSE).save(latest)
    assert find_policy(tmp_path, key="run") == latest
    make(DENSE).save(tmp_path)
    assert find_policy(tmp_path, key="run") == tmp_path


@pytest.mark.parametrize("name", ["x" * 300, "policy.json", "", "\0"])
def test_no_folder(name: str, tmp_path: Path) -> None:
    make(DENSE).save(tmp_path)
    with pytest.raises(BadRequest, match="no policy there"):
        load_policy(tmp_path / "below" / name)


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
    make(DENSE).save(tmp_path)
    data = json.loads((tmp_path / "policy.json").read_text()) | HOSTILE[name]
    (tmp_path / "policy.json").write_text(json.dumps(data))
    began = time.perf_counter()
    line = str(refusal(load_policy, tmp_path))
    assert time.perf_counter() - began < 2.0
    assert "secret" not in line
    assert line.isprintable()
