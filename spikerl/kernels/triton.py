"""Neurons on a GPU: a layer's scan over all spike steps in one kernel, forward and backward.

PyTorch computes the products, one for all spike steps of a layer. Drives may be float32, bfloat16
or float16; currents, membranes and the comparison with the threshold are float32.

Shape legend   T spike steps, B batch, N neurons, M = B N.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikerl.kernels import reference
from spikerl.kernels.coverage import triton_scans
from spikerl.kernels.gradient import Moments, Pullback
from spikerl.kernels.nets import Parts, SpikingNet
from spikerl.kernels.reference import (
    actor_loss_grad,
    add_clipped_noise,
    critic_backward,
    dense_actions,
    dense_vjp,
    mse_backward,
    polyak,
    squashed,
    squashed_vjp,
    td_target,
    values,
)
from spikerl.snn.neurons import CubaLIF, Neuron

__all__ = [
    "actions",
    "actor_loss_grad",
    "adam",
    "add_clipped_noise",
    "critic_backward",
    "dense_actions",
    "dense_vjp",
    "mse_backward",
    "polyak",
    "scan",
    "squashed",
    "squashed_vjp",
    "td_target",
    "values",
    "vjp",
]

BLOCK = 256  # neurons per Triton program


def actions(
    net: SpikingNet, obs_BO: Tensor, generator: torch.Generator | None, squash: bool = True
) -> Tensor:
    """As `reference.actions`."""
    return reference.actions(net, obs_BO, generator, squash, parts)


def vjp(
    net: SpikingNet, obs_BO: Tensor, generator: torch.Generator | None, squash: bool = True
) -> tuple[Tensor, Pullback]:
    """As `reference.vjp`."""
    return reference.vjp(net, obs_BO, generator, squash, parts)


def scan(neuron: Neuron, drive_TBN: Tensor) -> Tensor:
    """Spikes (T, B, N) of one layer, from rest, in the drive's type."""
    if not triton_scans(neuron):
        return reference.scan(neuron, drive_TBN)
    assert isinstance(neuron, CubaLIF)
    c = neuron.config
    constants = (neuron.current_decay, c.voltage_decay, c.threshold, c.surrogate_window)
    spikes: Tensor = _Scan.apply(drive_TBN.contiguous(), *constants)
    return spikes


parts: Parts = reference.parts._replace(scan=scan)


def adam(moments: Moments, gradient: Tensor, lr: float, max_norm: float, masked: Tensor) -> None:
    """As `reference.adam`.

    PyTorch's function gives 65 536 entries of a tensor to one block of threads, so a small network
    keeps only a few multiprocessors busy. Splitting the vectors helps: the function takes up to 36
    small tensors in one launch, each with a block of its own.
    """
    piece = max(4096, 16 * -(-len(gradient) // 512))  # a multiple of a vector register's entries
    reference.adam(moments, gradient, lr, max_norm, masked, piece)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, drive_TBN: Tensor, *constants: float) -> Tensor:
        steps, neurons = len(drive_TBN), drive_TBN[0].numel()
        spikes = torch.empty_like(drive_TBN)
        voltage = torch.empty_like(drive_TBN, dtype=torch.float32)
        grid = (triton.cdiv(neurons, BLOCK),)
        with torch.cuda.device_of(drive_TBN):  # Triton launches on the current device
            _forward[grid](drive_TBN, spikes, voltage, neurons, *constants[:3], steps, BLOCK)
        ctx.save_for_backward(voltage)
        ctx.constants = constants
        return spikes

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TBN: Tensor) -> tuple[Tensor | None, ...]:
        (voltage,) = ctx.saved_tensors
        steps, neurons = len(voltage), voltage[0].numel()
        grad_TBN = grad_TBN.contiguous()
        out = torch.empty_like(grad_TBN)
        grid = (triton.cdiv(neurons, BLOCK),)
        with torch.cuda.device_of(voltage):
            _backward[grid](grad_TBN, voltage, out, neurons, *ctx.constants, steps, BLOCK)
        return out, None, None, None, None


@triton.jit  # type: ignore[untyped-decorator]
def _forward(  # type: ignore[no-untyped-def]
    drive,
    spikes,
    voltage,
    M,
    current_decay,
    voltage_decay,
    threshold,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """c = dc c + x;  v = dv v (1 - o) + c;  o = [v > th]."""
    m = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = m < M
    step = tl.cast(M, tl.int64)  # of int32, a place in a large tensor would overflow
    c = tl.zeros([BLOCK], tl.float32)
    v = tl.zeros([BLOCK], tl.float32)
    fired = v > 1.0
    for t in range(T):
        c = current_decay * c + tl.load(drive + t * step + m, there, 0.0).to(tl.float32)
        v = voltage_decay * tl.where(fired, 0.0, v) + c
        fired = v > threshold
        tl.store(voltage + t * step + m, v, there)
        tl.store(spikes + t * step + m, tl.where(fired, 1.0, 0.0), there)


@triton.jit  # type: ignore[untyped-decorator]
def _backward(  # type: ignore[no-untyped-def]
    grad,
    voltage,
    out,
    M,
    current_decay,
    voltage_decay,
    threshold,
    window,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """From the last spike step to the first, with kept = dv gv_next.

    gv = [|v - th| < window] (grad - kept v) + kept (1 - o);  out = dc out_next + gv.
    """
    m = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = m < M
    step = tl.cast(M, tl.int64)  # of int32, a place in a large tensor would overflow
    gc = tl.zeros([BLOCK], tl.float32)
    gv = tl.zeros([BLOCK], tl.float32)
    for i in range(T):
        place = (T - 1 - i) * step + m
        v = tl.load(voltage + place, there, 0.0)
        kept = voltage_decay * gv
        spike = tl.load(grad + place, there, 0.0).to(tl.float32) - kept * v
        gv = tl.where(tl.abs(v - threshold) < window, spike, 0.0)
        gv += tl.where(v > threshold, 0.0, kept)
        gc = current_decay * gc + gv
        tl.store(out + place, gc, there)
