"""Shared by algorithms that replay transitions: when updates are due, and their batches."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from spikerl.algos.base import AlgoConfig, CriticsConfig, Learner, Metrics, flatten, normal_like
from spikerl.algos.graphs import Graphed
from spikerl.algos.replay import Sampler
from spikerl.errors import BadRequest
from spikerl.models.actor import Actor
from spikerl.models.critic import Critics
from spikerl.snn.batchnorm import BatchNorm
from spikerl.types import Batch

BATCHES_AT_ONCE = 64  # gathered and normalised in one pass; bounds its memory

M = TypeVar("M", bound=nn.Module)


@dataclass(kw_only=True)
class TargetConfig(AlgoConfig):
    tau: float  # target <- (1 - tau) target + tau online

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("give a value in (0, 1]", lambda x: 0.0 < x <= 1.0, "tau")


@dataclass(kw_only=True)
class ReplayConfig(TargetConfig):
    replay_capacity: int  # transitions
    random_steps: int  # the first steps act uniformly at random
    learning_starts: int  # steps before the first update
    update_interval: int  # steps, after which update_interval * updates_per_step updates are due
    updates_per_step: float
    n_step: int = 1  # rewards that a target sums before it bootstraps

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("give at least 1", lambda x: x >= 1, "replay_capacity", "update_interval")
        self.check("give 1 to 1000", lambda x: 1 <= x <= 1000, "n_step")
        self.check("give 0 or more", lambda x: x >= 0, "random_steps", "learning_starts")
        self.check("give a value above 0, at most 1e6", lambda x: 0.0 < x <= 1e6,
                   "updates_per_step")  # fmt: skip

    def capacity(self) -> int:
        return self.replay_capacity

    def updates_due(self, step: int, batches: int) -> int:
        """Updates become due after every update_interval steps, from learning_starts on."""
        # Number, from 1, of the first interval with updates.
        first = -(-max(self.learning_starts, 1) // self.update_interval)
        intervals = max(step // self.update_interval - first + 1, 0)
        updates = intervals * self.update_interval * self.updates_per_step / batches
        return int(updates + 1e-6)  # 100 * 0.29 is 28.999...


@dataclass(kw_only=True)
class OffPolicyConfig(ReplayConfig, CriticsConfig):
    critic_warmup: int = 0  # number of first updates that leave the policy unchanged

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("give 0 or more", lambda x: x >= 0, "critic_warmup")


@dataclass(kw_only=True)
class DelayConfig(AlgoConfig):
    """Delayed policy updates."""

    policy_delay: int = 1  # critic updates for each update of the actor and the target networks
    first_policy_update: int = 0  # number, from 0, of the first critic update that includes one

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("give at least 1", lambda x: x >= 1, "policy_delay")
        if not 0 <= self.first_policy_update < self.policy_delay:
            remedy = f"give 0 or more, below algo.policy_delay={self.policy_delay}"
            raise BadRequest("algo.first_policy_update", self.first_policy_update, remedy)


@dataclass(kw_only=True)
class OfflineConfig(AlgoConfig):
    """Keys of algorithms that learn from a dataset and never act; one step of the run is one batch
    of an update.
    """

    MOST: ClassVar[int] = 1 << 40  # transitions; memory runs out long before

    def updates_due(self, step: int, batches: int) -> int:
        return step // batches

    def capacity(self) -> int:
        return self.MOST


class OffPolicy(Learner):
    """Updates from replayed rows, with target networks.

    Target networks change only in policy updates. The updates up to and including the next policy
    update are a round: they share the target networks, so target values take a single pass.
    """

    config: AlgoConfig
    actor: Actor
    acting: Actor
    n_step = 1  # steps that a sampled transition spans
    batches_per_update = 1
    policy_delay = 1  # updates for each change of actor and targets
    first_policy_update = 0  # number, from 0, of the first update that changes them
    policy_parts: tuple[str, ...] = ("actor",)  # optimizers held in the first critic_warmup updates
    policy_held = False

    def __init__(
        self, actor: Actor, critic: Critics | None, config: AlgoConfig, **settings: Any
    ) -> None:
        super().__init__(actor, critic, config, **settings)
        if isinstance(config, ReplayConfig):
            self.random_steps, self.n_step = config.random_steps, config.n_step
        if isinstance(config, OffPolicyConfig):
            self.critic_warmup = config.critic_warmup
        if isinstance(config, DelayConfig):
            self.policy_delay = config.policy_delay
            self.first_policy_update = config.first_policy_update
        self.graph: Graphed | None = None
        if critic is not None:
            self.critic_target = self.add_target("critic", critic)
            if critic.kernel == "triton/graphs":
                self.graph = Graphed(self.whole_round, self.generator)

    def add_target(self, name: str, module: M) -> M:
        """A target network for `module`, which `update_targets` moves towards it."""
        target = copy.deepcopy(module).requires_grad_(False)
        self.targets[name] = flatten(target)
        return target

    def update(self, rows: Batch, numbers: range) -> list[Metrics]:
        """Make the updates `numbers`, a round or part of one, each on an equal share of `rows`."""
        raise NotImplementedError

    def hold_policy(self, held: bool) -> None:
        """Make the updates from here on leave the policy unchanged (`held`), or change it again."""
        self.policy_held = held
        for name in self.policy_parts:
            self.optimizers[name].held = held
        for part in self.actor.modules():
            if isinstance(part, BatchNorm):
                part.held = held

    def is_policy_update(self, number: int) -> bool:
        return (number - self.first_policy_update) % self.policy_delay == 0

    def update_targets(self) -> None:
        """Target <- (1 - tau) target + tau online."""
        assert isinstance(self.config, TargetConfig)
        for name, target in self.targets.items():
            online = self.optimizers[name].flat
            self.kernel.polyak(target, online, self.config.tau, self.guard.masked)

    def train(self, sampler: Sampler, gradient_steps: int, batch_size: int) -> list[Metrics]:
        metrics: list[Metrics] = []
        most = max(BATCHES_AT_ONCE // self.batches_per_update, 1)
        while len(metrics) < gradient_steps:
            count = min(gradient_steps - len(metrics), most)
            size = count * self.batches_per_update * batch_size
            rows = sampler.batch(size, self.n_step)
            metrics += self.run_updates(rows, count)
        return metrics

    def run_updates(self, rows: Batch, gradient_steps: int) -> list[Metrics]:
        """Make `gradient_steps` updates, round by round, on consecutive equal shares of `rows`."""
        first, metrics = self.updates, []
        last = first + gradient_steps
        ends = [n + 1 for n in range(first, last) if self.is_policy_update(n) or n + 1 == last]
        rounds = [range(begin, end) for begin, end in zip([first, *ends], ends, strict=False)]
        size = len(rows.rew) // gradient_steps
        sizes = [len(numbers) * size for numbers in rounds]
        for numbers, *fields in zip(rounds, *(field.split(sizes) for field in rows), strict=True):
            own, held = Batch(*fields), numbers.stop <= self.critic_warmup
            if held != self.policy_held:
                self.hold_policy(held)
            # A whole round follows a policy update, so none begins at update 0.
            whole = self.updates > 0 and len(numbers) == self.policy_delay
            if self.graph is not None and whole and not held:
                metrics += self.graph(own)
            else:
                metrics += self.update(own, numbers)
            self.updates = numbers.stop
        self.refresh()
        return metrics

    def whole_round(self, rows: Batch) -> list[Metrics]:
        """The updates that a CUDA graph records: `policy_delay` of them, the policy update last."""
        delay = self.policy_delay
        first = next(n for n in range(1, delay + 1) if self.is_policy_update(n + delay - 1))
        return self.update(rows, range(first, first + delay))

    def critic_step(self, obs: Tensor, act: Tensor, q_target: Tensor) -> Metrics:
        """One gradient step of the critics on sum_i mean (Q_i(s, a) - y)^2."""
        optimizer = self.critic_optimizer
        q_mean = self.critic.critic_backward(obs, act, q_target, optimizer.gradient)
        return {"critic_loss": optimizer.step(), "q_mean": q_mean}

    def add_noise(
        self, act: Tensor, generator: torch.Generator, std: float, bound: float = math.inf
    ) -> Tensor:
        """clip(act + clip(eps, -bound, bound), -1, 1); eps ~ N(0, std) for each row and entry."""
        noise = normal_like(act, generator)
        return self.kernel.add_clipped_noise(act, noise, std, bound)

    def explore_with_noise(self, obs: Tensor, generator: torch.Generator, std: float) -> Tensor:
        """Actions with Gaussian noise."""
        return self.add_noise(self.acting(obs, generator), generator, std)


def batches(count: int, *fields: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split the rows of each field into `count` equal shares; yields the fields share by share."""
    size = len(fields[0]) // count
    return zip(*(field.split(size) for field in fields), strict=True)
