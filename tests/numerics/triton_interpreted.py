"""Tests that test_kernels_triton.py runs in a process of its own: on a CPU under Triton's
interpreter, or compiled on a GPU.
"""

from __future__ import annotations

import os

import pytest
import torch
from builders import lif_config, popsan, with_neurons

from spikerl.kernels import reference, triton
from spikerl.kernels.gradient import Gradient

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [] if "TRITON_INTERPRET" in os.environ else [pytest.mark.gpu]


@pytest.mark.parametrize("neurons", [1, 255, 700])
@pytest.mark.parametrize("steps", [1, 5, 32])
@pytest.mark.parametrize("lif", [False, True], ids=["cuba_lif", "lif"])
def test_scan(neurons: int, steps: int, lif: bool) -> None:
    net = popsan(3, 2, [8], spike_steps=steps)
    if lif:
        with_neurons(net, lif_config(voltage_decay=0.6, threshold=0.4, surrogate_window=0.3))
    draw = torch.Generator().manual_seed(neurons + steps)
    drive = torch.randn(steps, 2, neurons, generator=draw) * 0.6
    if neurons > 1:
        drive[:, 0, 0], drive[:, 1, -1] = -9.0, 9.0  # silent, saturated
    weight = torch.randn(drive.shape, generator=draw)
    found = []
    for scan in (reference.scan, triton.scan):
        x = drive.clone().to(DEVICE).requires_grad_()
        spikes = scan(net.neurons[0], x)
        (grad,) = torch.autograd.grad((spikes * weight.to(DEVICE)).sum(), x)
        found.append((spikes.detach().cpu(), grad.cpu()))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-5, atol=1e-6)
    assert neurons == 1 or 0.0 < float(found[0][0].mean()) < 1.0
    assert neurons == 1 or found[0][1].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_membranes_do_not_round(dtype: torch.dtype) -> None:
    """With drives of bf16 or fp16, spikes are those of membranes in float32."""
    net, draw = popsan(3, 2, [8]), torch.Generator().manual_seed(0)
    drive = (torch.randn(5, 3, 90, generator=draw) * 0.6).to(dtype).requires_grad_()
    weight = torch.randn(drive.shape, generator=draw).to(dtype)
    spikes = triton.scan(net.neurons[0], drive.to(DEVICE))
    (grad,) = torch.autograd.grad(spikes, drive, weight.to(DEVICE))
    assert spikes.dtype == grad.dtype == dtype
    exact = drive.detach().float().requires_grad_()
    expected = reference.scan(net.neurons[0], exact)
    assert torch.equal(spikes.float().cpu(), expected)
    (wanted,) = torch.autograd.grad(expected, exact, weight.float())
    # A gradient is rounded once, when it is stored: to the nearest number, so by half a unit of the
    # last place at most. The interpreter truncates bfloat16 instead, so by a whole unit at most.
    unit = torch.finfo(dtype).eps
    cuts = dtype == torch.bfloat16 and DEVICE == "cpu"
    rtol = (1.0 if cuts else 0.5) * unit * 1.001
    torch.testing.assert_close(grad.float().cpu(), wanted, rtol=rtol, atol=1e-7)


def test_a_whole_actor() -> None:
    net = popsan(4, 2, [24, 17]).to(DEVICE)
    obs, direction = torch.randn(9, 4).to(DEVICE), torch.randn(9, 2).to(DEVICE)
    params = list(net.parameters())
    results = []
    for actions in (reference.actions, triton.actions):
        act = actions(net, obs, None)
        results.append([act, *torch.autograd.grad(act, params, direction)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_what_spikes_cost() -> None:
    net = popsan(4, 2, [24, 17], spike_cost=[0.5, 2.0, 1.0]).to(DEVICE)
    net.schedule(0, 1)
    obs, zero = torch.randn(9, 4).to(DEVICE), torch.zeros(9, 2).to(DEVICE)
    results = []
    for kernel in (reference, triton):
        into = Gradient(list(net.parameters()))
        loss = kernel.vjp(net, obs, None)[1](zero, into)["spike_loss"]
        results.append([loss, into.vector])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
    assert results[0][1].any()
