"""Membranes against traces worked by hand in binary fractions, and networks' firing statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from builders import (
    CUBA_LIF,
    NEURON,
    alif_config,
    dynamic_config,
    lif_config,
    neuron_of,
    plif_config,
    popsan,
)
from torch import Tensor

from spikerl.errors import BadRequest
from spikerl.kernels import reference
from spikerl.snn.encoders import PopulationEncoder
from spikerl.snn.neurons import CubaLIFConfig, NeuronConfig, State


@torch.no_grad()
def run(drive_T: list[float], config: NeuronConfig = CUBA_LIF) -> list[State]:
    neuron = neuron_of(config).double()
    states = []
    state = neuron.initial(torch.zeros(1, 1, dtype=torch.float64))
    for drive in drive_T:
        state = neuron.step(torch.full((1, 1), drive, dtype=torch.float64), state)
        states.append(state)
    return states


def voltages(states: list[State]) -> list[float]:
    return [float(state.voltage_BN) for state in states]


def fired(states: list[State]) -> list[float]:
    return [float(state.spikes_BN) for state in states]


def other(states: list[State], i: int = 0) -> list[float]:
    return [float(state.others[i]) for state in states]


def test_cuba_lif_by_hand() -> None:
    """c = c/2 + x; v = 3/4 v (1 - o) + c; o = [v > 1/2]."""
    states = run([0.25, 0.25, 0.0, -0.5, 1.0])
    assert other(states) == [0.25, 0.375, 0.1875, -0.40625, 0.796875]
    # 0.75 * 0.25 + 0.375 = 0.5625 fires; reset: 0.1875; 0.75 * 0.1875 - 0.40625 = -0.265625;
    # 0.75 * -0.265625 + 0.796875 = 0.59765625 fires
    assert voltages(states) == [0.25, 0.5625, 0.1875, -0.265625, 0.59765625]
    assert fired(states) == [0.0, 1.0, 0.0, 0.0, 1.0]


def test_reset_clears_the_voltage_but_not_the_current() -> None:
    states = run([1.0, 0.0, 0.0])
    assert other(states) == [1.0, 0.5, 0.25]
    assert voltages(states) == [1.0, 0.5, 0.625]
    assert fired(states) == [1.0, 0.0, 1.0]


def test_lif_by_hand() -> None:
    """v = 3/4 v (1 - o) + x: there is no current that keeps earlier drives."""
    states = run([0.25, 0.25, 0.25, -0.5, 1.0], lif_config())
    assert voltages(states) == [0.25, 0.4375, 0.578125, -0.5, 0.625]
    assert fired(states) == [0.0, 0.0, 1.0, 0.0, 1.0]


def test_soft_reset_takes_the_threshold_once_and_what_is_left_decays() -> None:
    states = run([1.25, 0.0, 0.0], lif_config(reset="soft"))
    # 0.75 (1.25 - 0.5) = 0.5625 fires; 0.75 (0.5625 - 0.5) = 0.046875
    assert voltages(states) == [1.25, 0.5625, 0.046875]
    assert fired(states) == [1.0, 1.0, 0.0]
    soft = CubaLIFConfig(
        **{**NEURON, "name": "cuba_lif", "reset": "soft"}, current_decay=0.5, voltage_decay=0.75
    )
    assert voltages(run([1.0, 0.0, 0.0], soft)) == [1.0, 0.875, 0.53125]


def test_plif_by_hand() -> None:
    """A decay of 1/2 is a logit of 0."""
    states = run([0.25, 0.5, 0.25, 0.25], plif_config())
    assert voltages(states) == [0.25, 0.625, 0.25, 0.375]
    assert fired(states) == [0.0, 1.0, 0.0, 0.0]
    decay = neuron_of(plif_config(voltage_decay=0.75)).get_parameter("decay_logit")
    assert torch.sigmoid(decay).item() == pytest.approx(0.75)


ALIF = alif_config(surrogate_window=0.25)


def test_alif_by_hand() -> None:
    """a = a/2 + o; v = v (1 - o) / 2 + 1; o = [v > 1/2 + a/2], a tie at the second step."""
    states = run([1.0] * 5, ALIF)
    assert other(states) == [0.0, 1.0, 0.5, 1.25, 0.625]
    assert voltages(states) == [1.0, 1.0, 1.5, 1.0, 1.5]
    assert fired(states) == [1.0, 0.0, 1.0, 0.0, 1.0]


def test_dynamic_by_hand() -> None:
    """v = v'^2 - u' + c;  u = u' - v'/4 - u'/2; a spike sets v' to 1/8 and adds 1/4 to u'."""
    states = run([0.75, 0.0, 0.5, 0.0], dynamic_config())
    assert other(states) == [0.75, 0.375, 0.6875, 0.34375]
    # Second step: v = 1/64 - 1/4 + 0.375, u = 1/4 - 1/32 - 1/8; third: v = 0.140625^2 - 0.09375
    # + 0.6875.
    assert voltages(states) == [0.75, 0.140625, 0.613525390625, 0.09765625]
    assert other(states, 1) == [0.0, 0.09375, 0.01171875, 0.099609375]
    assert fired(states) == [1.0, 0.0, 1.0, 0.0]


def test_tie_does_not_fire() -> None:
    assert fired(run([0.5])) == [0.0]


def test_zero_drive_stays_silent() -> None:
    assert voltages(run([0.0] * 32)) == [0.0] * 32


def drives(*values: float) -> list[Tensor]:
    return [torch.tensor([[x]], dtype=torch.float64, requires_grad=True) for x in values]


def slope(x: Tensor) -> float:
    assert x.grad is not None
    return float(x.grad)


def test_gradient_through_time_by_hand() -> None:
    """d(o2) / d(x1) with v1 = x1 = 0.25 silent and v2 = 0.75 x1 + 0.5 x1 + x2 inside the window.

    Through the membrane and current: 0.75 + 0.5. Through the reset: -0.75 v1 times do1/dv1 = 1.
    """
    x1, x2 = drives(0.25, 0.1)
    neuron = neuron_of(CUBA_LIF)
    neuron.step(x2, neuron.step(x1, neuron.initial(x1))).spikes_BN.sum().backward()
    assert slope(x1) == 0.75 + 0.5 - 0.75 * 0.25


@pytest.mark.parametrize(
    ("reset", "values", "by_decay", "by_drive"),
    [
        # v = .25, .25, .25 without spikes: dv3/ds = v2 + s (1 - v2) v1
        ("hard", [0.25, 0.125, 0.125], 0.25 + 0.5 * 0.75 * 0.25, (0.5 * 0.75) ** 2),
        # v = .75, .625, .3125; the first two fire: dv3/ds = (v2 - th) + s (1 - th) (v1 - th)
        ("soft", [0.75, 0.5, 0.25], 0.125 + 0.5 * 0.5 * 0.25, (0.5 * 0.5) ** 2),
    ],
)
def test_gradient_of_a_learned_decay_by_hand(
    reset: str, values: list[float], by_decay: float, by_drive: float
) -> None:
    """Slopes of o3 by s = sigmoid(w) and by x1; all v are inside the window, where do/dv = 1."""
    xs = drives(*values)
    neuron = neuron_of(plif_config(reset=reset)).double()
    state = neuron.initial(xs[0])
    for x in xs:
        state = neuron.step(x, state)
    state.spikes_BN.sum().backward()
    assert slope(neuron.get_parameter("decay_logit")) == 0.25 * by_decay
    assert slope(xs[0]) == by_drive


def test_gradient_through_an_adaptation_by_hand() -> None:
    """o2 depends on o1 by -v1/2 through the reset, and by -1/2 through the raised threshold."""
    x1, x2 = drives(0.25, 0.5)
    neuron = neuron_of(alif_config())
    neuron.step(x2, neuron.step(x1, neuron.initial(x1))).spikes_BN.sum().backward()
    assert slope(x1) == 0.5 * (1.0 - 0.25) - 0.5


@pytest.mark.parametrize(
    ("make", "key", "value"),
    [
        (plif_config, "voltage_decay", 0.0),
        (plif_config, "voltage_decay", 1.0),
        (dynamic_config, "reset", "soft"),
    ],
)
def test_what_one_neuron_cannot_have(make: Any, key: str, value: Any) -> None:
    with pytest.raises(BadRequest) as refused:
        make(**{key: value})
    assert refused.value.args[:2] == (f"neuron.{key}", value)
    lif_config(**{key: value})


def test_spikes_are_binary_and_layers_see_this_steps_input() -> None:
    """A spike crosses all layers within one spike step: PopSAN has no axonal delay."""
    actor = popsan(1, 1, [3, 2], spike_steps=1)
    assert isinstance(actor.encoder, PopulationEncoder)
    with torch.no_grad():
        for layer in actor.layers:
            layer.weight_IN.fill_(1.0)
            layer.bias_N.zero_()
    centre = actor.encoder.mean_OP[0, 4].detach().view(1, 1)
    spikes, states = reference.record(actor, centre, None)
    assert [s.sum().item() for s in spikes] == [1.0, 3.0, 2.0, 10.0]
    own = [torch.stack([s.voltage_BN for s in layer]) for layer in states]
    assert [v.unique().tolist() for v in own] == [[1.0], [3.0], [2.0]]


def test_firing_statistics_by_hand() -> None:
    """A silent hidden layer of 2; an output layer of 10 that fires at every step (bias 2)."""
    actor = popsan(1, 1, [2], spike_steps=5)
    with torch.no_grad():
        for layer, bias in zip(actor.layers, (0.0, 2.0), strict=True):
            layer.weight_IN.zero_()
            layer.bias_N.fill_(bias)
    rates = reference.spikes(actor, torch.full((3, 1), 50.0), None).mean(0)
    assert torch.equal(rates, torch.ones(3, 10))
    activity = actor.activity(torch.full((1030, 1), 50.0))  # far from all fields
    assert activity.layers == [0.0, 0.0, pytest.approx(1.0)]
    assert activity.firing_rate == pytest.approx(10 / 12)
    assert activity.window_fraction == 0.0  # |0 - .5| and |2 - .5| are both outside (0, .5)
    assert activity.samples == 1030 * 5
    assert (activity.silent, activity.saturated) == ([1.0, 0.0], [0.0, 1.0])
    assert activity.layer_windows == [0.0, 0.0]
    with torch.no_grad():
        actor.layers[0].bias_N.fill_(0.125)  # v: .125 .28125 .43 .557 | .24; all inside the window
    changed = actor.activity(torch.full((7, 1), 50.0))
    assert changed.window_fraction == pytest.approx(2 / 12)
    assert changed.layer_windows == [pytest.approx(1.0), 0.0]
    assert changed.silent == [0.0, 0.0]  # .557 fires
    assert changed.layers == [0.0, pytest.approx(1 / 5), pytest.approx(1.0)]
    both = activity + changed
    assert both.samples == 1037 * 5
    assert both.layers[1] == pytest.approx(7 / (1037 * 5))
    assert (both.silent, both.saturated) == ([0.0, 0.0], [0.0, 1.0])


def test_window_is_around_the_adapted_threshold() -> None:
    """In test_alif_by_hand v - 1/2 - a/2 is 1/2, 0, 3/4, -1/8, 11/16: two are within 1/4."""
    actor = popsan(1, 1, [2], neuron=ALIF)
    with torch.no_grad():
        for layer in actor.layers:
            layer.weight_IN.zero_()
            layer.bias_N.fill_(1.0)
    activity = actor.activity(torch.zeros(1, 1))
    assert activity.layer_windows == [2 / 5, 2 / 5]
    assert activity.layers[1:] == [3 / 5, 3 / 5]
