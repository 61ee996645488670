"""What an environment must not do: each is reported with the step, before anything is stored."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from builders import small_config
from transitions_env import COUNTER, CounterEnv, registered

from spikerl.envs import vector as envs
from spikerl.envs.config import EnvConfig
from spikerl.envs.make import DEFAULT_EPISODE_STEPS, make_env, task_of
from spikerl.errors import BadRequest, EnvironmentFailed, NonFinite
from spikerl.training.evaluator import Evaluator
from spikerl.training.state import shard_of
from spikerl.training.trainer import Trainer

AT = 23


class OddEnv(CounterEnv):
    """From step AT on, part number `part` of what a step returns is `odd`; below 0, a reset's
    observation.
    """

    def __init__(self, part: int, odd: Any) -> None:
        super().__init__()
        self.part, self.odd = part, odd

    def reset(self, **kwargs: Any) -> Any:
        obs, info = super().reset(**kwargs)
        return (self.odd if self.part < 0 and len(self.seeds) == 4 else obs), info

    def step(self, action: np.ndarray) -> Any:
        answer = list(super().step(action))
        if self.lived >= AT and self.part >= 0:
            if isinstance(self.odd, Exception):
                raise self.odd
            answer[self.part] = self.odd
        return tuple(answer)


ODD = {
    "short": (0, np.zeros(1), r"an observation \(1,\) of float64; its space says \(2,\)"),
    "turned": (0, np.zeros((1, 2)), r"an observation \(1, 2\)"),
    "scalar": (0, 0.0, r"an observation \(\)"),
    "words": (0, np.array(["1", "2"]), "of <U1"),
    "complex": (0, np.zeros(2, complex), "of complex128"),
    "objects": (0, [None, 1.0], "of object"),
    "ragged": (0, [[1.0], 2.0], "raised ValueError"),
    "nothing": (0, None, "of object"),
    "a word for a reward": (1, "1.5", "returned '1.5' as reward, which is not a number"),
    "no reward": (1, None, "returned None as reward"),
    "two rewards": (1, np.zeros(2), "as reward, which is not a number"),
    "complex reward": (1, 1j, "as reward"),
    "a word for an end": (2, "False", "as terminated, which is not a bool"),
    "ends": (3, np.zeros(2, bool), "as truncated, which is not a bool"),
    "raises": (1, KeyError("joint"), "raised KeyError: 'joint'"),
    "too large": (0, np.array([0.0, 1e39]), "NaN or infinite observation"),
    "reward too large": (1, -1e39, "NaN or infinite reward"),
}


@contextmanager
def trainer_of(env: EnvConfig, **settings: Any) -> Iterator[Trainer]:
    training = small_config(env=env, eval_episodes=1, learning_starts=5, **settings)
    with closing(make_env(env)) as one:
        task = task_of(one)
    with closing(Trainer(training, task)) as trainer:
        yield trainer


@pytest.mark.parametrize("case", ODD)
def test_what_it_returns(case: str) -> None:
    part, odd, said = ODD[case]
    env = registered("Odd", OddEnv, limit=99, part=part, odd=odd)
    wrong = NonFinite if "infinite" in said else EnvironmentFailed
    with trainer_of(env) as trainer:
        with pytest.raises(wrong, match=f"^step {AT}: Odd-v0 .*{said}"):
            list(trainer.epochs())
        assert trainer.replay.added == trainer.step == AT - 1
        assert all(tensor.isfinite().all() for tensor in trainer.learner_state().values())


class Bytes(gym.Env[np.ndarray, int]):
    """Its observation space is of bytes."""

    observation_space = gym.spaces.Box(0, 255, (2,), np.uint8)
    action_space: Any = gym.spaces.Discrete(2)
    obs: Any = np.array([0, 255], np.uint8)

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        return self.obs, {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        return self.obs, 0.0, False, False, {}


@pytest.mark.parametrize("obs", [[0, 256], [-1, 0], [0.5, 0]])
def test_bytes_that_are_none(obs: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(make_env(registered("Bytes", Bytes, limit=9))) as env:
        assert task_of(env).obs_bytes
        assert env.reset()[0].tolist() == [0.0, 255.0]
        monkeypatch.setattr(Bytes, "obs", np.array([7, 8], np.int64))
        assert env.step(0)[0].tolist() == [7.0, 8.0]
        monkeypatch.setattr(Bytes, "obs", np.array(obs))
        with pytest.raises(EnvironmentFailed, match="not of whole numbers from 0 to 255"):
            env.step(0)


@pytest.mark.parametrize("odd", [np.zeros(3), None])
def test_what_a_reset_returns(odd: Any) -> None:
    env = registered("Odd", OddEnv, limit=99, part=-1, odd=odd)
    with trainer_of(env) as trainer, pytest.raises(EnvironmentFailed, match=r"^step 8: Odd-v0 ret"):
        list(trainer.epochs())  # after the third episode


def odd_env(env: gym.Env[Any, Any]) -> OddEnv:
    inner = env.unwrapped
    assert isinstance(inner, OddEnv)
    return inner


@pytest.mark.parametrize("case", ["turned", "no reward", "raises", "too large"])
def test_an_evaluation_says_where(case: str) -> None:
    part, odd, _ = ODD[case]
    env = replace(registered("Odd", OddEnv, part=part, odd=odd), max_episode_steps=99)
    with closing(make_env(COUNTER)) as one, closing(Evaluator(env, 9, 0)) as evaluator:
        env_id = task_of(one).env_id
        for inner in evaluator.envs:
            odd_env(inner).lived = AT - 2
        with (
            trainer_of(COUNTER) as trainer,
            pytest.raises((NonFinite, EnvironmentFailed), match=f"^evaluation, step 2: {env_id} "),
        ):
            evaluator.run(trainer.policy, 1)


@pytest.mark.parametrize("good", [1, True, np.float32(1), np.array([1.0]), np.int64(1)])
def test_numbers_of_every_kind_are_rewards(good: Any) -> None:
    env = make_env(registered("Odd", OddEnv, limit=99, part=1, odd=good))
    env.reset(seed=0)
    odd_env(env).lived = AT
    assert env.step(np.zeros(2, np.float32))[1] == 1.0


class Endless(CounterEnv):
    def __init__(self) -> None:
        super().__init__("9999999t")


def test_every_episode_ends() -> None:
    env = registered("Endless", Endless)  # without a limit of steps
    gym.registry["Endless-v0"].max_episode_steps = None
    with trainer_of(env) as trainer:
        assert trainer.evaluator.run(trainer.policy, 1).lengths == [DEFAULT_EPISODE_STEPS]
    repeats = [{"name": "MaxAndSkipObservation", "skip": 4}]
    made = make_env(EnvConfig(name="gym", version=None, id="Endless-v0", max_episode_steps=None,
                              vectorizer="sync", wrappers=repeats))  # fmt: skip
    made.reset(seed=0)
    taken = 1
    while not made.step(np.zeros(2, np.float32))[3]:
        taken += 1
    assert taken == DEFAULT_EPISODE_STEPS // 4  # the limit counts frames, like a typed one


@pytest.mark.parametrize("limit", [10**6 + 1, 10**15])
def test_a_limit_that_is_none(limit: int) -> None:
    env = registered("Endless", Endless, limit=limit)
    with pytest.raises(BadRequest, match=str(limit)):
        make_env(env)
    with pytest.raises(BadRequest, match="max_episode_steps"):
        replace(COUNTER, max_episode_steps=limit)


@pytest.mark.parametrize(("signal_", "said"), [
    (signal.SIGKILL, "lost a process"), (signal.SIGSTOP, "did not answer within 1 s"),
])  # fmt: skip
def test_a_process_that_died_or_hangs(
    signal_: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(envs, "PATIENCE_S", 1.0)
    env = replace(COUNTER, vectorizer="async")
    with trainer_of(env, num_envs=2) as trainer:
        for _ in range(5):
            trainer.advance()
        processes = trainer.envs.vector.processes  # type: ignore[attr-defined]
        os.kill(processes[1].pid, signal_)
        if signal_ == signal.SIGKILL:
            processes[1].join(10)
        with pytest.raises(EnvironmentFailed, match=f"^step 11: Counter-v0 {said}"):
            trainer.advance()
        assert trainer.replay.added == 10
    assert not any(process.is_alive() for process in processes)


@pytest.mark.parametrize(("signal_", "said"), [
    (signal.SIGKILL, "lost a process"), (signal.SIGSTOP, "did not answer within 1 s"),
])  # fmt: skip
def test_a_process_that_is_gone_when_a_checkpoint_is_due(
    signal_: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is that of a step, and all other processes end."""
    monkeypatch.setattr(envs, "PATIENCE_S", 1.0)
    env = replace(COUNTER, vectorizer="async")
    with trainer_of(env, num_envs=2) as trainer:
        trainer.advance()
        processes = trainer.envs.vector.processes  # type: ignore[attr-defined]
        os.kill(processes[0].pid, signal_)
        if signal_ == signal.SIGKILL:
            processes[0].join(10)
        with pytest.raises(EnvironmentFailed, match=f"^step 3: Counter-v0 {said}"):
            shard_of(trainer)
    assert not any(process.is_alive() for process in processes)


def test_a_process_that_is_gone_when_all_are_closed() -> None:
    trainer = Trainer(small_config(env=replace(COUNTER, vectorizer="async"), num_envs=2),
                      task_of(make_env(COUNTER)))  # fmt: skip
    processes = trainer.envs.vector.processes  # type: ignore[attr-defined]
    processes[0].kill()
    processes[0].join(10)
    with pytest.raises(EnvironmentFailed, match="close: lost a process"):
        trainer.close()
    assert not any(process.is_alive() for process in processes)


def test_an_environment_that_raises_in_its_process() -> None:
    env = registered("Odd", OddEnv, limit=99, part=1, odd=KeyError("joint"))
    env = replace(env, vectorizer="async")
    with (
        trainer_of(env, num_envs=2) as trainer,
        pytest.raises(EnvironmentFailed, match=r"^step 45: Odd-v0 raised KeyError: .*joint"),
    ):
        list(trainer.epochs())
