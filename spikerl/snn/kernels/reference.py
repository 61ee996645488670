"""The definition in plain PyTorch: layer by layer, one matrix product for all spike steps.

Shape legend   T spike steps, B batch, O observation entries, I inputs, N neurons.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spikerl.linear import product
from spikerl.snn.kernels import SpikingNet
from spikerl.snn.neurons import CubaLIFState


def rates(net: SpikingNet, obs_BO: Tensor, generator: torch.Generator | None) -> Tensor:
    """Mean firing rates (B, N) of the output population, every neuron starting at rest."""
    spikes = net.encoder(obs_BO, net.spike_steps, generator)
    for layer in net.layers:
        spikes = torch.stack([state.spikes_BN for state in _states(net, layer, spikes)])
    return spikes.mean(0)


@torch.no_grad()
def record(
    net: SpikingNet, obs_BO: Tensor, generator: torch.Generator | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Spikes (T, B, N) of the encoder and of each layer; voltages (T, B, N) of each layer."""
    spikes = [net.encoder(obs_BO, net.spike_steps, generator)]
    voltages = []
    for layer in net.layers:
        states = _states(net, layer, spikes[-1])
        spikes.append(torch.stack([state.spikes_BN for state in states]))
        voltages.append(torch.stack([state.voltage_BN for state in states]))
    return spikes, voltages


def _states(net: SpikingNet, layer: nn.Linear, spikes_TBI: Tensor) -> list[CubaLIFState]:
    """One layer's states at every spike step, from rest."""
    steps = spikes_TBI.shape[0]
    drive_TBN = product(spikes_TBI.flatten(0, 1), layer, net.dtype).unflatten(0, (steps, -1))
    states = [net.neuron.step(drive_TBN[0], net.neuron.initial(drive_TBN[0]))]
    for drive_BN in drive_TBN[1:]:
        states.append(net.neuron.step(drive_BN, states[-1]))
    return states
