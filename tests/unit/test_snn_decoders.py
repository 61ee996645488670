"""Decoders against values worked by hand, alone and behind a network's neurons."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from builders import POPULATION, RATE, fill, lif_config, membrane_config, popsan, voltage_config

from spikerl.kernels import reference
from spikerl.snn.decoders import (
    DECODERS,
    Decoder,
    DecoderConfig,
    LearnedDecoder,
    MembraneDecoder,
)
from spikerl.snn.encoders import EncoderConfig


def built(config: DecoderConfig, act_dim: int, hidden: int, spike_steps: int) -> Decoder:
    return DECODERS.part(config)(config, act_dim, hidden, spike_steps)


def test_rate_decoder_reads_each_population_alone() -> None:
    decoder = built(RATE, 2, 5, 5)
    fill(decoder, {"weight_AP": [list(range(10)), list(range(10, 20))], "bias_A": [0.5, -1.0]})
    rate = torch.zeros(1, 20)
    rate[0, 3], rate[0, 12] = 0.25, 0.5
    assert decoder(rate.unsqueeze(0)).tolist() == [[0.5 + 3 * 0.25, -1.0 + 12 * 0.5]]


def membrane(read: str, decay: float) -> Decoder:
    config = membrane_config(pop_size=2, read=read, voltage_decay=decay)
    made = built(config, 2, 5, 3)
    assert type(made) is MembraneDecoder
    fill(made, {"weight_AP": [[1.0, -2.0], [0.5, 0.25]], "bias_A": [0.25, -0.5]})
    return made


@pytest.mark.parametrize(
    ("read", "decay", "expected"),
    [
        # With decay 1/2, charges 1.25, -1.75, .25 and -.25, -.5, .25 give the voltages
        # 1.25, -1.125, -.3125 and -.25, -.625, -.0625.
        ("last", 0.5, [-0.3125, -0.0625]),
        ("mean", 0.5, [-0.0625, -0.3125]),
        ("max", 0.5, [1.25, -0.625]),  # farthest from 0, with its sign
        ("last", 1.0, [-0.25, -0.5]),  # the sums
        ("max", 0.0, [-1.75, -0.5]),  # the charges themselves
    ],
)
def test_membrane_by_hand(read: str, decay: float, expected: list[float]) -> None:
    spikes = [[[1, 0, 0, 1]], [[0, 1, 0, 0]], [[0, 0, 1, 1]]]
    made = membrane(read, decay)
    torch.testing.assert_close(made(torch.tensor(spikes).float()), torch.tensor([expected]))


def test_a_tie_of_extremes_is_the_negative_one() -> None:
    """Charges 1, -2 without a leak: V = 1, -1."""
    made = membrane("max", 1.0)
    fill(made, {"bias_A": 0.0})
    spikes = torch.tensor([[[1.0, 0.0, 0.0, 0.0]], [[0.0, 1.0, 0.0, 0.0]]])
    assert made(spikes).tolist() == [[-1.0, 0.0]]


def test_lateral_connections_by_hand() -> None:
    """Connections from neuron p to q of a population act one spike step later, a bias at each step.

    Four output neurons without memory (decay 0) are driven by 1, 0, 0, 0, and the last by a
    lateral bias of 3/4. 0 excites 1 and 1 inhibits 0; 3 excites 2 and 2 inhibits 3.
    """
    actor = popsan(
        1,
        2,
        [1],
        spike_steps=4,
        encoder=replace(POPULATION, pop_size=1),
        neuron=lif_config(voltage_decay=0.0),
        decoder=membrane_config(name="ilc", pop_size=2),
    )
    fill(actor.layers[1], {"weight_IN": 0.0, "bias_N": [1.0, 0.0, 0.0, 0.0]})
    fill(
        actor.decoder,
        {
            "lateral_APP": [[[0, 1], [-1, 0]], [[0, -1], [1, 0]]],
            "lateral_bias_N": [0.0, 0.0, 0.0, 0.75],
            "weight_AP": [[0.25, 0.5], [0.125, -0.25]],
            "bias_A": 0.0,
        },
    )
    obs = torch.zeros(1, 1)
    spikes = reference.spikes(actor, obs, None)[:, 0]
    assert spikes.tolist() == [[1, 0, 0, 1], [1, 1, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0]]
    torch.testing.assert_close(
        actor(obs), torch.tanh(torch.tensor([[2 * 0.25 + 2 * 0.5, 2 * 0.125 - 2 * 0.25]]))
    )
    assert actor.activity(obs).layers[2] == 8 / 16


def test_learned_decoder_by_hand() -> None:
    """Two neurons, two spike steps: rows of the first map are (step, neuron) = 00, 01, 10, 11."""
    made = built(DecoderConfig(name="learned"), 1, 2, 2)
    assert isinstance(made, LearnedDecoder)
    over_time = [[1, 10], [2, 20], [3, 30], [4, 40]]
    fill(made.over_time, {"weight_IN": over_time, "bias_N": [0.5, 0.0]})
    fill(made.map, {"weight_IN": [[1.0], [0.25]], "bias_N": [-1.0]})
    spikes = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 1.0], [1.0, 0.0]]])
    # The first observation has spikes 00 and 11, the second only 10.
    expected = [[5.5 + 0.25 * 50 - 1.0], [3.5 + 0.25 * 30 - 1.0]]
    assert made(spikes).tolist() == expected


def test_linear_decoder_by_hand() -> None:
    made = built(DecoderConfig(name="linear"), 2, 2, 4)
    fill(made, {"map.weight_IN": [[1.0, 2.0], [4.0, 8.0]], "map.bias_N": [0.5, 0.0]})
    spikes = torch.tensor([[[1.0, 0.0]], [[1.0, 1.0]], [[0.0, 0.0]], [[0.0, 0.0]]])
    assert made(spikes).tolist() == [[0.5 + 0.5 + 4 * 0.25, 2 * 0.5 + 8 * 0.25]]


def test_an_actors_gradient_reaches_its_learned_coders() -> None:
    """Drives 1/2 and 1/2 cause no spikes but are inside the window: the action is tanh(bias)."""
    actor = popsan(
        2,
        1,
        [2],
        spike_steps=1,
        encoder=EncoderConfig(name="learned"),
        neuron=lif_config(threshold=1.0, surrogate_window=2.0),
        decoder=DecoderConfig(name="learned"),
    )
    eye = [[1.0, 0.0], [0.0, 1.0]]
    fill(actor.encoder, {"map.weight_IN": eye, "map.bias_N": 0.0})
    fill(actor.layers[0], {"weight_IN": [[1.0, 0.5], [0.0, 1.0]], "bias_N": 0.0})
    fill(actor.decoder, {"over_time.weight_IN": eye, "over_time.bias_N": 0.0})
    fill(actor.decoder, {"map.weight_IN": [[2.0], [3.0]], "map.bias_N": 0.25})
    act = actor(torch.tensor([[0.5, 0.25]]))
    act.sum().backward()
    slope = 1.0 - math.tanh(0.25) ** 2
    assert act.item() == pytest.approx(math.tanh(0.25))
    grads = {name: p.grad for name, p in actor.named_parameters()}
    torch.testing.assert_close(grads["decoder.map.bias_N"], torch.tensor([slope]))
    # Slopes of the action by the two currents: 2 * 1 + 3 * .5 = 3.5, and 3 * 1.
    expected = [[0.5 * 3.5, 0.5 * 3.0], [0.25 * 3.5, 0.25 * 3.0]]
    torch.testing.assert_close(grads["encoder.map.weight_IN"], slope * torch.tensor(expected))


@pytest.mark.parametrize("name", ["linear", "learned"])
def test_without_an_output_population(name: str) -> None:
    """These decoders read the last hidden layer."""
    actor = popsan(3, 2, [5, 4], decoder=DecoderConfig(name=name))
    assert [layer.weight_IN.shape[1] for layer in actor.layers] == [5, 4]
    assert actor(torch.zeros(7, 3)).shape == (7, 2)


@pytest.mark.parametrize(
    ("read", "decay", "expected"),
    [
        # V = V / 2 + charge / 2: 4, -2, 1 and 1, -5, -3 give 2, 0, .5 and .5, -2.25, -2.625.
        ("last", 0.5, [0.5, -2.625]),
        ("mean", 0.5, [2.5 / 3, -4.375 / 3]),
        ("max", 0.5, [2.0, 0.5]),  # the largest, not the farthest from 0
        ("last", 0.0, [1.0, -3.0]),  # the charges themselves
        ("max", 0.75, [1.0, 0.25]),  # charges have weight 1/4
    ],
)
def test_voltages_of_values_by_hand(read: str, decay: float, expected: list[float]) -> None:
    made = built(voltage_config(read, decay), 2, 2, 3)
    fill(made, {"map.weight_IN": [[3.0, 2.0], [-3.0, -4.0]], "map.bias_N": [1.0, -1.0]})
    spikes = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[1.0, 1.0]]])
    torch.testing.assert_close(made(spikes), torch.tensor([expected]))
