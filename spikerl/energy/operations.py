"""The operations of a policy per decision, counted on observations that it met.

Shape legend   T spike steps, B observations, I inputs, N neurons, A action entries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from spikerl.energy.parts import DECODERS, ENCODERS, NEURON_UPDATES, early_exit
from spikerl.energy.synapses import Count, Synapses, add, through
from spikerl.errors import BadRequest
from spikerl.kernels import reference
from spikerl.models.actor import Actor, MLPActor, SpikingActor, connections
from spikerl.models.compression import footprints
from spikerl.models.policy import Policy
from spikerl.snn import decoders
from spikerl.snn.conv import Conv
from spikerl.snn.linear import Linear
from spikerl.snn.neurons import Neuron, NeuronConfig


@dataclass(frozen=True)
class DenseTwin:
    """ReLU layers of the same hidden sizes, every weight and activation counted."""

    sizes: list[int]  # observation entries, outputs of hidden layers, action entries
    convolutions: list[tuple[int, int]] = field(default_factory=list)  # MACs, parameters of each

    @classmethod
    def of(cls, obs_dim: int, hidden: Sequence[Linear], act_dim: int) -> DenseTwin:
        conv = [layer for layer in hidden if isinstance(layer, Conv)]
        each = [(c.outputs // c.filters * c.weight_IN.numel(), c.weight_IN.numel() + c.filters)
                for c in conv]  # fmt: skip
        return cls([obs_dim, *(layer.outputs for layer in hidden), act_dim], each)

    @property
    def linear(self) -> list[tuple[int, int]]:
        """Inputs and outputs of each layer after the convolutions."""
        return list(pairwise(self.sizes))[len(self.convolutions) :]

    @property
    def macs(self) -> int:
        return sum(macs for macs, _ in self.convolutions) + sum(i * n for i, n in self.linear)

    @property
    def activations(self) -> int:
        return sum(self.sizes)

    @property
    def footprint_bytes(self) -> int:
        """Bytes of weights and biases in float32."""
        parameters = sum(own for _, own in self.convolutions)
        return 4 * (parameters + sum((i + 1) * n for i, n in self.linear))


@dataclass(frozen=True)
class Operations:
    """Counts for one policy; encoder and decoder are None in a dense one."""

    encoder: Count | None
    layers: list[Count]
    decoder: Count | None
    early_exit: Count | None  # the cost of finding out that an action has settled
    observations: int
    spike_steps: int | None
    steps_taken: float | None  # spike steps until the decision, mean over observations
    activation_sparsity: float  # 1 - share of activations that are not zero
    connection_sparsity: float  # share of weights that are zero
    footprint_bytes: int  # of all parameters and buffers
    packed_bytes: int  # the same without weights of 0, which a bit map marks
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
        """Bits of the widest weights; None if they are not quantised."""
        return max((part.bits for part in self.parts if part.bits), default=None)

    @property
    def network(self) -> Synapses:
        """Synaptic operations of the layers between encoder and decoder."""
        return add(*(part.synapses for part in self.layers))

    @property
    def rate(self) -> float | None:
        """Share of the synapses with spiking inputs that are used at a spike step."""
        return self.network.acs / self.network.most_acs if self.network.most_acs else None


@torch.no_grad()
def count(
    actor: Actor,
    obs_BO: Tensor,
    generator: torch.Generator | None = None,
    bits: Mapping[str, int] | None = None,
    squash: bool = True,
) -> Operations:
    """Count operations on some thousand normalised observations.

    `bits`: those of quantised weights, by name. `squash`: whether tanh is applied to the outputs.
    """
    check(actor)
    bits, weights = bits or {}, connections(actor)
    zeros = sum(int((w == 0).sum()) for w in weights.values())
    footprint, packed = footprints(actor, bits)
    stored = {
        "connection_sparsity": zeros / sum(w.numel() for w in weights.values()),
        "footprint_bytes": footprint,
        "packed_bytes": packed,
    }
    if isinstance(actor, MLPActor):
        return _dense(actor, obs_BO, bits, stored, squash)
    ops = _spiking(actor, obs_BO, generator, bits, stored)
    assert ops.decoder is not None
    return ops if squash else replace(ops, decoder=replace(ops.decoder, functions=0.0))


def of_policy(policy: Policy, obs_BO: Tensor, generator: torch.Generator) -> Operations | None:
    """As `count`, for a policy; None if its operations are not known."""
    try:
        check(policy.actor)
    except BadRequest:
        return None
    bits = policy.compression.bits if policy.compression else None
    return count(policy.actor, obs_BO, generator, bits, policy.task.choices is None)


def check(actor: Actor) -> None:
    """Raise BadRequest for an actor with a part whose operations are not known."""
    if type(actor) is MLPActor:
        return
    if type(actor) is not SpikingActor:
        remedy = f"the operations of {type(actor).__name__} are not known; leave ops out"
        raise BadRequest("ops", "true", remedy)
    parts: list[tuple[Any, bool]] = [
        (actor.encoder, type(actor.encoder) in ENCODERS),
        (actor.decoder, type(actor.decoder) in DECODERS),
        *((neuron, _kind(neuron) in NEURON_UPDATES) for neuron in actor.neurons),
    ]
    if actor.carries:
        remedy = "spikes depend on the decisions before, which a count of one leaves out"
        raise BadRequest("ops", "true", f"{remedy}; leave ops out")
    for part, known in parts:
        if not known:
            remedy = f"the operations of {type(part).__name__} are not known; leave ops out"
            raise BadRequest("ops", "true", remedy)


def _kind(neuron: Neuron) -> tuple[type[Neuron], type[NeuronConfig]]:
    return type(neuron), type(neuron.config)


def _widest(bits: Mapping[str, int], *parts: str) -> int | None:
    """The most bits among quantised weights whose names begin with one of `parts`."""
    return max((b for name, b in bits.items() if name.startswith(parts)), default=None)


def _synapses(layer: Linear, x: Tensor, spiking: bool, calls: float | None = None) -> Synapses:
    patches = layer.patches if isinstance(layer, Conv) else None
    return through(x, layer.weight_IN, spiking, calls, patches)


def _dense(
    actor: MLPActor,
    obs_BO: Tensor,
    bits: Mapping[str, int],
    stored: Mapping[str, Any],
    squash: bool,
) -> Operations:
    x, parts, active = obs_BO, [], []
    for i, layer in enumerate(actor.layers, 1):
        own = _widest(bits, f"layers.{i - 1}.")
        parts.append(Count(f"hidden {i}", _synapses(layer, x, False), bits=own))
        x = torch.relu(layer(x))
        active.append((x != 0).double())
    parts[-1] = replace(parts[-1], name="output", functions=actor.act_dim * squash)
    return Operations(
        encoder=None,
        layers=parts,
        decoder=None,
        early_exit=None,
        observations=len(obs_BO),
        spike_steps=None,
        steps_taken=None,
        activation_sparsity=1.0 - float(torch.cat(active[:-1], 1).mean()),
        **stored,
        twin=DenseTwin.of(actor.obs_dim, list(actor.layers)[:-1], actor.act_dim),
    )


def _spiking(
    actor: SpikingActor,
    obs_BO: Tensor,
    generator: torch.Generator | None,
    bits: Mapping[str, int],
    stored: Mapping[str, Any],
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
            _synapses(layer, x, i > 1 or actor.encoder.spikes, calls),
            updates=steps * spikes.shape[-1],
            update=NEURON_UPDATES[_kind(neuron)],
            spikes=float(spikes.sum()) / batch,
            bits=_widest(bits, f"layers.{i - 1}."),
        )
        parts.append(part)
        x, calls = spikes, steps
    hidden = list(actor.layers)
    if actor.decoder.population(actor.decoder.config, actor.act_dim):
        hidden.pop()
        parts[-1] = replace(parts[-1], name="output")
    read_at = _widest({n: b for n, b in bits.items() if "lateral" not in n}, "decoder.")
    if isinstance(actor.decoder, decoders.ILCDecoder):
        # Lateral inputs are the spikes of the previous spike step; the first step has none.
        before = torch.cat([torch.zeros_like(x[:1]), x[:-1]]) * taken_TB1
        lateral = through(before, actor.decoder.lateral_APP.flatten(0, 1), True, steps)
        both = _widest(bits, f"layers.{len(parts) - 1}.", "decoder.lateral")
        parts[-1] = replace(parts[-1], synapses=add(parts[-1].synapses, lateral), bits=both)
    decoder = DECODERS[type(actor.decoder)](actor.decoder, x, steps)
    fires = sum(float(layer.sum()) for layer in fired)
    neurons_each = sum(layer.shape[-1] for layer in fired)
    return Operations(
        encoder=encoder,
        layers=parts,
        decoder=replace(decoder, bits=read_at),
        early_exit=early_exit(actor, x, taken_TB1, read_at),
        observations=batch,
        spike_steps=actor.spike_steps,
        steps_taken=steps,
        activation_sparsity=1.0 - fires / (neurons_each * steps * batch),
        **stored,
        twin=DenseTwin.of(actor.obs_dim, hidden, actor.act_dim),
    )
