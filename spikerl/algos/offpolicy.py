"""What learning rules that replay transitions share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from spikerl import kernels
from spikerl.algos.base import AlgoConfig, Learner, Metrics, flatten
from spikerl.algos.graphs import Graphed
from spikerl.algos.replay import Replay
from spikerl.types import Batch

DRAWN_TOGETHER = 64  # batches that are gathered and normalised at once, which bounds their memory


@dataclass(kw_only=True)
class OffPolicyConfig(AlgoConfig):
    critics: ClassVar[int] = 2

    tau: float  # target <- (1 - tau) target + tau online
    replay_capacity: int  # transitions
    random_steps: int  # the first steps act uniformly at random
    learning_starts: int  # steps before the first update
    update_interval: int  # steps between bursts of updates
    updates_per_step: float  # a burst makes update_interval * updates_per_step updates

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("give at least 1", lambda x: x >= 1, "replay_capacity", "update_interval")
        self.check("give 0 or more", lambda x: x >= 0, "random_steps", "learning_starts")
        self.check("give a value in (0, 1]", lambda x: 0.0 < x <= 1.0, "tau")
        self.check("give a value above 0", lambda x: x > 0.0, "updates_per_step")

    def capacity(self) -> int:
        return self.replay_capacity

    def updates_due(self, step: int, fewer: int) -> int:
        """A burst at each update_interval, from learning_starts on."""
        first = -(-max(self.learning_starts, 1) // self.update_interval)  # the first burst's number
        bursts = max(step // self.update_interval - first + 1, 0)
        updates = bursts * self.update_interval * self.updates_per_step / fewer
        return int(updates + 1e-6)  # 100 * 0.29 is 28.999...


class OffPolicy(Learner):
    """An actor, critics and their targets, and updates from replayed rows."""

    config: OffPolicyConfig
    batches = 1  # that an update takes

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.random_steps = self.config.random_steps
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.critic_target_flat = flatten(self.critic_target)
        self.graph: Graphed | None = None
        if self.critic.kernel == "triton/graphs":
            self.graph = Graphed(self.round, self.generator)

    @property
    def policy_delay(self) -> int:
        """The actor and all targets move once in so many updates."""
        return 1

    def moves(self, update: int) -> bool:
        """Whether they move on this one."""
        return True

    def burst(
        self,
        replay: Replay,
        updates: int,
        size: int,
        generator: torch.Generator,
        normalize: Callable[[Tensor], Tensor],
    ) -> list[Metrics]:
        """As `Learner.burst`, from rows that are drawn here."""
        found: list[Metrics] = []
        while len(found) < updates:
            count = min(updates - len(found), max(DRAWN_TOGETHER // self.batches, 1))
            rows = replay.sample(count * self.batches * size, generator, normalize)
            found += self.learn(rows, count)
        return found

    def learn(self, rows: Batch, updates: int) -> list[Metrics]:
        """Updates with equal shares of the rows, in order; what each says of itself.

        Targets stand still from one move to the next, so the values of all updates between are
        found in one pass.
        """
        size = len(rows.rew) // updates
        numbers = range(self.updates, self.updates + updates)
        ends = [i + 1 for i in range(updates) if self.moves(numbers[i]) or i + 1 == updates]
        rounds = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
        sizes = [together * size for together in rounds]
        found: list[Metrics] = []
        for together, *fields in zip(rounds, *(field.split(sizes) for field in rows), strict=True):
            now = Batch(*fields)
            # A whole round begins behind a move of the targets and ends with the next.
            if self.graph is not None and self.updates > 0 and together == self.policy_delay:
                found += self.graph(now)
            else:
                found += self.between_moves(now, self.updates, together)
            self.updates += together
        self.refresh()
        return found

    def round(self, rows: Batch) -> list[Metrics]:
        """The updates of one graph: up to a move, from the one behind the last."""
        delay = self.policy_delay
        first = next(i for i in range(1, delay + 1) if self.moves(i + delay - 1))
        return self.between_moves(rows, first, delay)

    def between_moves(self, rows: Batch, update: int, updates: int) -> list[Metrics]:
        """Updates number `update` and on, whose targets are the same."""
        raise NotImplementedError

    def update(self, batch: Batch) -> Metrics:
        """One update."""
        return self.learn(batch, 1)[0]

    def parts(self) -> dict[str, dict[str, Tensor]]:
        return {**super().parts(), "target": {"critic": self.critic_target_flat}}

    def polyak(self, target: Tensor, online: Tensor) -> None:
        polyak = kernels.named(self.critic.kernel).polyak
        polyak(target, online, self.config.tau, self.guard.masked)
