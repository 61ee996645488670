"""The operations of each neuron, encoder and decoder, and of early exit.

Operations are not counted for actors with a part that has no entry here (`operations.check`).

Shape legend   T spike steps, B observations, I inputs, N neurons, A action entries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from spikerl.energy.synapses import NO_SYNAPSES, Count, Synapses, Update, add, through
from spikerl.models.actor import SpikingActor
from spikerl.snn import decoders, encoders, neurons

# By module and config class: a plugin's neuron may use the config class of another.
NEURON_UPDATES: dict[tuple[type[neurons.Neuron], type[neurons.NeuronConfig]], Update] = {
    (neurons.CubaLIF, neurons.LIFConfig): Update(1, 1, 1),
    (neurons.CubaLIF, neurons.CubaLIFConfig): Update(2, 1, 2),
    (neurons.PLIF, neurons.PLIFConfig): Update(1, 1, 1),
    (neurons.ALIF, neurons.ALIFConfig): Update(3, 1, 2),
    (neurons.Dynamic, neurons.DynamicConfig): Update(4, 2, 3),
    (neurons.ResidualIF, neurons.ResidualIFConfig): Update(0, 2, 1),
}
INTEGRATE_AND_FIRE = Update(0, 2, 1)
COMPARISON = Update(0, 1, 0)
DISTANCE = Update(0, 2, 0)  # a difference of two actions, and its comparison with a threshold
COUNTER = Update(0, 1, 1)
LEAKY = Update(1, 0, 1)


def _fields(encoder: Any) -> Count:
    """exp of a constant times (s - mean)^2: two products for each neuron, once per decision."""
    products = 2.0 * encoder.outputs
    return Count("encoder", Synapses(products, products), functions=encoder.outputs)


def _population(encoder: Any, obs_BO: Tensor, steps: float) -> Count:
    updates = encoder.outputs * steps
    return replace(_fields(encoder), updates=updates, update=INTEGRATE_AND_FIRE)


def _tanh_population(encoder: Any, obs_BO: Tensor, steps: float) -> Count:
    part = _population(encoder, obs_BO, steps)
    return replace(part, functions=part.functions + obs_BO.shape[1])


def _poisson(encoder: Any, obs_BO: Tensor, steps: float) -> Count:
    """A random number, compared with the activity, for each neuron and spike step."""
    part, draws = _fields(encoder), encoder.outputs * steps
    functions = part.functions + draws
    return replace(part, updates=draws, update=COMPARISON, functions=functions)


def _analog(encoder: Any, obs_BO: Tensor, steps: float) -> Count:
    return _fields(encoder)


def _direct(encoder: Any, obs_BO: Tensor, steps: float) -> Count:
    return Count("encoder")


def _learned_encoder(encoder: Any, obs_BO: Tensor, steps: float) -> Count:
    return Count("encoder", through(obs_BO, encoder.map.weight_IN, False))


def _counted(decoder_weight_IN: Tensor, spikes_TBN: Tensor) -> Count:
    """A counter update for each spike, then products with each count that is not zero."""
    synapses = through(spikes_TBN.sum(0), decoder_weight_IN, False)
    spikes = float(spikes_TBN.sum()) / spikes_TBN.shape[1]
    return Count("decoder", synapses, updates=spikes, update=COUNTER)


def _rate(decoder: Any, spikes_TBN: Tensor, steps: float) -> Count:
    part = _counted(_by_input(decoder.weight_AP), spikes_TBN)
    return replace(part, functions=len(decoder.weight_AP))


def _linear(decoder: Any, spikes_TBN: Tensor, steps: float) -> Count:
    weight_NA = decoder.map.weight_IN
    return replace(_counted(weight_NA, spikes_TBN), functions=weight_NA.shape[1])


def _membrane(decoder: Any, spikes_TBN: Tensor, steps: float) -> Count:
    actions = len(decoder.weight_AP)
    synapses = through(spikes_TBN, _by_input(decoder.weight_AP), True, steps)
    updates = steps * actions
    return Count("decoder", synapses, updates=updates, update=LEAKY, functions=actions)


def _voltage(decoder: Any, spikes_TBN: Tensor, steps: float) -> Count:
    weight_NA = decoder.map.weight_IN
    updates, actions = steps * weight_NA.shape[1], weight_NA.shape[1]
    synapses = through(spikes_TBN, weight_NA, True)
    return Count("decoder", synapses, updates=updates, update=LEAKY, functions=actions)


def _learned_decoder(decoder: Any, spikes_TBN: Tensor, steps: float) -> Count:
    over_time = spikes_TBN.transpose(0, 1).flatten(1)
    first = through(over_time, decoder.over_time.weight_IN, True)
    second = through(decoder.over_time(over_time), decoder.map.weight_IN, False)
    return Count("decoder", add(first, second), functions=decoder.map.weight_IN.shape[1])


ENCODERS: dict[type[encoders.Encoder], Callable[[Any, Tensor, float], Count]] = {
    encoders.PopulationEncoder: _population,
    encoders.TanhPopulationEncoder: _tanh_population,
    encoders.PoissonEncoder: _poisson,
    encoders.AnalogEncoder: _analog,
    encoders.DirectEncoder: _direct,
    encoders.LearnedEncoder: _learned_encoder,
}
DECODERS: dict[type[decoders.Decoder], Callable[[Any, Tensor, float], Count]] = {
    decoders.RateDecoder: _rate,
    decoders.MembraneDecoder: _membrane,
    decoders.ILCDecoder: _membrane,
    decoders.LinearDecoder: _linear,
    decoders.LearnedDecoder: _learned_decoder,
    decoders.VoltageDecoder: _voltage,
}


def early_exit(
    actor: SpikingActor, spikes_TBN: Tensor, taken_TB1: Tensor, bits: int | None
) -> Count | None:
    """The actions at each spike step before the last taken, and their distances from the k before.

    `membrane` and `ilc` have an action at every spike step anyway; the others read their counters.
    """
    if actor.early_exit is None:
        return None
    decoder, k = actor.decoder, actor.early_exit.steps
    read_TB1 = taken_TB1[1:]  # step t, counted from 1, needs a read of its own if t + 1 is taken
    reads = float(read_TB1.sum()) / read_TB1.shape[1]
    counts_TBN = spikes_TBN.cumsum(0)[:-1] * read_TB1
    synapses = NO_SYNAPSES
    if isinstance(decoder, decoders.LinearDecoder):
        synapses = through(counts_TBN, decoder.map.weight_IN, False, reads)
    elif type(decoder) is decoders.RateDecoder:
        synapses = through(counts_TBN, _by_input(decoder.weight_AP), False, reads)
    compared = float(taken_TB1[k:-1].sum()) / taken_TB1.shape[1] * k * actor.act_dim
    return Count(
        "early exit", synapses, updates=compared, update=DISTANCE,
        functions=reads * actor.act_dim, bits=bits,
    )  # fmt: skip


def _by_input(weight_AP: Tensor) -> Tensor:
    """The weights as connections (N, 1): each neuron reaches only its own action entry."""
    return weight_AP.reshape(-1, 1)
