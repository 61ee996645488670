"""Progressive threshold-dependent batch normalisation by hand, folded, and over workers."""

from __future__ import annotations

import math

import pytest
import torch
from builders import fill
from threads import run_in_threads, worlds
from torch import Tensor

from spikerl.snn.batchnorm import BATCH, TDBN
from spikerl.snn.linear import Linear
from spikerl.snn.ptbn import PTBN, NormedLinear, folded_behind

# Two spike steps of two tokens with two entries. Entry 0 has mean 3 and variance 5, entry 1 has
# mean 2 and variance 1.
X = torch.tensor([[[0.0, 1.0], [2.0, 3.0]], [[4.0, 1.0], [6.0, 3.0]]])


def batch_normal() -> Tensor:
    return (X - torch.tensor([3.0, 2.0])) / torch.sqrt(torch.tensor([5.0, 1.0]) + 1e-5)


def token_normal() -> Tensor:
    """X normalised over each token's two entries: -1 and 1, apart from eps."""
    half = (X[..., 1] - X[..., 0]) / 2
    up = half / torch.sqrt(half.square() + 1e-5)
    return torch.stack([-up, up], -1)


@pytest.mark.parametrize("theta", [1.0, 0.25, 0.0])
def test_by_hand(theta: float) -> None:
    """gamma of both normalisations starts at the threshold."""
    made = PTBN(2, 0.5)
    made.theta = theta
    expected = 0.5 * (theta * token_normal() + (1.0 - theta) * batch_normal())
    torch.testing.assert_close(made(X, training=True), expected, rtol=1e-5, atol=1e-6)
    # Running moments move by a tenth from 0 and 1; variances are unbiased, 20/3 and 4/3.
    torch.testing.assert_close(made.bn.mean_N.data, torch.tensor([0.3, 0.2]))
    expected = torch.tensor([1.0 + 0.1 * (20 / 3 - 1), 1.0 + 0.1 * (4 / 3 - 1)])
    torch.testing.assert_close(made.bn.var_N.data, expected)


def test_what_acts_has_running_moments_alone() -> None:
    made = PTBN(2, 0.5)
    made.theta = 1.0
    fill(made, {"bn.mean_N": [1.0, 2.0], "bn.var_N": [4.0, 9.0], "bn.beta_N": [0.5, 0.0]})
    y = made(torch.tensor([[[3.0, 5.0]]]), training=False)
    # gamma (x - mean) / sd + beta: .5 (3 - 1) / 2 + .5 and .5 (5 - 2) / 3
    torch.testing.assert_close(y, torch.tensor([[[1.0, 0.5]]]), rtol=1e-5, atol=0)
    assert made.bn.mean_N.tolist() == [1.0, 2.0]


def test_gradients_are_those_of_torch() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 4, generator=draw, dtype=torch.float64, requires_grad=True)
    weigh = torch.randn(3, 5, 4, generator=draw, dtype=torch.float64)
    made, theirs = PTBN(4, 0.5).double(), torch.nn.BatchNorm1d(4).double()
    made.theta = 0.3
    with torch.no_grad():
        theirs.weight.fill_(0.5)
    normal = torch.nn.functional.layer_norm(x, (4,)) * 0.5
    mixed = 0.3 * normal + 0.7 * theirs(x.flatten(0, 1)).view_as(x)
    params = [x, made.bn.gamma_N, made.bn.beta_N]
    ours = torch.autograd.grad((made(x, True) * weigh).sum(), params)
    expected = torch.autograd.grad((mixed * weigh).sum(), [x, theirs.weight, theirs.bias])
    for mine, one in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, one)
    torch.testing.assert_close(made.bn.var_N.data, theirs.running_var)


def test_moments_are_over_all_workers() -> None:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 3, 4, generator=draw) + 5.0, torch.randn(2, 6, 4, generator=draw)
    whole, both = TDBN(4, 0.5), [TDBN(4, 0.5) for _ in range(2)]
    for made, world in zip(both, worlds(2), strict=True):
        made.sum_ = world.sum_
    first, second = run_in_threads([lambda: both[0](x, BATCH), lambda: both[1](y, BATCH)])
    expected = whole(torch.cat([x, y], 1), BATCH)
    torch.testing.assert_close(torch.cat([first, second], 1), expected, rtol=1e-5, atol=1e-5)
    for made in both:
        torch.testing.assert_close(made.var_N.data, whole.var_N.data)


def with_moments(made: PTBN, draw: torch.Generator) -> None:
    names = ("gamma_N", "beta_N", "mean_N", "var_N")
    size = len(made.bn.gamma_N)
    fill(made.bn, {name: torch.rand(size, generator=draw).tolist() for name in names})


def test_folded_it_does_the_same() -> None:
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(0)
    made, plain = NormedLinear(3, 4, 0.5), NormedLinear(3, 4, None)
    assert abs(float(made.linear.weight_IN.detach().std()) - 0.02) < 0.01
    assert made.norm is not None
    with_moments(made.norm, draw)
    x = torch.randn(2, 5, 3, generator=draw)
    plain.load_state_dict(made.folded())
    drives = [layer.normed(layer.linear(x.flatten(0, 1)).view(2, 5, 4)) for layer in (plain, made)]
    torch.testing.assert_close(*drives)
    gamma, beta, mean, var = (p[0].item() for p in made.norm.bn.parameters())
    expected = beta - mean * gamma / math.sqrt(var + 1e-5)  # the layer's bias starts at 0
    assert math.isclose(plain.linear.bias_N[0].item(), expected, rel_tol=1e-5)


def test_folded_into_what_follows() -> None:
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(0)
    norm, head, folded = PTBN(3, 0.5), Linear(3, 2), Linear(3, 2)
    with_moments(norm, draw)
    folded.load_state_dict(folded_behind(norm, head))
    x = torch.randn(1, 5, 3, generator=draw)
    torch.testing.assert_close(folded(x[0]), head(norm(x, False)[0]))
