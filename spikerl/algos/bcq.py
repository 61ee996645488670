"""BCQ, batch-constrained deep Q-learning (Fujimoto, Meger and Precup, 2019, arXiv:1812.02900): only
actions like those of the dataset are valued and taken.

Shape legend   B batch, O observation entries, A action entries, Z latent entries, n proposals.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from spikerl.algos.base import CriticsConfig, Metrics, normal_like
from spikerl.algos.offpolicy import OfflineConfig, OffPolicy, TargetConfig, batches
from spikerl.models.actor import Actor, MLPActor
from spikerl.models.actor_config import ActorConfig, MLPConfig, ProposalConfig
from spikerl.models.critic import Critics
from spikerl.models.proposals import (
    Proposer,
    changed,
    decoder_of,
    first_of,
    latent_dim,
    proposed,
)
from spikerl.schema import check_sizes
from spikerl.types import Batch

KL_WEIGHT = 0.5  # in the VAE's loss
LOG_STD_RANGE = (-4.0, 15.0)


@dataclass(kw_only=True)
class BCQConfig(OfflineConfig, TargetConfig, CriticsConfig):
    phi: float  # largest change of a proposed action, in units of half the action range
    least_weight: float  # lambda: weight of the lower target value; the higher has 1 - lambda
    target_samples: int  # proposals at each next observation, valued at the best of them
    act_samples: int  # proposals that the policy chooses from
    vae_hidden_sizes: list[int]
    vae_lr: float

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("give a value in [0, 1]", lambda x: 0.0 <= x <= 1.0, "least_weight")
        self.check("give a value in [0, 2]", lambda x: 0.0 <= x <= 2.0, "phi")
        self.check("give 1 to 1000", lambda x: 1 <= x <= 1000, "target_samples", "act_samples")
        self.check("give a value above 0", lambda x: x > 0.0, "vae_lr")
        check_sizes("algo.vae_hidden_sizes", self.vae_hidden_sizes)

    def inputs(self, obs_dim: int, act_dim: int) -> int:
        return obs_dim + act_dim


class VAE(nn.Module):
    """Model of the dataset's actions: encoder (s, a) -> mean, log std of z; decoder (s, z) -> a."""

    def __init__(self, obs_dim: int, act_dim: int, hidden_sizes: list[int]) -> None:
        super().__init__()
        config = MLPConfig(name="mlp", hidden_sizes=hidden_sizes, lr=1.0)
        self.encoder = MLPActor(obs_dim + act_dim, 2 * latent_dim(act_dim), config)
        self.decoder = decoder_of(obs_dim, act_dim, hidden_sizes)

    def loss(self, obs_BO: Tensor, act_BA: Tensor, generator: torch.Generator) -> Tensor:
        """mean (decoded - a)^2 + 1/2 KL(N(mean, std) || N(0, 1)), means over batch and entries."""
        mean_BZ, raw_BZ = self.encoder(torch.cat([obs_BO, act_BA], 1), squash=False).chunk(2, 1)
        log_std_BZ = raw_BZ.clamp(*LOG_STD_RANGE)
        z_BZ = mean_BZ + log_std_BZ.exp() * normal_like(mean_BZ, generator)
        error_BA = self.decoder(torch.cat([obs_BO, z_BZ], 1)) - act_BA
        divergence = mean_BZ.square() + (2.0 * log_std_BZ).exp() - 1.0 - 2.0 * log_std_BZ
        return error_BA.square().mean() + KL_WEIGHT * 0.5 * divergence.mean()


class BCQ(OffPolicy):
    """The actor is the perturbation network xi(s, a), which adjusts proposed actions."""

    config: BCQConfig
    metrics = ("vae_loss",)

    def __init__(self, actor: Actor, critic: Critics, config: BCQConfig, **settings: Any) -> None:
        super().__init__(actor, critic, config, **settings)
        self.actor_target = self.add_target("actor", actor)
        self.sizes = (actor.obs_dim - actor.act_dim, actor.act_dim)
        self.vae = VAE(*self.sizes, config.vae_hidden_sizes).to(self.generator.device)
        self.optimizers["vae"] = self.optimizer(self.vae, config.vae_lr)

    def update(self, rows: Batch, numbers: range) -> list[Metrics]:
        """Make the updates with these numbers, each on an equal share of the rows."""
        c, generator, metrics = self.config, self.generator, []
        vae_opt, actor_opt, decoder = self.optimizers["vae"], self.actor_optimizer, self.vae.decoder
        for fields in batches(len(numbers), *rows):
            batch = Batch(*fields)
            obs = batch.obs

            # VAE: minimise mean (D(s, z) - a)^2 + 1/2 KL, z ~ N(E(s, a)).
            vae_opt.gradient.differentiate(self.vae.loss(obs, batch.act, generator))
            metric = {"vae_loss": vae_opt.step()}

            # y = r + gamma (1 - terminated) max_i [lambda min_j Q_j'(s', a_i)
            # + (1 - lambda) max_j Q_j'(s', a_i)], a_i = clip(d_i + phi xi'(s', d_i)), d_i proposed.
            with torch.no_grad():
                next_obs = batch.next_obs.repeat_interleave(c.target_samples, 0)
                next_act = proposed(decoder, next_obs, generator)
                change = self.actor_target(torch.cat([next_obs, next_act], 1), generator)
                q = self.critic_target(next_obs, changed(next_act, change, c.phi))
                q = c.least_weight * q.amin(0) + (1.0 - c.least_weight) * q.amax(0)
                q_target = batch.td_target(q.view(-1, c.target_samples).amax(1))

            # Critics: minimise sum_i mean (Q_i(s, a) - y)^2.
            metric |= self.critic_step(obs, batch.act, q_target)

            # Actor: minimise -mean Q_1(s, clip(d + phi xi(s, d))), d proposed. The chain rule takes
            # the gradient with respect to the actions back through clip, phi and the actor.
            with torch.no_grad():
                act = proposed(decoder, obs, generator)
            change, backward = self.actor.vjp(torch.cat([obs, act], 1), generator)
            grad = self.critic.actor_loss_grad(obs, changed(act, change, c.phi), actor_opt.gradient)
            inside = (act + c.phi * change).abs() <= 1.0
            metric |= backward(c.phi * grad * inside, actor_opt.gradient)
            metrics.append(metric | {"actor_loss": actor_opt.step()})

            self.update_targets()
            self.guard.end_update()
        return metrics

    def inference(self, config: ActorConfig, act_dim: int) -> tuple[ActorConfig, Actor | Proposer]:
        """The actor together with the decoder that proposes actions and the critic that chooses."""
        c = self.config
        config, change = super().inference(config, act_dim)
        assert isinstance(change, Actor)
        proposals = ProposalConfig(
            samples=c.act_samples,
            phi=c.phi,
            hidden_sizes=c.vae_hidden_sizes,
            critic_hidden_sizes=c.critic_hidden_sizes,
        )
        value = first_of(self.critic, *self.sizes, c.critic_hidden_sizes)
        proposer = Proposer(proposals, self.vae.decoder, change, value)
        return replace(config, proposals=proposals), proposer
