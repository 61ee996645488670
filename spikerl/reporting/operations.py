"""Counted operations and modelled energies as text of 80 columns."""

from __future__ import annotations

from collections.abc import Sequence

from spikerl.energy import modelled
from spikerl.energy.modelled import Constants, Energy
from spikerl.energy.operations import Operations
from spikerl.energy.synapses import Count
from spikerl.output import several
from spikerl.reporting.records import Run


def lines(ops: Operations) -> list[str]:
    steps = f", {several(ops.spike_steps, 'spike step')} each" if ops.spike_steps else ""
    if ops.early_exit:
        steps = f", {ops.steps_taken:.2f} of {ops.spike_steps} spike steps"
    twin = "-".join(str(size) for size in ops.twin.sizes)
    return [
        f"operations per decision: mean over {ops.observations} observations{steps}",
        _row("", ["dense", "MACs", "ACs", "updates", "spikes", "functions"]),
        *(_row(part.name, _counts(part)) for part in ops.parts),
        _row("dense twin", [f"{ops.twin.macs:,}"] * 2 + ["0"] * 4),
        f"sparsity: activations {ops.activation_sparsity:.3f},"
        f" connections {ops.connection_sparsity:.3f}",
        f"footprint: {ops.footprint_bytes:,} bytes;"
        f" dense twin ({twin}) {ops.twin.footprint_bytes:,} bytes",
        *_compressed(ops),
        "",
        *_energies(ops),
    ]


def notes(runs: Sequence[Run]) -> list[str]:
    """A report's note on modelled energies, if any of the runs has some."""
    if all(run.decision("modelled_memory_nj") is None for run in runs):
        return []
    c = modelled.ARITHMETIC
    return [
        "energy of a decision is modelled from counted operations and published constants, nothing"
        f" of it measured: {c.name}: arithmetic alone, a MAC {c.mac:g} pJ, an AC {c.ac:g} pJ"
        f" ({c.source}); memory: traffic alone, a weight fetched {modelled.DRAM_PJ_PER_BIT:g}"
        f" pJ/bit, a membrane read or written {modelled.ON_CHIP_PJ_PER_BIT:g} pJ/bit"
        f" ({modelled.MEMORY_SOURCE}), {modelled.BITS} bits each unless compressed"
    ]


def _compressed(ops: Operations) -> list[str]:
    text = []
    if ops.bits is not None:
        widths = ", ".join(
            f"{part.name} {part.bits}"
            for part in ops.parts
            if part.bits and part is not ops.early_exit
        )
        text.append(f"bits of weights: {widths}")
    if ops.connection_sparsity > 0.0:
        text.append(f"without the weights of 0: {ops.packed_bytes:,} bytes")
    return text


def _row(name: str, cells: Sequence[str], width: int = 11) -> str:
    return f"{name:<14}" + "".join(f"{cell:>{width}}" for cell in cells)


def _counts(part: Count) -> list[str]:
    s = part.synapses
    numbers = (s.dense, s.macs, s.acs, part.updates, part.spikes, part.functions)
    return [f"{number:,.0f}" for number in numbers]


def _energies(ops: Operations) -> list[str]:
    text = [
        "modelled energy, nJ per decision (published constants, nothing measured)",
        _row("", ["synapses", "neurons", "coding", "dense twin"], 13),
    ]
    for constants in modelled.SETS:
        text.append(_row(constants.name, _nj(modelled.by_constants(ops, constants)), 13))
    own, twins = modelled.memory(ops), modelled.twins(ops)
    for bits, dense_nj in twins.items():
        cells = _nj(own._replace(dense_twin=dense_nj))
        if bits != (ops.bits or modelled.BITS):
            cells[:-1] = ["", "", ""]
        text.append(_row(f"memory, {bits} bit", cells, 13))
    text += [_source(constants, ops) for constants in modelled.SETS]
    text += [
        f"memory: a weight fetched {modelled.DRAM_PJ_PER_BIT:g} pJ/bit, a membrane read or"
        f" written {modelled.ON_CHIP_PJ_PER_BIT:g} pJ/bit",
        f"  ({modelled.MEMORY_SOURCE}); no arithmetic",
    ]
    if ops.rate is not None:
        text.append(f"rate: a spike step uses {ops.rate:.3f} of the synapses; by memory traffic,")
        for bits, dense_nj in twins.items():
            rate = modelled.break_even(ops, dense_nj)
            below = "at no rate" if rate is None else f"below {rate:.3f}"
            text.append(f"  spikes cost less than the dense twin of {bits} bits {below}")
    return text


def _nj(energy: Energy) -> list[str]:
    return ["-" if value is None else f"{value:,.4g}" if value < 1e3 else f"{value:,.0f}"
            for value in energy]  # fmt: skip


def _source(c: Constants, ops: Operations) -> str:
    values = modelled.stated(c, ops)["constants_pj"]
    known = ", ".join(f"{name} {pj:g}" for name, pj in values.items() if pj is not None)
    return f"{c.name}: {known} pJ ({c.source})"
