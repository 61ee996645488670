"""A trained policy: actor, normaliser and action scaling, from raw observations to actions.

Shape legend   B batch, O observation entries, A action entries.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spikerl import kernels
from spikerl.errors import BadRequest
from spikerl.files import write_atomic
from spikerl.kernels import reference
from spikerl.kernels.reference import Carried
from spikerl.machine import versions
from spikerl.models.activity import Activity
from spikerl.models.actor import Actor, MLPActor, SpikingActor
from spikerl.models.actor_config import ActorConfig
from spikerl.models.compression import Compression
from spikerl.models.networks import SequenceActor
from spikerl.models.normalizer import RunningNorm
from spikerl.models.policy_file import Saved, read_files, to_bytes
from spikerl.models.proposals import Proposer
from spikerl.models.sequence import History, SequenceConfig
from spikerl.models.spikeformer import Spikeformer
from spikerl.types import Contexts, Task, flat

_started_in = os.getpid()  # the process whose thread pool torch may have started


class Policy:
    """Acts on raw observations; deterministic (a Poisson encoder draws from its own generator)."""

    def __init__(
        self,
        task: Task,
        config: ActorConfig,
        actor: Actor | SequenceActor | Proposer,
        norm: RunningNorm,
    ) -> None:
        self.task, self.config, self.network, self.norm = task, config, actor, norm
        self.device = next(actor.parameters()).device
        self.generator = torch.Generator(self.device).manual_seed(0)
        self.one_action = self._one_action()
        self.pid = _started_in
        self.trained_with: dict[str, str] = {}  # package versions, if loaded from a file
        self.compression: Compression | None = None

    @property
    def actor(self) -> Actor:
        """The network that maps an observation to an action; BadRequest if the policy has none."""
        if isinstance(self.network, Proposer):
            remedy = "its policy chooses among proposed actions, which no network does alone"
            raise BadRequest("algo", "bcq", f"{remedy}; eval, collect and load_policy run it")
        if isinstance(self.network, SequenceActor):
            remedy = "its decisions depend on an episode's steps and rewards before, which no"
            remedy += " network sees alone; eval, collect and load_policy run it"
            raise BadRequest("actor", self.config.actor.name, remedy)
        return self.network

    def _one_action(self) -> kernels.cpu.OneAction | None:
        # Not a subclass: one from a plugin may compute its actions differently.
        if type(self.network) is not SpikingActor or self.task.choices is not None:
            return None
        return kernels.one_action(self.network.kernel, self.network, self.task)

    def __getstate__(self) -> dict[str, Any]:
        # A generator cannot be pickled, nor pointers into the C++ library.
        return {**vars(self), "generator": self.generator.get_state(), "one_action": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.pid = _started_in
        self.generator = torch.Generator(self.device)
        self.generator.set_state(state["generator"])
        self.network.kernel = kernels.here(self.network.kernel, str(self.device))
        self.one_action = self._one_action()

    def carried(self) -> Carried | History | None:
        """A new state to pass to the decisions of an episode, or of several side by side, if they
        depend on earlier ones; else None.
        """
        if isinstance(self.config.actor, SequenceConfig):
            assert self.config.conditioning is not None
            return History(self.config.actor.context, self.config.conditioning)
        return Carried() if self.network.carries else None

    def aim(self, target_return: float) -> None:
        """Set the return of an episode to aim at from now on, in the environment's units."""
        if (aimed := self.config.conditioning) is None:
            remedy = "its policy does not depend on a return that it aims at; leave it out"
            raise BadRequest("target_return", target_return, remedy)
        if not abs(target_return) <= 1e30:
            raise BadRequest("target_return", target_return, "give a number of at most 1e30")
        aimed = replace(aimed, target_return=target_return)
        self.config = replace(self.config, conditioning=aimed)

    def __repr__(self) -> str:
        return f"<Policy of {self.task.env_id}: {self.config.shape()}>"

    def __call__(self, obs: Any, carried: Carried | History | None = None) -> np.ndarray:
        """Actions in the environment's units for one raw observation or a batch of them; dictionary
        observations may be given as dictionaries or flat.

        `carried`: if `policy.carried()` is not None, the object that it returned at the start of
        this episode; pass each action's reward to `carried.reward(rew)` before the next call.
        Discrete actions are int64, a scalar for each observation.

        Raises TypeError for other than real numbers, ValueError for another shape than (*obs_shape)
        or (B, *obs_shape), a value that is not finite, or a missing `carried` or reward.
        """
        if self.pid != os.getpid():
            leave_thread_pool()
            # Built anew, since a thread may have held the lock of the old one at the fork.
            self.pid, self.one_action = os.getpid(), self._one_action()
        if self.task.layout and not isinstance(obs, np.ndarray):
            obs = flat(self.task.layout, obs)
        obs = np.asarray(obs)
        if obs.dtype.kind not in "fiub":
            raise TypeError(f"obs holds {obs.dtype}; real numbers are needed")
        shape = self.task.obs_shape
        single = obs.shape == shape
        if not single and obs.shape[1:] != shape:
            batch = ", ".join(["B", *map(str, shape)])
            raise ValueError(f"obs has shape {obs.shape}; expected {shape} or ({batch})")
        if single and self.one_action is not None and not self.norm.far:
            one = self.one_action(obs.reshape(-1), self.norm.mean_std, self.norm.clip)
            if one is not None:
                return self.task.typed(one.reshape(self.task.act_shape))
        if not np.isfinite(obs).all():
            raise ValueError("obs holds a NaN or an infinity")
        act = self.act(obs.reshape(-1, self.task.obs_dim), self.generator, carried)
        act = self.task.to_env(act)
        return act[0] if single else act

    def predict(
        self,
        obs: np.ndarray,
        state: Carried | History | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = True,
    ) -> tuple[np.ndarray, Carried | History | None]:
        """The action, and the state to pass to the next call, None if decisions are independent.

        Has the signature that Stable-Baselines3 and tools for it expect. Raises ValueError for
        `deterministic=False`: exploration belongs to the algorithm, and is not saved.
        """
        if not deterministic:
            raise ValueError("a saved policy has no exploration noise; give deterministic=True")
        state = self.carried() if state is None else state
        if state is not None and episode_start is not None:
            state.restart(torch.as_tensor(np.atleast_1d(episode_start), device=self.device))
        return self(obs, state), state

    @torch.no_grad()
    def act(
        self,
        obs_BO: np.ndarray,
        generator: torch.Generator,
        carried: Carried | History | None = None,
    ) -> np.ndarray:
        """Actions (B, A) in [-1, 1]; for discrete actions, the network's output for each of them.
        `carried` as in `__call__`.
        """
        obs, squash = self.observe(obs_BO), self.task.choices is None
        if isinstance(self.network, SequenceActor):
            if not isinstance(carried, History):
                raise ValueError("a decision depends on those before: give carried")
            act: Tensor = self.network(carried.see(obs, self.task.act_dim))[:, -1]
            carried.acted(act)
        elif isinstance(self.network, SpikingActor) and self.network.carries:
            if not isinstance(carried, Carried):
                raise ValueError("a decision depends on the one before: give carried")
            act = reference.decide(self.network, obs, generator, carried, squash)
        elif isinstance(self.network, Proposer):
            act = self.network(obs, generator)
        else:
            act = self.network(obs, generator, squash)
        return act.cpu().numpy()

    def observe(self, obs_BO: np.ndarray) -> Tensor:
        """Normalised raw observations, as the actor sees them, (B, O)."""
        return self.norm.observe(obs_BO, self.device)

    def activity(self, seen_BO: Tensor, generator: torch.Generator) -> Activity | None:
        """Firing statistics on observations from `observe`; None for dense and sequence actors."""
        if isinstance(self.network, MLPActor | SequenceActor):
            return None
        return self.network.activity(seen_BO, generator)

    @torch.no_grad()
    def activity_in(self, steps: Contexts) -> Activity | None:
        """Firing statistics of a spiking sequence actor on these contexts; None for others."""
        if not isinstance(self.network, Spikeformer):
            return None
        spikes, inside = self.network.counts(steps)
        tokens, none = int(steps.there.sum()), torch.zeros(1, dtype=torch.float64)
        samples = tokens * self.network.config.spike_steps
        return Activity([none, *spikes], inside, samples, tokens, encoder_spikes=False)

    def save(self, folder: Path) -> None:
        for name, content in self.files().items():
            write_atomic(folder / name, content)

    def files(self) -> dict[str, bytes]:
        """The files that `save` writes, by name."""
        made_with = self.trained_with or versions()
        return to_bytes(
            Saved(self.task, self.config, self.network, self.norm, made_with, self.compression)
        )


def read_policy(
    folder: Path, device: str = "cpu", *, key: str, kernel: str = "reference"
) -> Policy:
    saved = read_files(folder, key=key, kernel=kernel)
    policy = Policy(saved.task, saved.config, saved.network.to(device), saved.norm)
    policy.trained_with, policy.compression = saved.trained_with, saved.compression
    return policy


def leave_thread_pool() -> None:
    """Compute in one thread in a forked process: torch's thread pool did not survive the fork, and
    waiting for its threads would never end.
    """
    global _started_in
    if os.getpid() != _started_in:
        _started_in = os.getpid()
        torch.set_num_threads(1)


def check_shapes(key: str, value: object, policy: Task, task: Task) -> None:
    """Refuse a policy whose observations or actions have other shapes than the task's."""
    (obs, act), (our_obs, our_act) = (_shapes(one) for one in (policy, task))
    if (obs, act) != (our_obs, our_act):
        remedy = f"its policy maps {obs} to {act} ({policy.env_id}),"
        raise BadRequest(key, value, f"{remedy} but {task.env_id} needs {our_obs} to {our_act}")


def _shapes(task: Task) -> tuple[str, str]:
    if task.choices is None:
        return str(task.obs_shape), str(task.act_shape)
    first = f" from {task.choices.start} on" if task.choices.start else ""
    return str(task.obs_shape), f"one of {task.act_dim} actions{first}"
