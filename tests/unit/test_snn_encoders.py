"""Encoders against values worked by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from builders import POISSON, POPULATION, fill, lif_config, popsan
from torch import Tensor

from spikerl.kernels import reference
from spikerl.snn.encoders import (
    ENCODERS,
    Encoder,
    EncoderConfig,
    PoissonEncoder,
    PopulationConfig,
    PopulationEncoder,
)


def encoder(obs_dim: int, config: PopulationConfig) -> PopulationEncoder:
    return PopulationEncoder(config, obs_dim, 5).double()


def built(config: EncoderConfig, obs_dim: int, spike_steps: int) -> Encoder:
    return ENCODERS.part(config)(config, obs_dim, spike_steps)


def test_population_centres_and_widths() -> None:
    made = PopulationEncoder(POPULATION, 2, 5)
    expected = [-3.0 + 6.0 * i / 9 for i in range(10)]
    for row in made.mean_OP:
        assert row.tolist() == pytest.approx(expected, abs=1e-6)
    assert made.std_OP.flatten().tolist() == pytest.approx([math.sqrt(0.15)] * 20)


def test_one_neuron_has_its_centre_in_the_middle() -> None:
    """With its centre at the lower end, -3, it would have exp(-9 / 0.3) = 1e-13 at 0."""
    made = PopulationEncoder(replace(POPULATION, pop_size=1), 2, 5)
    assert made.mean_OP.tolist() == [[0.0], [0.0]]
    assert made.activity(torch.zeros(1, 2)).tolist() == [[1.0, 1.0]]
    aside = PopulationEncoder(replace(POPULATION, pop_size=1, mean_range=[-1.0, 2.0]), 1, 5)
    assert aside.mean_OP.tolist() == [[0.5]]


def test_population_activity() -> None:
    made = encoder(1, POPULATION)
    centre = made.mean_OP[0, 4].detach()
    activity = made.activity((centre + math.sqrt(0.15)).view(1, 1))
    assert activity[0, 4].item() == pytest.approx(math.exp(-0.5))


def test_deterministic_spikes_by_hand() -> None:
    """With activity 0.6, v is .6, 1.2 (fires), .801, 1.401 (fires), 1.002 (fires)."""
    made = encoder(1, POPULATION)
    spikes = constant(made, 0.6)
    assert spikes == [0.0, 1.0, 0.0, 1.0, 1.0]
    assert constant(made, 1.0) == [1.0] * 5
    tie = encoder(1, replace(POPULATION, threshold=1.0))
    assert constant(tie, 1.0) == [0.0, 1.0, 1.0, 1.0, 1.0]  # v = 1 does not fire; then 2, 2, ...
    assert constant(made, 0.0) == [0.0] * 5


def constant(made: PopulationEncoder, activity: float) -> list[float]:
    """Spikes of a neuron whose Gaussian has the value `activity` at 0."""
    far = math.sqrt(-2.0 * 0.15 * math.log(activity)) if activity > 0 else 1e9
    with torch.no_grad():
        made.mean_OP.fill_(far)
    spikes: Tensor = made(torch.zeros(1, 1, dtype=torch.float64), 5, None)
    return spikes[:, 0, 0].tolist()


def test_straight_through_gradient() -> None:
    """v(1) = A, v(t+1) = v(t) + A - .999 o(t), do/dv = 1: g = dv/dA is 1, then .001 g(t) + 1."""
    made = encoder(1, POPULATION)
    obs = torch.zeros(1, 1, dtype=torch.float64)
    weight_T = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    (made(obs, 3, None)[:, 0, 0] * weight_T).sum().backward()
    slope = [1.0, 1.001, 1.001001]
    activity = math.exp(-0.5 * 9 / 0.15)
    by_mean = activity * (0.0 - -3.0) / 0.15  # dA/dmean = A (s - mean) / var
    expected = sum(w * s for w, s in zip([1.0, 2.0, 3.0], slope, strict=True)) * by_mean
    assert made.mean_OP.grad is not None
    assert float(made.mean_OP.grad[0, 0]) == pytest.approx(expected, rel=1e-5)


def test_poisson_rates_follow_the_activity_and_its_generator() -> None:
    made = PoissonEncoder(POISSON, 1, 5)
    obs = torch.full((4000, 1), 0.2)
    spikes = made(obs, 5, torch.Generator().manual_seed(1)).detach()
    again = made(obs, 5, torch.Generator().manual_seed(1)).detach()
    other = made(obs, 5, torch.Generator().manual_seed(2)).detach()
    assert torch.equal(spikes, again)
    assert not torch.equal(spikes, other)
    assert set(spikes.unique().tolist()) == {0.0, 1.0}
    p = made.activity(obs[:1])[0].detach()
    error = (spikes.mean((0, 1)) - p).abs()
    assert (error <= 4.5 * (p * (1 - p) / 20_000).sqrt() + 1e-6).all()
    per_step = spikes.mean(1)  # steps are independent draws, not one repeated
    assert not torch.equal(per_step[0], per_step[1])


def test_poisson_gradient_reaches_the_activity_unchanged() -> None:
    made = PoissonEncoder(POISSON, 1, 5)
    obs = torch.full((1, 1), 0.2, requires_grad=True)
    made(obs, 5, torch.Generator().manual_seed(1)).sum().backward()
    direct = torch.full((1, 1), 0.2, requires_grad=True)
    (5 * made.activity(direct)).sum().backward()
    assert obs.grad is not None
    assert direct.grad is not None
    torch.testing.assert_close(obs.grad, direct.grad)


def test_poisson_never_touches_the_global_generator() -> None:
    before = torch.get_rng_state()
    PoissonEncoder(POISSON, 1, 5)(torch.zeros(1, 1), 5, torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_tanh_population_is_that_of_a_squashed_observation() -> None:
    config = replace(POPULATION, name="tanh_population", mean_range=[-1.0, 1.0], var=0.05)
    obs = 2.0 * torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    made = built(config, 3, 5)
    plain = PopulationEncoder(replace(config, name="population"), 3, 5)
    spikes = made(obs, 5, None)
    assert torch.equal(spikes, plain(torch.tanh(obs), 5, None))
    assert not torch.equal(spikes, plain(obs, 5, None))


def test_analog_is_the_activity_as_a_current() -> None:
    """One current is used at every spike step: with a decay of 1/2, v = x, 1.5 x, 1.75 x."""
    config = replace(POPULATION, name="analog", pop_size=2, mean_range=[-1.0, 1.0], var=0.5)
    neuron = lif_config(voltage_decay=0.5, threshold=10.0)
    actor = popsan(1, 1, [1], spike_steps=3, encoder=config, neuron=neuron)
    obs = torch.tensor([[1.0], [0.0]])
    given = actor.encoder(obs, 3, None)
    expected = [[math.exp(-4.0), 1.0], [math.exp(-1.0)] * 2]  # exp(-(s - mean)^2)
    assert given.shape == (1, 2, 2)
    torch.testing.assert_close(given[0], torch.tensor(expected))
    fill(actor.layers[0], {"weight_IN": [[1.0], [1.0]], "bias_N": 0.0})
    _, (hidden, _) = reference.record(actor, obs, None)
    x = given[0].sum(1, keepdim=True)
    for state, share in zip(hidden, (1.0, 1.5, 1.75), strict=True):
        torch.testing.assert_close(state.voltage_BN, share * x)


def test_direct_is_the_observation() -> None:
    obs = torch.tensor([[0.5, -2.0], [0.0, 3.0]])
    made = built(EncoderConfig(name="direct"), 2, 5)
    assert torch.equal(made(obs, 5, None), obs.unsqueeze(0))
    assert made.outputs == 2
    assert not list(made.parameters())


def test_learned_encoder_by_hand() -> None:
    """Two entries, three spike steps: outputs 0 and 1 of the map are for the first step, etc."""
    made = built(EncoderConfig(name="learned"), 2, 3)
    weight = [[1, 2, 3, 4, 5, 6], [10, 20, 30, 40, 50, 60]]
    fill(made, {"map.weight_IN": weight, "map.bias_N": [0.5, 0.0, 0.0, 0.0, 0.0, -0.5]})
    obs = torch.tensor([[1.0, 0.0], [2.0, 1.0]])
    currents = made(obs, 3, None)
    assert currents.tolist() == [
        [[1.5, 2.0], [12.5, 24.0]],
        [[3.0, 4.0], [36.0, 48.0]],
        [[5.0, 5.5], [60.0, 71.5]],
    ]
    currents[1, 1, 0].backward()  # step 2, row 2, first current
    grad = made.get_parameter("map.weight_IN").grad
    assert grad is not None
    assert grad.tolist() == [[0, 0, 2, 0, 0, 0], [0, 0, 1, 0, 0, 0]]


@pytest.mark.parametrize(("entries", "fields"), [(10**12, 10), (10**6, 10**6)])
def test_a_shape_alone_takes_no_memory(entries: int, fields: int) -> None:
    """The shape that a policy's file declares is first built on the device meta."""
    config = replace(POPULATION, pop_size=fields)
    with torch.device("meta"):
        encoder = PopulationEncoder(config, entries, 5)
    assert encoder.mean_OP.shape == encoder.std_OP.shape == (entries, fields)
    assert encoder.mean_OP.is_meta
