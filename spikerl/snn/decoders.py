"""From the last layer's spikes to actions, before tanh.

Shape legend   T spike steps, B batch, N neurons of the last layer, A action entries, P neurons of
one population.

`rate`       an output population for each action entry; an affine map of its mean firing rates
`membrane`   the same map at every spike step charges a membrane that never fires; reads its last,
             mean or extreme value (ILC-SAN)
`ilc`        `membrane`, and connections within each output population (ILC-SAN)
`learned`    a learned matrix over all spike steps of the last hidden layer (ACSF)
`linear`     an affine map of the last hidden layer's mean firing rates (converted networks)
`voltage`    the same map at every spike step charges a membrane that never fires; reads its last,
             mean or largest voltage (DSQN)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spikerl.errors import BadRequest
from spikerl.schema import MOST_WIDTH, Registry
from spikerl.snn.linear import Linear, uniform


@dataclass(kw_only=True)
class DecoderConfig:
    """Config of a decoder without settings: `learned`, `linear`."""

    name: str


@dataclass(kw_only=True)
class RateConfig(DecoderConfig):
    """Decoder that reads the mean firing rate (arXiv:2010.09635)."""

    pop_size: int  # P, output neurons per action entry

    def __post_init__(self) -> None:
        if not 1 <= self.pop_size <= MOST_WIDTH:
            raise BadRequest("decoder.pop_size", self.pop_size, f"give 1 to {MOST_WIDTH}")


@dataclass(kw_only=True)
class MembraneConfig(RateConfig):
    """Decoder with a non-spiking membrane (arXiv:2401.05444)."""

    voltage_decay: float  # share of the membrane kept from one spike step to the next
    read: str  # last, mean, max (the value farthest from 0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.voltage_decay <= 1.0:
            raise BadRequest("decoder.voltage_decay", self.voltage_decay, "give a value in [0, 1]")
        if self.read not in ("last", "mean", "max"):
            raise BadRequest("decoder.read", self.read, "give last, mean or max")


@dataclass(kw_only=True)
class VoltageConfig(DecoderConfig):
    """Read-out of values from the membranes of a non-spiking layer (DSQN, arXiv:2201.09754)."""

    voltage_decay: float  # share of the membrane kept from one spike step to the next
    read: str  # last, mean, max (the largest voltage)

    def __post_init__(self) -> None:
        if not 0.0 <= self.voltage_decay < 1.0:
            remedy = "give a value in [0, 1), as a charge counts 1 minus that"
            raise BadRequest("decoder.voltage_decay", self.voltage_decay, remedy)
        if self.read not in ("last", "mean", "max"):
            raise BadRequest("decoder.read", self.read, "give last, mean or max")


class Decoder(nn.Module):
    """Reads `hidden` neurons of the last hidden layer, or an output population of its own."""

    def __init__(self, config: DecoderConfig, act_dim: int, hidden: int, spike_steps: int) -> None:
        super().__init__()
        self.config = config

    @staticmethod
    def population(config: Any, act_dim: int) -> int:
        """Neurons of the output population; 0 where the last hidden layer is read."""
        return 0

    def forward(self, spikes_TBN: Tensor) -> Tensor:
        raise NotImplementedError


class RateDecoder(Decoder):
    """Each action entry is an affine map of its own population's rates: a_j = w_j . r_j + b_j."""

    config: RateConfig

    def __init__(self, config: RateConfig, act_dim: int, hidden: int, spike_steps: int) -> None:
        super().__init__(config, act_dim, hidden, spike_steps)
        bound = 1.0 / math.sqrt(config.pop_size)
        self.weight_AP = uniform(bound, act_dim, config.pop_size)
        self.bias_A = uniform(bound, act_dim)

    @staticmethod
    def population(config: RateConfig, act_dim: int) -> int:
        return act_dim * config.pop_size

    def forward(self, spikes_TBN: Tensor) -> Tensor:
        return self.affine(spikes_TBN.mean(0))

    def affine(self, x: Tensor) -> Tensor:
        """(..., N) to (..., A)."""
        return (x.unflatten(-1, self.weight_AP.shape) * self.weight_AP).sum(-1) + self.bias_A


class MembraneDecoder(RateDecoder):
    """V = decay V + w_j . o_j + b_j at every spike step."""

    config: MembraneConfig

    def forward(self, spikes_TBN: Tensor) -> Tensor:
        voltages = []
        voltage = torch.zeros((), dtype=spikes_TBN.dtype, device=spikes_TBN.device)
        for charge_BA in self.affine(spikes_TBN):
            voltage = self.config.voltage_decay * voltage + charge_BA
            voltages.append(voltage)
        if self.config.read == "last":
            return voltages[-1]
        voltages_TBA = torch.stack(voltages)
        if self.config.read == "mean":
            return voltages_TBA.mean(0)
        high, low = voltages_TBA.amax(0), voltages_TBA.amin(0)
        return torch.where(high.abs() > low.abs(), high, low)


class ILCDecoder(MembraneDecoder):
    """`lateral` is the drive of output neurons by their population's spikes one spike step ago."""

    def __init__(self, config: MembraneConfig, act_dim: int, hidden: int, spike_steps: int) -> None:
        super().__init__(config, act_dim, hidden, spike_steps)
        size = config.pop_size
        bound = 1.0 / math.sqrt(size)
        self.lateral_APP = uniform(bound, act_dim, size, size)
        self.lateral_bias_N = uniform(bound, act_dim * size)

    def lateral(self, spikes_BN: Tensor) -> Tensor:
        spikes_BAP = spikes_BN.unflatten(1, self.weight_AP.shape)
        return (
            torch.einsum("bap,apq->baq", spikes_BAP, self.lateral_APP).flatten(1)
            + self.lateral_bias_N
        )


class LinearDecoder(Decoder):
    """An affine map of mean firing rates."""

    def __init__(self, config: DecoderConfig, act_dim: int, hidden: int, spike_steps: int) -> None:
        super().__init__(config, act_dim, hidden, spike_steps)
        self.map = Linear(hidden, act_dim)

    def forward(self, spikes_TBN: Tensor) -> Tensor:
        return self.map(spikes_TBN.mean(0))


class VoltageDecoder(LinearDecoder):
    """V = decay V + (1 - decay) (o W + b) at every spike step."""

    config: VoltageConfig

    def forward(self, spikes_TBN: Tensor) -> Tensor:
        decay, voltages = self.config.voltage_decay, []
        charge_TBA = self.map(spikes_TBN.flatten(0, 1)).unflatten(0, spikes_TBN.shape[:2])
        voltage = torch.zeros_like(charge_TBA[0])
        for charge_BA in charge_TBA:
            voltage = decay * voltage + (1.0 - decay) * charge_BA
            voltages.append(voltage)
        if self.config.read == "last":
            return voltage
        voltages_TBA = torch.stack(voltages)
        return voltages_TBA.mean(0) if self.config.read == "mean" else voltages_TBA.amax(0)


class LearnedDecoder(Decoder):
    """The learned matrix decoder of the adaptive coding framework (2211.11760), two affine maps.

    The first maps the spikes of all spike steps to one value for each neuron.
    """

    def __init__(self, config: DecoderConfig, act_dim: int, hidden: int, spike_steps: int) -> None:
        super().__init__(config, act_dim, hidden, spike_steps)
        self.over_time = Linear(spike_steps * hidden, hidden)
        self.map = Linear(hidden, act_dim)

    def forward(self, spikes_TBN: Tensor) -> Tensor:
        return self.map(self.over_time(spikes_TBN.transpose(0, 1).flatten(1)))


DECODERS: Registry[DecoderConfig, Decoder] = Registry(
    "decoder",
    rate=(RateConfig, RateDecoder),
    membrane=(MembraneConfig, MembraneDecoder),
    ilc=(MembraneConfig, ILCDecoder),
    linear=(DecoderConfig, LinearDecoder),
    learned=(DecoderConfig, LearnedDecoder),
    voltage=(VoltageConfig, VoltageDecoder),
)
