"""What a policy computes for one decision, counted on observations that it met.

Synaptic operations are NeuroBench's (Yik et al., 2025, arXiv:2304.04640): a product with an input
that is not a spike is a multiply-accumulate (MAC), a weight that a spike adds an accumulate (AC),
and weights and inputs of zero count only as dense operations. Biases count nowhere. A current that
is the same at every spike step is multiplied once.

Shape legend   T spike steps, B observations, I inputs, N neurons, A action entries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spikerl.errors import BadRequest
from spikerl.kernels import reference
from spikerl.models.actor import Actor, MLPActor, SpikingActor, connections
from spikerl.models.compression import footprints
from spikerl.snn import decoders, encoders, neurons
from spikerl.snn.conv import Conv


class Update(NamedTuple):
    """The arithmetic of one update of a membrane or counter; comparisons are additions."""

    macs: int
    acs: int
    states: int  # numbers that it keeps from one spike step to the next


NEURON_UPDATES = {
    neurons.LIFConfig: Update(1, 1, 1),
    neurons.CubaLIFConfig: Update(2, 1, 2),
    neurons.PLIFConfig: Update(1, 1, 1),
    neurons.ALIFConfig: Update(3, 1, 2),
    neurons.DynamicConfig: Update(4, 2, 3),
    neurons.ResidualIFConfig: Update(0, 2, 1),
}
INTEGRATE_AND_FIRE = Update(0, 2, 1)
COMPARISON = Update(0, 1, 0)
DISTANCE = Update(0, 2, 0)  # of two actions, and whether it is below a threshold
COUNTER = Update(0, 1, 1)
LEAKY = Update(1, 0, 1)
NO_UPDATE = Update(0, 0, 0)


class Synapses(NamedTuple):
    """Synaptic operations per decision."""

    dense: float = 0.0  # with no weight and no input of zero
    macs: float = 0.0
    acs: float = 0.0
    most_acs: float = 0.0  # if every input fired at every spike step


NO_SYNAPSES = Synapses()


@dataclass(frozen=True)
class Count:
    """One part of a network, per decision: all T spike steps, mean over observations."""

    name: str
    synapses: Synapses = NO_SYNAPSES
    updates: float = 0.0
    update: Update = NO_UPDATE
    spikes: float = 0.0
    functions: float = 0.0  # exp and tanh, and random numbers drawn
    bits: int | None = None  # of its weights, the widest; null: they are not quantised


@dataclass(frozen=True)
class DenseTwin:
    """ReLU layers of the same hidden sizes, every weight and activation counted."""

    sizes: list[int]  # observation entries, hidden layers, action entries

    @property
    def macs(self) -> int:
        return sum(i * n for i, n in pairwise(self.sizes))

    @property
    def activations(self) -> int:
        return sum(self.sizes)

    @property
    def footprint_bytes(self) -> int:
        """Of weights and biases in float32."""
        return 4 * (self.macs + sum(self.sizes[1:]))


@dataclass(frozen=True)
class Operations:
    """Of one policy; encoder and decoder are null in a dense one."""

    encoder: Count | None
    layers: list[Count]
    decoder: Count | None
    early_exit: Count | None  # what it takes to find out that an action has settled
    observations: int
    spike_steps: int | None
    steps_taken: float | None  # of the spike steps, mean over observations
    neuron: str | None
    activation_sparsity: float  # 1 - share of activations that are not zero
    connection_sparsity: float  # share of weights that are zero
    footprint_bytes: int  # of all parameters and buffers
    packed_bytes: int  # the same without weights of 0: a bit for each says which they are
    twin: DenseTwin

    @property
    def coding(self) -> list[Count]:
        return [part for part in (self.encoder, self.decoder, self.early_exit) if part]

    @property
    def parts(self) -> list[Count]:
        behind = filter(None, [self.decoder, self.early_exit])
        return [*filter(None, [self.encoder]), *self.layers, *behind]

    @property
    def bits(self) -> int | None:
        """Of the widest weights; null: they are not quantised."""
        return max((part.bits for part in self.parts if part.bits), default=None)

    @property
    def network(self) -> Synapses:
        """Of the layers between encoder and decoder."""
        return add(*(part.synapses for part in self.layers))

    @property
    def rate(self) -> float | None:
        """Share of the synapses behind spiking inputs that a spike step uses."""
        return self.network.acs / self.network.most_acs if self.network.most_acs else None


def add(*parts: Synapses) -> Synapses:
    return Synapses(*(sum(values) for values in zip(*parts, strict=True)))


def through(x: Tensor, weight_IN: Tensor, spiking: bool, calls: float | None = None) -> Synapses:
    """Of inputs (..., B, I) through connections; a matrix may hold the fan-out of each input.

    `calls`: how often an observation's inputs come; null: as often as they stand in x.
    """
    batch = x.shape[-2]
    calls = x[..., 0].numel() / batch if calls is None else calls
    fan_out_I = (weight_IN != 0).sum(1).double()
    active_I = (x != 0).flatten(0, -2).sum(0).double()
    effective = float(active_I @ fan_out_I) / batch
    dense = calls * weight_IN.numel()
    if spiking:
        return Synapses(dense, 0.0, effective, calls * float(fan_out_I.sum()))
    return Synapses(dense, effective)


@torch.no_grad()
def count(
    actor: Actor,
    obs_BO: Tensor,
    generator: torch.Generator | None = None,
    bits: Mapping[str, int] | None = None,
) -> Operations:
    """Operations on normalised observations, some thousands; `bits`: of quantised weights."""
    check(actor)
    bits, weights = bits or {}, connections(actor)
    zeros = sum(int((w == 0).sum()) for w in weights.values())
    footprint, packed = footprints(actor, bits)
    measure = _dense if isinstance(actor, MLPActor) else _spiking
    return replace(
        measure(actor, obs_BO, generator, bits),  # type: ignore[arg-type]
        connection_sparsity=zeros / sum(w.numel() for w in weights.values()),
        footprint_bytes=footprint,
        packed_bytes=packed,
    )


def check(actor: Actor) -> None:
    """Refuse an actor with a part whose operations are not known."""
    if any(isinstance(layer, Conv) for layer in actor.layers):
        raise BadRequest("ops", "true", "the operations of Conv are not known; leave ops out")
    if isinstance(actor, MLPActor):
        return
    kinds: list[tuple[Any, dict[Any, Any]]] = [
        (type(actor.encoder), ENCODERS),
        (type(actor.decoder), DECODERS),
        *((type(neuron.config), NEURON_UPDATES) for neuron in actor.neurons),
    ]
    if actor.carries:
        remedy = "spikes depend on the decisions before, which a count of one leaves out"
        raise BadRequest("ops", "true", f"{remedy}; leave ops out")
    for kind, known in kinds:
        if kind not in known:
            remedy = f"the operations of {kind.__name__} are not known; leave ops out"
            raise BadRequest("ops", "true", remedy)


def _widest(bits: Mapping[str, int], *parts: str) -> int | None:
    """Of the weights whose names begin so."""
    return max((b for name, b in bits.items() if name.startswith(parts)), default=None)


def _dense(
    actor: MLPActor, obs_BO: Tensor, generator: torch.Generator | None, bits: Mapping[str, int]
) -> Operations:
    x, parts, active = obs_BO, [], []
    for i, layer in enumerate(actor.layers, 1):
        own = _widest(bits, f"layers.{i - 1}.")
        parts.append(Count(f"hidden {i}", through(x, layer.weight_IN, False), bits=own))
        x = torch.relu(layer(x))
        active.append((x != 0).double())
    parts[-1] = replace(parts[-1], name="output", functions=actor.act_dim)
    sizes = [actor.obs_dim, *(layer.weight_IN.shape[1] for layer in actor.layers)]
    return Operations(
        encoder=None,
        layers=parts,
        decoder=None,
        early_exit=None,
        observations=len(obs_BO),
        spike_steps=None,
        steps_taken=None,
        neuron=None,
        activation_sparsity=1.0 - float(torch.cat(active[:-1], 1).mean()),
        connection_sparsity=0.0,
        footprint_bytes=0,
        packed_bytes=0,
        twin=DenseTwin(sizes),
    )


def _spiking(
    actor: SpikingActor,
    obs_BO: Tensor,
    generator: torch.Generator | None,
    bits: Mapping[str, int],
) -> Operations:
    batch = len(obs_BO)
    given, *fired = reference.record(actor, obs_BO, generator)[0]
    taken_TB1 = reference.taken(actor, fired[-1])
    steps = float(taken_TB1.sum()) / batch
    fired = [spikes * taken_TB1 for spikes in fired]
    if len(given) > 1:
        given = given * taken_TB1
    encoder = ENCODERS[type(actor.encoder)](actor.encoder, obs_BO, steps)
    encoder = replace(encoder, bits=_widest(bits, "encoder."))
    if actor.encoder.spikes:
        encoder = replace(encoder, spikes=float(given.sum()) / batch)
    parts, x, calls = [], given, steps if len(given) > 1 else 1.0
    for i, (layer, neuron, spikes) in enumerate(
        zip(actor.layers, actor.neurons, fired, strict=True), 1
    ):
        part = Count(
            f"hidden {i}",
            through(x, layer.weight_IN, i > 1 or actor.encoder.spikes, calls),
            updates=steps * spikes.shape[-1],
            update=NEURON_UPDATES[type(neuron.config)],
            spikes=float(spikes.sum()) / batch,
            bits=_widest(bits, f"layers.{i - 1}."),
        )
        parts.append(part)
        x, calls = spikes, steps
    hidden = [layer.weight_IN.shape[1] for layer in actor.layers]
    if actor.decoder.population(actor.decoder.config, actor.act_dim):
        hidden.pop()
        parts[-1] = replace(parts[-1], name="output")
    if isinstance(actor.decoder, decoders.ILCDecoder):
        # What a spike step gets are the spikes of the one before it; the first gets none.
        before = torch.cat([torch.zeros_like(x[:1]), x[:-1]]) * taken_TB1
        lateral = through(before, actor.decoder.lateral_APP.flatten(0, 1), True, steps)
        parts[-1] = replace(parts[-1], synapses=add(parts[-1].synapses, lateral))
    decoder = DECODERS[type(actor.decoder)](actor.decoder, x, steps)
    fires = sum(float(layer.sum()) for layer in fired)
    neurons_each = sum(layer.shape[-1] for layer in fired)
    return Operations(
        encoder=encoder,
        layers=parts,
        decoder=replace(decoder, bits=_widest(bits, "decoder.")),
        early_exit=_early_exit(actor, x, taken_TB1, _widest(bits, "decoder.")),
        observations=batch,
        spike_steps=actor.spike_steps,
        steps_taken=steps,
        neuron=actor.neurons[0].config.name,
        activation_sparsity=1.0 - fires / (neurons_each * steps * batch),
        connection_sparsity=0.0,
        footprint_bytes=0,
        packed_bytes=0,
        twin=DenseTwin([actor.obs_dim, *hidden, actor.act_dim]),
    )


def _early_exit(
    actor: SpikingActor, spikes_TBN: Tensor, taken_TB1: Tensor, bits: int | None
) -> Count | None:
    """The action at each spike step before the last taken, and its distance from the k before it.

    The membrane of `membrane` and `ilc` has it at every spike step; the others read their counters.
    """
    if actor.early_exit is None:
        return None
    decoder, k = actor.decoder, actor.early_exit.steps
    read_TB1 = taken_TB1[1:]  # spike step t, counted from 1, is read apart if t + 1 is taken
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


def _fields(encoder: Any) -> Count:
    """(s - mean) squared, times a constant, exp: two products for each neuron, once."""
    products = 2.0 * encoder.outputs
    return Count("encoder", Synapses(products, products), functions=encoder.outputs)


def _population(encoder: Any, obs_BO: Tensor, steps: float) -> Count:
    updates = encoder.outputs * steps
    return replace(_fields(encoder), updates=updates, update=INTEGRATE_AND_FIRE)


def _tanh_population(encoder: Any, obs_BO: Tensor, steps: float) -> Count:
    part = _population(encoder, obs_BO, steps)
    return replace(part, functions=part.functions + obs_BO.shape[1])


def _poisson(encoder: Any, obs_BO: Tensor, steps: float) -> Count:
    """A random number and a comparison for each neuron and spike step; the other side stays."""
    part, draws = _fields(encoder), encoder.outputs * steps
    functions = part.functions + draws
    return replace(part, updates=draws, update=COMPARISON, functions=functions)


def _analog(encoder: Any, obs_BO: Tensor, steps: float) -> Count:
    return _fields(encoder)


def _direct(encoder: Any, obs_BO: Tensor, steps: float) -> Count:
    return Count("encoder")


def _learned_encoder(encoder: Any, obs_BO: Tensor, steps: float) -> Count:
    return Count("encoder", through(obs_BO, encoder.map.weight_IN, False))


def _by_input(weight_AP: Tensor) -> Tensor:
    """Connections (N, 1) of populations that reach an action entry each."""
    return weight_AP.reshape(-1, 1)


def _counted(decoder_weight_IN: Tensor, spikes_TBN: Tensor) -> Count:
    """A counter for each neuron, then a product for each count that is not zero."""
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
