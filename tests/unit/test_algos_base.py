"""The step from a gradient to new weights, and the guard that watches it for NaN and infinity."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spikerl.algos.base import Guard, Optimizer, flatten
from spikerl.errors import NonFinite


def test_flatten_makes_parameters_views() -> None:
    module = nn.Linear(2, 3)
    values = [p.detach().clone() for p in module.parameters()]
    flat = flatten(module)
    for p, value in zip(module.parameters(), values, strict=True):
        assert torch.equal(p, value)
    flat.fill_(7.0)
    assert module(torch.ones(1, 2)).tolist() == [[21.0] * 3]


def test_gradient_clipping_by_hand() -> None:
    module = nn.Linear(2, 1, bias=False)
    guard = Guard("cpu", scales_loss=False)
    step = Optimizer(module, 0.1, guard, max_grad_norm=1.0)
    gradient = step.gradient
    gradient.differentiate((module(torch.tensor([[3.0, 4.0]]))).sum())  # gradient (3, 4), norm 5
    step.step()
    torch.testing.assert_close(gradient.vector[:-1], torch.tensor([0.6, 0.8]))
    gradient.differentiate((module(torch.tensor([[0.3, 0.4]]))).sum())
    step.step()  # the norm is within the bound: not clipped
    torch.testing.assert_close(gradient.vector[:-1], torch.tensor([0.3, 0.4]))


def test_an_infinite_loss_is_bad_even_where_its_gradient_is_not() -> None:
    module = nn.Linear(2, 1)
    guard = Guard("cpu", scales_loss=False)
    step = Optimizer(module, 0.1, guard)
    before = step.flat.detach().clone()
    step.gradient.differentiate(module(torch.ones(1, 2)).sum() + float("inf"))
    step.step()
    guard.end_update()
    assert torch.equal(step.flat.detach(), before)
    with pytest.raises(NonFinite, match="update 4:"):
        guard.check(5)


def test_a_held_policy_is_watched_too() -> None:
    """While the critics warm up the policy's weights stay fixed; a NaN in its loss is reported."""
    module = nn.Linear(2, 1)
    guard = Guard("cpu", scales_loss=False)
    step = Optimizer(module, 0.1, guard)
    step.held = True
    for loss in (1.0, float("nan")):
        guard.check(5)
        step.gradient.differentiate(module(torch.ones(1, 2)).sum() * loss)
        step.step()
        guard.end_update()
    with pytest.raises(NonFinite, match="update 4:"):
        guard.check(5)


def test_a_held_policy_is_watched_as_adam_watches() -> None:
    """A gradient of 1e20 is finite, but its norm is not, as the square overflows float32."""
    module = nn.Linear(2, 1)
    guard = Guard("cpu", scales_loss=False)
    step = Optimizer(module, 0.1, guard)
    for held in (True, False):
        step.held = held
        guard.masked.zero_()
        step.gradient.differentiate(module(torch.ones(1, 2)).sum() * 1e20)
        step.step()
        assert float(guard.masked) == 1.0


def test_fp16_scale_grows_after_enough_good_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Guard, "GROWTH_INTERVAL", 3)
    guard = Guard("cpu", scales_loss=True)
    scales = []
    for finite in (True, True, True, True, False, True, True, True):
        guard.masked.fill_(0.0 if finite else 1.0)
        guard.end_update()
        scales.append(float(guard.scale) / 65536.0)
    assert scales == [1.0, 1.0, 2.0, 2.0, 1.0, 1.0, 1.0, 2.0]


def test_fp16_that_never_fits_is_an_error() -> None:
    """From 2^16, 30 halvings leave a loss scale of 2^-14, which is allowed; one more is not."""
    guard = Guard("cpu", scales_loss=True)
    for _ in range(30):
        guard.masked.fill_(1.0)
        guard.end_update()
    assert float(guard.scale) == 2.0**-14
    guard.check(30)
    guard.masked.fill_(1.0)
    guard.end_update()
    with pytest.raises(NonFinite, match="any loss scale"):
        guard.check(31)
