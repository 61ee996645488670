"""What kernels read of networks; and `Parts`, the steps of a layer that a kernel may replace."""

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
    neurons: ListOf[Neuron]  # of each layer
    norms: ListOf[CaReBN]  # of each layer, or none
    decoder: Decoder
    spike_cost_L: Tensor | None  # of each layer now; None: spikes cost nothing
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
    """What a kernel that runs layer by layer brings; drives are those before a normalisation."""

    # The first layer's drive by observations, (T, B, N), or (1, B, N) where all steps get the same.
    first: Callable[[SpikingNet, Tensor, torch.Generator | None], Tensor]
    # The same of any other layer by a neuron's spikes (T, B, I), in a product of that type.
    drive: Callable[[Linear, Neuron, Tensor, torch.dtype], Tensor]
    scan: Callable[[Neuron, Tensor], Tensor]  # spikes (T, B, N) of a layer from its drive
    # The same of neurons that the decoder connects.
    connected_scan: Callable[[Neuron, Tensor, ILCDecoder], Tensor]
    rows: Rows  # of a normalisation
