"""Squashed Gaussians in C++ and in PyTorch: hand-worked numbers, and float64 by autograd."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from spikerl import kernels
from spikerl.kernels import build as native
from spikerl.kernels import reference

KERNELS = ["reference", *(f"cpu/{path}" for path in native.supported_paths())]
SIZES = [(1, 1), (3, 5), (16, 16), (256, 6), (50, 17)]
LOW, HIGH = -4.0, 1.5


def drawn(rows: int, entries: int) -> tuple[Tensor, ...]:
    """Means, log deviations on both sides of both bounds, noise, the gradients by both outputs."""
    draw = torch.Generator().manual_seed(rows * entries)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    wide = 4.0 * normal(rows, entries) - 1.0
    return 3.0 * normal(rows, entries), wide, *(normal(rows, entries) for _ in "ab"), normal(rows)


def results(kernel: Any, mean: Tensor, log_std: Tensor, noise: Tensor, *by: Tensor) -> list[Tensor]:
    act, log_prob, pull = kernel.squashed_vjp(mean, log_std, noise, LOW, HIGH)
    with torch.no_grad():
        alone = kernel.squashed(mean, log_std, noise, LOW, HIGH)
    return [*alone, act, log_prob, *pull(*by)]


@pytest.mark.parametrize("kernel", KERNELS)
def test_by_hand(kernel: str) -> None:
    """At u = 0 tanh has slope 1; at u = 1, from noise 2 and deviation 1/2, 1 - tanh(1)^2; at 20 and
    -200 the action is 1 in float32, and log(1 - tanh(u)^2) is 2 (log 2 - |u|).

    The gradient of log pi by u is 2 tanh(u); by the log deviation, that times std noise, less 1.
    """
    mean = torch.tensor([[0.0], [0.0], [20.0], [-200.0]])
    log_std = torch.tensor([[0.0], [-math.log(2.0)], [0.0], [0.0]])
    noise = torch.tensor([[0.0], [2.0], [0.0], [0.0]])
    act, log_prob, pull = kernels.named(kernel).squashed_vjp(mean, log_std, noise, LOW, HIGH)
    zero, slope = -0.5 * math.log(2.0 * math.pi), 1.0 - math.tanh(1.0) ** 2
    far = [zero - 2.0 * (math.log(2.0) - u) for u in (20.0, 200.0)]
    assert act.flatten().tolist() == pytest.approx([0.0, math.tanh(1.0), 1.0, -1.0])
    one = zero - 2.0 + math.log(2.0) - math.log(slope)
    assert log_prob.tolist() == pytest.approx([zero, one, *far])
    by_mean, by_log_std = pull(torch.zeros(4, 1), torch.ones(4))
    twice = 2.0 * math.tanh(1.0)
    assert by_mean.flatten().tolist() == pytest.approx([0.0, twice, 2.0, -2.0])
    assert by_log_std.flatten().tolist() == pytest.approx([-1.0, twice - 1.0, -1.0, -1.0])
    *_, pull = kernels.named(kernel).squashed_vjp(mean, log_std, noise, LOW, HIGH)
    by_mean, by_log_std = pull(torch.ones(4, 1), torch.zeros(4))
    assert by_mean.flatten().tolist() == pytest.approx([1.0, slope, 0.0, 0.0])
    assert by_log_std.flatten().tolist() == pytest.approx([0.0, slope, 0.0, 0.0])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_samples_and_gradients_are_float64s(kernel: str, size: tuple[int, int]) -> None:
    """float32 rounds each entry's terms, which are up to 40 here, by up to 6e-8 of them; `size[1]`
    entries are added.
    """
    given = drawn(*size)
    exact = results(reference, *(x.double() for x in given))
    for one, other in zip(results(kernels.named(kernel), *given), exact, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-6, atol=5e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_clipped_log_deviation_has_no_gradient(kernel: str) -> None:
    """At a bound itself it has one, as with torch.clamp; beyond, the deviation is the bound's."""
    log_std = torch.tensor([[LOW - 1.0], [LOW], [HIGH], [HIGH + 1.0]])
    mean, noise = torch.zeros(4, 1), torch.full((4, 1), 0.1)
    act, _, pull = kernels.named(kernel).squashed_vjp(mean, log_std, noise, LOW, HIGH)
    expected = [math.tanh(0.1 * math.exp(x)) for x in (LOW, LOW, HIGH, HIGH)]
    assert act.flatten().tolist() == pytest.approx(expected, abs=1e-7)
    _, by_log_std = pull(torch.zeros(4, 1), torch.ones(4))
    assert (by_log_std == 0.0).flatten().tolist() == [True, False, False, True]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["mean", "noise", "log_std"])
def test_what_is_not_finite_is_seen(kernel: str, bad: float, where: str) -> None:
    if where == "log_std" and bad == math.inf:
        return  # it is clipped
    given = {name: torch.full((3, 7), 0.5) for name in ("mean", "log_std", "noise")}
    for entry in (1, 6):  # within a vector register, and after the last full one
        given[where].fill_(0.5)[2, entry] = bad
        inputs = (given["mean"], given["log_std"], given["noise"])
        act, log_prob, pull = kernels.named(kernel).squashed_vjp(*inputs, LOW, HIGH)
        assert log_prob.isfinite().tolist() == [True, True, False]
        assert bad == math.inf or act[2, entry].isnan()
        by_mean, _ = pull(torch.ones(3, 7), torch.ones(3))
        assert by_mean[:2].isfinite().all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_views_and_other_types(kernel: str) -> None:
    """Halves of an actor's outputs are not contiguous; float64 stays float64."""
    mean, log_std, noise, by_act, by_log_prob = drawn(9, 4)
    halves = torch.cat([mean, log_std], -1).chunk(2, -1)
    assert not halves[0].is_contiguous()
    one = torch.ones(()).expand(9)
    expected = results(kernels.named(kernel), mean, log_std, noise, by_act, one.contiguous())
    for a, b in zip(
        results(kernels.named(kernel), *halves, noise, by_act, one), expected, strict=True
    ):
        assert torch.equal(a, b)
    double = [x.double() for x in (mean, log_std, noise, by_act, by_log_prob)]
    assert all(x.dtype == torch.float64 for x in results(kernels.named(kernel), *double))
