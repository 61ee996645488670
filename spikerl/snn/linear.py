"""Linear layers whose products may use a narrower number format than their parameters.

Shape legend   B batch, I inputs, N outputs, C networks side by side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn


def uniform(bound: float, *shape: int) -> nn.Parameter:
    """A parameter of entries between -bound and bound, float32 whatever torch's default is."""
    return nn.Parameter(torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound))


class Linear(nn.Module):
    """x W + b. W is input-major: each spiking input adds one contiguous row of W."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = 1.0 / math.sqrt(inputs)  # as torch's own linear layer
        self.weight_IN = uniform(bound, inputs, outputs)
        self.bias_N = uniform(bound, outputs)
        self.outputs = outputs

    def rows(self, x: Tensor) -> Tensor:
        """The rows that W multiplies."""
        return x

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias_N, x, self.weight_IN)


M = TypeVar("M", bound=nn.Module)


class ListOf(nn.ModuleList, Generic[M]):
    """Modules of one kind."""

    def __iter__(self) -> Iterator[M]:
        return super().__iter__()  # type: ignore[return-value]

    def __getitem__(self, i: int) -> M:  # type: ignore[override]
        return super().__getitem__(i)  # type: ignore[return-value]


class Linears(ListOf[Linear]):
    """Linear layers between consecutive sizes, after the layers `first`."""

    def __init__(self, sizes: Sequence[int], first: Sequence[Linear] = ()) -> None:
        behind = [first[-1].outputs, *sizes[1:]] if first else sizes
        super().__init__([*first, *(Linear(i, n) for i, n in pairwise(behind))])


def product(x: Tensor, layer: Linear, dtype: torch.dtype) -> Tensor:
    """x W + b with operands in `dtype`; the result and the gradients are in W's own type."""
    own = layer.weight_IN.dtype
    if dtype == own:
        return layer(x)
    rounded = (layer.bias_N.to(dtype), layer.rows(x).to(dtype), layer.weight_IN.to(dtype))
    return torch.addmm(*rounded).to(own).view(len(x), layer.outputs)
