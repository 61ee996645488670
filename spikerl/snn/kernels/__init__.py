"""Who runs the neuron dynamics: one operation, `rates`, with one module for each implementation.

`rates(net, obs_BO, generator)` gives the mean firing rates (B, N) of a spiking network's output
population, differentiable in its parameters; `net` has encoder, layers, neuron, spike_steps, dtype.
`reference` is the definition that every other kernel is tested against.
"""

from __future__ import annotations

from dataclasses import dataclass

from spikerl.types import Resolved


@dataclass(kw_only=True)
class KernelConfig:
    name: str


def resolve(config: KernelConfig) -> Resolved:
    """The kernel that runs, and why."""
    if config.name == "auto":
        return Resolved("reference", "the only kernel of this version")
    return Resolved(config.name, "requested")
