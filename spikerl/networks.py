"""Actors and critics.

Shape legend   B batch, O observation entries, A action entries, I inputs, N outputs, C critics.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

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


@dataclass(eq=False)
class Activity:
    """How a spiking actor fires: counts of each neuron, over observations and spike steps."""

    spikes: list[Tensor]  # of the encoder, of each hidden layer, of the output: (N,)
    inside: list[Tensor]  # voltages inside the surrogate window, the same but for the encoder
    samples: int  # observations times spike steps

    def __add__(self, other: Activity) -> Activity:
        spikes = [a + b for a, b in zip(self.spikes, other.spikes, strict=True)]
        inside = [a + b for a, b in zip(self.inside, other.inside, strict=True)]
        return Activity(spikes, inside, self.samples + other.samples)

    @property
    def firing_rate(self) -> float:
        """Spikes per spike step, mean over all hidden and output neurons."""
        return float(torch.cat(self.spikes[1:]).mean()) / self.samples

    @property
    def window_fraction(self) -> float:
        """Of their voltages, those that a gradient passes."""
        return float(torch.cat(self.inside).mean()) / self.samples

    @property
    def layers(self) -> list[float]:
        """Firing rates of the encoder, of each hidden layer, and of the output."""
        return [float(counts.mean()) / self.samples for counts in self.spikes]

    @property
    def layer_windows(self) -> list[float]:
        """Window fractions, without the encoder's."""
        return [float(counts.mean()) / self.samples for counts in self.inside]

    @property
    def silent(self) -> list[float]:
        """Shares of neurons that never fired, without the encoder's."""
        return [float((counts == 0).double().mean()) for counts in self.spikes[1:]]

    @property
    def saturated(self) -> list[float]:
        """Shares of neurons that always fired, without the encoder's."""
        return [float((counts == self.samples).double().mean()) for counts in self.spikes[1:]]


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
        """Over any number of observations, in pieces of bounded memory."""
        c = self.neuron.config
        found = None
        for piece in obs_BO.split(1024):
            spikes, voltages = reference.record(self, piece, generator)
            inside = [inside_window(v - c.threshold, c.surrogate_window) for v in voltages]
            part = Activity(
                [s.double().sum((0, 1)).cpu() for s in spikes],
                [near.double().sum((0, 1)).cpu() for near in inside],
                len(piece) * self.spike_steps,
            )
            found = found + part if found else part
        assert found is not None
        return found


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
