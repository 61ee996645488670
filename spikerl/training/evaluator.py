"""Deterministic evaluation, on streams of its own.

Shape legend   B environments side by side, O observation entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch

from spikerl.distributed.world import ALONE, World
from spikerl.envs.make import FLOAT32_MAX, EnvConfig, make_env
from spikerl.envs.vector import describe_error
from spikerl.errors import EnvironmentFailed, NonFinite
from spikerl.models.actor import Activity, SpikingActor
from spikerl.models.policy import Policy
from spikerl.seeding import generator_for, seed_for

SIDE_BY_SIDE = 10  # episodes that run together, as one batch through the actor
PROBED = 1024  # observations, evenly spaced over all episodes, that firing is measured on


@dataclass
class Evaluation:
    """Undiscounted returns and lengths by episode, and how the actor fired (None: it is dense)."""

    returns: list[float]
    lengths: list[int]
    activity: Activity | None

    @property
    def mean(self) -> float:
        return float(np.mean(self.returns))

    @property
    def std(self) -> float:
        return float(np.std(self.returns))

    @property
    def length(self) -> float:
        return float(np.mean(self.lengths))


class Evaluator:
    """Runs episodes on environments that it keeps; training never sees them, nor the reverse.

    With several workers, worker i mod W runs episode i; all get the whole result, by index.
    """

    def __init__(
        self, config: EnvConfig, episodes: int, run_seed: int, world: World = ALONE
    ) -> None:
        self.run_seed, self.world = run_seed, world
        self.mine = range(world.rank, episodes, world.size)
        self.envs = [make_env(config) for _ in self.mine[:SIDE_BY_SIDE]]

    def run(self, policy: Policy, evaluation: int) -> Evaluation:
        """Evaluation number `evaluation`: episode i starts from seed (run seed, evaluation, i)."""
        key = (evaluation, self.world.rank, 0)  # longer than an episode's, so never the same
        generator = generator_for(self.run_seed, "eval", *key, device=policy.device)
        episodes, seen = [], []
        for first in range(0, len(self.mine), SIDE_BY_SIDE):
            numbers = self.mine[first : first + SIDE_BY_SIDE]
            seeds = [seed_for(self.run_seed, "eval", evaluation, i) for i in numbers]
            returns, lengths, observed = self._wave(policy, seeds, generator)
            episodes += list(zip(numbers, returns, lengths, strict=True))
            seen += observed
        part = (episodes, self._activity(policy, seen, generator))
        parts = self.world.gather_objects(part)
        merged = sorted(episode for episodes, _ in parts for episode in episodes)
        activities = [activity for _, activity in parts if activity is not None]
        activity = reduce(Activity.__add__, activities) if activities else None
        return Evaluation([ret for _, ret, _ in merged], [n for _, _, n in merged], activity)

    def observations(self, policy: Policy) -> np.ndarray:
        """Every raw observation (M, O) of this worker's episodes, those of evaluation 0."""
        generator = generator_for(self.run_seed, "eval", 0, self.world.rank, 0)
        seen = []
        for first in range(0, len(self.mine), SIDE_BY_SIDE):
            numbers = self.mine[first : first + SIDE_BY_SIDE]
            seeds = [seed_for(self.run_seed, "eval", 0, i) for i in numbers]
            seen += self._wave(policy, seeds, generator)[2]
        return np.concatenate(seen)

    def close(self) -> None:
        for env in self.envs:
            env.close()

    def _wave(
        self, policy: Policy, seeds: list[int], generator: torch.Generator
    ) -> tuple[list[float], list[int], list[np.ndarray]]:
        envs = self.envs[: len(seeds)]
        env_id = policy.task.env_id
        try:
            obs = np.stack([env.reset(seed=s)[0] for env, s in zip(envs, seeds, strict=True)])
        except Exception as error:
            raise EnvironmentFailed(
                f"evaluation, reset: {env_id} {describe_error(error)}"
            ) from error
        if not (np.abs(obs) <= FLOAT32_MAX).all():
            raise NonFinite(f"evaluation, reset: {env_id} gave a NaN or infinity")
        returns, lengths = [0.0] * len(envs), [0] * len(envs)
        running = list(range(len(envs)))
        seen = []
        while running:
            seen.append(obs[running])
            # The batch keeps its size to the end: products of other sizes round differently.
            act = policy.task.to_env(policy.act(obs, generator))
            for i in list(running):
                where = f"evaluation, step {lengths[i] + 1}: {env_id}"
                try:
                    obs[i], rew, terminated, truncated, _ = envs[i].step(act[i])
                except Exception as error:
                    raise EnvironmentFailed(f"{where} {describe_error(error)}") from error
                if not (abs(rew) <= FLOAT32_MAX and (np.abs(obs[i]) <= FLOAT32_MAX).all()):
                    raise NonFinite(f"{where} gave a NaN or infinity")
                returns[i] += rew
                lengths[i] += 1
                if terminated or truncated:
                    running.remove(i)
        return returns, lengths, seen

    def _activity(
        self, policy: Policy, seen: list[np.ndarray], generator: torch.Generator
    ) -> Activity | None:
        if not isinstance(policy.actor, SpikingActor) or not seen:
            return None
        rows = np.concatenate(seen)
        picked = rows[np.linspace(0, len(rows) - 1, min(len(rows), PROBED)).astype(int)]
        obs = torch.from_numpy(picked.astype(np.float32)).to(policy.device)
        return policy.actor.activity(policy.norm.normalize(obs), generator)
