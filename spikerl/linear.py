"""Linear layers whose products may use a narrower number format than their parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class Linears(nn.ModuleList):
    """Linear layers between widths that follow each other."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__(nn.Linear(i, n) for i, n in pairwise(sizes))

    def __iter__(self) -> Iterator[nn.Linear]:
        return super().__iter__()  # type: ignore[return-value]


def product(x: Tensor, layer: nn.Linear, dtype: torch.dtype) -> Tensor:
    """W x + b with operands in `dtype`; the result and the gradients are in W's own type."""
    own = layer.weight.dtype
    if dtype == own:
        return layer(x)
    rounded = (x.to(dtype), layer.weight.to(dtype), layer.bias.to(dtype))
    return nn.functional.linear(*rounded).to(own)
