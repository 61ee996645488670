"""From gradient to weights: Adam and Polyak averaging against torch's, on every kernel."""

from __future__ import annotations

import math

import pytest
import torch
from builders import popsan, td3_config
from torch import Tensor, nn

from spikerl import kernels
from spikerl.algos.base import Guard, Optimizer
from spikerl.algos.td3 import TD3
from spikerl.kernels import build as native
from spikerl.kernels.gradient import Moments
from spikerl.models.actor import Actor, MLPActor
from spikerl.models.actor_config import MLPConfig
from spikerl.models.critic import Critics
from spikerl.types import Batch

CPU = [f"cpu/{path}" for path in native.supported_paths()]
KERNELS = ["reference", *CPU]


def moments(size: int) -> Moments:
    draw = torch.Generator().manual_seed(size)
    weights = torch.randn(size, generator=draw)
    return Moments(weights, torch.zeros(()), torch.zeros(size), torch.zeros(size))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("size", [1, 15, 16, 1000])
@pytest.mark.parametrize("max_norm", [math.inf, 0.5])
def test_adam_is_torchs(kernel: str, size: int, max_norm: float) -> None:
    ours, masked = moments(size), torch.zeros(())
    module = nn.Parameter(ours.weights.clone())
    theirs = torch.optim.Adam([module], lr=0.01)
    draw = torch.Generator().manual_seed(1)
    for k in range(20):
        gradient = torch.randn(size + 1, generator=draw) * 10.0 ** (k % 5 - 3)
        module.grad = gradient[:-1].clone()
        if max_norm < math.inf:
            nn.utils.clip_grad_norm_([module], max_norm)
        theirs.step()
        kernels.named(kernel).adam(ours, gradient, 0.01, max_norm, masked)
        torch.testing.assert_close(gradient[:-1], module.grad, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(ours.weights, module.detach(), rtol=1e-5, atol=1e-6)
    state = theirs.state[module]
    assert float(ours.step) == 20
    assert float(masked) == 0
    torch.testing.assert_close(ours.exp_avg, state["exp_avg"], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(ours.exp_avg_sq, state["exp_avg_sq"], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("where", [0, 20, 36, 37], ids=["first", "amid", "last", "loss"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_masks(kernel: str, where: int, bad: float) -> None:
    ours, masked = moments(37), torch.zeros(())
    adam = kernels.named(kernel).adam
    adam(ours, torch.ones(38), 0.01, math.inf, masked)
    assert float(ours.step) == 1
    before = [t.clone() for t in ours]
    gradient = torch.ones(38)
    gradient[where] = bad
    adam(ours, gradient, 0.01, math.inf, masked)
    assert float(masked) == 1
    adam(ours, torch.ones(38), 0.01, math.inf, masked)  # finite, and still masked
    assert all(torch.equal(a, b) for a, b in zip(ours, before, strict=True))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_pruned_weight_has_no_step(kernel: str) -> None:
    """It has no share of the gradient's norm either: clipping (3, 4) to a norm of 1 gives (0, 1).
    Adam's first step is the rate, its second the rate times (0.14 / 0.19) / sqrt(1.249 / 1.999).
    """
    net = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[0.0, 2.0]]))
    guard, unpruned = Guard("cpu", scales_loss=False), torch.tensor([0.0, 1.0])
    optimizer = Optimizer(net, 0.1, guard, max_grad_norm=1.0, kernel=kernel, unpruned=unpruned)
    for gradient, expected in (([3.0, 4.0], 1.9), ([-9.0, 0.5], 1.9 - 0.0932179)):
        optimizer.gradient.vector.copy_(torch.tensor([*gradient, 7.0]))
        assert float(optimizer.step()) == 7.0
        assert net.weight[0, 0].item() == 0.0
        assert net.weight[0, 1].item() == pytest.approx(expected, rel=1e-6)
    optimizer.gradient.vector.copy_(torch.tensor([math.nan, 1.0, 0.0]))
    optimizer.step()
    assert float(guard.masked) == 1.0  # the gradient of a pruned weight is checked too


@pytest.mark.parametrize("kernel", KERNELS)
def test_polyak(kernel: str) -> None:
    polyak = kernels.named(kernel).polyak
    target, online = torch.full((35,), 1.0), torch.full((35,), 3.0)
    polyak(target, online, 0.25, torch.ones(()))
    assert target.tolist() == [1.0] * 35  # masked
    polyak(target, online, 0.25, torch.zeros(()))
    assert target.tolist() == [1.5] * 35  # 0.75 1 + 0.25 3
    online.fill_(1e-9)  # much less than the last bit of 1.5
    polyak(target, online, 1.0, torch.zeros(()))
    assert torch.equal(target, online)


def learner(kernel: str, actor: Actor) -> TD3:
    torch.manual_seed(3)
    critic = Critics(4, 2, [32, 24], kernel=kernel)
    actor.kernel = kernel
    generator = torch.Generator().manual_seed(0)
    return TD3(actor, critic, td3_config(batch_size=32), actor_lr=1e-3, generator=generator)


def rows(updates: int) -> Batch:
    draw = torch.Generator().manual_seed(9)

    def normal(*shape: int) -> Tensor:
        return torch.randn(32 * updates, *shape, generator=draw)

    done, discount = torch.arange(32 * updates) % 7 == 0, torch.full((32 * updates,), 0.9)
    return Batch(normal(4), normal(2).clamp(-1, 1), normal(), normal(4), done, discount)


@pytest.mark.parametrize("kernel", CPU)
@pytest.mark.parametrize("kind", ["spiking", "dense"])
def test_a_whole_update_is_the_references(kernel: str, kind: str) -> None:
    """Five updates: losses, gradients, weights, moments and targets."""
    found = []
    for name in ("reference", kernel):
        torch.manual_seed(4)
        dense = MLPConfig(name="mlp", hidden_sizes=[16], lr=1e-3)
        actor = popsan(4, 2, [24, 16]) if kind == "spiking" else MLPActor(4, 2, dense)
        td3 = learner(name, actor)
        metrics = td3.run_updates(rows(5), 5)
        found.append((metrics, td3))
    (expected, theirs), (got, ours) = found
    assert [m.keys() for m in got] == [m.keys() for m in expected]
    for one, other in zip(got, expected, strict=True):
        for key, value in other.items():
            torch.testing.assert_close(one[key], value, rtol=1e-4, atol=1e-6)
    for name, value in theirs.state().items():
        error = float((ours.state()[name] - value).double().norm())
        assert error <= 1e-4 * float(value.double().norm()), name
    vectors = [
        (t.critic_optimizer.gradient.vector, t.actor_optimizer.gradient.vector)
        for t in (ours, theirs)
    ]
    for one, other in zip(*vectors, strict=True):
        assert float((one - other).norm()) <= 1e-3 * float(other.norm())


@pytest.mark.parametrize("kernel", CPU)
def test_a_mean_that_shrinks_does_not_become_denormal(kernel: str) -> None:
    """A denormal number costs hundreds of cycles, and rounding would keep it for ever."""
    ours, masked, none = moments(40), torch.zeros(()), torch.zeros(41)
    ours.exp_avg.fill_(1e-37)
    for _ in range(30):
        kernels.named(kernel).adam(ours, none, 0.01, math.inf, masked)
    smallest = torch.finfo(torch.float32).smallest_normal
    assert all(mean == 0.0 or mean >= smallest for mean in ours.exp_avg.tolist())
    assert torch.tensor([1e-38]).mul(0.1).item() > 0.0  # denormals are on again
