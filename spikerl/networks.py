"""Actors and critics.

Shape legend   B batch, O observation entries, A action entries, I inputs, N outputs, C critics.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spikerl.errors import BadRequest
from spikerl.gradient import Gradient, Pullback, by_autograd
from spikerl.linear import Linears, product
from spikerl.snn import kernels
from spikerl.snn.decoders import RateConfig, RateDecoder
from spikerl.snn.encoders import PopulationConfig, PopulationEncoder
from spikerl.snn.kernels import reference
from spikerl.snn.neurons import CubaLIF, NeuronConfig
from spikerl.snn.surrogates import inside_window


def check_sizes(key: str, sizes: Iterable[int]) -> None:
    sizes = list(sizes)
    if not sizes or any(size < 1 for size in sizes):
        raise BadRequest(key, sizes, "give a list of widths of at least 1, such as [256,256]")


@dataclass(kw_only=True)
class PopSANConfig:
    """Population-coded spiking actor (Tang et al., CoRL 2020, arXiv:2010.09635)."""

    name: str
    hidden_sizes: list[int]
    spike_steps: int  # T, spike steps per decision
    lr: float  # of the actor's Adam

    def __post_init__(self) -> None:
        check_sizes("actor.hidden_sizes", self.hidden_sizes)
        if not 1 <= self.spike_steps <= 32:
            raise BadRequest("actor.spike_steps", self.spike_steps, "give 1 to 32")
        if not self.lr > 0.0:
            raise BadRequest("actor.lr", self.lr, "give a value above 0")


@dataclass(kw_only=True)
class MLPConfig:
    """Dense baseline: ReLU layers and tanh."""

    name: str
    hidden_sizes: list[int]
    lr: float

    def __post_init__(self) -> None:
        check_sizes("actor.hidden_sizes", self.hidden_sizes)
        if not self.lr > 0.0:
            raise BadRequest("actor.lr", self.lr, "give a value above 0")


@dataclass(kw_only=True)
class ActorConfig:
    """What an actor's shape and arithmetic depend on; a dense actor has no spiking parts."""

    actor: PopSANConfig | MLPConfig
    encoder: PopulationConfig | None
    neuron: NeuronConfig | None
    decoder: RateConfig | None

    def shape(self) -> str:
        """Whatever two actors must share for one to take the other's weights."""
        text = f"{self.actor.name} {self.actor.hidden_sizes}"
        if self.encoder and self.decoder and self.neuron:
            sizes = f"populations {self.encoder.pop_size}, {self.decoder.pop_size}"
            text += f" with {self.encoder.name}, {self.neuron.name}, {sizes}"
        return text


class Activity(NamedTuple):
    """How a spiking actor fires over a batch of observations."""

    firing_rate: float  # spikes per spike step, mean over all hidden and output neurons
    window_fraction: float  # of their voltages that a gradient passes, mean over the same
    layers: list[float]  # firing rate of the encoder, of each hidden layer, and of the output


class SpikingActor(nn.Module):
    """Population encoder, spiking layers, population decoder, tanh: (B, O) -> (B, A) in [-1, 1]."""

    def __init__(
        self,
        obs_dim: int,
        act_dim: int,
        actor: PopSANConfig,
        encoder: PopulationConfig,
        neuron: NeuronConfig,
        decoder: RateConfig,
        *,
        dtype: torch.dtype = torch.float32,
        kernel: str = "reference",
    ) -> None:
        super().__init__()
        self.spike_steps, self.kernel = actor.spike_steps, kernel
        # Of the layers' products; voltages and thresholds keep the weights' type.
        self.dtype = dtype
        self.neuron = CubaLIF(neuron)
        self.encoder = PopulationEncoder(obs_dim, encoder)
        sizes = [obs_dim * encoder.pop_size, *actor.hidden_sizes, act_dim * decoder.pop_size]
        self.layers = Linears(sizes)
        self.decoder = RateDecoder(act_dim, decoder)

    def forward(self, obs_BO: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Actions; `generator` is drawn from only where the encoder is random."""
        return kernels.named(self.kernel).actions(self, obs_BO, generator)

    def vjp(self, obs_BO: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Pullback]:
        """Actions, and the way back from their gradient to the parameters'."""
        return kernels.named(self.kernel).vjp(self, obs_BO, generator)

    def activity(self, obs_BO: Tensor, generator: torch.Generator | None = None) -> Activity:
        """Firing rates over any number of observations, in pieces of bounded memory."""
        fired, inside = torch.zeros(len(self.layers) + 1), torch.zeros(len(self.layers))
        for piece in obs_BO.split(1024):
            spikes, voltages = reference.record(self, piece, generator)
            weight = len(piece) / len(obs_BO)
            fired += weight * torch.stack([s.mean() for s in spikes]).cpu()
            c = self.neuron.config
            inside += (
                weight
                * torch.stack(
                    [
                        inside_window(v - c.threshold, c.surrogate_window).float().mean()
                        for v in voltages
                    ]
                ).cpu()
            )
        share = torch.tensor([float(len(layer.bias_N)) for layer in self.layers])
        share /= share.sum()
        return Activity(
            float((fired[1:] * share).sum()), float((inside * share).sum()), fired.tolist()
        )


class MLPActor(nn.Module):
    """Dense actor, (B, O) -> (B, A) in [-1, 1]."""

    def __init__(
        self, obs_dim: int, act_dim: int, actor: MLPConfig, *, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.dtype = dtype
        sizes = [obs_dim, *actor.hidden_sizes, act_dim]
        self.layers = Linears(sizes)

    def forward(self, obs_BO: Tensor, generator: torch.Generator | None = None) -> Tensor:
        x = obs_BO
        *hidden, last = self.layers
        for layer in hidden:
            x = torch.relu(product(x, layer, self.dtype))
        return torch.tanh(product(x, last, self.dtype))

    def vjp(self, obs_BO: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Pullback]:
        return by_autograd(self(obs_BO, generator))


Actor = SpikingActor | MLPActor


def build_actor(
    config: ActorConfig,
    obs_dim: int,
    act_dim: int,
    *,
    dtype: torch.dtype = torch.float32,
    kernel: str = "reference",
) -> Actor:
    if isinstance(config.actor, MLPConfig):
        return MLPActor(obs_dim, act_dim, config.actor, dtype=dtype)
    encoder, neuron, decoder = config.encoder, config.neuron, config.decoder
    if encoder is None or neuron is None or decoder is None:
        raise ValueError("a spiking actor needs an encoder, a neuron and a decoder")
    return SpikingActor(
        obs_dim, act_dim, config.actor, encoder, neuron, decoder, dtype=dtype, kernel=kernel
    )


class Critics(nn.Module):
    """Q networks with ReLU layers, side by side in one batched product per layer."""

    def __init__(
        self,
        obs_dim: int,
        act_dim: int,
        hidden_sizes: list[int],
        *,
        networks: int = 2,
        dtype: torch.dtype = torch.float32,
        kernel: str = "reference",
    ) -> None:
        super().__init__()
        self.dtype, self.kernel = dtype, kernel
        sizes = [obs_dim + act_dim, *hidden_sizes, 1]
        self.weights_CIN, self.biases_C1N = nn.ParameterList(), nn.ParameterList()
        for i, n in pairwise(sizes):
            bound = 1.0 / math.sqrt(i)  # what torch gives a linear layer
            self.weights_CIN.append(
                nn.Parameter(torch.empty(networks, i, n).uniform_(-bound, bound))
            )
            self.biases_C1N.append(
                nn.Parameter(torch.empty(networks, 1, n).uniform_(-bound, bound))
            )

    def forward(self, obs_BO: Tensor, act_BA: Tensor) -> Tensor:
        """Every network's values, (C, B)."""
        return kernels.named(self.kernel).values(self, obs_BO, act_BA)

    def regress(self, obs_BO: Tensor, act_BA: Tensor, target_B: Tensor, into: Gradient) -> Tensor:
        """Gradient of the sum of the networks' mean squared errors; the mean value."""
        return kernels.named(self.kernel).regress(self, obs_BO, act_BA, target_B, into)

    def ascent(self, obs_BO: Tensor, act_BA: Tensor, into: Gradient) -> Tensor:
        """The loss -mean Q_1, its weights held fixed: its gradient by the actions, (B, A)."""
        return kernels.named(self.kernel).ascent(self, obs_BO, act_BA, into)
