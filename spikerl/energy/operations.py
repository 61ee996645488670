"""What a policy computes for one decision, counted on observations that it met.

Synaptic operations are NeuroBench's (Yik et al., 2025, arXiv:2304.04640): a product with an input
that is no spike is a multiply-accumulate (MAC), a weight that a spike adds an accumulate (AC), and
weights and inputs of zero count only as dense operations. Biases count nowhere. A current that is
the same at every spike step is multiplied once.

Shape legend   T spike steps, B observations, I inputs, N neurons, A action entries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spikerl.errors import BadRequest
from spikerl.kernels import reference
from spikerl.models.actor import Actor, MLPActor, SpikingActor
from spikerl.snn import decoders, encoders, neurons


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
}
INTEGRATE_AND_FIRE = Update(0, 2, 1)
COMPARISON = Update(0, 1, 0)
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
    observations: int
    spike_steps: int | None
    neuron: str | None
    activation_sparsity: float  # 1 - share of activations that are not zero
    connection_sparsity: float  # share of weights that are zero
    footprint_bytes: int  # of all parameters and buffers
    twin: DenseTwin

    @property
    def coding(self) -> list[Count]:
        return [part for part in (self.encoder, self.decoder) if part]

    @property
    def parts(self) -> list[Count]:
        return [*filter(None, [self.encoder]), *self.layers, *filter(None, [self.decoder])]

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


def through(x: Tensor, weight_IN: Tensor, spiking: bool) -> Synapses:
    """Of inputs (..., B, I) through connections; a matrix may hold the fan-out of each input."""
    batch = x.shape[-2]
    calls = x[..., 0].numel() / batch
    fan_out_I = (weight_IN != 0).sum(1).double()
    active_I = (x != 0).flatten(0, -2).sum(0).double()
    effective = float(active_I @ fan_out_I) / batch
    dense = calls * weight_IN.numel()
    if spiking:
        return Synapses(dense, 0.0, effective, calls * float(fan_out_I.sum()))
    return Synapses(dense, effective)


@torch.no_grad()
def count(actor: Actor, obs_BO: Tensor, generator: torch.Generator | None = None) -> Operations:
    """Operations of an actor on normalised observations, some thousands at most."""
    check(actor)
    weights = [p for name, p in actor.named_parameters() if _is_weight(name, p)]
    zeros = sum(int((w == 0).sum()) for w in weights)
    stored = [*actor.parameters(), *actor.buffers()]
    measure = _dense if isinstance(actor, MLPActor) else _spiking
    return replace(
        measure(actor, obs_BO, generator),  # type: ignore[arg-type]
        connection_sparsity=zeros / sum(w.numel() for w in weights),
        footprint_bytes=sum(p.numel() * p.element_size() for p in stored),
    )


def check(actor: Actor) -> None:
    """Refuse an actor with a part whose operations are not known."""
    if isinstance(actor, MLPActor):
        return
    kinds: list[tuple[Any, dict[Any, Any]]] = [
        (type(actor.encoder), ENCODERS),
        (type(actor.decoder), DECODERS),
        *((type(neuron.config), NEURON_UPDATES) for neuron in actor.neurons),
    ]
    for kind, known in kinds:
        if kind not in known:
            remedy = f"the operations of {kind.__name__} are not known; leave ops out"
            raise BadRequest("ops", "true", remedy)


def _is_weight(name: str, p: Tensor) -> bool:
    return p.dim() > 1 and name not in ("encoder.mean_OP", "encoder.std_OP")


def _dense(actor: MLPActor, obs_BO: Tensor, generator: torch.Generator | None) -> Operations:
    x, parts, active = obs_BO, [], []
    for i, layer in enumerate(actor.layers, 1):
        parts.append(Count(f"hidden {i}", through(x, layer.weight_IN, False)))
        x = torch.relu(layer(x))
        active.append((x != 0).double())
    parts[-1] = replace(parts[-1], name="output", functions=actor.act_dim)
    sizes = [actor.obs_dim, *(layer.weight_IN.shape[1] for layer in actor.layers)]
    return Operations(
        encoder=None,
        layers=parts,
        decoder=None,
        observations=len(obs_BO),
        spike_steps=None,
        neuron=None,
        activation_sparsity=1.0 - float(torch.cat(active[:-1], 1).mean()),
        connection_sparsity=0.0,
        footprint_bytes=0,
        twin=DenseTwin(sizes),
    )


def _spiking(actor: SpikingActor, obs_BO: Tensor, generator: torch.Generator | None) -> Operations:
    batch, steps = len(obs_BO), actor.spike_steps
    given, *fired = reference.record(actor, obs_BO, generator)[0]
    encoder = ENCODERS[type(actor.encoder)](actor.encoder, obs_BO, steps)
    if actor.encoder.spikes:
        encoder = replace(encoder, spikes=float(given.sum()) / batch)
    parts, x = [], given
    for i, (layer, neuron, spikes) in enumerate(
        zip(actor.layers, actor.neurons, fired, strict=True), 1
    ):
        part = Count(
            f"hidden {i}",
            through(x, layer.weight_IN, i > 1 or actor.encoder.spikes),
            updates=steps * spikes.shape[-1],
            update=NEURON_UPDATES[type(neuron.config)],
            spikes=float(spikes.sum()) / batch,
        )
        parts.append(part)
        x = spikes
    hidden = [layer.weight_IN.shape[1] for layer in actor.layers]
    if actor.decoder.population(actor.decoder.config, actor.act_dim):
        hidden.pop()
        parts[-1] = replace(parts[-1], name="output")
    if isinstance(actor.decoder, decoders.ILCDecoder):
        # What a spike step gets are the spikes of the one before it; the first gets none.
        before = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
        lateral = through(before, actor.decoder.lateral_APP.flatten(0, 1), True)
        parts[-1] = replace(parts[-1], synapses=add(parts[-1].synapses, lateral))
    return Operations(
        encoder=encoder,
        layers=parts,
        decoder=DECODERS[type(actor.decoder)](actor.decoder, x),
        observations=batch,
        spike_steps=steps,
        neuron=actor.neurons[0].config.name,
        activation_sparsity=1.0 - float(torch.cat(fired, -1).double().mean()),
        connection_sparsity=0.0,
        footprint_bytes=0,
        twin=DenseTwin([actor.obs_dim, *hidden, actor.act_dim]),
    )


def _fields(encoder: Any) -> Count:
    """(s - mean) squared, times a constant, exp: two products for each neuron, once."""
    products = 2.0 * encoder.outputs
    return Count("encoder", Synapses(products, products), functions=encoder.outputs)


def _population(encoder: Any, obs_BO: Tensor, steps: int) -> Count:
    updates = encoder.outputs * steps
    return replace(_fields(encoder), updates=updates, update=INTEGRATE_AND_FIRE)


def _tanh_population(encoder: Any, obs_BO: Tensor, steps: int) -> Count:
    part = _population(encoder, obs_BO, steps)
    return replace(part, functions=part.functions + obs_BO.shape[1])


def _poisson(encoder: Any, obs_BO: Tensor, steps: int) -> Count:
    """A random number and a comparison for each neuron and spike step; the other side stays."""
    part, draws = _fields(encoder), encoder.outputs * steps
    functions = part.functions + draws
    return replace(part, updates=draws, update=COMPARISON, functions=functions)


def _analog(encoder: Any, obs_BO: Tensor, steps: int) -> Count:
    return _fields(encoder)


def _direct(encoder: Any, obs_BO: Tensor, steps: int) -> Count:
    return Count("encoder")


def _learned_encoder(encoder: Any, obs_BO: Tensor, steps: int) -> Count:
    return Count("encoder", through(obs_BO, encoder.map.weight_IN, False))


def _by_input(weight_AP: Tensor) -> Tensor:
    """Connections (N, 1) of populations that reach an action entry each."""
    return weight_AP.reshape(-1, 1)


def _counted(decoder_weight_IN: Tensor, spikes_TBN: Tensor) -> Count:
    """A counter for each neuron, then a product for each count that is not zero."""
    synapses = through(spikes_TBN.sum(0), decoder_weight_IN, False)
    spikes = float(spikes_TBN.sum()) / spikes_TBN.shape[1]
    return Count("decoder", synapses, updates=spikes, update=COUNTER)


def _rate(decoder: Any, spikes_TBN: Tensor) -> Count:
    part = _counted(_by_input(decoder.weight_AP), spikes_TBN)
    return replace(part, functions=len(decoder.weight_AP))


def _linear(decoder: Any, spikes_TBN: Tensor) -> Count:
    weight_NA = decoder.map.weight_IN
    return replace(_counted(weight_NA, spikes_TBN), functions=weight_NA.shape[1])


def _membrane(decoder: Any, spikes_TBN: Tensor) -> Count:
    actions = len(decoder.weight_AP)
    synapses = through(spikes_TBN, _by_input(decoder.weight_AP), True)
    updates = len(spikes_TBN) * actions
    return Count("decoder", synapses, updates=updates, update=LEAKY, functions=actions)


def _voltage(decoder: Any, spikes_TBN: Tensor) -> Count:
    weight_NA = decoder.map.weight_IN
    updates, actions = len(spikes_TBN) * weight_NA.shape[1], weight_NA.shape[1]
    synapses = through(spikes_TBN, weight_NA, True)
    return Count("decoder", synapses, updates=updates, update=LEAKY, functions=actions)


def _learned_decoder(decoder: Any, spikes_TBN: Tensor) -> Count:
    over_time = spikes_TBN.transpose(0, 1).flatten(1)
    first = through(over_time, decoder.over_time.weight_IN, True)
    second = through(decoder.over_time(over_time), decoder.map.weight_IN, False)
    return Count("decoder", add(first, second), functions=decoder.map.weight_IN.shape[1])


ENCODERS: dict[type[encoders.Encoder], Callable[[Any, Tensor, int], Count]] = {
    encoders.PopulationEncoder: _population,
    encoders.TanhPopulationEncoder: _tanh_population,
    encoders.PoissonEncoder: _poisson,
    encoders.AnalogEncoder: _analog,
    encoders.DirectEncoder: _direct,
    encoders.LearnedEncoder: _learned_encoder,
}
DECODERS: dict[type[decoders.Decoder], Callable[[Any, Tensor], Count]] = {
    decoders.RateDecoder: _rate,
    decoders.MembraneDecoder: _membrane,
    decoders.ILCDecoder: _membrane,
    decoders.LinearDecoder: _linear,
    decoders.LearnedDecoder: _learned_decoder,
    decoders.VoltageDecoder: _voltage,
}
