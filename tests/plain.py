"""A learner's networks as modules of torch.nn, for reference updates written in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from spikerl.algos.base import Learner, flatten
from spikerl.models.actor import MLPActor, SpikingActor
from spikerl.models.critic import Critics
from spikerl.types import Batch


@contextmanager
def float64() -> Iterator[None]:
    """Make float64 the default type: in float32, rounding may decide comparisons."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


L = TypeVar("L", bound=Learner)


def doubled(learner: L) -> L:
    """`learner` itself, all its networks in float64; the program itself has float32."""
    parts = {"temperature": "log_temperature"}
    for name, old in learner.optimizers.items():
        module: nn.Module = getattr(learner, parts.get(name, name))
        made = learner.optimizer(module.double(), old.lr)
        made.max_norm = old.max_norm
        learner.optimizers[name] = made
    for name in learner.targets:
        learner.targets[name] = flatten(getattr(learner, f"{name}_target").double())
    learner.critic_optimizer = learner.optimizers["critic"]
    learner.actor_optimizer = learner.optimizers["actor"]
    return learner


def relu_net(weights_IN: Iterable[Tensor], biases_N: Iterable[Tensor]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for weight, bias in zip(weights_IN, biases_N, strict=True):
        linear = nn.Linear(*weight.shape)
        linear.weight.data, linear.bias.data = weight.detach().T.clone(), bias.detach().clone()
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def q_networks(critics: Critics) -> nn.ModuleList:
    weights, biases = list(critics.weights_CIN), list(critics.biases_C1N)
    each = range(len(weights[0]))
    return nn.ModuleList(relu_net([w[c] for w in weights], [b[c, 0] for b in biases]) for c in each)


def dense(actor: MLPActor) -> nn.Sequential:
    """The actor's layers; the network returns actions before tanh."""
    layers = list(actor.layers)
    return relu_net([x.weight_IN for x in layers], [x.bias_N for x in layers])


class Fire(nn.Module):
    """A spike (1.0) where a voltage is above the threshold of 0.5."""

    def forward(self, voltage_BN: Tensor) -> Tensor:
        return (voltage_BN > 0.5).float()


class Spiking(nn.Module):
    """PopSAN's equations on torch's own layers."""

    def __init__(self, actor: SpikingActor) -> None:
        super().__init__()
        self.encoder, self.spike_steps = actor.encoder, actor.spike_steps
        layers = list(actor.layers)
        net = relu_net([x.weight_IN for x in layers], [x.bias_N for x in layers])
        self.linear = nn.Sequential(*(x for x in net if isinstance(x, nn.Linear)))
        self.fire = nn.Sequential(*(Fire() for _ in layers))
        weight_AP = actor.decoder.get_parameter("weight_AP").detach()
        actions, self.pop_size = weight_AP.shape
        self.decoder = nn.Conv1d(actions, actions, self.pop_size, groups=actions)
        self.decoder.weight.data = weight_AP.unsqueeze(1).clone()
        self.decoder.bias = nn.Parameter(actor.decoder.get_parameter("bias_A").detach().clone())

    def forward(self, obs_BO: Tensor) -> Tensor:
        zero = torch.zeros(len(obs_BO), 1)
        states = [(zero, zero, zero) for _ in self.linear]
        total = zero
        for x in self.encoder(obs_BO, self.spike_steps, None):
            for i, (layer, fire) in enumerate(zip(self.linear, self.fire, strict=True)):
                current, voltage, fired = states[i]
                current = 0.5 * current + layer(x)
                voltage = 0.75 * voltage * (1.0 - fired) + current
                x = fire(voltage)
                states[i] = (current, voltage, x)
            total = total + x
        rates_BAP = (total / self.spike_steps).unflatten(1, (-1, self.pop_size))
        return torch.tanh(self.decoder(rates_BAP).squeeze(-1))


def cut_weights(weights: list[Tensor], draw: torch.Generator) -> None:
    """Set three tenths of the weights to 0, drawn at random."""
    with torch.no_grad():
        for w in weights:
            w[torch.rand(w.shape, generator=draw) < 0.3] = 0.0


def values(nets: nn.ModuleList, *inputs: Tensor) -> Tensor:
    """The values by C networks for a batch of B, of shape (C, B)."""
    return torch.stack([net(torch.cat(inputs, 1)).squeeze(1) for net in nets])


def descend(
    loss: Tensor, *optimisers: torch.optim.Optimizer, max_norm: float | None = None
) -> None:
    """Let each optimiser make a step on the same loss; `max_norm` limits each one's gradient."""
    parts = [adam.param_groups[0]["params"] for adam in optimisers]
    grads = iter(torch.autograd.grad(loss, [p for part in parts for p in part]))
    for adam, part in zip(optimisers, parts, strict=True):
        for p in part:
            p.grad = next(grads)
        if max_norm is not None:
            nn.utils.clip_grad_norm_(part, max_norm)
        adam.step()


def length(adam: torch.optim.Optimizer) -> float:
    """The norm of the gradient at the last step; the step alone would not show it, as Adam makes
    the same step for any multiple of a gradient.
    """
    return torch.cat([p.grad.flatten() for p in adam.param_groups[0]["params"]]).norm().item()


def average(target: nn.Module, online: nn.Module, tau: float) -> None:
    for old, new in zip(target.parameters(), online.parameters(), strict=True):
        old.data = (1.0 - tau) * old.data + tau * new.data


def linears(*nets: nn.Module) -> list[nn.Linear]:
    return [layer for net in nets for layer in net.modules() if isinstance(layer, nn.Linear)]


def flat(net: nn.Module) -> Tensor:
    """All parameters in spikerl's order: in critics, all weights come before all biases."""
    if isinstance(net, nn.ModuleList):
        each = [linears(one) for one in net]
        weights = [torch.stack([x.weight.T for x in layer]) for layer in zip(*each, strict=True)]
        biases = [torch.stack([x.bias for x in layer]) for layer in zip(*each, strict=True)]
        params = [*weights, *biases]
    elif isinstance(net, nn.Sequential):
        params = [p for layer in linears(net) for p in (layer.weight.T, layer.bias)]
    else:
        params = list(net.parameters())
    return torch.cat([p.detach().flatten() for p in params])


def transitions(count: int, dtype: torch.dtype, seed: int = 1) -> Batch:
    """Random transitions with 3 observation and 2 action entries; every fifth ends its episode."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(count, *shape, generator=draw, dtype=dtype)

    done, discount = torch.arange(count) % 5 == 0, torch.full((count,), 0.9, dtype=dtype)
    return Batch(normal(3), normal(2).clamp(-1, 1), normal(), normal(3), done, discount)


def cut(batch: Batch, size: int) -> list[Batch]:
    return [Batch(*part) for part in zip(*(field.split(size) for field in batch), strict=True)]
