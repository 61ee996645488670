"""What kernels read of networks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from spikerl.snn.batchnorm import CaReBN
from spikerl.snn.decoders import Decoder
from spikerl.snn.early_exit import EarlyExit
from spikerl.snn.encoders import Encoder
from spikerl.snn.linear import Linears, ListOf
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
