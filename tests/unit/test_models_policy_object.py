"""A policy as an object: copied, pickled, forked, and as Stable-Baselines3 calls it."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import time
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import builders
import numpy as np
import pytest
import torch

import spikerl
from spikerl import kernels
from spikerl.kernels import KernelConfig
from spikerl.models.actor import SpikingActor
from spikerl.models.networks import build_actor
from spikerl.models.normalizer import RunningNorm
from spikerl.models.policy import Policy
from spikerl.runs.policies import load_policy
from spikerl.types import Task

CONFIGS = {
    "popsan": builders.spiking(builders.POPULATION),
    "poisson": builders.spiking(builders.POISSON),
    "mlp": builders.dense_config([7]),
}


def make(name: str, env_id: str = "Toy-v0", obs_dim: int = 4) -> Policy:
    bound = np.full(1, 3.0)
    task = Task(env_id, (obs_dim,), (1,), -bound, bound, 10)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kernel = kernels.resolve(KernelConfig(name="auto", path=None), "cpu").choice
        actor = build_actor(CONFIGS[name], obs_dim, 1, kernel=kernel)
    norm = RunningNorm(obs_dim, 2.5)
    norm.add(np.random.default_rng(1).normal(3.0, 2.0, (50, obs_dim)))
    norm.merge([norm.collect()])
    return Policy(task, CONFIGS[name], actor, norm)


OBS = np.random.default_rng(2).normal(3.0, 4.0, (9, 4))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_acts_alike(name: str, way: str) -> None:
    policy = make(name)
    policy.trained_with = {"torch": "0.1"}
    policy(OBS)  # a copy has the state of a Poisson encoder's generator
    twin = copy.deepcopy(policy) if way == "deepcopy" else pickle.loads(pickle.dumps(policy))
    for obs in (OBS, OBS[0], OBS[1]):
        np.testing.assert_array_equal(twin(obs), policy(obs))
    assert twin.trained_with == {"torch": "0.1"}
    assert (twin.one_action is None) == (policy.one_action is None)


def test_a_copy_is_no_view() -> None:
    policy = make("popsan")
    before = policy(OBS)
    twin = copy.deepcopy(policy)
    with torch.no_grad():
        for p in twin.actor.parameters():
            p.zero_()
    twin.norm.mean_O += 1.0
    np.testing.assert_array_equal(policy(OBS), before)
    assert not np.array_equal(twin(OBS), before)


def test_a_pickle_of_another_processor() -> None:
    """The kernel named in the pickle does not exist here; its replacement acts the same."""
    policy = make("popsan")
    assert isinstance(policy.actor, SpikingActor)
    policy.actor.kernel = "cpu/strange"
    twin = pickle.loads(pickle.dumps(policy))
    chosen = kernels.resolve(KernelConfig(name="auto", path=None), "cpu").choice
    assert twin.actor.kernel == chosen
    np.testing.assert_allclose(twin(OBS), make("popsan")(OBS), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    "obs",
    [
        np.full(4, "1"),
        np.full((2, 4), b"1"),
        np.ones(4, complex),
        np.array([1.0, None, 2.0, 3.0]),
        np.zeros(4, "datetime64[s]"),
    ],
    ids=["words", "bytes", "complex", "objects", "dates"],
)
def test_other_than_numbers(name: str, obs: np.ndarray) -> None:
    with pytest.raises(TypeError, match="real numbers are needed"):
        make(name)(obs)


@pytest.mark.parametrize("kind", ["float16", "float64", "int64", "uint8", "bool"])
def test_numbers_of_every_kind(kind: str) -> None:
    policy = make("popsan")
    obs = np.array([0, 1, 1, 0]).astype(kind)
    np.testing.assert_array_equal(policy(obs), policy(np.array([0.0, 1.0, 1.0, 0.0])))


def in_a_child(work: Any, seconds: float = 30.0) -> int | None:
    """The exit status of a forked child that does `work`; None if it hangs."""
    if (child := os.fork()) == 0:
        status = 9
        try:
            status = int(not work())
        finally:
            os._exit(status)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("name", ["popsan", "mlp"])
def test_a_forked_child_acts(name: str, tmp_path: Path) -> None:
    """A forked child can act, although the threads of its parent's pool do not exist in it."""
    policy = make(name)
    policy.save(tmp_path)
    batch = np.repeat(OBS, 300, 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        wanted = policy(batch)
        torch.ones(1 << 20).sum()  # starts the pool, whichever kernel acts

        def acts() -> bool:
            return np.allclose([policy(batch), load_policy(tmp_path)(batch)], wanted, atol=1e-6)

        assert in_a_child(acts) == 0
        if policy.one_action is not None:
            with policy.one_action.lock:  # as held by another thread at the time of the fork
                assert in_a_child(lambda: policy(OBS[0]).shape == (1,)) == 0
        np.testing.assert_array_equal(policy(batch), wanted)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_predict() -> None:
    policy = make("popsan")
    act, state = policy.predict(OBS, state=None, episode_start=np.ones(9, bool), deterministic=True)
    np.testing.assert_array_equal(act, policy(OBS))
    assert state is None
    np.testing.assert_array_equal(policy.predict(OBS[0])[0], policy(OBS[0]))
    with pytest.raises(ValueError, match="no exploration noise"):
        policy.predict(OBS, deterministic=False)


def test_stable_baselines_evaluates_it() -> None:
    gymnasium = import_module("gymnasium")
    evaluation = import_module("stable_baselines3.common.evaluation")
    policy = make("popsan", "Pendulum-v1", obs_dim=3)
    env = gymnasium.make("Pendulum-v1", max_episode_steps=20)
    obs, _ = env.reset(seed=5)
    wanted = 0.0
    for _ in range(20):
        obs, rew, *_ = env.step(policy(obs))
        wanted += rew
    vectors = import_module("stable_baselines3.common.vec_env").DummyVecEnv
    monitor = import_module("stable_baselines3.common.monitor").Monitor
    envs = vectors([lambda: monitor(gymnasium.make("Pendulum-v1", max_episode_steps=20))])
    envs.seed(5)
    returns, lengths = evaluation.evaluate_policy(
        policy, envs, n_eval_episodes=1, return_episode_rewards=True
    )
    assert lengths == [20]
    assert returns[0] == pytest.approx(wanted, rel=1e-5)


def test_the_version() -> None:
    assert spikerl.__version__ == metadata.version("spikerl")
