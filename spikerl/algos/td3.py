"""TD3, twin delayed DDPG (Fujimoto et al., 2018, arXiv:1802.09477)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from spikerl.algos.base import Guard, Stepper, flatten, polyak_, td_target
from spikerl.distributed.world import ALONE, World
from spikerl.errors import BadRequest
from spikerl.networks import Actor, TwinCritic, check_sizes
from spikerl.types import Batch


@dataclass(kw_only=True)
class TD3Config:
    """Hyper-parameters; every count of steps is a total over all workers and environments."""

    name: str
    batch_size: int
    gamma: float  # discount per step
    tau: float  # target <- (1 - tau) target + tau online
    critic_lr: float
    critic_hidden_sizes: list[int]
    policy_delay: int  # the actor and all targets move on updates 0, d, 2d, ...
    explore_noise: float  # std of acting noise, in units of half the action range
    target_noise: float  # std of target smoothing noise, same unit
    noise_clip: float  # bound of target smoothing noise, same unit
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
        for key in ("batch_size", "policy_delay", "replay_capacity", "update_interval"):
            if getattr(self, key) < 1:
                raise BadRequest(f"algo.{key}", getattr(self, key), "give at least 1")
        if self.norm_interval < 1:
            raise BadRequest("algo.norm_interval", self.norm_interval, "give at least 1")
        for key in (
            "random_steps",
            "learning_starts",
            "explore_noise",
            "target_noise",
            "noise_clip",
        ):
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


class TD3:
    """Actor, twin critics, their targets, and one update of them all."""

    def __init__(
        self,
        actor: Actor,
        critic: TwinCritic,
        config: TD3Config,
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
        )
        self.step_critic = stepper(critic, config.critic_lr)
        self.step_actor = stepper(actor, actor_lr)
        self.actor_target = copy.deepcopy(actor).requires_grad_(False)
        self.critic_target = copy.deepcopy(critic).requires_grad_(False)
        self.actor_target_flat = flatten(self.actor_target)
        self.critic_target_flat = flatten(self.critic_target)
        self.updates = 0

    def learn(self, batches: Sequence[Batch]) -> list[dict[str, Tensor]]:
        """An update with each batch; what `update` says of it.

        Targets stand still from one move to the next, so the values of all updates between are
        found in one pass.
        """
        found = []
        rest = list(batches)
        while rest:
            together = -self.updates % self.config.policy_delay + 1
            now, rest = rest[:together], rest[together:]
            pairs = zip(now, self.next_values([batch.next_obs for batch in now]), strict=True)
            found += [self.step(batch, td_target(batch, next_q)) for batch, next_q in pairs]
        return found

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One step of the critics; on updates 0, d, 2d, ... (d = policy_delay) of all the rest."""
        return self.learn([batch])[0]

    @torch.no_grad()
    def next_values(self, next_obs: list[Tensor]) -> Sequence[Tensor]:
        """The lower of both targets' values, (B,), for each batch of observations."""
        obs = torch.cat(next_obs) if len(next_obs) > 1 else next_obs[0]
        act = self.smooth(self.actor_target(obs, self.generator))
        return self.critic_target(obs, act).amin(0).split([len(part) for part in next_obs])

    def step(self, batch: Batch, q_target: Tensor) -> dict[str, Tensor]:
        q = self.critic(batch.obs, batch.act)  # (2, B)
        loss = 2.0 * mse_loss(q, q_target.expand_as(q))  # the sum of both critics' means
        critic_loss = self.step_critic(loss, self.updates)
        metrics = {"critic_loss": critic_loss, "q_mean": q.detach().mean()}
        if self.updates % self.config.policy_delay == 0:
            act = self.actor(batch.obs, self.generator)
            actor_loss = self.step_actor(-self.critic.first(batch.obs, act).mean(), self.updates)
            metrics["actor_loss"] = actor_loss
            tau, masked = self.config.tau, self.guard.masked
            polyak_(self.critic_target_flat, self.step_critic.flat, tau, masked)
            polyak_(self.actor_target_flat, self.step_actor.flat, tau, masked)
        self.guard.close()
        self.updates += 1
        return metrics

    def state(self) -> dict[str, Tensor]:
        """The live tensors that an update depends on and changes, beside `updates`."""
        parts = {
            "critic": self.step_critic.state(),
            "actor": self.step_actor.state(),
            "guard": self.guard.state(),
            "target": {"critic": self.critic_target_flat, "actor": self.actor_target_flat},
        }
        return {f"{part}.{k}": v for part, tensors in parts.items() for k, v in tensors.items()}

    def smooth(self, act: Tensor) -> Tensor:
        """Target policy smoothing: clipped noise, then clipped to the action range."""
        c = self.config
        noise = torch.randn(act.shape, generator=self.generator, device=act.device)
        return (act + (noise * c.target_noise).clamp(-c.noise_clip, c.noise_clip)).clamp(-1.0, 1.0)

    @torch.no_grad()
    def explore(self, obs: Tensor, generator: torch.Generator) -> Tensor:
        """Actions with Gaussian noise, one draw for every environment and entry, clipped."""
        act = self.actor(obs, generator)
        noise = torch.randn(act.shape, generator=generator, device=act.device)
        return (act + self.config.explore_noise * noise).clamp(-1.0, 1.0)
