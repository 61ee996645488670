"""CaRe-BN by hand, against torch's batch normalisation, over workers, and in an actor."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import (
    CUBA_LIF,
    POPULATION,
    RATE,
    care_bn_config,
    fill,
    membrane_config,
    plif_config,
)
from torch import Tensor

from spikerl.kernels import reference
from spikerl.models.actor import SpikingActor
from spikerl.models.actor_config import ActorConfig
from spikerl.models.networks import build_actor, inference_actor
from spikerl.snn.batchnorm import BATCH, RECALIBRATE, CaReBN

# Two spike steps of three samples: mean 3, variance 12/6 = 2.
DRIVE = torch.tensor([[1.0, 5.0, 2.0], [4.0, 2.0, 4.0]], dtype=torch.float64).unsqueeze(-1)


def norm_of(neurons: int, **values: Any) -> CaReBN:
    made = CaReBN(neurons, 0.5).double()
    fill(made, values)
    return made


def random_norm(neurons: int) -> CaReBN:
    draw = torch.Generator().manual_seed(1)
    names = ("gamma_N", "beta_N", "mean_N", "var_N")
    return norm_of(neurons, **{n: torch.rand(neurons, generator=draw).tolist() for n in names})


def random_drive(*shape: int) -> Tensor:
    """Random drives; each feature has its own mean and width."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=draw, dtype=torch.float64)
    return (x + torch.arange(shape[-1])) * torch.linspace(0.1, 2.0, shape[-1])


def moments(drive_TBN: Tensor) -> tuple[Tensor, Tensor]:
    rows = drive_TBN.flatten(0, 1)
    return rows.mean(0), rows.var(0, correction=0)


def test_batch_moments_by_hand() -> None:
    """Moments are over both spike steps; gamma and beta start at 0.25, half the threshold."""
    normal = (DRIVE - 3.0) / math.sqrt(2.0 + 1e-5)
    torch.testing.assert_close(norm_of(1)(DRIVE, BATCH), 0.25 * normal + 0.25, rtol=1e-12, atol=0)


def test_running_moments_by_hand() -> None:
    """y = gamma (x - mean) / sqrt(var + eps) + beta; the running moments do not change."""
    norm = norm_of(1, gamma_N=[3.0], beta_N=[-1.0], mean_N=[0.5], var_N=[0.25])
    expected = 3.0 * (DRIVE - 0.5) / math.sqrt(0.25 + 1e-5) - 1.0
    torch.testing.assert_close(norm(DRIVE), expected, rtol=1e-12, atol=0)
    assert (norm.mean_N.item(), norm.var_N.item()) == (0.5, 0.25)


def test_kalman_gain_by_hand() -> None:
    """From mean 0 and variance 1, two batches of three with means 3, -1 and variance 2.

    p = 0.8 p + 0.2 off^2; gain = p / (p + noise), with noise 2 / (3 - 1) = 1 for the mean and
    2 * 2^2 / (3 - 1) = 4 for the variance.
    """
    norm = norm_of(1)
    norm(DRIVE, BATCH)
    p_mean, p_var = 0.2 * 9.0, 0.2 * 1.0
    mean, var = 3.0 * p_mean / (p_mean + 1.0), 1.0 + p_var / (p_var + 4.0)
    assert norm.mean_N.item() == pytest.approx(mean, rel=1e-7)  # it starts in float32
    assert norm.var_N.item() == pytest.approx(var, rel=1e-7)

    norm(DRIVE - 4.0, BATCH)
    p_mean = 0.8 * p_mean + 0.2 * (-1.0 - mean) ** 2
    p_var = 0.8 * p_var + 0.2 * (2.0 - var) ** 2
    assert norm.mean_error_N.item() == pytest.approx(p_mean)
    assert norm.var_error_N.item() == pytest.approx(p_var)
    assert norm.mean_N.item() == pytest.approx(mean + p_mean / (p_mean + 1.0) * (-1.0 - mean))
    assert norm.var_N.item() == pytest.approx(var + p_var / (p_var + 4.0) * (2.0 - var))


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("value", [0.0, 0.3, 1e7 / 3])
def test_a_constant_feature_stays_finite(value: float, batch: int) -> None:
    """Its output is beta, its gradient is 0, and its moments are its value and 0."""
    norm = norm_of(1)
    x = torch.full((1, batch, 1), value, dtype=torch.float64, requires_grad=True)
    for _ in range(2):
        y = norm(x, BATCH)
    torch.testing.assert_close(y, torch.full_like(y, 0.25), rtol=1e-5, atol=0)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.abs().max() < 1e-6
    assert norm.mean_N.item() == pytest.approx(value)
    assert norm.var_N.item() == pytest.approx(0.0, abs=0.1)
    assert norm(x).isfinite().all()


def test_output_and_gradient_are_torchs() -> None:
    norm, weight = random_norm(3), random_drive(4, 8, 3).flip(0)
    x = random_drive(4, 8, 3).requires_grad_()
    y = norm(x, BATCH)
    (y * weight).sum().backward()

    theirs_x = x.detach().clone().requires_grad_()
    gamma, beta = (p.detach().clone().requires_grad_() for p in (norm.gamma_N, norm.beta_N))
    theirs = F.batch_norm(theirs_x.flatten(0, 1), None, None, gamma, beta, training=True, eps=1e-5)
    torch.testing.assert_close(y.flatten(0, 1), theirs, rtol=1e-10, atol=1e-12)
    (theirs * weight.flatten(0, 1)).sum().backward()
    for ours, other in ((x, theirs_x), (norm.gamma_N, gamma), (norm.beta_N, beta)):
        torch.testing.assert_close(ours.grad, other.grad, rtol=1e-10, atol=1e-12)


def in_step(workers: list[CaReBN], work: Callable[[int], object]) -> None:
    """Run `work` of each worker in its own thread; sums wait for all workers."""
    barrier = threading.Barrier(len(workers), timeout=60)
    parts: list[Tensor] = [torch.empty(0)] * len(workers)

    def shared(rank: int) -> Callable[[Tensor], None]:
        def sum_(total: Tensor) -> None:
            parts[rank] = total.clone()
            barrier.wait()
            everything = torch.stack(parts).sum(0)
            barrier.wait()
            total.copy_(everything)

        return sum_

    for rank, norm in enumerate(workers):
        norm.sum_ = shared(rank)
    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(workers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_workers_normalise_as_one() -> None:
    """Workers with 5 and 3 rows have the outputs, gradients and moments of one with all 8."""
    whole, weight = random_norm(3), random_drive(4, 8, 3).flip(0)
    workers = [copy.deepcopy(whole) for _ in range(2)]
    x = random_drive(4, 8, 3).requires_grad_()
    y = whole(x, BATCH)
    (y * weight).sum().backward()

    parts = [part.detach().requires_grad_() for part in x.split([5, 3], 1)]
    weights = weight.split([5, 3], 1)
    outputs: list[Tensor] = [torch.empty(0)] * 2

    def work(rank: int) -> None:
        outputs[rank] = workers[rank](parts[rank], BATCH)
        (outputs[rank] * weights[rank]).sum().backward()

    in_step(workers, work)
    close: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(torch.cat(outputs, 1), y, **close)
    torch.testing.assert_close(torch.cat([p.grad for p in parts], 1), x.grad, **close)
    for name in ("gamma_N", "beta_N"):
        summed = sum(norm.get_parameter(name).grad for norm in workers)  # type: ignore[misc]
        torch.testing.assert_close(summed, whole.get_parameter(name).grad, **close)
    for norm in workers:
        for name, value in whole.state_dict().items():
            torch.testing.assert_close(norm.state_dict()[name], value, **close)


BATCHES = [random_drive(4, 8, 3), 5.0 - 3.0 * random_drive(4, 2, 3)]


def recalibrate(norm: CaReBN, batches: list[Tensor]) -> list[Tensor]:
    norm.begin_recalibration()
    outputs = [norm(batch, RECALIBRATE) for batch in batches]
    norm.end_recalibration()
    return outputs


def test_recalibration_measures_all_batches_at_once() -> None:
    """Moments are of all rows, not means of batches' moments; meanwhile each batch is normalised by
    the moments of all so far.
    """
    norm = random_norm(3)
    recalibrate(norm, [torch.randn(4, 8, 3)])  # must have no effect
    first, second = recalibrate(norm, BATCHES)
    everything = torch.cat([batch.flatten(0, 1) for batch in BATCHES]).unsqueeze(0)
    mean, var = moments(everything)
    torch.testing.assert_close(norm.mean_N.data, mean, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(norm.var_N.data, var, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(first, norm.affine(BATCHES[0], *moments(BATCHES[0])))
    torch.testing.assert_close(second, norm(BATCHES[1]))


def test_recalibration_counts_every_workers_rows() -> None:
    whole = random_norm(3)
    workers = [copy.deepcopy(whole) for _ in range(2)]
    recalibrate(whole, BATCHES)
    halves = [[batch[:, :1] for batch in BATCHES], [batch[:, 1:] for batch in BATCHES]]
    in_step(workers, lambda rank: recalibrate(workers[rank], halves[rank]))
    for norm in workers:
        torch.testing.assert_close(norm.mean_N, whole.mean_N, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(norm.var_N, whole.var_N, rtol=1e-10, atol=1e-12)


def test_folded_weights_give_the_same_drive() -> None:
    norm, draw = random_norm(3), torch.Generator().manual_seed(2)
    x, weight, bias = (
        torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((6, 5), (5, 3), (3,))
    )
    folded_weight, folded_bias = norm.folded(weight, bias)
    expected = norm((x @ weight + bias).unsqueeze(0))[0]
    torch.testing.assert_close(x @ folded_weight + folded_bias, expected, rtol=1e-10, atol=1e-12)


def actor_and_config(act_dim: int, **changes: Any) -> tuple[SpikingActor, ActorConfig]:
    """An actor with CaRe-BN in float64, so that rounding moves no voltage across its threshold."""
    parts: dict[str, Any] = {"encoder": POPULATION, "neuron": CUBA_LIF, "decoder": RATE} | changes
    config = ActorConfig(actor=care_bn_config([16, 12]), **parts)
    actor = build_actor(config, 3, act_dim, dtype=torch.float64).double()
    assert isinstance(actor, SpikingActor)
    return actor, config


def observations(rows: int) -> Tensor:
    return torch.randn(rows, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_an_update_normalises_by_its_batch_and_acting_by_the_running_moments() -> None:
    torch.manual_seed(0)
    actor, _ = actor_and_config(2)
    drives = reference.normed(actor, 0, reference.first(actor, observations(32), None))
    untouched = copy.deepcopy(actor.state_dict())
    acted = actor(observations(32))
    assert all(torch.equal(value, untouched[name]) for name, value in actor.state_dict().items())
    updated, _ = actor.vjp(observations(32), None)
    assert not torch.allclose(updated, acted)
    assert drives.shape == (5, 32, 16)
    for norm in actor.norms:
        assert norm.mean_N.count_nonzero() == len(norm.mean_N)


def test_an_actors_recalibration() -> None:
    """The first layer's moments are of its drive over all observations and spike steps."""
    torch.manual_seed(0)
    actor, _ = actor_and_config(2)
    obs = observations(40)
    actor.recalibrate(obs.split(16), None)
    layer, norm = actor.layers[0], actor.norms[0]
    spikes = actor.encoder(obs, 5, None)
    mean, var = moments((spikes @ layer.weight_IN + layer.bias_N).detach())
    torch.testing.assert_close(norm.mean_N.data, mean, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(norm.var_N.data, var, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "parts", [{}, {"neuron": plif_config(), "decoder": membrane_config(name="ilc")}]
)
def test_what_is_deployed_acts_the_same(parts: dict[str, Any]) -> None:
    """The inference actor has no CaRe-BN, and not the last of three outputs, but acts the same."""
    torch.manual_seed(0)
    actor, config = actor_and_config(3, **parts)
    actor.recalibrate(observations(64).split(32), None)
    small_config, small = inference_actor(config, actor, 2)
    obs = observations(100)
    expected = actor(obs)[:, :2]
    assert expected.std(0).min() > 0.01
    torch.testing.assert_close(small(obs), expected, rtol=1e-9, atol=1e-12)
    assert small_config.actor.name == "popsan"
    assert not [name for name in small.state_dict() if "norm" in name]
    assert inference_actor(small_config, small, 2) == (small_config, small)


def test_what_is_deployed_has_the_slopes_of_what_is_trained() -> None:
    """Evaluations use the surrogate's slope to count voltages inside its window."""
    moving = replace(CUBA_LIF, surrogate="triangle", surrogate_slope=2.0, surrogate_slope_end=8.0)
    actor, config = actor_and_config(3, neuron=moving)
    actor.schedule(50, 100)
    _, small = inference_actor(config, actor, 2)
    assert isinstance(small, SpikingActor)
    assert [neuron.scale for neuron in small.neurons] == [5.0, 5.0, 5.0]
