"""Energies modelled from counted operations and published constants. Nothing here is measured.

All are in nJ per decision. None: the constants do not cover what that part of the policy does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from spikerl.energy.operations import DenseTwin, Operations
from spikerl.energy.synapses import Count


class Energy(NamedTuple):
    """Energy of synaptic operations, neurons, encoder and decoder; and of the dense twin."""

    synapses: float | None
    neurons: float | None
    coding: float | None
    dense_twin: float | None

    @property
    def total(self) -> float | None:
        """Energy of the policy, without its dense twin."""
        return _sum([self.synapses, self.neurons, self.coding])


@dataclass(frozen=True, kw_only=True)
class Constants:
    """pJ per operation; `exp`, `tanh` and random numbers have no published constant."""

    name: str
    source: str
    mac: float | None
    ac: float
    update: float | None  # update of a neuron; None: unknown
    spike: float = 0.0  # sending a spike
    update_by_arithmetic: bool = False  # an update costs its MACs and ACs


ARITHMETIC = Constants(
    name="45nm",
    source="Horowitz, ISSCC 2014, 32-bit floats",
    mac=4.6,
    ac=0.9,
    update=None,
    update_by_arithmetic=True,
)
SETS = (
    ARITHMETIC,
    Constants(
        name="proxy_target",
        source="arXiv:2505.24161, Table 2",
        # Rounded to 3.97 there. The energies in the table only fit 3.967931 to 3.967954.
        mac=3.96794,
        ac=0.077,
        update=None,
    ),
    Constants(
        name="loihi",
        source="Davies et al., IEEE Micro 2018",
        mac=None,
        ac=23.6,
        update=81.0,
        spike=1.7,
    ),
)
DRAM_PJ_PER_BIT, ON_CHIP_PJ_PER_BIT = 20.0, 0.25
MEMORY_SOURCE = "after arXiv:2409.08290"
BITS = 8  # of weights, membranes and activations when memory traffic is modelled


def by_constants(ops: Operations, constants: Constants) -> Energy:
    """Energy of the policy and its dense twin with these costs per operation."""
    spikes = sum(part.spikes for part in ops.parts) * constants.spike
    return Energy(
        _sum(_synapses(part, constants) for part in ops.layers),
        _sum([spikes * 1e-3, *(_updates(part, constants) for part in ops.layers)]),
        _sum(f(part, constants) for part in ops.coding for f in (_synapses, _updates)),
        _times(ops.twin.macs, constants.mac),
    )


def memory(ops: Operations, bits: int = BITS) -> Energy:
    """Energy of memory traffic alone: a weight fetched per operation, membranes read and written.

    `bits`: of membranes and activations, and of weights that are not quantised.
    Arithmetic on 8-bit integers would add less than 0.2 % (45 nm: 0.2 pJ per product and 0.03 pJ
    per addition, compared with 160 pJ for the weight).
    """
    activations = 0.0 if ops.spike_steps else _activations(ops.twin, bits)
    return Energy(
        sum(_fetched(part, bits) for part in ops.layers),
        sum(_states(part, bits) for part in ops.layers) + activations,
        sum(_fetched(part, bits) + _states(part, bits) for part in ops.coding),
        twin_memory(ops.twin, bits),
    )


def twin_memory(twin: DenseTwin, bits: int) -> float:
    """Memory energy if every weight is fetched once and every activation is moved once."""
    return twin.macs * bits * DRAM_PJ_PER_BIT * 1e-3 + _activations(twin, bits)


def twin_bits(spike_steps: int) -> int:
    """Bits for as many levels as there are possible spike counts in T steps, 0 to T."""
    return math.ceil(math.log2(spike_steps + 1))


def break_even(ops: Operations, dense_nj: float) -> float | None:
    """The rate (share of synapses used) below which the policy's memory traffic costs less than
    `dense_nj`.

    E(rate) = rate * (a weight fetched for every synapse of a spiking input at every spike step)
    + the rest, as counted. None: even rate 0 does not cost less, or nothing spikes.
    """
    nj = DRAM_PJ_PER_BIT * 1e-3
    most = sum(part.synapses.most_acs * (part.bits or BITS) for part in ops.layers) * nj
    if not most:
        return None
    own = memory(ops)
    assert own.synapses is not None
    assert own.neurons is not None
    assert own.coding is not None
    spent = sum(part.synapses.acs * (part.bits or BITS) for part in ops.layers) * nj
    rate = (dense_nj - (own.synapses + own.neurons + own.coding - spent)) / most
    return min(rate, 1.0) if rate > 0.0 else None


def per_decision(ops: Operations) -> dict[str, float | None]:
    """Operations and modelled energies of the whole policy."""
    return {
        "macs": sum(part.synapses.macs for part in ops.parts),
        "acs": sum(part.synapses.acs for part in ops.parts),
        "modelled_45nm_nj": by_constants(ops, ARITHMETIC).total,
        "modelled_memory_nj": memory(ops).total,
    }


PER_DECISION = ("macs", "acs", "modelled_45nm_nj", "modelled_memory_nj")  # keys of per_decision


def mean(parts: Sequence[tuple[int, Mapping[str, float | None]]]) -> dict[str, float | None]:
    """Means of `per_decision` results, weighted by their observations; None if any is None."""
    total = sum(observations for observations, _ in parts)
    means: dict[str, float | None] = dict.fromkeys(PER_DECISION)
    for key in means if parts else ():
        values = [(n, part[key]) for n, part in parts]
        means[key] = _sum(None if value is None else value * (n / total) for n, value in values)
    return means


def facts(ops: Operations) -> dict[str, Any]:
    """Counts, and the energies modelled from them, as plain data."""
    energies = {c.name: {**stated(c, ops), **_named(by_constants(ops, c))} for c in SETS}
    return {
        **per_decision(ops),
        "operations": {
            "observations": ops.observations,
            "spike_steps": ops.spike_steps,
            "spike_steps_taken": ops.steps_taken,
            "parts": {part.name: _part(part) for part in ops.parts},
            "network": ops.network._asdict(),
            "rate": ops.rate,
            "activation_sparsity": ops.activation_sparsity,
            "connection_sparsity": ops.connection_sparsity,
            "footprint_bytes": ops.footprint_bytes,
            "packed_bytes": ops.packed_bytes,
            "dense_twin": {
                "sizes": ops.twin.sizes,
                "macs": ops.twin.macs,
                "footprint_bytes": ops.twin.footprint_bytes,
            },
        },
        "modelled_energy": energies,
        "modelled_memory": {
            "constants": {
                "dram_pj_per_bit": DRAM_PJ_PER_BIT,
                "on_chip_pj_per_bit": ON_CHIP_PJ_PER_BIT,
                "bits": BITS,
                "weight_bits": {part.name: part.bits or BITS for part in ops.parts},
                "source": MEMORY_SOURCE,
            },
            **_named(memory(ops)),
            "dense_twins": [
                {"bits": bits, "nj": nj, "break_even_rate": break_even(ops, nj)}
                for bits, nj in twins(ops).items()
            ],
        },
    }


def twins(ops: Operations) -> dict[int, float]:
    """By bits, the dense twin's memory energy: with the policy's bits, and with `twin_bits(T)`."""
    bits = {ops.bits or BITS, *([twin_bits(ops.spike_steps)] if ops.spike_steps else [])}
    return {b: twin_memory(ops.twin, b) for b in sorted(bits, reverse=True)}


def stated(c: Constants, ops: Operations) -> dict[str, Any]:
    """The constants of a set, with the update energy of the policy's neurons, and its source."""
    stated = {"mac": c.mac, "ac": c.ac, "update": c.update, "spike": c.spike or None}
    if c.update_by_arithmetic and ops.spike_steps:
        macs, acs, _ = ops.layers[0].update
        stated |= {"update": macs * (c.mac or 0.0) + acs * c.ac}
    return {"constants_pj": stated, "source": c.source}


def _named(energy: Energy) -> dict[str, float | None]:
    return {f"{name}_nj": value for name, value in energy._asdict().items()}


def _part(part: Count) -> dict[str, float]:
    rest = {"updates": part.updates, "spikes": part.spikes, "functions": part.functions}
    return {**part.synapses._asdict(), **rest}


def _times(number: float, pj: float | None) -> float | None:
    """Energy in nJ; 0 for no operations, even if their cost is unknown."""
    if not number:
        return 0.0
    return None if pj is None else number * pj * 1e-3


def _sum(terms: Any) -> float | None:
    total = 0.0
    for term in terms:
        if term is None:
            return None
        total += term
    return total


def _synapses(part: Count, constants: Constants) -> float | None:
    s = part.synapses
    return _sum([_times(s.macs, constants.mac), _times(s.acs, constants.ac)])


def _updates(part: Count, constants: Constants) -> float | None:
    if not constants.update_by_arithmetic:
        return _times(part.updates, constants.update)
    macs, acs, _ = part.update
    each = _sum([_times(macs, constants.mac), _times(acs, constants.ac)])
    return None if each is None else part.updates * each


def _fetched(part: Count, bits: int) -> float:
    fetched = (part.synapses.macs + part.synapses.acs) * (part.bits or bits)
    return fetched * DRAM_PJ_PER_BIT * 1e-3


def _states(part: Count, bits: int) -> float:
    """Energy of states, each read and written at every update."""
    return part.updates * part.update.states * 2 * bits * ON_CHIP_PJ_PER_BIT * 1e-3


def _activations(twin: DenseTwin, bits: int) -> float:
    return twin.activations * bits * ON_CHIP_PJ_PER_BIT * 1e-3
