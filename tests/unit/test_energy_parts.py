"""Operations of encoders, decoders and neurons, against numbers worked by hand."""

from __future__ import annotations

from typing import Any

import builders
import pytest
import torch
from builders import fill
from hand_worked import SEEN, encoder, spiking

from spikerl.energy import operations
from spikerl.energy.synapses import Count, Synapses, Update
from spikerl.models.actor import SpikingActor
from spikerl.snn.decoders import DecoderConfig
from spikerl.snn.encoders import EncoderConfig


def learned_encoder() -> SpikingActor:
    """A learned encoder with three weights that are not 0, two of them of the first entry."""
    actor = spiking(encoder=EncoderConfig(name="learned"))
    fill(actor, {"encoder.map.weight_IN": [[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]})
    return actor


@pytest.mark.parametrize(
    ("actor", "obs", "expected"),
    [
        (spiking(encoder=encoder("tanh_population")), SEEN, (4, 4, 2 * 4, 2 + 2)),
        (spiking(encoder=encoder("poisson")), SEEN, (4, 4, 1 * 4, 2 + 4)),
        (spiking(encoder=encoder("analog")), SEEN, (4, 4, 0, 2)),
        (spiking(encoder=EncoderConfig(name="direct")), SEEN, (0, 0, 0, 0)),
        (learned_encoder(), [1.0, 0.0], (8, 2, 0, 0)),
    ],
    ids=["tanh_population", "poisson", "analog", "direct", "learned"],
)
def test_encoders(actor: SpikingActor, obs: list[float], expected: tuple[float, ...]) -> None:
    ops = operations.count(actor, torch.tensor([obs]), torch.Generator().manual_seed(0))
    part = ops.encoder
    assert part
    additions = part.updates * part.update.acs
    got = (part.synapses.dense, part.synapses.macs, additions, part.functions)
    assert got == expected
    assert part.synapses.acs == 0


def test_currents_are_multiplied_and_once_if_they_stay() -> None:
    """Constant currents of a direct encoder are multiplied once; a learned encoder's currents,
    which differ between the two spike steps, at each step.
    """
    direct = operations.count(spiking(encoder=EncoderConfig(name="direct")), torch.tensor([SEEN]))
    assert direct.layers[0].synapses == Synapses(4, 2)
    assert direct.encoder
    assert direct.encoder.spikes == 0
    learned = learned_encoder()
    fill(learned, {"encoder.map.bias_N": [0.0, 0.0, 0.0, 0.0]})
    counted = operations.count(learned, torch.tensor([[1.0, 0.0]]))
    assert counted.layers[0].synapses == Synapses(8, 1 + 2)  # currents (1, 1), then (0, 0)


def decoded(name: str, **settings: Any) -> SpikingActor:
    if name in ("membrane", "ilc"):
        return spiking(decoder=builders.membrane_config(name=name, pop_size=3, **settings))
    return spiking(decoder=DecoderConfig(name=name))


def test_membranes_read_every_spike() -> None:
    actor = decoded("membrane")
    output = {"layers.1.weight_IN": [[1.0, 0.0, 0.375], [1.0, 1.0, 1.0]]}
    fill(actor, output | {"layers.1.bias_N": [0.0] * 3, "decoder.weight_AP": [[2.0, 1.0, 0.0]]})
    part = operations.count(actor, torch.tensor([SEEN])).decoder
    expected = Synapses(6, 0, 2, 4)  # two of three spikes reach a weight that is not 0
    assert part == Count("decoder", expected, 2, Update(1, 0, 1), functions=1)


def test_lateral_connections_see_the_spikes_before() -> None:
    """The first neuron's first spike reaches two weights; spikes of the last step reach none."""
    actor = decoded("ilc")
    output = {"layers.1.weight_IN": [[1.0, 0.0, 0.375], [1.0, 1.0, 1.0]]}
    lateral = [[[-0.125, 0.0, -0.125], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]]
    fill(actor, output | {"layers.1.bias_N": [0.0] * 3, "decoder.weight_AP": [[2.0, 1.0, 0.0]]})
    fill(actor, {"decoder.lateral_APP": lateral, "decoder.lateral_bias_N": [0.0] * 3})
    ops = operations.count(actor, torch.tensor([SEEN]))
    assert ops.layers[1].synapses == Synapses(12 + 18, 0, 4 + 2, 10 + 16)
    assert ops.connection_sparsity == 4 / 22
    # A layer's synapses count with the larger number of bits of its two matrices.
    for wide, narrow in ((8, 4), (4, 8)):
        bits = {"layers.1.weight_IN": wide, "decoder.lateral_APP": narrow, "decoder.weight_AP": 2}
        ops = operations.count(actor, torch.tensor([SEEN]), bits=bits)
        assert ops.decoder
        assert (ops.layers[1].bits, ops.decoder.bits) == (8, 2)


def test_decoders_without_an_output_population() -> None:
    linear = decoded("linear")
    fill(linear, {"decoder.map.weight_IN": [[1.0], [1.0]]})
    ops = operations.count(linear, torch.tensor([SEEN]))
    assert [part.name for part in ops.parts] == ["encoder", "hidden 1", "decoder"]
    assert ops.decoder == Count("decoder", Synapses(2, 1), 2, Update(0, 1, 1), functions=1)
    assert ops.twin.sizes == [2, 2, 1]
    learned = decoded("learned")  # 4 inputs (2 neurons, 2 spike steps), 2 values, 1
    over_time = {"decoder.over_time.weight_IN": [[1.0, 0.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]}
    fill(learned, over_time | {"decoder.over_time.bias_N": [0.0, 0.0]})
    fill(learned, {"decoder.map.weight_IN": [[1.0], [1.0]]})
    ops = operations.count(learned, torch.tensor([SEEN]))
    # The first neuron's spikes reach one weight, then two; both values differ from 0.
    assert ops.decoder == Count("decoder", Synapses(8 + 2, 2, 3, 7), functions=1)


@pytest.mark.parametrize(
    ("neuron", "update"),
    [
        (builders.lif_config(), (1, 1, 1)),
        (builders.CUBA_LIF, (2, 1, 2)),
        (builders.plif_config(), (1, 1, 1)),
        (builders.alif_config(), (3, 1, 2)),
        (builders.dynamic_config(), (4, 2, 3)),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_updates_of_neurons(neuron: Any, update: tuple[int, ...]) -> None:
    ops = operations.count(spiking(neuron=neuron), torch.tensor([SEEN]))
    assert {part.update for part in ops.layers} == {update}
    assert [part.updates for part in ops.layers] == [4, 20]
