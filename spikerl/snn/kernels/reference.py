"""The definition in plain PyTorch: layer by layer, one matrix product for all spike steps.

Shape legend   T spike steps, B batch, O observation entries, I inputs, N neurons, A actions,
C critics side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from spikerl.gradient import Gradient, Moments, Pullback, by_autograd
from spikerl.linear import Linear, Linears, product, relu_values
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


class ValueNet(Protocol):
    """What a kernel reads of critics."""

    dtype: torch.dtype  # of the layers' products
    weights_CIN: nn.ParameterList
    biases_C1N: nn.ParameterList


Scan = Callable[[SpikingNet, Tensor], Tensor]


def actions(net: SpikingNet, obs_BO: Tensor, generator: torch.Generator | None) -> Tensor:
    """Actions (B, A) in [-1, 1]."""
    return torch.tanh(net.decoder(rates(net, obs_BO, generator, scan)))


def vjp(
    net: SpikingNet, obs_BO: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, Pullback]:
    """Actions, and the way back from their gradient to the parameters'."""
    return by_autograd(actions(net, obs_BO, generator))


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


def values(critic: ValueNet, obs_BO: Tensor, act_BA: Tensor) -> Tensor:
    """Values (C, B)."""
    x_BI = torch.cat([obs_BO, act_BA], -1)
    return relu_values(x_BI, list(critic.weights_CIN), list(critic.biases_C1N), critic.dtype)


def regress(
    critic: ValueNet, obs_BO: Tensor, act_BA: Tensor, target_B: Tensor, into: Gradient
) -> Tensor:
    """Gradient of sum_c mean_b (Q_c - target)^2; the mean of all values."""
    value_CB = values(critic, obs_BO, act_BA)
    into.take((value_CB - target_B).square().mean(1).sum())
    return value_CB.detach().mean()


def ascent(critic: ValueNet, obs_BO: Tensor, act_BA: Tensor, into: Gradient) -> Tensor:
    """The loss -mean_b Q_1; its gradient by the actions, (B, A)."""
    act_BA = act_BA.detach().requires_grad_()
    x_BI = torch.cat([obs_BO, act_BA], -1)
    weights = [w.detach()[:1] for w in critic.weights_CIN]
    biases = [b.detach()[:1] for b in critic.biases_C1N]
    loss = -relu_values(x_BI, weights, biases, critic.dtype).mean()
    into.loss.copy_(loss.detach() * into.weight)
    return torch.autograd.grad(loss, act_BA, into.factor)[0]


def adam(moments: Moments, gradient: Tensor, lr: float, max_norm: float, masked: Tensor) -> None:
    """One step of Adam with a gradient whose last entry is the loss.

    The gradient is first scaled to a norm of at most `max_norm`. If something is not finite,
    `masked` becomes 1; where it is, nothing else changes. The step is the function below
    torch.optim.Adam(fused=True), whose own bookkeeping takes longer than that.
    """
    grad, step = gradient[:-1], moments.step
    # The sum of squares is finite only if every entry is; NaN is below nothing.
    finite = torch.dot(gradient, gradient) < math.inf
    masked.masked_fill_(~finite, 1.0)
    if max_norm < math.inf:
        grad *= (max_norm / (grad.norm() + 1e-6)).clamp(max=1.0)
    step += 1.0
    torch._fused_adam_(
        [moments.weights],
        [grad],
        [moments.exp_avg],
        [moments.exp_avg_sq],
        [],
        [step],
        lr=lr,
        beta1=0.9,
        beta2=0.999,
        weight_decay=0.0,
        eps=1e-8,
        amsgrad=False,
        maximize=False,
        found_inf=masked,
    )
    step -= masked


def polyak(target: Tensor, online: Tensor, tau: float, masked: Tensor) -> None:
    """target <- (1 - tau) target + tau online, unless masked."""
    target.lerp_(online, (tau * (1.0 - masked)).to(target.dtype))


def _drive(net: SpikingNet, layer: Linear, spikes_TBI: Tensor) -> Tensor:
    steps = spikes_TBI.shape[0]
    return product(spikes_TBI.flatten(0, 1), layer, net.dtype).unflatten(0, (steps, -1))


def _states(net: SpikingNet, drive_TBN: Tensor) -> list[CubaLIFState]:
    """One layer's states at every spike step."""
    states = [net.neuron.step(drive_TBN[0], net.neuron.initial(drive_TBN[0]))]
    for drive_BN in drive_TBN[1:]:
        states.append(net.neuron.step(drive_BN, states[-1]))
    return states
