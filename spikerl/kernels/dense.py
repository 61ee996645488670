"""Dense networks with ReLU layers, side by side, as one node of PyTorch's graph.

Shape legend   B batch, I inputs, N outputs, C networks side by side.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def relu_values(
    x_BI: Tensor, weights_CIN: list[Tensor], biases_C1N: list[Tensor], dtype: torch.dtype
) -> Tensor:
    """The values (C, B) of C networks with ReLU layers and one output each, for the same inputs.

    Products have operands in `dtype`; values and gradients are in the parameters' type. Forward and
    backward are written out, because matrix products with a single column are slow.
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
        grad = grad_CB.to(weights[0].dtype).unsqueeze(-1)  # gradient of layer outputs, (C, B, N)
        grads: list[Tensor] = []  # bias and weight of each layer, the last layer first
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
