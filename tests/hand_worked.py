"""Actors of a few neurons, whose operations are counted by hand."""

from __future__ import annotations

from typing import Any

import builders
from builders import fill

from spikerl.models.actor import MLPActor, SpikingActor
from spikerl.models.actor_config import MLPConfig
from spikerl.snn.decoders import RateConfig
from spikerl.snn.encoders import PopulationConfig

FIELD: dict[str, Any] = {"pop_size": 1, "mean_range": [0.0, 0.0], "var": 0.5, "threshold": 0.999}
# Observations: the first entry at its field's centre, so that it fires; both far away.
SEEN, UNSEEN = [0.0, 50.0], [50.0, 50.0]
HIDDEN = {"layers.0.weight_IN": [[1.0, 0.0], [1.0, 1.0]], "layers.0.bias_N": [0.0, 0.0]}


def encoder(name: str = "population") -> PopulationConfig:
    return PopulationConfig(name=name, **FIELD)


def spiking(**parts: Any) -> SpikingActor:
    """Two entries, two hidden neurons, two spike steps; one weight of the first layer is 0.

    If only the first entry fires, at both spike steps, so does only the first hidden neuron.
    """
    settings: dict[str, Any] = {
        "encoder": encoder(),
        "neuron": builders.lif_config(),
        "spike_steps": 2,
    }
    actor = builders.popsan(2, 1, [2], **(settings | parts))
    fill(actor, HIDDEN)
    return actor


def rate_decoded(**parts: Any) -> SpikingActor:
    """For SEEN, the first of three output neurons fires twice, the second never, the third once:
    its voltages are 0.375 and 0.656.
    """
    actor = spiking(decoder=RateConfig(name="rate", pop_size=3), **parts)
    output = {"layers.1.weight_IN": [[1.0, 0.0, 0.375], [1.0, 1.0, 1.0]]}
    fill(actor, output | {"layers.1.bias_N": [0.0] * 3, "decoder.weight_AP": [[2.0, 1.0, 0.0]]})
    return actor


def dense() -> MLPActor:
    actor = MLPActor(2, 1, MLPConfig(name="mlp", hidden_sizes=[2], lr=1e-3))
    fill(actor, {"layers.0.weight_IN": [[1.0, 0.0], [-1.0, 1.0]], "layers.0.bias_N": [0.0, 0.0]})
    fill(actor, {"layers.1.weight_IN": [[1.0], [1.0]]})
    return actor
