"""The interfaces of networks that kernels use, and `Parts`, the operations on a layer that kernels
replace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from spikerl.snn.batchnorm import CaReBN, Rows
from spikerl.snn.decoders import Decoder, ILCDecoder
from spikerl.snn.early_exit import EarlyExit
from spikerl.snn.encoders import Encoder
from spikerl.snn.linear import Linear, Linears, ListOf
from spikerl.snn.neurons import Neuron


class SpikingNet(Protocol):
    """A spiking actor."""

    spike_steps: int
    dtype: torch.dtype  # of the layers' products
    encoder: Encoder
    layers: Linears
    neurons: ListOf[Neuron]  # one for each layer
    norms: ListOf[CaReBN]  # one for each layer, or empty
    decoder: Decoder
    spike_cost_L: Tensor | None  # current cost for each layer; None: spikes cost nothing
    early_exit: EarlyExit | None

    def parameters(self) -> Iterator[nn.Parameter]: ...


class ValueNet(Protocol):
    """Critics."""

    dtype: torch.dtype  # of the layers' products
    weights_CIN: nn.ParameterList
    biases_C1N: nn.ParameterList


class DenseNet(Protocol):
    """A dense actor."""

    dtype: torch.dtype  # of the layers' products
    layers: Linears


class Parts(NamedTuple):
    """A kernel's operations on a layer; drives are those before a normalisation."""

    # The first layer's drive from observations, (T, B, N), or (1, B, N) if all steps get the same.
    first: Callable[[SpikingNet, Tensor, torch.Generator | None], Tensor]
    # Any other layer's drive from the spikes (T, B, I) of that neuron, with operands of that type.
    drive: Callable[[Linear, Neuron, Tensor, torch.dtype], Tensor]
    scan: Callable[[Neuron, Tensor], Tensor]  # spikes (T, B, N) of a layer from its drive
    # The same for an output population whose neurons the decoder connects.
    connected_scan: Callable[[Neuron, Tensor, ILCDecoder], Tensor]
    rows: Rows  # the operations of a normalisation
