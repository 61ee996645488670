"""The definition in plain PyTorch: layer by layer, one matrix product for all spike steps.

Shape legend   T spike steps, B batch, O observation entries, I inputs, N neurons, A actions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from spikerl.linear import Linear, Linears, product
from spikerl.snn.decoders import RateDecoder
from spikerl.snn.encoders import PopulationEncoder
from spikerl.snn.neurons import CubaLIF, CubaLIFState


class SpikingNet(Protocol):
    """What a kernel reads of a network."""

    spike_steps: int
    dtype: torch.dtype  # of the layers' products
    neuron: CubaLIF
    encoder: PopulationEncoder
    decoder: RateDecoder

    layers: Linears

    def parameters(self) -> Iterator[nn.Parameter]: ...


Scan = Callable[[SpikingNet, Tensor], Tensor]


def actions(net: SpikingNet, obs_BO: Tensor, generator: torch.Generator | None) -> Tensor:
    """Actions (B, A) in [-1, 1]."""
    return torch.tanh(net.decoder(rates(net, obs_BO, generator, scan)))


def scan(net: SpikingNet, drive_TBN: Tensor) -> Tensor:
    """Spikes (T, B, N) of one layer, from rest."""
    return torch.stack([state.spikes_BN for state in _states(net, drive_TBN)])


def rates(
    net: SpikingNet, obs_BO: Tensor, generator: torch.Generator | None, scan: Scan = scan
) -> Tensor:
    """Mean firing rates (B, N) of the output population, `scan` running each layer's neurons."""
    spikes = net.encoder(obs_BO, net.spike_steps, generator)
    for layer in net.layers:
        spikes = scan(net, _drive(net, layer, spikes))
    return spikes.mean(0)


@torch.no_grad()
def record(
    net: SpikingNet, obs_BO: Tensor, generator: torch.Generator | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Spikes (T, B, N) of the encoder and of each layer; voltages (T, B, N) of each layer."""
    spikes = [net.encoder(obs_BO, net.spike_steps, generator)]
    voltages = []
    for layer in net.layers:
        states = _states(net, _drive(net, layer, spikes[-1]))
        spikes.append(torch.stack([state.spikes_BN for state in states]))
        voltages.append(torch.stack([state.voltage_BN for state in states]))
    return spikes, voltages


def _drive(net: SpikingNet, layer: Linear, spikes_TBI: Tensor) -> Tensor:
    steps = spikes_TBI.shape[0]
    return product(spikes_TBI.flatten(0, 1), layer, net.dtype).unflatten(0, (steps, -1))


def _states(net: SpikingNet, drive_TBN: Tensor) -> list[CubaLIFState]:
    """One layer's states at every spike step."""
    states = [net.neuron.step(drive_TBN[0], net.neuron.initial(drive_TBN[0]))]
    for drive_BN in drive_TBN[1:]:
        states.append(net.neuron.step(drive_BN, states[-1]))
    return states
