"""Shared by every algorithm: its config, and the step from a gradient to new weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from spikerl import kernels
from spikerl.algos.replay import Sampler
from spikerl.distributed.world import ALONE, World
from spikerl.errors import BadRequest, NonFinite
from spikerl.kernels.gradient import Gradient, Moments
from spikerl.models.actor import Actor
from spikerl.models.actor_config import ActorConfig
from spikerl.models.critic import Critics
from spikerl.models.networks import SequenceActor, inference_actor
from spikerl.models.proposals import Proposer
from spikerl.schema import check_sizes


@dataclass(kw_only=True)
class AlgoConfig:
    """Keys that every algorithm has; every count of steps is a total over all environments."""

    anneals: ClassVar[bool] = False  # whether the learning rate changes in the course of a run

    name: str
    batch_size: int
    gamma: float  # discount per step
    norm_interval: int | None  # steps between merges of the observation normaliser; null: none
    norm_clip: float | None  # bound of normalised observations; null: they are not clipped
    max_grad_norm: float | None  # bound of the norm of each network's gradient; null: no clipping

    def __post_init__(self) -> None:
        self.check("give at least 1", lambda x: x >= 1, "batch_size")
        self.check("give a value in [0, 1]", lambda x: 0.0 <= x <= 1.0, "gamma")
        self.check("give at least 1, or null", lambda x: x is None or x >= 1, "norm_interval")
        above = "give a value above 0, or null"
        self.check(above, lambda x: x is None or x > 0.0, "norm_clip", "max_grad_norm")

    def check(self, remedy: str, holds: Callable[[Any], bool], *keys: str) -> None:
        """Raise BadRequest for the first of `keys` whose value fails the test `holds`."""
        for key in keys:
            if not holds(getattr(self, key)):
                raise BadRequest(f"algo.{key}", getattr(self, key), remedy)

    def unread(self, discrete: bool) -> dict[str, str]:
        """Keys that have no effect with these settings, each with a remedy for the user."""
        return {}

    def inputs(self, obs_dim: int, act_dim: int) -> int:
        """Number of the actor's inputs for observations and actions of these sizes."""
        return obs_dim

    def outputs(self, act_dim: int) -> int:
        """Number of the actor's outputs for actions of this size."""
        return act_dim

    def updates_due(self, step: int, batches: int) -> int:
        """Number of updates due in the first `step` steps if each one uses `batches` batches."""
        raise NotImplementedError

    def capacity(self) -> int:
        """Most transitions that the replay keeps."""
        raise NotImplementedError


@dataclass(kw_only=True)
class CriticsConfig(AlgoConfig):
    """Keys of algorithms that have critics beside their actor."""

    critics: ClassVar[int] = 2

    critic_lr: float
    critic_hidden_sizes: list[int]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes("algo.critic_hidden_sizes", self.critic_hidden_sizes)
        self.check("give a value above 0", lambda x: x > 0.0, "critic_lr")


def flatten(module: nn.Module) -> Tensor:
    """Move a module's parameters into one contiguous vector that they become views of.

    Adam, Polyak averaging, an all-reduce and a checksum are then one call each. Move the module to
    its device first.
    """
    params = list(module.parameters())
    flat = torch.cat([p.detach().flatten() for p in params])
    pieces = flat.split([p.numel() for p in params])
    for p, piece in zip(params, pieces, strict=True):
        p.data = piece.view_as(p)
    return flat


def normal_like(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal float32 noise with the shape and on the device of `like`."""
    return torch.randn(like.shape, generator=generator, dtype=torch.float32, device=like.device)


class Guard:
    """Detects non-finite values on the device and masks writes to weights.

    In fp32 and bf16 all writes are masked from the first bad update on; `check`, called after each
    group of updates, raises and gives that update's number. In fp16 a bad gradient is ordinary: the
    loss scale was too large. The rest of that one update is masked, target networks included, and
    the scale halves; it doubles after `GROWTH_INTERVAL` good updates in a row.
    """

    GROWTH_INTERVAL = 2000

    def __init__(self, device: torch.device | str, *, scales_loss: bool) -> None:
        self.scales_loss = scales_loss
        first = 65536.0 if scales_loss else 1.0
        self.scale = torch.tensor(first, dtype=torch.float32, device=device)
        self.streak = torch.zeros((), dtype=torch.int64, device=device)  # good updates in a row
        # 1 while writes are masked, else 0; float32, as the Adam kernel requires
        self.masked = torch.zeros((), dtype=torch.float32, device=device)
        # updates since the last check that ended masked
        self.bad = torch.zeros((), dtype=torch.float32, device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)  # bad updates in fp16

    def end_update(self) -> None:
        """Count the update if it was bad; in fp16 also adapt the loss scale and lift the mask."""
        if not self.scales_loss:
            self.bad += self.masked
            return
        bad = self.masked > 0
        self.skipped += bad
        self.streak.copy_(torch.where(bad, 0, self.streak + 1))
        grow = (self.streak > 0) & (self.streak % self.GROWTH_INTERVAL == 0)
        self.scale.copy_(self.scale * torch.where(bad, 0.5, torch.where(grow, 2.0, 1.0)))
        self.masked.zero_()

    def state(self) -> dict[str, Tensor]:
        return {"scale": self.scale, "streak": self.streak, "skipped": self.skipped}

    def check(self, updates: int) -> None:
        """Raise NonFinite if one of the `updates` made so far was bad, or the fp16 scale vanished.

        The weights then hold their last good values.
        """
        bad = int(self.bad)
        self.bad.zero_()
        if bad:
            raise NonFinite(f"update {updates - bad}: the loss or a gradient is NaN or infinite")
        if float(self.scale) < 2.0**-14:
            raise NonFinite("fp16: gradients are not finite at any loss scale; use bf16 or fp32")


class Optimizer:
    """From a gradient to new weights: sum over workers, unscale, check, clip, Adam.

    An algorithm fills `gradient` before each step.
    """

    def __init__(
        self,
        module: nn.Module,
        lr: float,
        guard: Guard,
        *,
        max_grad_norm: float | None = None,
        world: World = ALONE,
        weight: float = 1.0,
        kernel: str = "reference",
        unpruned: Tensor | None = None,
    ) -> None:
        """`unpruned`: for each entry of the flat parameters, 1 if learned, 0 if it stays 0."""
        self.flat, self.unpruned = flatten(module), unpruned
        scale = guard.scale if guard.scales_loss else None
        self.gradient = Gradient(list(module.parameters()), weight=weight, scale=scale)
        self.lr, self.max_norm = lr, math.inf if max_grad_norm is None else max_grad_norm
        step = torch.zeros((), dtype=torch.float32, device=self.flat.device)
        zeros = torch.zeros_like(self.flat)
        self.moments = Moments(self.flat, step, zeros, zeros.clone())
        self.guard, self.world, self.kernel = guard, world, kernels.named(kernel)
        self.weight_decay = 0.0  # AdamW: a step subtracts lr * weight_decay * w from each learned w
        self.held = False  # while true, a step leaves the weights unchanged

    def step(self) -> Tensor:
        """Take a step unless a value was not finite; returns the loss over the global batch."""
        guard, vector = self.guard, self.gradient.vector
        self.world.sum_(vector)
        if guard.scales_loss:
            vector[:-1] /= guard.scale
        if self.unpruned is not None:
            # Adam leaves a weight whose gradient was always 0 bitwise unchanged.
            vector[:-1] *= self.unpruned
        loss = self.gradient.loss.clone()
        if self.held:
            # The Adam kernel, which makes this check otherwise, does not run.
            guard.masked.masked_fill_(~torch.isfinite(torch.dot(vector, vector)), 1.0)
            return loss
        params = [p.data for p in self.gradient.params] if self.weight_decay else []
        before = [p.clone() for p in params]
        self.kernel.adam(self.moments, vector, self.lr, self.max_norm, guard.masked)
        for p, old in zip(params, before, strict=True):
            p.sub_(self.lr * self.weight_decay * (1.0 - guard.masked) * old)
        return loss

    def state(self) -> dict[str, Tensor]:
        """The live tensors: weights, Adam's moments and, after pruning, the mask `unpruned`."""
        pruned = {} if self.unpruned is None else {"kept": self.unpruned}
        return self.moments._asdict() | pruned


Metrics = dict[str, Tensor]
N = TypeVar("N", bound=Actor | SequenceActor)


class Learner:
    """Base class of the algorithms: an actor, perhaps critics, and how they learn."""

    config: AlgoConfig
    actor: Actor | SequenceActor
    acting: Actor | SequenceActor  # explores: `actor`, or its copy on the CPU
    critic: Critics  # only algorithms with critics set it
    critic_optimizer: Optimizer
    acts: tuple[str, ...] = ("continuous",)  # kinds of actions that the algorithm can learn
    on_policy = False
    has_graphs = False  # whether a round of updates can be one CUDA graph
    random_steps = 0  # the first steps act uniformly at random
    critic_warmup = 0  # number of first updates that leave the policy unchanged
    # For schedules; the trainer sets these two.
    step = 0  # environment steps so far, over all workers
    total_updates = 1  # updates that the whole run makes
    metrics: tuple[str, ...] = ()  # names of an update's metrics beyond those of every algorithm

    def __init__(
        self,
        actor: Actor | SequenceActor,
        critic: Critics | None,
        config: AlgoConfig,
        *,
        actor_lr: float,
        generator: torch.Generator,
        scales_loss: bool = False,
        world: World = ALONE,
        weight: float = 1.0,
        discrete: bool = False,
        unpruned: Tensor | None = None,
    ) -> None:
        """`unpruned`: for the actor's parameters, as in `Optimizer`."""
        self.config, self.generator, self.world = config, generator, world
        self.discrete = discrete  # whether actions are discrete
        kernel = actor.kernel if critic is None else critic.kernel
        self.actor, self.kernel = actor, kernels.named(kernel)
        self.guard = Guard(generator.device, scales_loss=scales_loss)
        self.optimizer = partial(
            Optimizer,
            guard=self.guard,
            max_grad_norm=config.max_grad_norm,
            world=world,
            weight=weight,
            kernel=kernel,
        )
        # By the names under which checkpoints store their state.
        self.optimizers: dict[str, Optimizer] = {}
        if critic is not None:
            assert isinstance(config, CriticsConfig)
            self.critic, self.critic_optimizer = critic, self.optimizer(critic, config.critic_lr)
            self.optimizers["critic"] = self.critic_optimizer
        self.actor_optimizer = self.optimizers["actor"] = self.optimizer(
            actor, actor_lr, unpruned=unpruned
        )
        self.targets: dict[str, Tensor] = {}
        self.acting = actor
        # Flat parameters of the copies that act on the CPU, by the names in `optimizers`.
        self.copies: dict[str, Tensor] = {}
        self.updates = 0

    def train(self, sampler: Sampler, gradient_steps: int, batch_size: int) -> list[Metrics]:
        """Make up to `gradient_steps` updates, each on `batch_size` rows; returns their metrics."""
        raise NotImplementedError

    def explore(self, obs: Tensor, generator: torch.Generator) -> Tensor:
        """Exploratory actions for these observations, (B, A)."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise NonFinite if an update since the last check was bad."""
        self.guard.check(self.updates)

    def state(self) -> dict[str, Tensor]:
        """The live tensors that updates read and change; the count `updates` is kept apart."""
        parts = {name: optimizer.state() for name, optimizer in self.optimizers.items()}
        parts |= {"guard": self.guard.state(), "target": self.targets}
        return {f"{part}.{k}": v for part, tensors in parts.items() for k, v in tensors.items()}

    def notes(self) -> list[str]:
        """Further lines to print before the run starts."""
        return []

    def inference(
        self, config: ActorConfig, act_dim: int
    ) -> tuple[ActorConfig, Actor | SequenceActor | Proposer]:
        """The network to evaluate and save, with its config; `config` is that of the actor."""
        return inference_actor(config, self.actor, act_dim)

    def act_on_cpu(self, kernel: str) -> None:
        """From now on, explore with a copy of the actor on the CPU, run by `kernel`."""
        self.acting = self.add_copy("actor", self.actor, kernel)

    def add_copy(self, name: str, network: N, kernel: str) -> N:
        """A copy of `network` on the CPU, whose weights `refresh` updates."""
        own = copy.deepcopy(network)
        own.cpu().requires_grad_(False)
        own.kernel = kernel
        self.copies[name] = flatten(own)
        return own

    def refresh(self) -> None:
        """Copy the current weights into the copies that explore."""
        for name, flat in self.copies.items():
            flat.copy_(self.optimizers[name].flat)
