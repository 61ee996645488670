"""The kernels' definition in plain PyTorch: layer by layer, one matrix product for all spike steps.

Shape legend   T spike steps, B batch, O observation entries, I inputs, N neurons, A actions,
C critics side by side.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from spikerl.kernels.dense import relu_values
from spikerl.kernels.gradient import Gradient, Moments, Pullback, SamplePullback, by_autograd
from spikerl.kernels.nets import DenseNet, Parts, SpikingNet, ValueNet
from spikerl.snn.batchnorm import BATCH, ROWS, RUNNING, Rows
from spikerl.snn.decoders import ILCDecoder
from spikerl.snn.early_exit import EarlyExit
from spikerl.snn.linear import Linear, product
from spikerl.snn.neurons import Neuron, ResidualIF, State
from spikerl.types import Batch


@dataclass
class Carried:
    """What B episodes side by side carry from one decision to the next; empty at their start."""

    residuals: list[Tensor] = field(default_factory=list)  # (B, N) for each layer
    fired_B: Tensor | None = None  # number of spikes of all layers in the last decision

    def reward(self, rew_B: object) -> None:
        """Accept rewards, as `History.reward` does; they have no effect here."""

    def restart(self, which_B: Tensor) -> None:
        """Clear the state of the episodes selected by the mask `which_B`, which begin anew."""
        for residual_BN in self.residuals:
            residual_BN[which_B] = 0.0


def early_actions(
    net: SpikingNet, obs_BO: Tensor, generator: torch.Generator | None, exit: EarlyExit
) -> Tensor:
    """Actions (B, A), computed one spike step at a time until all are decided."""
    x_TBK = net.encoder(obs_BO, net.spike_steps, generator)
    constant = len(x_TBK) == 1
    first_TBN = normed(net, 0, _drive(net, 0, x_TBK[:1]))
    states: list[State | None] = [None] * len(net.neurons)
    spikes_TBN: list[Tensor] = []
    act_TBA: list[Tensor] = []
    decided_BA = obs_BO.new_zeros(())
    open_B1 = torch.ones(len(obs_BO), 1, dtype=torch.bool, device=obs_BO.device)
    for t in range(net.spike_steps):
        x_BI = x_TBK[0 if constant else t]
        for i, neuron in enumerate(net.neurons):
            known = i == 0 and (constant or t == 0)
            drive_BN = (first_TBN if known else normed(net, i, _drive(net, i, x_BI.unsqueeze(0))))[
                0
            ]
            state = states[i] or neuron.initial(drive_BN)
            if lateral := _lateral(net, i):
                drive_BN = drive_BN + lateral(state.spikes_BN)
            states[i] = state = neuron.step(drive_BN, state)
            x_BI = state.spikes_BN
        spikes_TBN.append(x_BI)
        act_TBA.append(torch.tanh(net.decoder(torch.stack(spikes_TBN))))
        decided_BA = torch.where(open_B1, act_TBA[-1], decided_BA)
        open_B1 = open_B1 & ~exit.settled(act_TBA).unsqueeze(1)
        if not open_B1.any():
            break
    return decided_BA


def taken(net: SpikingNet, spikes_TBN: Tensor) -> Tensor:
    """Mask (T, B, 1) of the spike steps before each decision's early exit; `spikes_TBN`: those of
    the last layer.
    """
    open_TB1 = torch.ones_like(spikes_TBN[..., :1], dtype=torch.bool)
    if net.early_exit is not None:
        act_TBA: list[Tensor] = []
        for t in range(1, len(spikes_TBN)):
            act_TBA.append(torch.tanh(net.decoder(spikes_TBN[:t])))
            open_TB1[t] = open_TB1[t - 1] & ~net.early_exit.settled(act_TBA).unsqueeze(1)
    return open_TB1


def act(output_BA: Tensor, squash: bool) -> Tensor:
    return torch.tanh(output_BA) if squash else output_BA


def first(net: SpikingNet, obs_BO: Tensor, generator: torch.Generator | None) -> Tensor:
    """The first layer's drive."""
    return _drive(net, 0, net.encoder(obs_BO, net.spike_steps, generator))


def drive(layer: Linear, neuron: Neuron, x_TBI: Tensor, dtype: torch.dtype) -> Tensor:
    """The drive of a layer, (T, B, N), by the spikes of the neuron before it."""
    return _driven(layer, x_TBI, dtype)


def scan(neuron: Neuron, drive_TBN: Tensor) -> Tensor:
    """Spikes (T, B, N) of one layer, from rest."""
    return _spikes(_states(neuron, drive_TBN))


def connected_scan(neuron: Neuron, drive_TBN: Tensor, decoder: ILCDecoder) -> Tensor:
    """As `scan`, for neurons with lateral connections in the decoder."""
    return _spikes(_states(neuron, drive_TBN, decoder.lateral))


parts = Parts(first, drive, scan, connected_scan, ROWS)


def actions(
    net: SpikingNet,
    obs_BO: Tensor,
    generator: torch.Generator | None,
    squash: bool = True,
    parts: Parts = parts,
) -> Tensor:
    """Actions (B, A) in [-1, 1]; without `squash`, their values before tanh."""
    if net.early_exit is not None and squash:
        return early_actions(net, obs_BO, generator, net.early_exit)
    return act(outputs(net, obs_BO, generator, parts), squash)


def vjp(
    net: SpikingNet,
    obs_BO: Tensor,
    generator: torch.Generator | None,
    squash: bool = True,
    parts: Parts = parts,
) -> tuple[Tensor, Pullback]:
    """Actions, and the pullback from their gradient to the parameters'.

    If spikes have a cost, the pullback adds it to the loss: sum_l cost_l mean_tbn spikes_l.
    """
    if net.spike_cost_L is None:
        return by_autograd(act(outputs(net, obs_BO, generator, parts, BATCH), squash))
    layers = list(layer_spikes(net, obs_BO, generator, parts, BATCH))
    rate_L = torch.stack([layer.mean() for layer in layers])
    output = act(net.decoder(layers[-1]), squash)
    return by_autograd(output, (net.spike_cost_L * rate_L).sum())


def outputs(
    net: SpikingNet,
    obs_BO: Tensor,
    generator: torch.Generator | None,
    parts: Parts = parts,
    moments: str = RUNNING,
) -> Tensor:
    """The decoder's outputs from the last layer's spikes, (B, A)."""
    return net.decoder(spikes(net, obs_BO, generator, parts, moments))


def spikes(
    net: SpikingNet,
    obs_BO: Tensor,
    generator: torch.Generator | None,
    parts: Parts = parts,
    moments: str = RUNNING,
) -> Tensor:
    """The last layer's spikes (T, B, N)."""
    return deque(layer_spikes(net, obs_BO, generator, parts, moments), maxlen=1).pop()


def layer_spikes(
    net: SpikingNet,
    obs_BO: Tensor,
    generator: torch.Generator | None,
    parts: Parts,
    moments: str,
) -> Iterator[Tensor]:
    """Each layer's spikes (T, B, N).

    `moments`: the kind of moments that normalise drives, if the network has norms.
    """
    drive_TBN = parts.first(net, obs_BO, generator)
    for i, neuron in enumerate(net.neurons):
        drive_TBN = normed(net, i, drive_TBN, moments, parts.rows)
        if (connected := _connected(net, i)) is not None:
            x_TBN = parts.connected_scan(neuron, drive_TBN, connected)
        else:
            x_TBN = parts.scan(neuron, drive_TBN)
        yield x_TBN
        if i < len(net.neurons) - 1:
            drive_TBN = parts.drive(net.layers[i + 1], neuron, x_TBN, net.dtype)


@torch.no_grad()
def record(
    net: SpikingNet, obs_BO: Tensor, generator: torch.Generator | None
) -> tuple[list[Tensor], list[list[State]]]:
    """The encoder's output followed by each layer's spikes (T, B, N), and each layer's states."""
    layers = [net.encoder(obs_BO, net.spike_steps, generator)]
    states = []
    for i, neuron in enumerate(net.neurons):
        drive_TBN = normed(net, i, _drive(net, i, layers[-1]))
        states.append(_states(neuron, drive_TBN, _lateral(net, i)))
        layers.append(_spikes(states[-1]))
    return layers, states


@torch.no_grad()
def decide(
    net: SpikingNet,
    obs_BO: Tensor,
    generator: torch.Generator | None,
    carried: Carried,
    squash: bool = True,
) -> Tensor:
    """As `actions`, for neurons that carry residuals over; updates `carried` in place."""
    x = net.encoder(obs_BO, net.spike_steps, generator)
    fired_B = torch.zeros(len(obs_BO), dtype=torch.float64, device=obs_BO.device)
    residuals = []
    for i, neuron in enumerate(net.neurons):
        assert isinstance(neuron, ResidualIF)
        drive_TBN = normed(net, i, _drive(net, i, x))
        begin = neuron.initial(drive_TBN[0], carried.residuals[i] if carried.residuals else None)
        states = _states(neuron, drive_TBN, _lateral(net, i), begin)
        residuals.append(neuron.residual(begin, states))
        x = _spikes(states)
        fired_B += x.double().sum((0, 2))
    carried.residuals, carried.fired_B = residuals, fired_B
    return act(net.decoder(x), squash)


def values(critic: ValueNet, obs_BO: Tensor, act_BA: Tensor) -> Tensor:
    """Values (C, B)."""
    x_BI = torch.cat([obs_BO, act_BA], -1)
    return relu_values(x_BI, list(critic.weights_CIN), list(critic.biases_C1N), critic.dtype)


def td_target(
    critic: ValueNet, rows: Batch, act_BA: Tensor, bonus_B: Tensor | None = None
) -> Tensor:
    """Target values (B,), from the lowest critic value of next observations and `act`, plus the
    bonus.
    """
    lowest_B = values(critic, rows.next_obs, act_BA).amin(0)
    return rows.td_target(lowest_B if bonus_B is None else lowest_B + bonus_B)


def squashed(
    mean_BA: Tensor, log_std_BA: Tensor, noise_BA: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """a = tanh(u) with u = mean + std noise, and log pi(a), (B,); log std is clipped first.

    log pi(a) = sum log N(u; mean, std) - log(1 - tanh(u)^2), the last in a form that does not
    overflow: 2 (log 2 - u - softplus(-2 u)).
    """
    log_std_BA = log_std_BA.clamp(low, high)
    u = mean_BA + log_std_BA.exp() * noise_BA
    normal = -0.5 * noise_BA.square() - log_std_BA - 0.5 * math.log(2.0 * math.pi)
    slope = 2.0 * (math.log(2.0) - u - nn.functional.softplus(-2.0 * u))
    return torch.tanh(u), (normal - slope).sum(-1)


def squashed_vjp(
    mean_BA: Tensor, log_std_BA: Tensor, noise_BA: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor, SamplePullback]:
    """As `squashed`, and the pullback from gradients with respect to a and log pi(a) to those with
    respect to mean and log std.
    """
    inputs = mean_BA.detach().requires_grad_(), log_std_BA.detach().requires_grad_()
    outputs = squashed(*inputs, noise_BA, low, high)

    def pull(by_act_BA: Tensor, by_log_prob_B: Tensor) -> tuple[Tensor, Tensor]:
        by_mean, by_log_std = torch.autograd.grad(outputs, inputs, (by_act_BA, by_log_prob_B))
        return by_mean, by_log_std

    act, log_prob = outputs
    return act.detach(), log_prob.detach(), pull


def add_clipped_noise(act_BA: Tensor, noise_BA: Tensor, std: float, bound: float) -> Tensor:
    """act + clip(std noise, -bound, bound), clipped to [-1, 1]; kernels may overwrite the noise."""
    return (act_BA + (noise_BA * std).clamp(-bound, bound)).clamp(-1.0, 1.0)


def critic_backward(
    critic: ValueNet, obs_BO: Tensor, act_BA: Tensor, target_B: Tensor, into: Gradient
) -> Tensor:
    """Write the loss sum_c mean_b (Q_c - target)^2 and its gradient; the mean of all values."""
    value_CB = values(critic, obs_BO, act_BA)
    into.differentiate((value_CB - target_B).square().mean(1).sum())
    return value_CB.detach().mean()


def actor_loss_grad(
    critic: ValueNet, obs_BO: Tensor, act_BA: Tensor, into: Gradient, lowest: bool = False
) -> Tensor:
    """Write the loss -mean_b Q_1 (`lowest`: -mean_b min_c Q_c); returns its gradient with respect
    to the actions, (B, A).
    """
    act_BA = act_BA.detach().requires_grad_()
    x_BI = torch.cat([obs_BO, act_BA], -1)
    networks = None if lowest else 1
    weights = [w.detach()[:networks] for w in critic.weights_CIN]
    biases = [b.detach()[:networks] for b in critic.biases_C1N]
    loss = -relu_values(x_BI, weights, biases, critic.dtype).amin(0).mean()
    into.loss.copy_(loss.detach() * into.weight)
    return torch.autograd.grad(loss, act_BA, into.factor)[0]


def dense_actions(net: DenseNet, obs_BO: Tensor, squash: bool = True) -> Tensor:
    """Actions (B, A): ReLU layers and tanh; without `squash`, their values before tanh."""
    x = obs_BO
    *hidden, last = net.layers
    for layer in hidden:
        x = torch.relu(product(x, layer, net.dtype))
    return act(product(x, last, net.dtype), squash)


def dense_vjp(net: DenseNet, obs_BO: Tensor, squash: bool = True) -> tuple[Tensor, Pullback]:
    """As `vjp`, for a dense network."""
    return by_autograd(dense_actions(net, obs_BO, squash))


def mse_backward(net: DenseNet, obs_BO: Tensor, goal_BA: Tensor, into: Gradient) -> None:
    """Write the mean squared error of the actions from `goal`, over batch and entries, and its
    gradient.
    """
    into.differentiate((dense_actions(net, obs_BO) - goal_BA).square().mean())


def adam(
    moments: Moments,
    gradient: Tensor,
    lr: float,
    max_norm: float,
    masked: Tensor,
    piece: int | None = None,
) -> None:
    """One step of Adam with a gradient whose last entry is the loss.

    The gradient is first scaled to a norm of at most `max_norm`. If an entry is not finite,
    `masked` becomes 1; while it is 1, weights and moments stay unchanged. Calls the function below
    torch.optim.Adam(fused=True), whose own bookkeeping takes longer than the step itself. `piece`:
    split the vectors into tensors of so many entries for that function.
    """
    grad, step = gradient[:-1], moments.step
    # The sum of squares is finite only if every entry is; comparing NaN gives False.
    finite = torch.dot(gradient, gradient) < math.inf
    masked.masked_fill_(~finite, 1.0)
    if max_norm < math.inf:
        grad *= (max_norm / (grad.norm() + 1e-6)).clamp(max=1.0)
    step += 1.0
    vectors = (moments.weights, grad, moments.exp_avg, moments.exp_avg_sq)
    weights, grads, exp_avgs, exp_avg_sqs = ([*v.split(piece or len(v))] for v in vectors)
    torch._fused_adam_(
        weights, grads, exp_avgs, exp_avg_sqs, [], [step] * len(weights), lr=lr, beta1=0.9,
        beta2=0.999, weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False, found_inf=masked,
    )  # fmt: skip
    step -= masked


def polyak(target: Tensor, online: Tensor, tau: float, masked: Tensor) -> None:
    """target <- (1 - tau) target + tau online, unless masked."""
    target.lerp_(online, (tau * (1.0 - masked)).to(target.dtype))


def normed(
    net: SpikingNet, i: int, drive_TBN: Tensor, moments: str = RUNNING, rows: Rows = ROWS
) -> Tensor:
    """The drive of layer `i`, normalised if the network has norms, expanded to all spike steps."""
    if len(net.norms):
        drive_TBN = net.norms[i](drive_TBN, moments, rows)
    return drive_TBN.expand(net.spike_steps, -1, -1)


def _drive(net: SpikingNet, i: int, x_TBI: Tensor) -> Tensor:
    """The drive of layer `i` by its inputs, (T, B, N)."""
    return _driven(net.layers[i], x_TBI, net.dtype)


def _driven(layer: Linear, x_TBI: Tensor, dtype: torch.dtype) -> Tensor:
    return product(x_TBI.flatten(0, 1), layer, dtype).unflatten(0, (len(x_TBI), -1))


def _connected(net: SpikingNet, i: int) -> ILCDecoder | None:
    """The decoder, if it connects the neurons of layer `i`, the output population; else None."""
    last = i == len(net.neurons) - 1
    return net.decoder if last and isinstance(net.decoder, ILCDecoder) else None


def _lateral(net: SpikingNet, i: int) -> Callable[[Tensor], Tensor] | None:
    """The function from the spikes of layer `i` to the drive they give each other, if any."""
    connected = _connected(net, i)
    return connected.lateral if connected is not None else None


def _states(
    neuron: Neuron,
    drive_TBN: Tensor,
    lateral: Callable[[Tensor], Tensor] | None = None,
    begin: State | None = None,
) -> list[State]:
    """One layer's states at every spike step; `begin`: the initial state, None for rest."""
    state, states = begin or neuron.initial(drive_TBN[0]), []
    for drive_BN in drive_TBN:
        if lateral is not None:
            drive_BN = drive_BN + lateral(state.spikes_BN)
        state = neuron.step(drive_BN, state)
        states.append(state)
    return states


def _spikes(states: list[State]) -> Tensor:
    return torch.stack([state.spikes_BN for state in states])
