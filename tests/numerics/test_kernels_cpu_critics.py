"""Critics in C++ against the reference in PyTorch: values, losses and every gradient."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from spikerl import kernels
from spikerl.kernels import build as native
from spikerl.kernels import reference
from spikerl.kernels.dense import relu_values
from spikerl.kernels.gradient import Gradient
from spikerl.models.critic import Critics
from spikerl.types import Batch

PATHS = native.supported_paths()
SIZES = [  # observation and action entries, hidden layers, samples
    (17, 6, [256, 256], 100),
    (1, 1, [1], 1),
    (3, 2, [7], 3),
    (10, 6, [33, 14], 29),
    (39, 1, [15], 15),
    (105, 8, [400, 300], 7),
    (20, 17, [40, 32, 5], 33),
    (17, 6, [256, 256], 150),
    (5, 18, [33, 70, 16], 141),
]


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def made(obs_dim: int, act_dim: int, hidden: list[int], batch: int) -> tuple[Critics, Tensor]:
    """Critics, and rows of an observation, an action and a target."""
    draw = torch.Generator().manual_seed(obs_dim + batch)
    critic = Critics(obs_dim, act_dim, hidden)
    with torch.no_grad():
        for p in critic.parameters():
            p.copy_(torch.randn(p.shape, generator=draw) / max(p.shape[1], 1) ** 0.5)
    return critic, torch.randn(batch, obs_dim + act_dim + 1, generator=draw)


def results(kernel: str, critic: Critics, rows: Tensor, obs_dim: int) -> list[Tensor]:
    """The values; the mean value, loss and gradients of a regression; the loss of the actor and its
    gradient by the actions.
    """
    critic.kernel = kernel
    obs, act, target = rows[:, :obs_dim], rows[:, obs_dim:-1], rows[:, -1]
    with torch.no_grad():
        values = critic(obs, act)
    into = Gradient(list(critic.parameters()), weight=0.7)
    into.vector.fill_(float("nan"))
    mean = critic.critic_backward(obs, act, target, into)
    towards = Gradient([torch.zeros(1)], weight=0.3)
    ascent = critic.actor_loss_grad(obs, act, towards)
    return [values, mean, into.loss, *into.slots, towards.loss, ascent]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values_losses_and_gradients(path: str, size: tuple[Any, ...]) -> None:
    critic, rows = made(*size)
    expected = results("reference", critic, rows, size[0])
    ours = results(f"cpu/{path}", critic, rows, size[0])
    assert expected[0].shape == (2, size[3])
    for one, other in zip(ours, expected, strict=True):
        assert one.shape == other.shape
        assert float((one - other).norm()) <= 1e-5 * float(other.norm()) + 1e-7


@pytest.mark.parametrize("path", PATHS)
def test_they_are_as_exact_as_float32_is(path: str) -> None:
    """Against float64; PyTorch's float32 is off by 2e-8 to 3.4e-7 here."""
    critic, rows = made(105, 8, [256, 256], 256)
    exact = copy.deepcopy(critic).double()
    exact.dtype = torch.float64
    expected = results("reference", exact, rows.double(), 105)
    for one, other in zip(results(f"cpu/{path}", critic, rows, 105), expected, strict=True):
        assert float((one.double() - other).norm()) < 6e-7 * float(other.norm())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_target_values(path: str, size: tuple[Any, ...]) -> None:
    critic, rows = made(*size)
    obs, act, rew = rows[:, : size[0]], rows[:, size[0] : -1], rows[:, -1]
    ends, discount = torch.arange(size[3]) % 3 == 1, torch.linspace(0.5, 1.0, size[3])
    batch = Batch(obs, act, rew, obs, ends, discount)
    with torch.no_grad():
        lowest = reference.values(critic, obs, act).amin(0)
        found = kernels.named(f"cpu/{path}").td_target(critic, batch, act)
        torch.testing.assert_close(found, torch.where(ends, rew, rew + discount * lowest))
        bonus = rows[:, 0] - 0.5
        more = kernels.named(f"cpu/{path}").td_target(critic, batch, act, bonus)
        expected = torch.where(ends, rew, rew + discount * (lowest + bonus))
        torch.testing.assert_close(more, expected)
        torch.testing.assert_close(reference.td_target(critic, batch, act, bonus), expected)
        for c in range(2):  # a critic that is NaN is not ignored in the minimum
            critic.biases_C1N[-1].zero_()[c] = float("nan")
            found = kernels.named(f"cpu/{path}").td_target(critic, batch, act)
            assert torch.equal(found.isnan(), ~ends)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("batch", [5, 150])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen(path: str, batch: int, bad: float) -> None:
    """No layer turns it into a 0, and a network with infinite values does not affect the next."""
    critic, rows = made(6, 2, [20], batch)
    rows[1, 0] = bad
    kernel = kernels.named(f"cpu/{path}")
    with torch.no_grad():
        found = kernel.values(critic, rows[:, :6], rows[:, 6:8])
        assert found[:, 1].isnan().any() or not found[:, 1].isfinite().any()
        assert found[:, 2:].isfinite().all()
        wide, wide_rows = made(6, 2, [64], batch)
        wide.biases_C1N[0].fill_(float("inf"))
        kernel.values(wide, wide_rows[:, :6], wide_rows[:, 6:8])
        assert torch.equal(kernel.values(critic, rows[:, :6], rows[:, 6:8])[:, 2:], found[:, 2:])
        critic.biases_C1N[-1].zero_()[1] = float("nan")  # the second of two critics
    towards = Gradient([torch.zeros(1)])
    kernel.actor_loss_grad(critic, rows[:, :6], rows[:, 6:8], towards, True)
    assert towards.loss.isnan()


@pytest.mark.parametrize("path", PATHS)
def test_smoothed_actions(path: str) -> None:
    torch.manual_seed(0)
    act, noise = torch.rand(37, 3) * 2.0 - 1.0, torch.randn(37, 3) * 3.0
    act[0, 0], noise[1, 1] = float("nan"), float("nan")
    expected = (act + (noise * 0.2).clamp(-0.5, 0.5)).clamp(-1.0, 1.0)
    assert 10 < int((expected.abs() == 1.0).sum()) < 100
    found = kernels.named(f"cpu/{path}").add_clipped_noise(act, noise, 0.2, 0.5)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shift", [-1e3, 1e3], ids=["silent", "all active"])
def test_layers_of_one_kind(path: str, shift: float) -> None:
    """Hidden units that are all 0, or all active."""
    critic, rows = made(9, 2, [40, 24], 20)
    with torch.no_grad():
        for bias in list(critic.biases_C1N)[:-1]:
            bias.fill_(shift)
    expected = results("reference", critic, rows, 9)
    ours = results(f"cpu/{path}", critic, rows, 9)
    for one, other in zip(ours, expected, strict=True):
        assert float((one - other).norm()) <= 1e-5 * float(other.norm())
    moved = [float(slot.abs().sum()) > 0 for slot in ours[3:-2]]
    assert moved == ([True] * 6 if shift > 0 else [False] * 5 + [True])  # the last bias


@pytest.mark.parametrize("path", PATHS)
def test_exact_on_dyadic_numbers(path: str) -> None:
    """Where no sum is rounded, every bit is the same."""
    critic, rows = made(5, 3, [24, 17], 16)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in critic.parameters():
            p.copy_(torch.randint(-2, 3, p.shape, generator=draw) / 4.0)
    rows = torch.randint(-2, 3, rows.shape, generator=draw) / 2.0
    critic.kernel = "reference"
    found = []
    for kernel in ("reference", f"cpu/{path}"):
        critic.kernel = kernel
        into = Gradient(list(critic.parameters()), weight=0.5)
        mean = critic.critic_backward(rows[:, :5], rows[:, 5:8], rows[:, 8], into)
        ascent = critic.actor_loss_grad(rows[:, :5], rows[:, 5:8], Gradient([torch.zeros(1)]))
        found.append([mean, into.vector, ascent])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_a_regression_by_hand() -> None:
    """h = relu(2 x + 1), q = 3 h - 1: x = 1 gives 8; x = -1 gives -1, and a gradient only by b2."""
    for kernel in ("reference", f"cpu/{PATHS[0]}"):
        critic = Critics(1, 1, [1], kernel=kernel)
        with torch.no_grad():
            for p, value in zip(critic.parameters(), ([2.0, 0.0], 3.0, 1.0, -1.0), strict=True):
                p.copy_(torch.tensor(value).view(-1, 1))
        obs, act = torch.tensor([[1.0], [-1.0]]), torch.zeros(2, 1)
        into = Gradient(list(critic.parameters()))
        mean = critic.critic_backward(obs, act, torch.tensor([7.0, 1.0]), into)
        # Errors 1 and -2: each critic's loss is (1 + 4) / 2, and dq is 1 and -2.
        assert float(mean) == 3.5
        assert float(into.loss) == 5.0
        w1, w2, b1, b2 = into.slots
        assert w1.flatten(1).tolist() == [[3.0, 0.0]] * 2  # dq 3 x
        assert w2.flatten().tolist() == [3.0] * 2  # dq h, h = 3 and 0
        assert b1.flatten().tolist() == [3.0] * 2
        assert b2.flatten().tolist() == [-1.0] * 2


def test_the_definition_is_autograds() -> None:
    """The gradients of the reference, which are written by hand, are those that autograd gives."""
    pairs = list(pairwise([5, 6, 4, 1]))
    draw = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_()

    weights, biases = [leaf(2, i, n) for i, n in pairs], [leaf(2, 1, n) for _, n in pairs]
    x, params = leaf(9, 5), [*weights, *biases]
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
    critic, rows = made(*SIZES[0])
    found = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        found.append(results(f"cpu/{PATHS[0]}", critic, rows, 17))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("kernel", ["reference", f"cpu/{PATHS[0]}"])
def test_an_ascent_is_of_the_first_critic_alone(kernel: str) -> None:
    torch.manual_seed(0)
    critic = Critics(3, 2, [8, 8], kernel=kernel)
    obs, act = torch.randn(5, 3), torch.randn(5, 2, requires_grad=True)
    into = Gradient([torch.zeros(1)])
    found = critic.actor_loss_grad(obs, act.detach(), into)
    loss = -critic(obs, act)[0].mean()
    torch.testing.assert_close(found, torch.autograd.grad(loss, act)[0])
    torch.testing.assert_close(into.loss, loss.detach())
    assert all(p.grad is None for p in critic.parameters())


@pytest.mark.parametrize("path", [path for path in PATHS if path != "amx"])
def test_rounded_products_stay_with_pytorch(path: str) -> None:
    torch.manual_seed(0)
    critic = Critics(3, 2, [8], dtype=torch.bfloat16)
    rows = torch.randn(5, 6)
    plain = results("reference", critic, rows, 3)
    for one, other in zip(results(f"cpu/{path}", critic, rows, 3), plain, strict=True):
        assert torch.equal(one, other)


def rounded_by_hand(critic: Critics, rows: Tensor, obs_dim: int) -> list[Tensor]:
    """`results` in float64, with only the operands of hidden layers' products rounded to bf16."""

    def low(x: Tensor) -> Tensor:
        return x.detach().bfloat16().double()

    weights, biases = (
        [p.detach().double() for p in ps] for ps in (critic.weights_CIN, critic.biases_C1N)
    )
    batch = len(rows)
    inputs = [rows[:, :-1].double().expand(len(weights[0]), -1, -1)]
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        inputs.append((low(inputs[-1].float()) @ low(weight) + bias).relu())
    values = (inputs[-1] @ weights[-1] + biases[-1]).squeeze(-1)

    def back(grad: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        grads_w, grads_b = [inputs[-1].mT @ grad], [grad.sum(1, keepdim=True)]
        drive = grad @ weights[-1].mT * (inputs[-1] > 0)
        for i in reversed(range(len(weights) - 1)):
            grads_w.insert(0, low(inputs[i].float()).mT @ low(drive.float()))
            grads_b.insert(0, drive.sum(1, keepdim=True))
            below = low(drive.float()) @ low(weights[i]).mT
            drive = below * (inputs[i] > 0)
        return grads_w, grads_b, below

    errors = values - rows[:, -1].double()
    grads_w, grads_b, _ = back(1.4 / batch * errors.unsqueeze(-1))
    first = torch.zeros_like(errors)
    first[0] = -0.3 / batch
    towards = back(first.unsqueeze(-1))[2].sum(0)[:, obs_dim:]
    loss, ascent = 0.7 * errors.square().mean(1).sum(), -0.3 * values[0].mean()
    found = [values, values.mean(), loss, *grads_w, *grads_b, ascent, towards]
    return [x.float() for x in found]


@pytest.mark.skipif("amx" not in PATHS, reason="needs a processor with bf16 matrix units")
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_rounded_products_on_matrix_units(size: tuple[Any, ...]) -> None:
    critic, rows = made(*size)
    critic.dtype = torch.bfloat16
    expected = rounded_by_hand(critic, rows, size[0])
    ours = results("cpu/amx", critic, rows, size[0])
    for one, other in zip(ours, expected, strict=True):
        # An operand between two numbers of bf16 may be rounded to the other one of them.
        assert float((one - other).norm()) <= 2e-3 * float(other.norm()) + 1e-7
    if size[3] == 100:
        full = results("reference", made(*size)[0], rows, size[0])
        assert float((full[0] - ours[0]).norm()) > 1e-3 * float(ours[0].norm())
        assert float((ours[0] - expected[0]).norm()) < 2e-5 * float(ours[0].norm())


def test_other_formats_are_not_read_as_if_they_were_float32() -> None:
    critic, rows = made(3, 2, [8], 5)
    expected = results("reference", critic, rows, 3)
    for one, other in zip(
        results(f"cpu/{PATHS[0]}", critic, rows.double(), 3), expected, strict=True
    ):
        torch.testing.assert_close(one.float(), other, rtol=1e-5, atol=1e-6)


def test_values_that_somebody_will_differentiate() -> None:
    critic, rows = made(3, 2, [8], 5)
    critic.kernel = f"cpu/{PATHS[0]}"
    value = critic(rows[:, :3], rows[:, 3:5])
    assert value.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(critic(rows[:, :3], rows[:, 3:5]), value.detach())


def test_parameters_that_moved() -> None:
    """The kernel renews its pointers when tensors move in memory."""
    critic, rows = made(3, 2, [8], 5)
    critic.kernel = f"cpu/{PATHS[0]}"
    with torch.no_grad():
        before = critic(rows[:, :3], rows[:, 3:5])
        for p in critic.parameters():
            p.data = 2.0 * p.data
        twice = critic(rows[:, :3], rows[:, 3:5])
        state = {k: v / 2.0 for k, v in critic.state_dict().items()}
        critic.load_state_dict(state, assign=True)
        assert torch.equal(critic(rows[:, :3], rows[:, 3:5]), before)
    assert not torch.equal(twice, before)


def test_kernels_have_the_same_operations() -> None:
    names = [n for n in dir(kernels.Kernel) if not n.startswith("_")]
    assert sorted(names) == [
        "actions", "actor_loss_grad", "adam", "add_clipped_noise", "critic_backward",
        "dense_actions", "dense_vjp", "mse_backward", "polyak", "squashed", "squashed_vjp",
        "td_target", "values", "vjp",
    ]  # fmt: skip
    for kernel in ("reference", f"cpu/{PATHS[0]}"):
        made = kernels.named(kernel)
        assert all(callable(getattr(made, name)) for name in names)
        assert all(callable(part) for part in made.parts[:4])


@pytest.mark.parametrize("kernel", ["reference", *(f"cpu/{path}" for path in PATHS)])
def test_equal_critics_share_the_gradient(kernel: str) -> None:
    """Q1 = relu(1 + a) + 1 and Q2 = 1 + relu(1 + 3 a) are both 2 at a = 0; the loss, -min Q, has
    the slope -(1 + 3) / 2, of which each of two samples has a half.
    """
    critic = hinges(kernel)
    one = Gradient([torch.zeros(1)])
    slopes = critic.actor_loss_grad(torch.zeros(2, 1), torch.zeros(2, 1), one, lowest=True)
    assert slopes.flatten().tolist() == [-1.0, -1.0]
    assert float(one.loss) == -2.0


@pytest.mark.parametrize("kernel", ["reference", *(f"cpu/{path}" for path in PATHS)])
def test_a_critic_that_is_not_a_number_is_not_hidden(kernel: str) -> None:
    critic = hinges(kernel)
    with torch.no_grad():
        critic.biases_C1N[1][1] = float("nan")
    one = Gradient([torch.zeros(1)])
    slopes = critic.actor_loss_grad(torch.zeros(2, 1), torch.zeros(2, 1), one, lowest=True)
    assert slopes.isnan().all()
    assert one.loss.isnan()


def hinges(kernel: str) -> Critics:
    critic = Critics(1, 1, [2], kernel=kernel)
    with torch.no_grad():
        for p in critic.parameters():
            p.zero_()
        critic.weights_CIN[0][0, 1] = torch.tensor([1.0, 0.0])  # of the action
        critic.weights_CIN[0][1, 1] = torch.tensor([0.0, 3.0])
        critic.biases_C1N[0].fill_(1.0)
        critic.weights_CIN[1].fill_(1.0)
    return critic
