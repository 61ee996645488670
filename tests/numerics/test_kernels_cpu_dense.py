"""Dense networks in C++ against the reference in PyTorch: outputs and every gradient."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from builders import sac_config
from torch import Tensor

from spikerl.algos.sac import SAC
from spikerl.kernels import build as native
from spikerl.kernels.gradient import Gradient
from spikerl.models.actor import MLPActor
from spikerl.models.actor_config import MLPConfig
from spikerl.models.critic import Critics
from spikerl.types import Batch

PATHS = native.supported_paths()
SIZES = [  # observation and action entries, hidden layers, samples
    (17, 6, [256, 256], 100),
    (1, 1, [1], 1),
    (3, 2, [7], 3),
    (10, 70, [33, 14], 29),
    (105, 8, [400, 300], 7),
    (20, 17, [40, 32, 5], 33),
    (5, 18, [33, 70, 16], 141),
]


def made(obs_dim: int, act_dim: int, hidden: list[int], batch: int) -> tuple[MLPActor, Tensor]:
    """A network, and rows of an observation and of the outputs' gradient."""
    draw = torch.Generator().manual_seed(obs_dim + batch)
    net = MLPActor(obs_dim, act_dim, MLPConfig(name="mlp", hidden_sizes=hidden, lr=1e-3))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=draw) / len(p) ** 0.5)
    return net, torch.randn(batch, obs_dim + act_dim, generator=draw)


def results(kernel: str, net: MLPActor, rows: Tensor, squash: bool) -> list[Tensor]:
    """Outputs without and with a backward pass, and the gradients of that pass."""
    net.kernel = kernel
    obs, grad = rows[:, : net.obs_dim], rows[:, net.obs_dim :]
    with torch.no_grad():
        alone = net(obs, squash=squash)
    output, back = net.vjp(obs, None, squash)
    into = Gradient(list(net.parameters()))
    into.vector.fill_(float("nan"))
    back(grad, into)
    return [alone, output, *into.slots]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("squash", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_outputs_and_gradients(path: str, squash: bool, size: tuple[Any, ...]) -> None:
    net, rows = made(*size)
    expected = results("reference", net, rows, squash)
    ours = results(f"cpu/{path}", net, rows, squash)
    assert expected[0].shape == (size[3], size[1])
    assert torch.equal(ours[0], ours[1])
    for one, other in zip(ours, expected, strict=True):
        assert one.shape == other.shape
        assert float((one - other).norm()) <= 1e-5 * float(other.norm()) + 1e-7


@pytest.mark.parametrize("path", PATHS)
def test_they_are_as_exact_as_float32_is(path: str) -> None:
    """Against autograd in float64; PyTorch's float32 is off by 2e-7 to 5e-7 here."""
    net, rows = made(105, 8, [256, 256], 256)
    exact = copy.deepcopy(net).double()
    exact.dtype = torch.float64
    expected = results("reference", exact, rows.double(), True)
    for one, other in zip(results(f"cpu/{path}", net, rows, True), expected, strict=True):
        assert float((one.double() - other).norm()) < 1e-6 * float(other.norm())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("batch", [16, 144])
def test_exact_on_dyadic_numbers(path: str, batch: int) -> None:
    """Where no sum is rounded, every bit is the same."""
    net, rows = made(5, 3, [24, 17], batch)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randint(-2, 3, p.shape, generator=draw) / 4.0)
    rows = torch.randint(-2, 3, rows.shape, generator=draw) / 2.0
    found = [results(kernel, net, rows, False) for kernel in ("reference", f"cpu/{path}")]
    assert float(found[0][1].abs().sum()) > 0
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kernel", ["reference", f"cpu/{PATHS[0]}"])
def test_a_network_by_hand(kernel: str) -> None:
    """h = relu(2 x + 1), y = 3 h - 1: x = 1 gives 8; x = -1 gives -1, and a gradient only by b2."""
    net = MLPActor(1, 1, MLPConfig(name="mlp", hidden_sizes=[1], lr=1e-3))
    with torch.no_grad():
        for p, value in zip(net.parameters(), (2.0, 1.0, 3.0, -1.0), strict=True):
            p.fill_(value)
    rows = torch.tensor([[1.0, 0.5], [-1.0, 2.0]])  # an observation and the output's gradient
    _, output, w1, b1, w2, b2 = results(kernel, net, rows, False)
    assert output.tolist() == [[8.0], [-1.0]]
    assert [g.flatten().tolist() for g in (w1, b1, w2, b2)] == [[1.5], [1.5], [1.5], [2.5]]


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_the_same_bits_for_any_number_of_threads(threads: int) -> None:
    net, rows = made(*SIZES[0])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = results(f"cpu/{PATHS[0]}", net, rows, True)
        torch.set_num_threads(threads)
        found = results(f"cpu/{PATHS[0]}", net, rows, True)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_an_output_does_not_depend_on_the_rest_of_its_batch() -> None:
    """Acting on 1, 4, 64 or more observations gives the same bits."""
    net, rows = made(*SIZES[0])
    net.kernel, obs = f"cpu/{next(p for p in PATHS if p != 'amx')}", rows[:, :17]
    with torch.no_grad():
        whole = net(obs)
        for size in (1, 4, 64):
            assert torch.equal(torch.cat([net(part) for part in obs.split(size)]), whole)


def test_two_ways_back_at_once_and_none_twice() -> None:
    net, rows = made(*SIZES[0])
    kernel, obs, grad = f"cpu/{PATHS[0]}", rows[:, :17], rows[:, 17:]
    expected = results(kernel, net, rows, True)[2:]
    into, other = (Gradient(list(net.parameters())) for _ in range(2))
    _, first = net.vjp(obs, None)
    _, second = net.vjp(-obs, None)
    second(grad, other)
    first(grad, into)
    assert all(torch.equal(a, b) for a, b in zip(into.slots, expected, strict=True))
    assert not torch.equal(into.vector, other.vector)
    with pytest.raises(IndexError):
        first(grad, into)


@pytest.mark.parametrize("path", PATHS)
def test_what_is_not_finite_is_seen(path: str) -> None:
    net, rows = made(6, 2, [20, 12], 5)
    rows[1, 0] = float("nan")
    _, output, *grads = results(f"cpu/{path}", net, rows, True)
    assert output[1].isnan().all()
    assert output[2:].isfinite().all()
    assert any(grad.isnan().any() for grad in grads)


def test_other_formats_are_not_read_as_if_they_were_float32() -> None:
    net, rows = made(3, 2, [8], 5)
    net.dtype = torch.bfloat16
    expected = results("reference", net, rows, True)
    for one, other in zip(results(f"cpu/{PATHS[0]}", net, rows, True), expected, strict=True):
        assert torch.equal(one, other)


def test_weights_that_moved() -> None:
    """The kernel renews its pointers when tensors move in memory or are replaced."""
    net, rows = made(3, 2, [8], 5)
    net.kernel, obs = f"cpu/{PATHS[0]}", rows[:, :3]
    with torch.no_grad():
        before = net(obs, squash=False)
        for p in net.parameters():
            p.data = 2.0 * p.data
        assert not torch.equal(net(obs, squash=False), before)
        state = {k: v / 2.0 for k, v in net.state_dict().items()}
        net.load_state_dict(state, assign=True)
        assert torch.equal(net(obs, squash=False), before)


def test_what_somebody_will_differentiate() -> None:
    net, rows = made(3, 2, [8], 5)
    net.kernel = f"cpu/{PATHS[0]}"
    assert net(rows[:, :3]).requires_grad


@pytest.mark.parametrize("kernel", [f"cpu/{path}" for path in PATHS])
def test_updates_of_sac_with_its_log_deviation(kernel: str) -> None:
    """Five updates, whose actor is dense as well: losses, weights, moments and targets."""
    draw = torch.Generator().manual_seed(9)

    def normal(*shape: int) -> Tensor:
        return torch.randn(5 * 32, *shape, generator=draw)

    done, discount = torch.arange(5 * 32) % 7 == 0, torch.full((5 * 32,), 0.9)
    rows = Batch(normal(4), normal(2).clamp(-1, 1), normal(), normal(4), done, discount)
    found = []
    for name in ("reference", kernel):
        torch.manual_seed(3)
        net = MLPConfig(name="mlp", hidden_sizes=[24, 16], lr=1e-3)
        actor = MLPActor(4, 2, net, kernel=name)
        critic = Critics(4, 2, [32, 24], kernel=name)
        config = sac_config(batch_size=32, log_std_hidden_sizes=[20], learn_temperature=True)
        sac = SAC(actor, critic, config, actor_lr=1e-3, generator=torch.Generator().manual_seed(0))
        assert sac.log_std is not None
        assert sac.log_std.kernel == name
        found.append((sac.run_updates(rows, 5), sac))
    (expected, theirs), (got, ours) = found
    for one, other in zip(got, expected, strict=True):
        for key, value in other.items():
            torch.testing.assert_close(one[key], value, rtol=1e-4, atol=1e-6)
    assert "log_std.weights" in theirs.state()
    for name, value in theirs.state().items():
        error = float((ours.state()[name] - value).double().norm())
        assert error <= 1e-4 * float(value.double().norm()), name
