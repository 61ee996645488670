"""DDPG, deep deterministic policy gradient (Lillicrap et al., 2016, arXiv:1509.02971)."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from spikerl.algos.base import Guard, Stepper, flatten, td_target
from spikerl.algos.graphs import Graphed
from spikerl.distributed.world import ALONE, World
from spikerl.errors import BadRequest
from spikerl.networks import Actor, Critics, SpikingActor, check_sizes
from spikerl.snn import kernels
from spikerl.types import Batch


@dataclass(kw_only=True)
class DDPGConfig:
    """Hyper-parameters; every count of steps is a total over all workers and environments."""

    critics: ClassVar[int] = 1

    name: str
    batch_size: int
    gamma: float  # discount per step
    tau: float  # target <- (1 - tau) target + tau online
    critic_lr: float
    critic_hidden_sizes: list[int]
    explore_noise: float  # std of acting noise, in units of half the action range
    replay_capacity: int  # transitions
    random_steps: int  # the first steps act uniformly at random
    learning_starts: int  # steps before the first update
    update_interval: int  # steps between bursts of updates
    updates_per_step: float  # a burst makes update_interval * updates_per_step updates
    norm_interval: int  # steps between merges of the observation normaliser
    norm_clip: float  # normalised observations are clipped to [-norm_clip, norm_clip]
    max_grad_norm: float | None  # null: gradients are not clipped

    def __post_init__(self) -> None:
        check_sizes("algo.critic_hidden_sizes", self.critic_hidden_sizes)
        for key in ("batch_size", "replay_capacity", "update_interval", "norm_interval"):
            if getattr(self, key) < 1:
                raise BadRequest(f"algo.{key}", getattr(self, key), "give at least 1")
        for key in ("random_steps", "learning_starts", "explore_noise"):
            if getattr(self, key) < 0:
                raise BadRequest(f"algo.{key}", getattr(self, key), "give 0 or more")
        if not 0.0 <= self.gamma <= 1.0:
            raise BadRequest("algo.gamma", self.gamma, "give a value in [0, 1]")
        if not 0.0 < self.tau <= 1.0:
            raise BadRequest("algo.tau", self.tau, "give a value in (0, 1]")
        for key in ("critic_lr", "norm_clip", "updates_per_step"):
            if not getattr(self, key) > 0.0:
                raise BadRequest(f"algo.{key}", getattr(self, key), "give a value above 0")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0.0:
            raise BadRequest(
                "algo.max_grad_norm", self.max_grad_norm, "give a value above 0, or null"
            )


class DDPG:
    """Actor, critics, their targets, and one update of them all."""

    def __init__(
        self,
        actor: Actor,
        critic: Critics,
        config: DDPGConfig,
        *,
        actor_lr: float,
        generator: torch.Generator,
        scales_loss: bool = False,
        world: World = ALONE,
        weight: float = 1.0,
    ) -> None:
        self.config, self.generator = config, generator
        self.actor, self.critic = actor, critic
        self.guard = Guard(generator.device, scales_loss=scales_loss)
        stepper = partial(
            Stepper,
            guard=self.guard,
            max_grad_norm=config.max_grad_norm,
            world=world,
            weight=weight,
            kernel=critic.kernel,
        )
        self.step_critic = stepper(critic, config.critic_lr)
        self.step_actor = stepper(actor, actor_lr)
        self.actor_target = copy.deepcopy(actor).requires_grad_(False)
        self.critic_target = copy.deepcopy(critic).requires_grad_(False)
        self.actor_target_flat = flatten(self.actor_target)
        self.critic_target_flat = flatten(self.critic_target)
        self.acting: Actor = actor  # explores
        self.acting_flat = self.step_actor.flat
        self.updates = 0
        self.graph: Graphed | None = None
        if critic.kernel == "triton/graphs":
            self.graph = Graphed(self.round, generator)

    @property
    def policy_delay(self) -> int:
        """The actor and all targets move on updates 0, d, 2d, ..., d being this."""
        return 1

    def learn(self, rows: Batch, updates: int) -> list[dict[str, Tensor]]:
        """Updates with equal shares of the rows, in order; what each says of itself.

        Targets stand still from one move to the next, so the values of all updates between are
        found in one pass.
        """
        size = len(rows.rew) // updates
        found: list[dict[str, Tensor]] = []
        while len(found) < updates:
            together = min(-self.updates % self.policy_delay + 1, updates - len(found))
            first = len(found) * size
            now = Batch(*(field[first : first + together * size] for field in rows))
            # A whole round begins behind a move of the targets and ends with the next.
            if self.graph is not None and self.updates > 0 and together == self.policy_delay:
                found += self.graph(now)
            else:
                found += self.between_moves(now, self.updates, together)
            self.updates += together
        self.refresh()
        return found

    def round(self, rows: Batch) -> list[dict[str, Tensor]]:
        return self.between_moves(rows, 1, self.policy_delay)

    def between_moves(self, rows: Batch, update: int, updates: int) -> list[dict[str, Tensor]]:
        """Updates number `update` and on, whose targets are the same."""
        q_target = td_target(rows, self.next_value(rows.next_obs))
        size = len(q_target) // updates
        parts = zip(*(field.split(size) for field in (rows.obs, rows.act, q_target)), strict=True)
        delay = self.policy_delay
        return [self.step(*part, moves=(update + i) % delay == 0) for i, part in enumerate(parts)]

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One step of the critics; on updates 0, d, 2d, ... of all the rest."""
        return self.learn(batch, 1)[0]

    @torch.no_grad()
    def next_value(self, next_obs: Tensor) -> Tensor:
        """The target critics' least value of the target actor's action, (B,)."""
        act = self.smooth(self.actor_target(next_obs, self.generator))
        return self.critic_target(next_obs, act).amin(0)

    def smooth(self, act: Tensor) -> Tensor:
        """What a target is valued at."""
        return act

    def step(self, obs: Tensor, act: Tensor, q_target: Tensor, *, moves: bool) -> dict[str, Tensor]:
        """A step of the critics; of the actor and the targets too where it `moves`."""
        critic, actor = self.step_critic, self.step_actor
        q_mean = self.critic.regress(obs, act, q_target, critic.gradient)
        metrics = {"critic_loss": critic(), "q_mean": q_mean}
        if moves:
            act, pull = self.actor.vjp(obs, self.generator)
            pull(self.critic.ascent(obs, act, actor.gradient), actor.gradient)
            metrics["actor_loss"] = actor()
            tau, masked = self.config.tau, self.guard.masked
            polyak = kernels.named(self.critic.kernel).polyak
            polyak(self.critic_target_flat, critic.flat, tau, masked)
            polyak(self.actor_target_flat, actor.flat, tau, masked)
        self.guard.close()
        return metrics

    def check(self) -> None:
        """Raise NonFinite if an update since the last check was bad."""
        self.guard.check(self.updates)

    def state(self) -> dict[str, Tensor]:
        """The live tensors that an update depends on and changes, beside `updates`."""
        parts = {
            "critic": self.step_critic.state(),
            "actor": self.step_actor.state(),
            "guard": self.guard.state(),
            "target": {"critic": self.critic_target_flat, "actor": self.actor_target_flat},
        }
        return {f"{part}.{k}": v for part, tensors in parts.items() for k, v in tensors.items()}

    def act_on_cpu(self, kernel: str) -> None:
        """From now on a copy of the actor explores there, run by `kernel`."""
        self.acting = copy.deepcopy(self.actor).cpu().requires_grad_(False)
        if isinstance(self.acting, SpikingActor):
            self.acting.kernel = kernel
        self.acting_flat = flatten(self.acting)

    def refresh(self) -> None:
        """Give the copy that explores the actor's weights."""
        if self.acting is not self.actor:
            self.acting_flat.copy_(self.step_actor.flat)

    @torch.no_grad()
    def explore(self, obs: Tensor, generator: torch.Generator) -> Tensor:
        """Actions with Gaussian noise, one draw for every environment and entry, clipped."""
        act = self.acting(obs, generator)
        noise = torch.randn(act.shape, generator=generator, device=act.device)
        return (act + self.config.explore_noise * noise).clamp(-1.0, 1.0)
