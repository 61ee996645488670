"""The definition in plain PyTorch: layer by layer, one matrix product for all spike steps.

Shape legend   T spike steps, B batch, O observation entries, I inputs, N neurons.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from spikerl.snn.neurons import CubaLIFState

if TYPE_CHECKING:
    from spikerl.networks import SpikingActor


def rates(net: SpikingActor, obs_BO: Tensor, generator: torch.Generator | None) -> Tensor:
    """Mean firing rates (B, N) of the output population, every neuron starting at rest."""
    spikes = net.encoder(obs_BO, net.spike_steps, generator)
    for layer in net.layers:
        spikes = torch.stack([state.spikes_BN for state in _states(net, layer, spikes)])
    return spikes.mean(0)


@torch.no_grad()
def record(
    net: SpikingActor, obs_BO: Tensor, generator: torch.Generator | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Spikes (T, B, N) of the encoder and of each layer; voltages (T, B, N) of each layer."""
    spikes = [net.encoder(obs_BO, net.spike_steps, generator)]
    voltages = []
    for layer in net.layers:
        states = _states(net, layer, spikes[-1])
        spikes.append(torch.stack([state.spikes_BN for state in states]))
        voltages.append(torch.stack([state.voltage_BN for state in states]))
    return spikes, voltages


def _states(net: SpikingActor, layer: nn.Linear, spikes_TBI: Tensor) -> list[CubaLIFState]:
    """One layer's states at every spike step, from rest."""
    steps = spikes_TBI.shape[0]
    drive_TBN = product(spikes_TBI.flatten(0, 1), layer, net.dtype).unflatten(0, (steps, -1))
    states = [net.neuron.step(drive_TBN[0], net.neuron.initial(drive_TBN[0]))]
    for drive_BN in drive_TBN[1:]:
        states.append(net.neuron.step(drive_BN, states[-1]))
    return states


def product(x: Tensor, layer: nn.Linear, dtype: torch.dtype) -> Tensor:
    """W x + b with operands in `dtype`; the result and the gradients are in W's own type."""
    if dtype == layer.weight.dtype:
        return layer(x)
    return nn.functional.linear(x.to(dtype), layer.weight.to(dtype), layer.bias.to(dtype)).to(
        layer.weight.dtype
    )
