"""DQN, deep Q-learning (Mnih et al., 2015), with double Q-learning (van Hasselt et al., 2016,
arXiv:1509.06461), the duelling network (Wang et al., 2016, arXiv:1511.06581) and n-step targets.

The configured actor, without its tanh, is the Q network; with the decoder `voltage` it is the
spiking network of DSQN (Chen et al., 2022, arXiv:2201.09754). The policy takes the greedy action.

Shape legend   B batch, A actions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spikerl.algos.base import Metrics
from spikerl.algos.offpolicy import OffPolicy, ReplayConfig, batches
from spikerl.models.actor import Actor
from spikerl.models.critic import Critics
from spikerl.types import Batch


@dataclass(kw_only=True)
class DQNConfig(ReplayConfig):
    double: bool  # the online network chooses the action that the target network values
    duelling: bool  # the network gives advantages and a value of the state
    target_interval: int  # updates from one change of the target network (by tau) to the next
    epsilon_start: float  # share of random actions at step 0
    epsilon_end: float  # share of random actions from epsilon_steps on
    epsilon_steps: int  # steps over which the share moves linearly between the two

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("give at least 1", lambda x: x >= 1, "target_interval")
        shares = ("epsilon_start", "epsilon_end")
        self.check("give a value in [0, 1]", lambda x: 0.0 <= x <= 1.0, *shares)
        self.check("give at least 1", lambda x: x >= 1, "epsilon_steps")

    def outputs(self, act_dim: int) -> int:
        return act_dim + 1 if self.duelling else act_dim


class DQN(OffPolicy):
    config: DQNConfig
    acts = ("discrete",)
    metrics = ("epsilon",)

    def __init__(
        self, actor: Actor, critic: Critics | None, config: DQNConfig, **settings: Any
    ) -> None:
        self.policy_delay = config.target_interval
        self.first_policy_update = config.target_interval - 1
        super().__init__(actor, critic, config, **settings)
        self.actor_target = self.add_target("actor", actor)

    def update(self, rows: Batch, numbers: range) -> list[Metrics]:
        """Make the updates with these numbers, each on an equal share of the rows."""
        c, optimizer = self.config, self.actor_optimizer
        metrics = []
        for number, fields in zip(numbers, batches(len(numbers), *rows), strict=True):
            batch = Batch(*fields)

            # y = r + gamma^n (1 - terminated) Q'(s', a') with a' = argmax Q'(s', .), or, double,
            # argmax Q(s', .).
            with torch.no_grad():
                next_q = self.values(
                    self.actor_target(batch.next_obs, self.generator, squash=False)
                )
                choosing = next_q
                if c.double:
                    choosing = self.values(self.actor(batch.next_obs, self.generator, squash=False))
                next_act = choosing.argmax(-1, keepdim=True)
                y = batch.td_target(next_q.gather(1, next_act).squeeze(1))

            # Minimise mean huber(Q(s, a) - y), huber(x) = x^2 / 2 up to 1 and |x| - 1/2 beyond.
            output, backward = self.actor.vjp(batch.obs, self.generator, squash=False)
            output.requires_grad_()
            act = batch.act.argmax(-1, keepdim=True)
            q = self.values(output).gather(1, act).squeeze(1)
            loss = nn.functional.smooth_l1_loss(q, y)
            (by_output,) = torch.autograd.grad(loss, output, optimizer.gradient.factor)
            optimizer.gradient.loss.copy_(loss.detach() * optimizer.gradient.weight)
            spikes = backward(by_output, optimizer.gradient)
            metric = {"critic_loss": optimizer.step(), "q_mean": q.detach().mean(), **spikes}

            if self.is_policy_update(number):
                self.update_targets()
            self.guard.end_update()
            metrics.append({**metric, "epsilon": y.new_tensor(self.epsilon)})
        return metrics

    def values(self, output: Tensor) -> Tensor:
        """Q, (B, A): the network's output, or, if duelling, V + advantage - mean advantage."""
        if not self.config.duelling:
            return output
        advantage, value = output[:, :-1], output[:, -1:]
        return value + advantage - advantage.mean(-1, keepdim=True)

    @property
    def epsilon(self) -> float:
        """The share of random actions at the current step."""
        c = self.config
        share = min(self.step / c.epsilon_steps, 1.0)
        return c.epsilon_start + share * (c.epsilon_end - c.epsilon_start)

    @torch.no_grad()
    def explore(self, obs: Tensor, generator: torch.Generator) -> Tensor:
        """One-hot actions (B, A): greedy, or with probability epsilon uniformly random."""
        greedy = self.values(self.acting(obs, generator, squash=False))
        draws = torch.rand(len(obs), 2, generator=generator, dtype=torch.float32, device=obs.device)
        count = greedy.shape[1]
        random = (draws[:, 1] * count).long().clamp(max=count - 1)
        act = torch.where(draws[:, 0] < self.epsilon, random, greedy.argmax(-1))
        return nn.functional.one_hot(act, count).to(greedy.dtype)
