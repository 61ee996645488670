"""Surrogate derivatives of spikes: formulas, window, and slope over a run."""

from __future__ import annotations

import math

import pytest
import torch
from builders import lif_config, neuron_of, popsan
from torch import Tensor

from spikerl.snn.surrogates import SURROGATES, derivative, reach, spike

SMOOTH = [kind for kind in SURROGATES if kind != "rect"]


def primitive(kind: str, x: Tensor, scale: float) -> Tensor:
    """The smooth step whose derivative is the surrogate's."""
    if kind == "rect":
        return (x + scale).clamp(0.0, 2.0 * scale)
    if kind == "triangle":
        kx = (scale * x).clamp(-1.0, 1.0)
        return 0.5 + kx - 0.5 * kx * kx.abs()
    if kind == "sigmoid":
        return torch.sigmoid(scale * x)
    return 0.5 + torch.atan(0.5 * math.pi * scale * x) / math.pi


def test_window_is_open_and_one_inside() -> None:
    excess = torch.tensor([-0.5, -0.4999, 0.0, 0.4999, 0.5], requires_grad=True)
    spikes = spike(excess, "rect", 0.5)
    assert spikes.tolist() == [0.0, 0.0, 0.0, 1.0, 1.0]  # a tie does not fire
    spikes.backward(torch.full((5,), 3.0))
    assert excess.grad is not None
    assert excess.grad.tolist() == [0.0, 3.0, 3.0, 3.0, 0.0]


def test_formulas_by_hand() -> None:
    """Derivatives with slope 2 at x = 0 and at other points."""
    x = torch.tensor([0.0, 0.25, -0.25, 0.5, 0.75], dtype=torch.float64)
    assert derivative("triangle", x, 2.0).tolist() == [2.0, 1.0, 1.0, 0.0, 0.0]
    x = torch.tensor([0.0, 0.5 * math.log(3.0)], dtype=torch.float64)  # s = 1/2, 3/4
    assert derivative("sigmoid", x, 2.0).tolist() == pytest.approx([0.5, 0.375])
    x = torch.tensor([0.0, -math.sqrt(3.0) / math.pi], dtype=torch.float64)
    assert derivative("atan", x, 2.0).tolist() == pytest.approx([1.0, 0.25])


@pytest.mark.parametrize("kind", SURROGATES)
@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_gradient_is_that_of_a_smooth_step(kind: str, scale: float) -> None:
    """Compared with central differences, away from kinks at multiples of 1/6."""
    x = (torch.arange(-24, 24, dtype=torch.float64) + 0.5) / 12.0
    x.requires_grad_()
    upstream = torch.linspace(-1.0, 2.0, len(x), dtype=torch.float64)
    spike(x, kind, scale).backward(upstream)
    h = 1e-6
    with torch.no_grad():
        slope = (primitive(kind, x + h, scale) - primitive(kind, x - h, scale)) / (2.0 * h)
    assert slope.count_nonzero() >= 6
    torch.testing.assert_close(x.grad, upstream * slope, rtol=0, atol=1e-8)


@pytest.mark.parametrize("kind", SMOOTH)
def test_area_is_one(kind: str) -> None:
    x = torch.linspace(-25.0, 25.0, 100_001, dtype=torch.float64).sinh()
    area = torch.trapezoid(derivative(kind, x, 2.0), x)
    assert area.item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("kind", SMOOTH)
@pytest.mark.parametrize("slope", [0.5, 3.0])
def test_reach_is_where_half_the_peak_is_left(kind: str, slope: float) -> None:
    x = torch.tensor([0.0, reach(kind, slope)], dtype=torch.float64)
    peak, half = derivative(kind, x, slope).tolist()
    assert half == pytest.approx(peak / 2)


@pytest.mark.parametrize("kind", SURROGATES)
def test_a_gradient_passes_within_reach(kind: str) -> None:
    neuron = neuron_of(lif_config(surrogate=kind, surrogate_window=0.25, surrogate_slope=3.0))
    edge = 0.25 if kind == "rect" else reach(kind, 3.0)
    rest = neuron.initial(torch.zeros(1, 2))
    for side in (-1.0, 1.0):
        drive = 0.5 + side * edge * torch.tensor([[0.999, 1.001]])
        assert neuron.passes(neuron.step(drive, rest)).tolist() == [[True, False]]


@pytest.mark.parametrize(
    ("kind", "end", "expected"),
    [
        ("sigmoid", 10.0, [2.0, 6.0, 10.0]),
        ("triangle", 1.0, [2.0, 1.5, 1.0]),
        ("atan", None, [2.0, 2.0, 2.0]),
        ("rect", 10.0, [0.5, 0.5, 0.5]),
    ],
)
def test_slope_over_a_run(kind: str, end: float | None, expected: list[float]) -> None:
    """Slopes at the start, half and end of a run, in every layer; rect's window is constant."""
    config = lif_config(surrogate=kind, surrogate_slope=2.0, surrogate_slope_end=end)
    actor = popsan(1, 1, [3], neuron=config)
    for step, scale in zip((0, 20, 40), expected, strict=True):
        actor.schedule(step, 40)
        for neuron in actor.neurons:
            drive = torch.tensor([[0.5 + 0.125]], requires_grad=True)
            neuron.step(drive, neuron.initial(drive)).spikes_BN.sum().backward()
            assert drive.grad is not None
            slope = derivative(kind, torch.tensor([[0.125]]), scale)
            torch.testing.assert_close(drive.grad, slope)
