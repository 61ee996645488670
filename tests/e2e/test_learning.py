"""Every algorithm learns a task with episodes of one step, and none from shuffled rewards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from builders import (
    ddpg_config,
    dqn_config,
    popsan_config,
    ppo_config,
    proxy_td3_config,
    sac_config,
    small_config,
    td3_config,
)
from transitions_env import registered

from spikerl.algos import AlgoConfig
from spikerl.envs.make import make_env, task_of
from spikerl.kernels import build as native
from spikerl.models.actor_config import ActorConfig, MLPConfig
from spikerl.training.trainer import Trainer
from spikerl.types import Resolved

BOX = gym.spaces.Box(-1.0, 1.0, (1,))
STEPS = 1000
# The root mean square error of the actions; if they are always 0, it is 0.577.
LEARNED = 0.15


class Identity(gym.Env[np.ndarray, np.ndarray]):
    """Episodes of one step, whose best action is the observation, uniform in [-1, 1]."""

    observation_space, action_space = BOX, BOX

    def __init__(self, shuffled: bool = False) -> None:
        self.shuffled = shuffled
        self.obs, self.past = np.zeros(1), [0.0] * 100

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.obs = self.np_random.uniform(-1.0, 1.0, 1)
        return self.obs, {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        rew = -(float((action - self.obs)[0]) ** 2)
        if self.shuffled:
            i = int(self.np_random.integers(len(self.past)))
            self.past[i], rew = rew, self.past[i]
        return self.obs, rew, True, False, {}


class Sign(Identity):
    """The same task with two actions: the first is right if the observation is below 0."""

    action_space: Any = gym.spaces.Discrete(2)

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        return super().step(self.obs if action == (self.obs[0] > 0.0) else self.obs + 1.0)


FAST: dict[str, Any] = {
    "batch_size": 32,
    "critic_hidden_sizes": [32, 32],
    "critic_lr": 3e-3,
    "norm_interval": None,
    "norm_clip": None,
}
REPLAYING: dict[str, Any] = {
    "random_steps": 100,
    "learning_starts": 100,
    "update_interval": 10,
    "replay_capacity": STEPS,
    "tau": 0.05,
}
ALGOS: dict[str, AlgoConfig] = {
    "ddpg": ddpg_config(**FAST, **REPLAYING, explore_noise=0.3),
    "td3": td3_config(**FAST, **REPLAYING, explore_noise=0.3),
    "proxy_td3": proxy_td3_config(**FAST, **REPLAYING, explore_noise=0.3, proxy_steps=1),
    "sac": sac_config(**FAST, **REPLAYING, temperature=0.02, log_std_hidden_sizes=[16]),
    "ppo": ppo_config(**FAST, rollout_steps=100, epochs=10, log_std=-1.0),
}
DQN = dqn_config(
    **{key: value for key, value in (FAST | REPLAYING).items() if "critic" not in key},
    epsilon_steps=STEPS,
)


@contextmanager
def trained(
    algo: str, kind: str, seed: int, *, shuffled: bool = False, made: type[Identity] = Identity
) -> Iterator[Trainer]:
    env = registered(made.__name__, made, limit=1, shuffled=shuffled)
    config = small_config(
        env=env, total_steps=STEPS, steps_per_epoch=STEPS, eval_episodes=1, seed=seed
    )
    actor = replace(config.actor, actor=replace(popsan_config([32]), lr=3e-3))
    if kind == "dense":
        dense = MLPConfig(name="mlp", hidden_sizes=[32, 32], lr=3e-3)
        actor = ActorConfig(actor=dense, encoder=None, neuron=None, decoder=None)
    fastest = Resolved(f"cpu/{native.supported_paths()[0]}", "requested")
    config = replace(
        config,
        actor=actor,
        algo=DQN if algo == "dqn" else ALGOS[algo],
        resolved=replace(config.resolved, kernel=fastest),
    )
    with closing(make_env(env)) as one:
        task = task_of(one)
    with closing(Trainer(config, task)) as trainer:
        list(trainer.epochs())
        yield trainer


def error(trainer: Trainer) -> float:
    """The root mean square error of the actions, over observations between -1 and 1."""
    obs = np.linspace(-1.0, 1.0, 101)[:, None]
    return float(np.sqrt(np.square(trainer.policy(obs) - obs).mean()))


@pytest.mark.parametrize("kind", ["spiking", "dense"])
@pytest.mark.parametrize("algo", ALGOS)
def test_it_is_learned(algo: str, kind: str) -> None:
    with trained(algo, kind, seed=0) as trainer:
        assert error(trainer) < LEARNED


@pytest.mark.parametrize(
    "algo",
    [  # ddpg and proxy_td3 learn much as td3 does
        pytest.param(name, marks=pytest.mark.slow if name in ("ddpg", "proxy_td3") else ())
        for name in ALGOS
    ],
)
def test_not_from_shuffled_rewards(algo: str) -> None:
    """Rewards are exchanged between steps; over three seeds, as one may come close by chance."""
    errors = []
    for seed in range(3):
        with trained(algo, "dense", seed, shuffled=True) as trainer:
            assert trainer.algo.updates >= 300
            errors.append(error(trainer))
    assert np.mean(errors) > 2 * LEARNED


def wrong(trainer: Trainer) -> float:
    """The share of observations between -1 and 1 for which the policy takes the other action."""
    obs = np.linspace(-1.0, 1.0, 100)[:, None]
    return float((trainer.policy(obs) != (obs[:, 0] > 0.0)).mean())


@pytest.mark.parametrize("algo", ["dqn", "ppo"])
def test_of_two_actions_the_right_one_is_learned(algo: str) -> None:
    with trained(algo, "spiking", seed=0, made=Sign) as trainer:
        assert wrong(trainer) < 0.1


@pytest.mark.parametrize("algo", ["dqn", "ppo"])
def test_of_two_actions_none_is_from_shuffled_rewards(algo: str) -> None:
    shares = []
    for seed in range(2):
        with trained(algo, "dense", seed, shuffled=True, made=Sign) as trainer:
            shares.append(wrong(trainer))
    assert np.mean(shares) > 0.2
