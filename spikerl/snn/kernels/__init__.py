"""Who runs the neuron dynamics: one operation, `rates`, with one module for each implementation.

`rates(net, obs_BO, generator)` gives the mean firing rates (B, N) of a spiking network's output
population, differentiable in its parameters.
`reference` is the definition that every other kernel is tested against.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from spikerl.snn.encoders import PopulationEncoder
from spikerl.snn.neurons import CubaLIF
from spikerl.types import Resolved


class SpikingNet(Protocol):
    """What a kernel reads of a network."""

    spike_steps: int
    dtype: torch.dtype  # of the layers' products
    neuron: CubaLIF
    encoder: PopulationEncoder

    @property
    def layers(self) -> Iterable[nn.Linear]: ...


@dataclass(kw_only=True)
class KernelConfig:
    name: str


def resolve(config: KernelConfig) -> Resolved:
    """The kernel that runs, and why."""
    if config.name == "auto":
        return Resolved("reference", "the only kernel of this version")
    return Resolved(config.name, "requested")
