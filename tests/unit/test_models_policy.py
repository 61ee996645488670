"""A policy's actions: in the environment's units, for one observation or many."""

from __future__ import annotations

from pathlib import Path

import builders
import numpy as np
import pytest
from builders import HIGH, LOW, toy_policy
from safetensors.torch import load_file

import spikerl
from spikerl.runs.policies import load_policy

DENSE = builders.dense_config([7])
CONFIGS = {"popsan": builders.spiking(builders.POPULATION), "mlp": DENSE}


def some_obs(*shape: int) -> np.ndarray:
    return np.random.default_rng(2).normal(3.0, 4.0, shape)


@pytest.mark.parametrize("name", ["popsan", "mlp"])
def test_one_observation_or_many(name: str, tmp_path: Path) -> None:
    toy_policy(CONFIGS[name]).save(tmp_path)
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
    """The dense actor's equations, written out."""
    policy = toy_policy(DENSE)
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
    toy_policy(DENSE, (2, 3)).save(tmp_path)
    policy = load_policy(tmp_path)
    obs = some_obs(4, 2, 3)
    assert policy(obs).shape == (4, 3)
    assert policy(obs[0]).shape == (3,)
    for wrong in (obs[0, 0], obs.reshape(4, 6), obs[None]):
        with pytest.raises(ValueError, match="obs has shape"):
            policy(wrong)
