"""Environments stepped together, with true successors under every autoreset mode.

Shape legend   N environments, O observation entries, A action entries.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from torch import Tensor

from spikerl.envs.checked import describe_raised
from spikerl.envs.config import EnvConfig
from spikerl.envs.make import make_env
from spikerl.envs.process import Processes, maker
from spikerl.envs.snapshot import Snapshot
from spikerl.errors import BadRequest, EnvironmentFailed, Interrupted, NonFinite
from spikerl.isolation import UserCode
from spikerl.schema import FLOAT32_MAX
from spikerl.types import Task

PATIENCE_S = 300.0  # time limit for one step of environments in processes of their own


class Steps(NamedTuple):
    """True transitions of one vector step, M of them: M is N unless environments were resetting."""

    obs: np.ndarray  # (M, O) float64
    act: np.ndarray  # (M, A) as requested, before clipping
    rew: np.ndarray  # (M,) float64
    next_obs: np.ndarray  # (M, O) true successors, never reset observations
    terminated: np.ndarray  # (M,) bool
    last: np.ndarray  # (M,) bool, of its episode: terminated or truncated


class Episode(NamedTuple):
    ret: float
    length: int


class Envs:
    """N environments stepped together, whatever their autoreset mode.

    Under SAME_STEP the true successor of an episode's last step is in `final_obs`. Under NEXT_STEP
    the step after it only resets: that is not a transition and yields no row.
    """

    def __init__(self, vector: VectorEnv[Any, Any, Any], task: Task) -> None:
        self.vector, self.task = vector, task
        self.same_step = vector.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
        self.obs = np.empty(0)
        self.steps = 0
        self.failed = False
        self.finished: list[Episode] = []  # since the caller last emptied it

    def reset(self, seeds: Sequence[int]) -> None:
        obs, _ = self._ask(lambda: self._reset(list(seeds)))
        self.obs = np.array(obs)
        self.resetting = np.zeros(len(obs), bool)
        self.returns = np.zeros(len(obs))
        self.lengths = np.zeros(len(obs), np.int64)
        self._check("observation", self.obs)

    def step(self, act: np.ndarray) -> Steps:
        """Step with actions (N, A), which are clipped to [-1, 1]."""
        actions = self.task.to_env(act)
        obs, rew, terminated, truncated, info = self._ask(lambda: self._step(actions))
        live = ~self.resetting
        next_obs = np.array(obs)
        done = (terminated | truncated) & live
        if self.same_step:
            for i in np.flatnonzero(done):
                next_obs[i] = info["final_obs"][i]
        self._check("reward", rew[live])
        self._check("observation", next_obs)
        if done.any():
            self._check("observation", obs)
        self.steps += int(live.sum())
        self.returns += rew * live
        self.lengths += live
        for i in np.flatnonzero(done):
            self.finished.append(Episode(float(self.returns[i]), int(self.lengths[i])))
        self.returns[done] = 0.0
        self.lengths[done] = 0
        ends = (terminated[live], done[live])
        steps = Steps(self.obs[live], act[live], rew[live], next_obs[live], *ends)
        self.obs = np.array(obs)
        self.resetting = done & (not self.same_step)
        return steps

    def __len__(self) -> int:
        return int(self.vector.num_envs)

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on; empty if an environment cannot be saved."""
        snapshots = self._ask(self._snapshots)
        if any(one is None for one in snapshots) or not self.same_step:
            return {}
        state = {"obs": self.obs, "returns": self.returns, "lengths": self.lengths}
        for i, one in enumerate(snapshots):
            state |= {f"{i}.{name}": array for name, array in one.items()}
        state["steps"] = np.array(self.steps)
        return {name: torch.from_numpy(np.array(array)) for name, array in state.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore `state`, after a reset with any seeds."""
        arrays = {name: tensor.numpy().copy() for name, tensor in state.items()}
        self.obs, self.returns = arrays.pop("obs"), arrays.pop("returns")
        self.lengths = arrays.pop("lengths")
        self.steps = int(arrays.pop("steps"))
        snapshots: list[Snapshot] = [{} for _ in range(len(self))]
        for name, array in arrays.items():
            number, _, field = name.partition(".")
            snapshots[int(number)][field] = array
        self.vector.set_attr("snapshot", snapshots)  # type: ignore[attr-defined]

    def close(self) -> None:
        if isinstance(self.vector, Processes):
            self.vector.close(terminate=self.failed)
        else:
            self.vector.close()

    def _reset(self, seeds: list[int]) -> Any:
        if isinstance(self.vector, Processes):
            self.vector.reset_async(seed=seeds)  # type: ignore[arg-type]
            return self.vector.reset_wait(timeout=PATIENCE_S)
        with UserCode():
            return self.vector.reset(seed=seeds)  # type: ignore[arg-type]

    def _step(self, actions: np.ndarray) -> Any:
        if isinstance(self.vector, Processes):
            self.vector.step_async(actions)
            return self.vector.step_wait(timeout=PATIENCE_S)
        with UserCode():
            return self.vector.step(actions)

    def _snapshots(self) -> Any:
        if isinstance(self.vector, Processes):
            self.vector.call_async("snapshot")
            return self.vector.call_wait(timeout=PATIENCE_S)
        return self.vector.call("snapshot")  # type: ignore[attr-defined]

    def _ask(self, act: Callable[[], Any]) -> Any:
        """The environments' answer; whatever they raise becomes EnvironmentFailed with the step."""
        try:
            return act()
        except BaseException as error:
            self.failed = True
            if isinstance(error, Interrupted):
                raise
            said, cause = describe_error(error), error
            if trace := getattr(next(iter(error.args), None), "trace", None):
                cause = RuntimeError(f"in a process of its own\n{trace}")
            raise EnvironmentFailed(f"step {self.steps + 1}: {self.task.env_id} {said}") from cause

    def _check(self, what: str, values: np.ndarray) -> None:
        if not (np.abs(values) <= FLOAT32_MAX).all():
            raise NonFinite(
                f"step {self.steps + 1}: {self.task.env_id} returned a NaN or infinite {what},"
                " or one beyond float32"
            )


@contextmanager
def asked(where: str) -> Iterator[None]:
    """Guard a call of an environment: an exception becomes EnvironmentFailed that says `where`."""
    try:
        with UserCode():
            yield
    except Exception as error:
        raise EnvironmentFailed(f"{where} {describe_error(error)}") from error


def check_finite(where: str, obs: np.ndarray, rew: float = 0.0) -> None:
    """Raise NonFinite that says `where` if a value is NaN, infinite or beyond float32."""
    if not (abs(rew) <= FLOAT32_MAX and (np.abs(obs) <= FLOAT32_MAX).all()):
        raise NonFinite(f"{where} gave a NaN or infinity")


def describe_error(error: BaseException) -> str:
    """What an environment did, as a predicate: the caller puts the environment's name before it."""
    if isinstance(error, EnvironmentFailed):
        return str(error)
    if isinstance(error, TimeoutError | multiprocessing.TimeoutError):
        return f"did not answer within {PATIENCE_S:.0f} s"
    if isinstance(error, EOFError | ConnectionError):
        return "lost a process: it was killed or crashed"
    return describe_raised(error)


def make_envs(config: EnvConfig, num_envs: int, task: Task) -> Envs:
    settings: Any = {"autoreset_mode": AutoresetMode.SAME_STEP, "copy": False}  # `Envs` copies
    if config.vectorizer == "sync":
        return Envs(SyncVectorEnv([lambda: make_env(config)] * num_envs, **settings), task)
    try:
        return Envs(Processes([maker(config)] * num_envs, **settings), task)
    except (BadRequest, Interrupted):
        raise
    except Exception as error:
        remedy = f"an environment could not be made in another process: {describe_error(error)}"
        raise BadRequest("env.vectorizer", "async", remedy) from error
