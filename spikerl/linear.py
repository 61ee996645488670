"""Linear layers whose products may use a narrower number format than their parameters.

Shape legend   B batch, I inputs, N outputs, C networks side by side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn


class Linear(nn.Module):
    """x W + b. A row of W belongs to one input, so that an input that fires adds one row."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = 1.0 / math.sqrt(inputs)  # as torch's own linear layer
        self.weight_IN = nn.Parameter(torch.empty(inputs, outputs).uniform_(-bound, bound))
        self.bias_N = nn.Parameter(torch.empty(outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias_N, x, self.weight_IN)


M = TypeVar("M", bound=nn.Module)


class ListOf(nn.ModuleList, Generic[M]):
    """Modules of one kind."""

    def __iter__(self) -> Iterator[M]:
        return super().__iter__()  # type: ignore[return-value]

    def __getitem__(self, i: int) -> M:  # type: ignore[override]
        return super().__getitem__(i)  # type: ignore[return-value]


class Linears(ListOf[Linear]):
    """Linear layers between widths that follow each other."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__(Linear(i, n) for i, n in pairwise(sizes))


def product(x: Tensor, layer: Linear, dtype: torch.dtype) -> Tensor:
    """x W + b with operands in `dtype`; the result and the gradients are in W's own type."""
    own = layer.weight_IN.dtype
    if dtype == own:
        return layer(x)
    rounded = (layer.bias_N.to(dtype), x.to(dtype), layer.weight_IN.to(dtype))
    return torch.addmm(*rounded).to(own)


def relu_values(
    x_BI: Tensor, weights_CIN: list[Tensor], biases_C1N: list[Tensor], dtype: torch.dtype
) -> Tensor:
    """The values (C, B) of C networks with ReLU layers and one output each, for the same inputs.

    Products have operands in `dtype`; values and gradients are in the parameters' type. It is one
    node of the graph, written out: with one column, a matrix product is slow.
    """
    values: Tensor = _ReLUValues.apply(x_BI, dtype, *weights_CIN, *biases_C1N)
    return values


class _ReLUValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BI: Tensor, dtype: torch.dtype, *params: Tensor) -> Tensor:
        layers = len(params) // 2
        weights = [w.to(dtype) for w in params[:layers]]
        biases = [b.to(dtype) for b in params[layers:]]
        inputs = [x_BI.to(dtype).expand(len(weights[0]), -1, -1)]
        for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
            inputs.append(torch.baddbmm(bias, inputs[-1], weight).relu_())
        last = torch.linalg.vecdot(inputs[-1], weights[-1].transpose(1, 2))
        ctx.save_for_backward(*inputs, *weights)
        ctx.own = params[0].dtype
        return (last + biases[-1].squeeze(-1)).to(ctx.own)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_CB: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        layers = len(saved) // 2
        inputs, weights = saved[:layers], saved[layers:]
        wants_x, _, wants_params, *_ = ctx.needs_input_grad
        grad = grad_CB.to(weights[0].dtype).unsqueeze(-1)  # of a layer's outputs, (C, B, N)
        grads: list[Tensor] = []  # of weights and biases, the last layer's first
        for i in reversed(range(layers)):
            if wants_params:
                bias = grad.sum(1, keepdim=True)
                if i == layers - 1:
                    weight = torch.bmm(grad.transpose(1, 2), inputs[i]).transpose(1, 2)
                else:
                    weight = torch.bmm(inputs[i].transpose(1, 2), grad)
                grads += [bias.to(ctx.own), weight.to(ctx.own)]
            if i == 0:
                break
            back = weights[i].transpose(1, 2)
            below = grad * back if i == layers - 1 else torch.bmm(grad, back)
            grad = torch.ops.aten.threshold_backward(below, inputs[i], 0)
        x_grad = None
        if wants_x:
            x_grad = torch.bmm(grad, weights[0].transpose(1, 2)).sum(0).to(ctx.own)
        if not wants_params:
            return x_grad, None, *[None] * (2 * layers)
        return x_grad, None, *grads[1::2][::-1], *grads[0::2][::-1]
