"""From the output population's spikes to actions.

Shape legend   B batch, A action entries, P neurons of one population.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spikerl.errors import BadRequest


@dataclass(kw_only=True)
class RateConfig:
    """Decoder that reads the mean firing rate (arXiv:2010.09635)."""

    name: str
    pop_size: int  # P, output neurons per action entry

    def __post_init__(self) -> None:
        if self.pop_size < 1:
            raise BadRequest("decoder.pop_size", self.pop_size, "give at least 1")


class RateDecoder(nn.Module):
    """Each action entry is an affine map of its own population's rates: a_j = w_j . r_j + b_j."""

    def __init__(self, act_dim: int, config: RateConfig) -> None:
        super().__init__()
        bound = 1.0 / math.sqrt(config.pop_size)
        self.weight_AP = nn.Parameter(torch.empty(act_dim, config.pop_size).uniform_(-bound, bound))
        self.bias_A = nn.Parameter(torch.empty(act_dim).uniform_(-bound, bound))

    def forward(self, rate_BN: Tensor) -> Tensor:
        rate_BAP = rate_BN.unflatten(1, self.weight_AP.shape)
        return (rate_BAP * self.weight_AP).sum(-1) + self.bias_A
