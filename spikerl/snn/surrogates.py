"""Spikes forward, a smooth stand-in for their derivative backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _RectSpike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, excess: Tensor, window: float) -> Tensor:
        ctx.save_for_backward(excess)
        ctx.window = window
        return (excess > 0).to(excess.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (excess,) = ctx.saved_tensors
        return grads[0] * inside_window(excess, ctx.window), None


def inside_window(excess: Tensor, window: float) -> Tensor:
    """Where a gradient passes: |voltage - threshold| < window, the interval being open."""
    return excess.abs() < window


def rect_spike(excess: Tensor, window: float) -> Tensor:
    """1 where voltage - threshold = `excess` > 0 (a tie does not fire), else 0.

    Backward, the derivative is 1 inside the open window around the threshold and 0 outside:
    PopSAN's rectangular surrogate (Tang et al., CoRL 2020, arXiv:2010.09635).
    """
    spikes: Tensor = _RectSpike.apply(excess, window)
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
