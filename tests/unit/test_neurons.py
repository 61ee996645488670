"""Membranes, surrogates, encoders and decoders against traces worked by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from builders import CUBA_LIF, POISSON, POPULATION, RATE, popsan
from torch import Tensor

from spikerl.snn.decoders import RateDecoder
from spikerl.snn.encoders import PopulationConfig, PopulationEncoder
from spikerl.snn.kernels import reference
from spikerl.snn.neurons import CubaLIF, State
from spikerl.snn.surrogates import spike


def run(drive_T: list[float]) -> list[State]:
    neuron = CubaLIF(CUBA_LIF)
    states = []
    state = neuron.initial(torch.zeros(1, 1, dtype=torch.float64))
    for drive in drive_T:
        state = neuron.step(torch.full((1, 1), drive, dtype=torch.float64), state)
        states.append(state)
    return states


def trace(states: list[State], field: str) -> list[float]:
    if field == "current_BN":
        return [float(state.others[0]) for state in states]
    return [float(getattr(state, field)) for state in states]


def test_cuba_lif_by_hand() -> None:
    """c = c/2 + x; v = 3/4 v (1 - o) + c; o = [v > 1/2]: binary fractions, so exact."""
    states = run([0.25, 0.25, 0.0, -0.5, 1.0])
    assert trace(states, "current_BN") == [0.25, 0.375, 0.1875, -0.40625, 0.796875]
    # 0.75 * 0.25 + 0.375 = 0.5625 fires; from zero 0.1875; 0.75 * 0.1875 - 0.40625 = -0.265625;
    # 0.75 * -0.265625 + 0.796875 = 0.59765625 fires
    assert trace(states, "voltage_BN") == [0.25, 0.5625, 0.1875, -0.265625, 0.59765625]
    assert trace(states, "spikes_BN") == [0.0, 1.0, 0.0, 0.0, 1.0]


def test_reset_clears_the_voltage_but_not_the_current() -> None:
    states = run([1.0, 0.0, 0.0])
    assert trace(states, "current_BN") == [1.0, 0.5, 0.25]
    assert trace(states, "voltage_BN") == [1.0, 0.5, 0.625]
    assert trace(states, "spikes_BN") == [1.0, 0.0, 1.0]


def test_tie_does_not_fire() -> None:
    assert trace(run([0.5]), "spikes_BN") == [0.0]
    assert spike(torch.tensor([0.0, 1e-7]), "rect", 0.5).tolist() == [0.0, 1.0]


def test_surrogate_window_is_open_and_one_inside() -> None:
    excess = torch.tensor([-0.5, -0.4999, 0.0, 0.4999, 0.5], requires_grad=True)
    spike(excess, "rect", 0.5).backward(torch.full((5,), 3.0))
    assert excess.grad is not None
    assert excess.grad.tolist() == [0.0, 3.0, 3.0, 3.0, 0.0]


def test_gradient_through_time_by_hand() -> None:
    """d(o2) / d(x1) with v1 = x1 = 0.25 silent and v2 = 0.75 x1 + 0.5 x1 + x2 inside the window.

    Through the membrane and current: 0.75 + 0.5. Through the reset: -0.75 v1 times do1/dv1 = 1.
    """
    x1 = torch.tensor([[0.25]], dtype=torch.float64, requires_grad=True)
    neuron = CubaLIF(CUBA_LIF)
    first = neuron.step(x1, neuron.initial(x1))
    second = neuron.step(torch.full_like(x1, 0.1), first)
    second.spikes_BN.sum().backward()
    assert x1.grad is not None
    assert float(x1.grad) == 0.75 + 0.5 - 0.75 * 0.25


def test_zero_drive_stays_silent() -> None:
    assert trace(run([0.0] * 32), "voltage_BN") == [0.0] * 32


def encoder(obs_dim: int, config: PopulationConfig) -> PopulationEncoder:
    return PopulationEncoder(obs_dim, config).double()


def test_population_centres_and_widths() -> None:
    made = PopulationEncoder(2, POPULATION)
    expected = [-3.0 + 6.0 * i / 9 for i in range(10)]
    for row in made.mean_OP:
        assert row.tolist() == pytest.approx(expected, abs=1e-6)
    assert made.std_OP.flatten().tolist() == pytest.approx([math.sqrt(0.15)] * 20)


def test_population_activity() -> None:
    made = encoder(1, POPULATION)
    centre = made.mean_OP[0, 4].detach()
    activity = made.activity((centre + math.sqrt(0.15)).view(1, 1))
    assert activity[0, 4].item() == pytest.approx(math.exp(-0.5))


def test_deterministic_spikes_by_hand() -> None:
    """Activity 0.6: v = .6, 1.2 fires, .801, 1.401 fires, 1.002 fires."""
    made = encoder(1, POPULATION)
    spikes = constant(made, 0.6)
    assert spikes == [0.0, 1.0, 0.0, 1.0, 1.0]
    assert constant(made, 1.0) == [1.0] * 5
    tie = encoder(1, replace(POPULATION, threshold=1.0))
    assert constant(tie, 1.0) == [0.0, 1.0, 1.0, 1.0, 1.0]  # v = 1 does not fire; then 2, 2, ...
    assert constant(made, 0.0) == [0.0] * 5


def constant(made: PopulationEncoder, activity: float) -> list[float]:
    """Spikes of a neuron whose Gaussian has this value at 0."""
    far = math.sqrt(-2.0 * 0.15 * math.log(activity)) if activity > 0 else 1e9
    with torch.no_grad():
        made.mean_OP.fill_(far)
    spikes: Tensor = made(torch.zeros(1, 1, dtype=torch.float64), 5, None)
    return spikes[:, 0, 0].tolist()


def test_straight_through_gradient() -> None:
    """dv(t)/dA: v(1) = A; v(t+1) = v(t) + A - .999 o(t) with do/dv = 1, so .001 g(t) + 1."""
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
    made = PopulationEncoder(1, POISSON)
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
    made = PopulationEncoder(1, POISSON)
    obs = torch.full((1, 1), 0.2, requires_grad=True)
    made(obs, 5, torch.Generator().manual_seed(1)).sum().backward()
    direct = torch.full((1, 1), 0.2, requires_grad=True)
    (5 * made.activity(direct)).sum().backward()
    assert obs.grad is not None
    assert direct.grad is not None
    torch.testing.assert_close(obs.grad, direct.grad)


def test_poisson_never_touches_the_global_generator() -> None:
    before = torch.get_rng_state()
    PopulationEncoder(1, POISSON)(torch.zeros(1, 1), 5, torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_decoder_reads_each_population_alone() -> None:
    decoder = RateDecoder(2, RATE)
    with torch.no_grad():
        decoder.weight_AP.copy_(torch.arange(20.0).view(2, 10))
        decoder.bias_A.copy_(torch.tensor([0.5, -1.0]))
    rate = torch.zeros(1, 20)
    rate[0, 3], rate[0, 12] = 0.25, 0.5
    assert decoder(rate.unsqueeze(0)).tolist() == [[0.5 + 3 * 0.25, -1.0 + 12 * 0.5]]


def test_spikes_are_binary_and_layers_see_this_steps_input() -> None:
    """A spike crosses all layers within one spike step: PopSAN has no axonal delay."""
    actor = popsan(1, 1, [3, 2], spike_steps=1)
    with torch.no_grad():
        for layer in actor.layers:
            layer.weight_IN.fill_(1.0)
            layer.bias_N.zero_()
    centre = actor.encoder.mean_OP[0, 4].detach().view(1, 1)
    spikes, states = reference.record(actor, centre, None)
    assert [s.sum().item() for s in spikes] == [1.0, 3.0, 2.0, 10.0]
    voltages = [torch.stack([s.voltage_BN for s in own]) for own in states]
    assert [v.unique().tolist() for v in voltages] == [[1.0], [3.0], [2.0]]


def test_firing_statistics_by_hand() -> None:
    """Silent hidden layer of 2, output layer of 10 whose bias 2 fires at every step."""
    actor = popsan(1, 1, [2], spike_steps=5)
    with torch.no_grad():
        for layer, bias in zip(actor.layers, (0.0, 2.0), strict=True):
            layer.weight_IN.zero_()
            layer.bias_N.fill_(bias)
    rates = reference.spikes(actor, torch.full((3, 1), 50.0), None).mean(0)
    assert torch.equal(rates, torch.ones(3, 10))
    activity = actor.activity(torch.full((1030, 1), 50.0))  # out of the encoder's reach
    assert activity.layers == [0.0, 0.0, pytest.approx(1.0)]
    assert activity.firing_rate == pytest.approx(10 / 12)
    assert activity.window_fraction == 0.0  # |0 - .5| and |2 - .5| are both outside (0, .5)
    assert activity.samples == 1030 * 5
    assert (activity.silent, activity.saturated) == ([1.0, 0.0], [0.0, 1.0])
    assert activity.layer_windows == [0.0, 0.0]
    with torch.no_grad():
        actor.layers[0].bias_N.fill_(0.125)  # v: .125 .28125 .43 .557 | .24; all inside the window
    other = actor.activity(torch.full((7, 1), 50.0))
    assert other.window_fraction == pytest.approx(2 / 12)
    assert other.layer_windows == [pytest.approx(1.0), 0.0]
    assert other.silent == [0.0, 0.0]  # .557 fires
    assert other.layers == [0.0, pytest.approx(1 / 5), pytest.approx(1.0)]
    both = activity + other
    assert both.samples == 1037 * 5
    assert both.layers[1] == pytest.approx(7 / (1037 * 5))
    assert (both.silent, both.saturated) == ([0.0, 0.0], [0.0, 1.0])
