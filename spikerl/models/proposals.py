"""A policy that chooses among proposals: a generative model proposes actions, a network adjusts
them slightly, and a critic selects the best (BCQ).

Shape legend   B batch, O observation entries, A action entries, Z latent entries, n proposals.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spikerl.models.activity import Activity
from spikerl.models.actor import Actor, MLPActor, SpikingActor
from spikerl.models.actor_config import ActorConfig, MLPConfig, ProposalConfig
from spikerl.models.critic import Critics
from spikerl.models.networks import SequenceActor, build_actor, build_sequence
from spikerl.models.sequence import SequenceConfig

LATENT_BOUND = 0.5  # bound of the latent entries that proposals are decoded from


def latent_dim(act_dim: int) -> int:
    return 2 * act_dim


def decoder_of(obs_dim: int, act_dim: int, hidden_sizes: list[int]) -> MLPActor:
    """A network from observation and latent entries to an action: ReLU layers and tanh."""
    config = MLPConfig(name="mlp", hidden_sizes=hidden_sizes, lr=1.0)
    return MLPActor(obs_dim + latent_dim(act_dim), act_dim, config)


def proposed(decoder: MLPActor, obs_BO: Tensor, generator: torch.Generator | None) -> Tensor:
    """An action (B, A) for each observation: decoded from z ~ N(0, 1), clipped to [-1/2, 1/2]."""
    shape = (len(obs_BO), decoder.obs_dim - obs_BO.shape[1])
    z_BZ = torch.randn(shape, generator=generator, dtype=torch.float32, device=obs_BO.device)
    z_BZ = z_BZ.clamp(-LATENT_BOUND, LATENT_BOUND).to(obs_BO.dtype)
    act_BA: Tensor = decoder(torch.cat([obs_BO, z_BZ], 1))
    return act_BA


def changed(act_BA: Tensor, change_BA: Tensor, phi: float) -> Tensor:
    """a + phi xi(s, a), within the bounds."""
    return (act_BA + phi * change_BA).clamp(-1.0, 1.0)


class Proposer(nn.Module):
    """(B, O) -> (B, A): of n proposals for each observation, the one with the highest Q_1."""

    carries = False

    def __init__(
        self, config: ProposalConfig, decoder: MLPActor, change: Actor, value: Critics
    ) -> None:
        super().__init__()
        self.config = config
        self.decoder, self.change, self.value = decoder, change, value

    @property
    def kernel(self) -> str:
        """Kernel of the network that adjusts actions; the other networks run in PyTorch."""
        return self.change.kernel

    @kernel.setter
    def kernel(self, name: str) -> None:
        self.change.kernel = name

    def forward(self, obs_BO: Tensor, generator: torch.Generator | None = None) -> Tensor:
        n = self.config.samples
        obs = obs_BO.repeat_interleave(n, 0)
        act = proposed(self.decoder, obs, generator)
        act = changed(act, self.change(torch.cat([obs, act], 1), generator), self.config.phi)
        best_B = self.value(obs, act)[0].view(-1, n).argmax(1)
        return act[torch.arange(0, len(act), n, device=act.device, dtype=torch.int64) + best_B]

    def activity(self, obs_BO: Tensor, generator: torch.Generator | None = None) -> Activity | None:
        """Firing statistics of the network that adjusts actions, on one proposal for each
        observation; None if it is dense.
        """
        if not isinstance(self.change, SpikingActor):
            return None
        act = proposed(self.decoder, obs_BO, generator)
        return self.change.activity(torch.cat([obs_BO, act], 1), generator)


def build_policy(
    config: ActorConfig, obs_dim: int, act_dim: int, *, kernel: str = "reference"
) -> Actor | SequenceActor | Proposer:
    """The network of a saved policy."""
    proposals = config.proposals
    if isinstance(config.actor, SequenceConfig):
        return build_sequence(config, obs_dim, act_dim, kernel=kernel, folded=True)
    if proposals is None:
        return build_actor(config, obs_dim, act_dim, kernel=kernel)
    change = build_actor(config, obs_dim + act_dim, act_dim, kernel=kernel)
    decoder = decoder_of(obs_dim, act_dim, proposals.hidden_sizes)
    value = Critics(obs_dim, act_dim, proposals.critic_hidden_sizes, networks=1)
    return Proposer(proposals, decoder, change, value)


def first_of(critic: Critics, obs_dim: int, act_dim: int, hidden_sizes: list[int]) -> Critics:
    """The first of several critics alone, with a copy of its current weights."""
    with torch.device("meta"):
        one = Critics(obs_dim, act_dim, hidden_sizes, networks=1, dtype=critic.dtype)
    first = {name: p[:1].detach().clone() for name, p in critic.state_dict().items()}
    one.load_state_dict(first, assign=True)
    return one
