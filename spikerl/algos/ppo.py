"""PPO, proximal policy optimisation (Schulman et al., 2017, arXiv:1707.06347).

Shape legend   T steps, N environments, B rows, A action entries, K log probabilities of an action:
A for a Gaussian policy, 1 for a categorical one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from spikerl.algos.base import CriticsConfig, Learner, Metrics, normal_like
from spikerl.algos.replay import Sampler
from spikerl.algos.returns import gae
from spikerl.models.actor import Actor
from spikerl.models.critic import Critics
from spikerl.types import Batch


@dataclass(kw_only=True)
class PPOConfig(CriticsConfig):
    critics: ClassVar[int] = 1

    rollout_steps: int  # steps, over all environments, between updates, which learn from them
    epochs: int  # passes over a rollout
    clip_ratio: float  # eps: ratios of new to old probability are clipped to 1 - eps to 1 + eps
    gae_lambda: float
    entropy_coef: float
    log_std: float  # initial value of the learned log deviation of each action entry
    target_kl: float | None  # a rollout's updates stop above 1.5 times this KL; null: never
    normalize_advantage: str  # minibatch: over each minibatch; rollout: over the rollout
    ratio: str  # joint: one ratio per action; per_entry: one per entry, as in PopSAN's code

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("give at least 1", lambda x: x >= 1, "rollout_steps", "epochs")
        self.check("give a value above 0", lambda x: x > 0.0, "clip_ratio")
        self.check("give a value in [0, 1]", lambda x: 0.0 <= x <= 1.0, "gae_lambda")
        self.check("give 0 or more", lambda x: x >= 0.0, "entropy_coef")
        self.check("give a value above 0, or null", lambda x: x is None or x > 0.0, "target_kl")
        known = ("minibatch", "rollout")
        self.check("give minibatch or rollout", lambda x: x in known, "normalize_advantage")
        self.check("give joint or per_entry", lambda x: x in ("joint", "per_entry"), "ratio")
        if self.normalize_advantage == "minibatch":
            self.check("one row has no deviation: give at least 2", lambda x: x >= 2, "batch_size")
        # A merge inside a rollout would make updates normalise it differently than acting did.
        steps = self.rollout_steps
        whole = f"give a multiple of algo.rollout_steps={steps}, or null"
        self.check(whole, lambda x: x is None or x % steps == 0, "norm_interval")
        if self.batch_size > self.rollout_steps:
            remedy = f"at most algo.rollout_steps={self.rollout_steps}: give"
            self.check(f"{remedy} less", lambda x: x <= self.rollout_steps, "batch_size")

    def unread(self, discrete: bool) -> dict[str, str]:
        return {"log_std": "discrete actions have no deviation; leave it out"} if discrete else {}

    def capacity(self) -> int:
        return self.rollout_steps

    def updates_due(self, step: int, batches: int) -> int:
        """`epochs` passes after each complete rollout; with target_kl, fewer may be made."""
        minibatches = max(self.rollout_steps // (self.batch_size * batches), 1)
        return step // self.rollout_steps * self.epochs * minibatches


class LogStd(nn.Module):
    """The policy's log deviation for each action entry; it does not depend on the observation."""

    def __init__(self, act_dim: int, start: float) -> None:
        super().__init__()
        self.value_A = nn.Parameter(torch.full((act_dim,), start, dtype=torch.float32))


class Gaussian:
    """N(mean, std) for each action entry; the mean is the actor's action."""

    squash = True

    def __init__(self, log_std_A: nn.Parameter) -> None:
        self.log_std_A = log_std_A
        self.learned = (log_std_A,)  # parameters beside those of the actor

    def log_prob(self, mean_BA: Tensor, act_BA: Tensor) -> Tensor:
        log_std = self.log_std_A
        z = (act_BA - mean_BA) * torch.exp(-log_std)
        return -0.5 * z.square() - log_std - 0.5 * math.log(2.0 * math.pi)

    def entropy(self, mean_BA: Tensor) -> Tensor:
        """(A,), the same for every row."""
        return self.log_std_A + 0.5 * math.log(2.0 * math.pi * math.e)

    def sample(self, mean_BA: Tensor, generator: torch.Generator) -> Tensor:
        """Samples may lie outside [-1, 1]; the environment clips them."""
        std = self.log_std_A.exp().to(mean_BA.device)
        return mean_BA + std * normal_like(mean_BA, generator)


class Categorical:
    """Softmax of the actor's outputs before tanh; actions are one-hot."""

    squash = False
    learned: tuple[nn.Parameter, ...] = ()

    def log_prob(self, logits_BA: Tensor, act_BA: Tensor) -> Tensor:
        return logits_BA.log_softmax(-1).gather(1, act_BA.argmax(-1, keepdim=True))

    def entropy(self, logits_BA: Tensor) -> Tensor:
        """(B, 1)."""
        log_prob = logits_BA.log_softmax(-1)
        return -(log_prob.exp() * log_prob).sum(-1, keepdim=True)

    def sample(self, logits_BA: Tensor, generator: torch.Generator) -> Tensor:
        number = torch.multinomial(logits_BA.softmax(-1), 1, generator=generator).squeeze(1)
        return nn.functional.one_hot(number, logits_BA.shape[1]).to(logits_BA.dtype)


class Rows(NamedTuple):
    """The rows of a rollout, or of a minibatch of it."""

    obs: Tensor  # (B, O)
    act: Tensor  # (B, A)
    log_prob: Tensor  # (B, K) under the policy that acted
    advantage: Tensor  # (B,)
    ret: Tensor  # (B,) target of the critic


class PPO(Learner):
    """The policy is a Gaussian around the actor's action or, for discrete actions, the softmax of
    its outputs.

    All workers have equally many rows, each of its own environments. Advantages are normalised
    with moments over all workers, and all workers stop at target_kl together.
    """

    config: PPOConfig
    actor: Actor
    acting: Actor
    acts = ("continuous", "discrete")
    metrics = ("entropy", "approx_kl", "clip_fraction")
    on_policy = True

    def __init__(self, actor: Actor, critic: Critics, config: PPOConfig, **settings: Any) -> None:
        super().__init__(actor, critic, config, **settings)
        self.pi: Gaussian | Categorical = Categorical()
        if not self.discrete:
            self.log_std = LogStd(actor.act_dim, config.log_std).to(self.generator.device)
            self.pi = Gaussian(self.log_std.value_A)
            lr = self.actor_optimizer.lr
            self.optimizers["log_std"] = self.optimizer(self.log_std, lr)

    def train(self, sampler: Sampler, gradient_steps: int, batch_size: int) -> list[Metrics]:
        """`epochs` passes over the newest rollout, in minibatches."""
        batch, last = sampler.newest(self.config.rollout_steps // self.world.size)
        rows = self.prepare(batch, last, sampler.replay.width)
        minibatches = gradient_steps // self.config.epochs
        metrics: list[Metrics] = []
        for _ in range(self.config.epochs):
            order = torch.randperm(len(rows.ret), generator=sampler.generator).to(rows.ret.device)
            for index in order.tensor_split(minibatches):
                own = self.update(Rows(*(field[index] for field in rows)))
                if own is None:
                    self.refresh()
                    return metrics
                metrics.append(own)
        self.refresh()
        return metrics

    @torch.no_grad()
    def prepare(self, batch: Batch, last: Tensor, envs: int) -> Rows:
        """Add log probabilities, advantages and returns, computed with the networks that acted."""
        c = self.config
        value, next_value = self.value(batch.obs), self.value(batch.next_obs)
        rew, values, next_values, terminated, ends = (
            field.unflatten(0, (-1, envs))
            for field in (batch.rew, value, next_value, batch.terminated, last)
        )
        # An episode also ends where a row does not begin at the previous row's next_obs: a resume
        # resets environments whose state cannot be restored.
        obs, next_obs = (field.unflatten(0, (-1, envs)) for field in (batch.obs, batch.next_obs))
        ends = ends.clone()
        ends[:-1] |= (obs[1:] != next_obs[:-1]).flatten(2).any(-1)
        steps = (rew, values, next_values, terminated, ends)
        advantage = gae(*steps, gamma=c.gamma, gae_lambda=c.gae_lambda).flatten()
        ret = advantage + value
        if c.normalize_advantage == "rollout":
            advantage = self.normalized(advantage)
        log_prob = self.pi.log_prob(self.output(self.actor, batch.obs), batch.act)
        return Rows(batch.obs, batch.act, log_prob, advantage, ret)

    def update(self, rows: Rows) -> Metrics | None:
        """Update on one minibatch; None if the KL from the policy that acted is above the limit."""
        c, actor_opt, critic_opt = self.config, self.actor_optimizer, self.critic_optimizer
        pi, advantage = self.pi, rows.advantage
        if c.normalize_advantage == "minibatch":
            advantage = self.normalized(advantage)

        # Ratio of new to old probability, and the divergence KL = E[ratio - 1 - log ratio].
        output, backward = self.actor.vjp(rows.obs, self.generator, squash=pi.squash)
        output.requires_grad_()
        log_ratio_BK = pi.log_prob(output, rows.act) - rows.log_prob
        log_ratio = log_ratio_BK.sum(-1, keepdim=True)
        approx_kl = (log_ratio.detach().expm1() - log_ratio.detach()).mean()
        if c.target_kl is not None and self.mean_over_workers(approx_kl) > 1.5 * c.target_kl:
            return None

        # Actor: minimise -mean min(ratio A, clip(ratio, 1 - eps, 1 + eps) A) - coef entropy.
        ratio = (log_ratio if c.ratio == "joint" else log_ratio_BK).exp()
        clipped = ratio.clamp(1.0 - c.clip_ratio, 1.0 + c.clip_ratio)
        surrogate = torch.min(ratio * advantage.unsqueeze(-1), clipped * advantage.unsqueeze(-1))
        entropy = pi.entropy(output)
        entropy = (entropy.sum(-1) if c.ratio == "joint" else entropy).mean()
        loss = -surrogate.mean() - c.entropy_coef * entropy
        by_output, *by_log_std = torch.autograd.grad(
            loss, (output, *pi.learned), actor_opt.gradient.factor
        )
        actor_opt.gradient.loss.copy_(loss.detach() * actor_opt.gradient.weight)
        spikes = backward(by_output, actor_opt.gradient)

        # Critic: minimise mean (V(s) - return)^2.
        no_act = self.no_act(rows.obs)
        q_mean = self.critic.critic_backward(rows.obs, no_act, rows.ret, critic_opt.gradient)

        metrics = {
            "critic_loss": critic_opt.step(),
            "q_mean": q_mean,
            "actor_loss": actor_opt.step(),
            "entropy": entropy.detach(),
            "approx_kl": approx_kl,
            "clip_fraction": (ratio.detach() != clipped.detach()).to(loss.dtype).mean(),
            **spikes,
        }
        for gradient in by_log_std:
            self.optimizers["log_std"].gradient.slots[0].copy_(gradient)
            self.optimizers["log_std"].step()
        self.guard.end_update()
        self.updates += 1
        return metrics

    def output(self, actor: Actor, obs: Tensor) -> Tensor:
        """Parameters of the action distribution, (B, A): Gaussian means or logits."""
        return actor(obs, self.generator, self.pi.squash)

    def value(self, obs: Tensor) -> Tensor:
        return self.critic(obs, self.no_act(obs))[0]

    def no_act(self, obs: Tensor) -> Tensor:
        """The empty action, (B, 0), of a critic that sees the observation alone."""
        return obs.new_empty(len(obs), 0)

    def normalized(self, advantage: Tensor) -> Tensor:
        """Advantages shifted and scaled to mean 0 and deviation 1 over the rows of all workers."""
        x = advantage.double()
        sums = torch.stack([torch.ones_like(x).sum(), x.sum(), x.square().sum()])
        self.world.sum_(sums)
        count, total, squares = sums
        mean = total / count
        var = (squares - count * mean.square()).clamp(min=0.0) / (count - 1.0).clamp(min=1.0)
        return ((x - mean) / (var.sqrt() + 1e-8)).to(advantage.dtype)

    def mean_over_workers(self, value: Tensor) -> float:
        total = value.clone()
        self.world.sum_(total)
        return float(total) / self.world.size

    @torch.no_grad()
    def explore(self, obs: Tensor, generator: torch.Generator) -> Tensor:
        """Actions drawn from the policy."""
        return self.pi.sample(self.output(self.acting, obs), generator)
