"""Critics in C++ against the definition in PyTorch: values and every gradient."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from spikerl.linear import relu_values
from spikerl.networks import TwinCritic
from spikerl.snn.kernels import cpu, native

PATHS = native.supported_paths()
SIZES = [  # networks, widths from input to output, samples
    (2, [23, 256, 256, 1], 100),
    (2, [1, 1, 1], 1),
    (1, [5, 7, 1], 3),
    (3, [16, 33, 14, 1], 29),
    (2, [40, 15, 1], 15),
    (2, [113, 400, 300, 1], 7),
]


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def made(nets: int, widths: list[int], batch: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    draw = torch.Generator().manual_seed(sum(widths))
    pairs = list(pairwise(widths))
    weights = [torch.randn(nets, i, n, generator=draw) / i**0.5 for i, n in pairs]
    biases = [torch.randn(nets, 1, n, generator=draw) for _, n in pairs]
    x = torch.randn(batch, widths[0], generator=draw)
    for tensor in (x, *weights, *biases):
        tensor.requires_grad_()
    return x, weights, biases


def both(path: str, size: tuple) -> list[list[Tensor]]:  # type: ignore[type-arg]
    x, weights, biases = made(*size)
    direction = torch.randn(size[0], size[2], generator=torch.Generator().manual_seed(0))
    results = []
    for values in (relu_values, cpu.kernel(path).values):
        found = values(x, weights, biases, torch.float32)
        grads = torch.autograd.grad(found, [x, *weights, *biases], direction)
        results.append([found.detach(), *grads])
    return results


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values_and_gradients(path: str, size: tuple) -> None:  # type: ignore[type-arg]
    expected, ours = both(path, size)
    assert expected[0].shape == (size[0], size[2])
    for one, other in zip(ours, expected, strict=True):
        assert one.shape == other.shape
        assert float((one - other).norm()) <= 1e-5 * float(other.norm()) + 1e-6


def test_the_definition_is_autograds() -> None:
    """Its gradients are written out; here they are what PyTorch makes of the equations."""
    x, weights, biases = made(2, [5, 6, 4, 1], 9)
    x, *params = (t.detach().double().requires_grad_() for t in (x, *weights, *biases))
    weights, biases = params[:3], params[3:]
    h = x.expand(2, -1, -1)
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        h = torch.relu(h @ weight + bias)
    plain = (h @ weights[-1] + biases[-1]).squeeze(-1)
    found = relu_values(x, weights, biases, torch.float64)
    torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-14)
    direction = torch.randn(2, 9, dtype=torch.float64)
    expected = torch.autograd.grad(plain, [x, *params], direction)
    ours = torch.autograd.grad(found, [x, *params], direction)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_the_same_bits_for_any_number_of_threads() -> None:
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        results.append(both(PATHS[0], SIZES[0])[1])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("kernel", ["reference", f"cpu/{PATHS[0]}"])
def test_the_actors_loss_gives_the_critics_no_gradient(kernel: str) -> None:
    torch.manual_seed(0)
    critic = TwinCritic(3, 2, [8, 8], kernel=kernel)
    obs, act = torch.randn(5, 3), torch.randn(5, 2, requires_grad=True)
    value = critic.first(obs, act)
    torch.testing.assert_close(value, critic(obs, act)[0])
    (expected,) = torch.autograd.grad(critic(obs, act)[0].sum(), act)
    value.sum().backward()
    assert act.grad is not None
    torch.testing.assert_close(act.grad, expected)
    assert all(p.grad is None for p in critic.parameters())


def test_rounded_products_stay_with_pytorch() -> None:
    torch.manual_seed(0)
    ours = TwinCritic(3, 2, [8], dtype=torch.bfloat16, kernel=f"cpu/{PATHS[0]}")
    plain = TwinCritic(3, 2, [8], dtype=torch.bfloat16)
    plain.load_state_dict(ours.state_dict())
    obs, act = torch.randn(5, 3), torch.randn(5, 2)
    assert torch.equal(ours(obs, act), plain(obs, act))


def test_a_graph_is_walked_once() -> None:
    """What it saved goes back to be used again; a second walk must fail, not err."""
    critic = TwinCritic(3, 2, [8], kernel=f"cpu/{PATHS[0]}")
    loss = critic(torch.randn(5, 3), torch.randn(5, 2)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(TypeError):
        loss.backward()


def test_two_graphs_at_once() -> None:
    critic = TwinCritic(3, 2, [8, 8], kernel=f"cpu/{PATHS[0]}")
    params = list(critic.parameters())
    inputs = [(torch.randn(5, 3), torch.randn(5, 2)) for _ in range(2)]
    alone = torch.autograd.grad(critic(*inputs[0]).square().sum(), params)
    first, second = (critic(*pair).square().sum() for pair in inputs)
    with torch.no_grad():
        critic(*inputs[1])
    torch.autograd.grad(second, params)
    for one, other in zip(torch.autograd.grad(first, params), alone, strict=True):
        assert torch.equal(one, other)
