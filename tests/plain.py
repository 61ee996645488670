"""A learner's networks as torch.nn has them, for updates written the usual way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from spikerl.models.actor import MLPActor
from spikerl.models.critic import Critics
from spikerl.types import Batch


@contextmanager
def float64() -> Iterator[None]:
    """New tensors are of it: what rounding leaves open in float32 is decided."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


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
    """Its actions before tanh."""
    layers = list(actor.layers)
    return relu_net([x.weight_IN for x in layers], [x.bias_N for x in layers])


def values(nets: nn.ModuleList, *inputs: Tensor) -> Tensor:
    """(C, B)."""
    return torch.stack([net(torch.cat(inputs, 1)).squeeze(1) for net in nets])


def descend(
    loss: Tensor, *optimisers: torch.optim.Optimizer, max_norm: float | None = None
) -> None:
    """A step of each down the same loss; `max_norm` is of each one's gradient."""
    parts = [adam.param_groups[0]["params"] for adam in optimisers]
    grads = iter(torch.autograd.grad(loss, [p for part in parts for p in part]))
    for adam, part in zip(optimisers, parts, strict=True):
        for p in part:
            p.grad = next(grads)
        if max_norm is not None:
            nn.utils.clip_grad_norm_(part, max_norm)
        adam.step()


def length(adam: torch.optim.Optimizer) -> float:
    """Of the gradient of its last step; a step alone would be the same for a multiple of it."""
    return torch.cat([p.grad.flatten() for p in adam.param_groups[0]["params"]]).norm().item()


def average(target: nn.Module, online: nn.Module, tau: float) -> None:
    for old, new in zip(target.parameters(), online.parameters(), strict=True):
        old.data = (1.0 - tau) * old.data + tau * new.data


def linears(*nets: nn.Module) -> list[nn.Linear]:
    return [layer for net in nets for layer in net.modules() if isinstance(layer, nn.Linear)]


def flat(net: nn.Module) -> Tensor:
    """Every parameter, as this program orders them: all weights before all biases in critics."""
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
    """Of 3 observation and 2 action entries; every fifth ends its episode."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(count, *shape, generator=draw, dtype=dtype)

    done, discount = torch.arange(count) % 5 == 0, torch.full((count,), 0.9, dtype=dtype)
    return Batch(normal(3), normal(2).clamp(-1, 1), normal(), normal(3), done, discount)


def cut(batch: Batch, size: int) -> list[Batch]:
    return [Batch(*part) for part in zip(*(field.split(size) for field in batch), strict=True)]
