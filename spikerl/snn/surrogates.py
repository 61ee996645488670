"""Spikes in the forward pass, a surrogate for their derivative in the backward pass."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# The surrogates, functions of x = voltage - threshold. `rect` has a window w, the others a slope k
# and area 1 (SpikingJelly's PiecewiseQuadratic, Sigmoid and ATan with alpha = k).
SURROGATES = ("rect", "triangle", "sigmoid", "atan")


def derivative(kind: str, excess: Tensor, scale: float) -> Tensor:
    """rect      1 where |x| < w, the interval being open (PopSAN, arXiv:2010.09635)
    triangle  k max(0, 1 - k |x|)
    sigmoid   k s (1 - s), s = 1 / (1 + exp(-k x))
    atan      (k / 2) / (1 + (pi k x / 2)^2)
    """
    if kind == "rect":
        return (excess.abs() < scale).to(excess.dtype)
    if kind == "triangle":
        return scale * (1.0 - scale * excess.abs()).clamp(min=0.0)
    if kind == "sigmoid":
        s = torch.sigmoid(scale * excess)
        return scale * s * (1.0 - s)
    return 0.5 * scale / (1.0 + (0.5 * math.pi * scale * excess).square())


def reach(kind: str, scale: float) -> float:
    """The |x| below which the derivative is more than half its peak: its window."""
    if kind == "rect":
        return scale
    if kind == "triangle":
        return 0.5 / scale
    if kind == "sigmoid":
        return math.log(3.0 + 2.0 * math.sqrt(2.0)) / scale
    return 2.0 / (math.pi * scale)


class _Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, excess: Tensor, kind: str, scale: float) -> Tensor:
        ctx.save_for_backward(excess)
        ctx.kind, ctx.scale = kind, scale
        return (excess > 0).to(excess.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (excess,) = ctx.saved_tensors
        return grads[0] * derivative(ctx.kind, excess, ctx.scale), None, None


def spike(excess: Tensor, kind: str, scale: float) -> Tensor:
    """1 where voltage - threshold = `excess` > 0 (a tie does not fire), else 0."""
    spikes: Tensor = _Spike.apply(excess, kind, scale)
    return spikes


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, source: Tensor, spikes: Tensor) -> Tensor:
        return spikes

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def straight_through(source: Tensor, spikes: Tensor) -> Tensor:
    """`spikes` forward; backward, the gradient reaches `source` unchanged."""
    passed: Tensor = _StraightThrough.apply(source, spikes)
    return passed
