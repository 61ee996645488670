"""TD3 with a proxy target (Xu et al., NeurIPS 2025, arXiv:2505.24161).

A dense network that imitates the current spiking actor replaces the target actor: the actions of a
spiking target jump whenever a spike appears or vanishes, those of a dense network change smoothly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spikerl.algos.base import Metrics
from spikerl.algos.offpolicy import OffPolicy, batches
from spikerl.algos.td3 import TD3Config
from spikerl.models.actor import Actor, MLPActor
from spikerl.models.actor_config import MLPConfig
from spikerl.models.critic import Critics
from spikerl.schema import check_sizes
from spikerl.types import Batch


@dataclass(kw_only=True)
class ProxyTD3Config(TD3Config):
    proxy_steps: int  # K, proxy steps before each critic step, each on a batch of its own
    proxy_lr: float
    proxy_hidden_sizes: list[int]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes("algo.proxy_hidden_sizes", self.proxy_hidden_sizes)
        self.check("give at least 1", lambda x: x >= 1, "proxy_steps")
        self.check("give a value above 0", lambda x: x > 0.0, "proxy_lr")


class ProxyTD3(OffPolicy):
    config: ProxyTD3Config
    has_graphs = True
    metrics = ("proxy_loss",)

    def __init__(
        self, actor: Actor, critic: Critics, config: ProxyTD3Config, **settings: Any
    ) -> None:
        self.batches_per_update = config.proxy_steps
        super().__init__(actor, critic, config, **settings)
        dense = MLPConfig(name="mlp", hidden_sizes=config.proxy_hidden_sizes, lr=config.proxy_lr)
        self.proxy = MLPActor(actor.obs_dim, actor.act_dim, dense).to(self.generator.device)
        self.optimizers["proxy"] = self.optimizer(self.proxy, config.proxy_lr)

    def update(self, rows: Batch, numbers: range) -> list[Metrics]:
        """Make the updates with these numbers, each on K batches of the rows.

        The proxy learns from all K batches, critics and actor from the last.
        """
        c, kernel, proxy = self.config, self.kernel, self.optimizers["proxy"]
        actor_opt = self.actor_optimizer

        # The actions that the proxy imitates, in one pass: only the last of these updates may
        # change the actor.
        with torch.no_grad():
            actor_act = self.actor(rows.obs, self.generator)

        metrics = []
        shares = batches(len(numbers) * c.proxy_steps, *rows, actor_act)
        for number in numbers:
            # Proxy: K steps that minimise mean (proxy(s) - pi(s))^2, over action entries too.
            losses = []
            for _ in range(c.proxy_steps):
                *fields, goal = next(shares)
                batch = Batch(*fields)
                kernel.mse_backward(self.proxy, batch.obs, goal, proxy.gradient)
                losses.append(proxy.step())

            with torch.no_grad():
                # Target policy smoothing, with eps ~ N(0, target_noise):
                # a' = clip(proxy(s') + clip(eps, -noise_clip, noise_clip), -1, 1).
                next_act = kernel.dense_actions(self.proxy, batch.next_obs)
                next_act = self.add_noise(next_act, self.generator, c.target_noise, c.noise_clip)
                # Clipped double Q-learning: y = r + gamma (1 - terminated) min_i Q_i'(s', a').
                q_target = self.critic_target.td_target(batch, next_act)

            # Critics: minimise sum_i mean (Q_i(s, a) - y)^2.
            metric = self.critic_step(batch.obs, batch.act, q_target)

            # Delayed policy update: minimise -mean Q_1(s, pi(s)). The kernels differentiate, not
            # autograd: the critic gives the gradient with respect to the actions, the actor takes
            # it back to its weights. Then targets <- (1 - tau) targets + tau online.
            if self.is_policy_update(number):
                act, backward = self.actor.vjp(batch.obs, self.generator)
                grad = self.critic.actor_loss_grad(batch.obs, act, actor_opt.gradient)
                metric |= backward(grad, actor_opt.gradient)
                metric["actor_loss"] = actor_opt.step()
                self.update_targets()

            self.guard.end_update()
            metrics.append({**metric, "proxy_loss": torch.stack(losses).mean()})
        return metrics

    @torch.no_grad()
    def explore(self, obs: Tensor, generator: torch.Generator) -> Tensor:
        return self.explore_with_noise(obs, generator, self.config.explore_noise)
