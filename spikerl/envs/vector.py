"""Environments stepped together, with true successors under every autoreset mode.

Shape legend   N environments, O observation entries, A action entries.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from torch import Tensor

from spikerl.distributed.process_lifetime import die_with_parent
from spikerl.envs.make import FLOAT32_MAX, PATIENCE_S, CheckedEnv, EnvConfig, make_env
from spikerl.envs.snapshot import Snapshot
from spikerl.errors import EnvironmentFailed, NonFinite
from spikerl.types import Task


class Steps(NamedTuple):
    """True transitions of one vector step, M of them: M is N unless environments were resetting."""

    obs: np.ndarray  # (M, O) float64
    act: np.ndarray  # (M, A) as it was asked for
    rew: np.ndarray  # (M,) float64
    next_obs: np.ndarray  # (M, O) true successors, never reset observations
    terminated: np.ndarray  # (M,) bool
    last: np.ndarray  # (M,) bool, of its episode: terminated or truncated


class Episode(NamedTuple):
    ret: float
    length: int


class Envs:
    """N environments stepped together, whatever their autoreset mode.

    Under SAME_STEP the successor of a last step is found in `final_obs`. Under NEXT_STEP the step
    after a last step only resets: it is no transition and yields no row.
    """

    def __init__(self, vector: VectorEnv[Any, Any, Any], task: Task) -> None:
        self.vector, self.task = vector, task
        self.same_step = vector.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
        self.obs = np.empty(0)
        self.steps = 0
        self.failed = False
        self.finished: list[Episode] = []  # since the caller last emptied it

    def reset(self, seeds: Sequence[int]) -> None:
        obs, _ = self._ask(lambda: self.vector.reset(seed=list(seeds)))  # type: ignore[arg-type]
        self.obs = np.array(obs)
        self.resetting = np.zeros(len(obs), bool)
        self.returns = np.zeros(len(obs))
        self.lengths = np.zeros(len(obs), np.int64)
        self._check("observation", self.obs)

    def step(self, act: np.ndarray) -> Steps:
        """Act with (N, A); what lies outside [-1, 1] is clipped."""
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
        """Everything that the next step depends on; empty where an environment cannot be saved."""
        snapshots = self.vector.call("snapshot")  # type: ignore[attr-defined]
        if any(one is None for one in snapshots) or not self.same_step:
            return {}
        state = {"obs": self.obs, "returns": self.returns, "lengths": self.lengths}
        for i, one in enumerate(snapshots):
            state |= {f"{i}.{name}": array for name, array in one.items()}
        state["steps"] = np.array(self.steps)
        return {name: torch.from_numpy(np.array(array)) for name, array in state.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state` was taken, after any reset."""
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
        if self.failed and isinstance(self.vector, AsyncVectorEnv):
            for process in self.vector.processes:  # one that hangs does not answer
                process.kill()
            self.vector.close(terminate=True)
        else:
            self.vector.close()

    def _step(self, actions: np.ndarray) -> Any:
        if not isinstance(self.vector, AsyncVectorEnv):
            return self.vector.step(actions)
        self.vector.step_async(actions)
        return self.vector.step_wait(timeout=PATIENCE_S)

    def _ask(self, act: Callable[[], Any]) -> Any:
        """What the environments answer; EnvironmentFailed names the step, whatever they raise."""
        try:
            return act()
        except Exception as error:
            self.failed = True
            said = describe_error(error)
            raise EnvironmentFailed(f"step {self.steps + 1}: {self.task.env_id} {said}") from error

    def _check(self, what: str, values: np.ndarray) -> None:
        if not (np.abs(values) <= FLOAT32_MAX).all():
            raise NonFinite(
                f"step {self.steps + 1}: {self.task.env_id} returned a NaN or infinite {what},"
                " or one beyond float32"
            )


def describe_error(error: Exception) -> str:
    """What an environment did, after its name."""
    if isinstance(error, EnvironmentFailed):
        return str(error)
    if isinstance(error, TimeoutError | multiprocessing.TimeoutError):
        return f"did not answer within {PATIENCE_S:.0f} s"
    if isinstance(error, EOFError | ConnectionError):
        return "lost a process: it was killed or crashed"
    return f"raised {type(error).__name__}: {error}"


def make_envs(config: EnvConfig, num_envs: int, task: Task) -> Envs:
    settings: Any = {"autoreset_mode": AutoresetMode.SAME_STEP, "copy": False}  # `Envs` copies
    if config.vectorizer == "sync":
        makers: list[Callable[[], CheckedEnv]] = [lambda: make_env(config)] * num_envs
        return Envs(SyncVectorEnv(makers, **settings), task)
    parent = os.getpid()
    makers = [lambda: _make_in_worker(config, parent)] * num_envs
    return Envs(AsyncVectorEnv(makers, **settings), task)


def _make_in_worker(config: EnvConfig, parent: int) -> CheckedEnv:
    if os.getpid() != parent:  # the vector makes one in its own process too, to see the spaces
        for number in (signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)  # they are the parent's to answer
        die_with_parent()
    return make_env(config)
