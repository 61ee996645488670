"""Deterministic evaluation, on streams of its own.

Shape legend   B environments side by side, O observation entries.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import reduce
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from spikerl.distributed.world import ALONE, World
from spikerl.energy import modelled, operations
from spikerl.energy.operations import Operations
from spikerl.envs.checked import CheckedEnv
from spikerl.envs.config import EnvConfig
from spikerl.envs.make import make_env
from spikerl.envs.vector import asked, check_finite
from spikerl.errors import BadRequest, Stopped
from spikerl.kernels.reference import Carried
from spikerl.models.activity import Activity
from spikerl.models.policy import Policy
from spikerl.models.sequence import History
from spikerl.seeding import RESET_BITS, generator_for, reset_seed
from spikerl.types import Contexts, Task

SIDE_BY_SIDE = 10  # episodes that run together, as one batch through the actor
ASK_S = 0.5  # seconds between the moments at which workers ask each other whether to stop
PROBED = 1024  # observations, evenly spaced over all episodes, that firing is measured on
PROBED_ENTRIES = 1 << 22  # of all these observations, at most: of large ones there are fewer
SEEN_BYTES = 1 << 28  # of observations that are held, at most, to choose these from
LOOKED_AT = 20  # firing is measured on one of so many decisions of a policy over sequences


@dataclass
class Evaluation:
    """Undiscounted returns and lengths by episode, and how the actor fired (None: it is dense)."""

    returns: list[float]
    lengths: list[int]
    activity: Activity | None
    probed: Tensor  # this worker's normalised observations that firing is measured on, (M, O)
    operations: Operations | None  # on the same observations; None: not known
    decision: dict[str, float | None]  # their modelled.PER_DECISION, over all workers
    # Spikes of all layers per decision, mean over all; None if no state is carried between them.
    carried_spikes: float | None = None

    @property
    def mean(self) -> float:
        return float(np.mean(self.returns))

    @property
    def std(self) -> float:
        return float(np.std(self.returns))

    @property
    def length(self) -> float:
        return float(np.mean(self.lengths))


class Acting(Protocol):
    """What an evaluation needs of a policy."""

    task: Task
    device: torch.device

    def carried(self) -> Carried | History | None: ...

    def act(
        self,
        obs_BO: np.ndarray,
        generator: torch.Generator,
        carried: Carried | History | None = None,
    ) -> np.ndarray: ...

    def observe(self, obs_BO: np.ndarray) -> Tensor: ...

    def activity(self, seen_BO: Tensor, generator: torch.Generator) -> Activity | None: ...


class StopWatch:
    """Ends an evaluation on all workers alike, once a signal reached any of them: raises Stopped.

    Workers make different numbers of steps, so they ask each other by the clock until all are done.
    """

    def __init__(self, world: World, stop_signal: Callable[[], int]) -> None:
        self.world, self.stop_signal = world, stop_signal
        self.due = time.monotonic() + ASK_S

    def look(self) -> None:
        """Call this between steps; it asks the other workers every ASK_S seconds."""
        if time.monotonic() >= self.due:
            self._ask(done=False)

    def finish(self) -> None:
        while not self._ask(done=True):
            pass

    def _ask(self, *, done: bool) -> bool:
        """Exchange signals with all workers; whether all of them are done."""
        mine = torch.tensor([self.stop_signal(), done], dtype=torch.int64)
        signals, ends = torch.stack(self.world.gather(mine)).unbind(1)
        if number := int(signals.max()):
            raise Stopped(number)
        self.due = time.monotonic() + ASK_S
        return bool(ends.all())


class Seen:
    """Observations in their order; where they take more than `most_bytes` only every second one is
    held, then every fourth, and so on.
    """

    def __init__(self, most_bytes: float = math.inf) -> None:
        self.most_bytes = most_bytes
        self.held: list[np.ndarray] = []
        self.bytes, self.count, self.stride = 0, 0, 1

    def add(self, obs_BO: np.ndarray) -> None:
        kept = obs_BO[-self.count % self.stride :: self.stride].copy()  # a view would hold all
        self.count += len(obs_BO)
        self.held.append(kept)
        self.bytes += kept.nbytes
        if self.bytes > self.most_bytes:
            self.held = [self.rows()[::2].copy()]
            self.stride *= 2
            self.bytes = self.held[0].nbytes

    def rows(self) -> np.ndarray:
        return np.concatenate(self.held)


class Evaluator:
    """Runs episodes on environments of its own, which training never uses.

    Of W workers, worker i mod W runs episode i; all get the whole result, ordered by episode.
    """

    def __init__(
        self, config: EnvConfig, episodes: int, run_seed: int, world: World = ALONE
    ) -> None:
        self.run_seed, self.world = run_seed, world
        self.seed_bits = RESET_BITS
        self.mine = range(world.rank, episodes, world.size)
        self.envs: list[CheckedEnv] = []
        self.note: str | None = None  # why fewer episodes run side by side, if so
        for _ in self.mine[:SIDE_BY_SIDE]:
            try:
                self.envs.append(make_env(config))
            except BadRequest as error:
                if not self.envs:
                    raise
                self.note = f"note: {len(self.envs)} episodes at a time, as {error.args[2]}"
                break
        # Not by the policy's task: the one that `env_id` names may have fractions, not bytes.
        self.obs_dtype = np.uint8 if any(env.obs_bytes for env in self.envs) else np.float64

    def run(
        self, policy: Acting, evaluation: int, stop_signal: Callable[[], int] = lambda: 0
    ) -> Evaluation:
        """Evaluation number `evaluation`: episode i starts from seed (run seed, evaluation, i).

        Raises Stopped on all workers once `stop_signal` gives a signal's number on one.
        """
        watch = StopWatch(self.world, stop_signal)
        key = (evaluation, self.world.rank, 0)  # episodes' keys are shorter, so never the same
        generator = generator_for(self.run_seed, "eval", *key, device=policy.device)
        episodes, seen, fired, contexts = [], Seen(SEEN_BYTES), 0.0, list[Contexts]()
        for numbers in self._waves():
            seeds = self._seeds(evaluation, numbers)
            returns, lengths, spikes = self._wave(policy, seeds, generator, watch, seen, contexts)
            fired += spikes
            episodes += list(zip(numbers, returns, lengths, strict=True))
        watch.finish()
        probed = self._probed(policy, seen)
        # How a policy fires that carries its state over cannot be measured on single observations.
        carried = policy.carried()
        carries = isinstance(carried, Carried)
        assert self.world.size == 1 or not carries
        own = policy.activity(probed, generator) if len(probed) and carried is None else None
        if contexts and isinstance(policy, Policy):
            fields = zip(*contexts, strict=True)
            own = policy.activity_in(Contexts(*(torch.cat(parts) for parts in fields)))
        counted = None
        if isinstance(policy, Policy) and len(probed):
            counted = operations.of_policy(policy, probed, generator)
        weighed = (len(probed), modelled.per_decision(counted)) if counted else None
        parts = self.world.gather_objects((episodes, own, weighed))
        merged = sorted(episode for part in parts for episode in part[0])
        activities = [part[1] for part in parts if part[1] is not None]
        decision = modelled.mean([part[2] for part in parts if part[2] is not None])
        activity = reduce(Activity.__add__, activities) if activities else None
        returns, lengths = [ret for _, ret, _ in merged], [n for _, _, n in merged]
        per_decision = fired / sum(lengths) if carries else None
        return Evaluation(returns, lengths, activity, probed, counted, decision, per_decision)

    def observations(self, policy: Acting, evaluation: int = 0) -> np.ndarray:
        """Every raw observation (M, O) of this worker's episodes in that evaluation."""
        generator = generator_for(self.run_seed, "eval", evaluation, self.world.rank, 0)
        seen, watch = Seen(), StopWatch(self.world, lambda: 0)
        for numbers in self._waves():
            self._wave(policy, self._seeds(evaluation, numbers), generator, watch, seen)
        return seen.rows()

    def close(self) -> None:
        with ExitStack() as stack:  # each is closed, even if closing another fails
            for env in self.envs:
                stack.callback(env.close)

    def _seeds(self, evaluation: int, episodes: range) -> list[int]:
        key = (self.seed_bits, self.run_seed, "eval", evaluation)
        return [reset_seed(*key, i) for i in episodes]

    def _waves(self) -> Iterator[range]:
        """The numbers of this worker's episodes, as many at a time as there are environments."""
        at_once = max(len(self.envs), 1)
        for first in range(0, len(self.mine), at_once):
            yield self.mine[first : first + at_once]

    def _wave(
        self,
        policy: Acting,
        seeds: list[int],
        generator: torch.Generator,
        watch: StopWatch,
        seen: Seen,
        contexts: list[Contexts] | None = None,
    ) -> tuple[list[float], list[int], float]:
        """Run an episode per seed: returns, lengths, and the spikes of a policy that carries its
        state over.

        Adds observations to `seen`, and some of what a policy over sequences saw to `contexts`.
        """
        envs = self.envs[: len(seeds)]
        where = f"evaluation, reset: {policy.task.env_id}"
        with asked(where):
            obs = np.stack([env.reset(seed=s)[0] for env, s in zip(envs, seeds, strict=True)])
        check_finite(where, obs)
        returns, lengths = [0.0] * len(envs), [0] * len(envs)
        running = list(range(len(envs)))
        step, fired, carried = 0, 0.0, policy.carried()
        while running:
            watch.look()
            seen.add(obs[running].astype(self.obs_dtype, copy=False))
            step += 1
            # The batch keeps its size to the end: products of other sizes round differently.
            act = policy.task.to_env(policy.act(obs, generator, carried))
            if isinstance(carried, Carried) and carried.fired_B is not None:
                fired += float(carried.fired_B[running].sum())
            steps = carried.steps if isinstance(carried, History) else None
            if steps is not None and contexts is not None and step % LOOKED_AT == 1:
                contexts.append(Contexts(*(field[running] for field in steps)))
            where = f"evaluation, step {step}: {policy.task.env_id}"
            with asked(where):
                made = {i: envs[i].step(act[i]) for i in running}
            earned = np.zeros(len(envs))
            for i, (next_obs, rew, terminated, truncated, _) in made.items():
                obs[i] = next_obs
                check_finite(where, obs[i], rew)
                returns[i] += rew
                earned[i] = rew
                lengths[i] += 1
                if terminated or truncated:
                    running.remove(i)
            if carried is not None:
                carried.reward(earned)
        return returns, lengths, fired

    def _probed(self, policy: Acting, seen: Seen) -> Tensor:
        obs_dim = policy.task.obs_dim
        if not seen.count:
            return torch.empty(0, obs_dim, dtype=torch.float32)
        rows = seen.rows()
        most = min(len(rows), PROBED, max(1, PROBED_ENTRIES // obs_dim))
        return policy.observe(rows[np.linspace(0, len(rows) - 1, most).astype(int)])
