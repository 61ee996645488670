"""TD3 with a proxy target (Xu et al., NeurIPS 2025, arXiv:2505.24161).

A dense network that imitates the present spiking actor stands in for its target: a spiking target
jumps where a spike appears, a dense one moves smoothly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spikerl import kernels
from spikerl.algos.base import Metrics
from spikerl.algos.offpolicy import OffPolicy
from spikerl.algos.td3 import TD3, TD3Config
from spikerl.models.actor import MLPActor, MLPConfig
from spikerl.schema import check_sizes
from spikerl.types import Batch


@dataclass(kw_only=True)
class ProxyTD3Config(TD3Config):
    proxy_steps: int  # K, steps of the proxy before each of the critics, a batch each
    proxy_lr: float
    proxy_hidden_sizes: list[int]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes("algo.proxy_hidden_sizes", self.proxy_hidden_sizes)
        self.check("give at least 1", lambda x: x >= 1, "proxy_steps")
        self.check("give a value above 0", lambda x: x > 0.0, "proxy_lr")


class ProxyTD3(TD3):
    """TD3 whose target actor is a proxy."""

    config: ProxyTD3Config
    metrics = ("proxy_loss",)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        OffPolicy.__init__(self, *args, **kwargs)  # there is no target actor
        c, actor = self.config, self.actor
        dense = MLPConfig(name="mlp", hidden_sizes=c.proxy_hidden_sizes, lr=c.proxy_lr)
        self.proxy = MLPActor(actor.obs_dim, actor.act_dim, dense).to(self.generator.device)
        self.step_proxy = self.stepper(self.proxy, c.proxy_lr)
        self.batches = c.proxy_steps

    def between_moves(self, rows: Batch, update: int, updates: int) -> list[Metrics]:
        """The critics, and the actor, learn from the last of the proxy's batches."""
        with torch.no_grad():  # the actor stands still until the last update has imitated it
            goal = self.actor(rows.obs, self.generator)
        size = len(goal) // (updates * self.batches)
        goals, batches = goal.split(size), zip(*(f.split(size) for f in rows), strict=True)
        found: list[Metrics] = []
        losses: list[Tensor] = []
        for i, (batch, now) in enumerate(zip(map(Batch._make, batches), goals, strict=True)):
            losses.append(self.mse_backward(batch.obs, now))
            if (i + 1) % self.batches:
                continue
            q_target = self.q_target(batch)
            moves = self.moves(update + len(found))
            metrics = self.step(batch.obs, batch.act, q_target, moves=moves)
            found.append({**metrics, "proxy_loss": torch.stack(losses).mean()})
            losses.clear()
        return found

    def mse_backward(self, obs: Tensor, goal: Tensor) -> Tensor:
        """A step of the proxy; its mean squared error over the batch and the action's entries."""
        kernel = kernels.named(self.critic.kernel)
        kernel.mse_backward(self.proxy, obs, goal, self.step_proxy.gradient)
        return self.step_proxy()

    def target_act(self, next_obs: Tensor) -> Tensor:
        return kernels.named(self.critic.kernel).dense_actions(self.proxy, next_obs)

    def move_targets(self) -> None:
        self.polyak(self.critic_target_flat, self.step_critic.flat)

    def parts(self) -> dict[str, dict[str, Tensor]]:
        return {**OffPolicy.parts(self), "proxy": self.step_proxy.state()}
