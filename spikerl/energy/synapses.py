"""Operations of one part of a network per decision, and how synaptic operations are counted.

Synaptic operations are NeuroBench's (Yik et al., 2025, arXiv:2304.04640): a product with an input
that is not a spike is a multiply-accumulate (MAC), adding a weight because of a spike an accumulate
(AC); weights and inputs of zero count only as dense operations. Biases are not counted. A current
that is the same at every spike step is multiplied once.

Shape legend   B observations, I inputs, N neurons.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Update(NamedTuple):
    """The arithmetic of one update of a membrane or counter; a comparison counts as an AC."""

    macs: int
    acs: int
    states: int  # numbers kept from one spike step to the next


NO_UPDATE = Update(0, 0, 0)


class Synapses(NamedTuple):
    """Synaptic operations per decision."""

    dense: float = 0.0  # if no weight and no input were zero
    macs: float = 0.0
    acs: float = 0.0
    most_acs: float = 0.0  # if every input fired at every spike step


NO_SYNAPSES = Synapses()


@dataclass(frozen=True)
class Count:
    """Operations of one part of a network per decision: all spike steps, mean over observations."""

    name: str
    synapses: Synapses = NO_SYNAPSES
    updates: float = 0.0
    update: Update = NO_UPDATE
    spikes: float = 0.0
    functions: float = 0.0  # exp and tanh, and random numbers drawn
    bits: int | None = None  # of its widest weights; None: they are not quantised


def add(*parts: Synapses) -> Synapses:
    return Synapses(*(sum(values) for values in zip(*parts, strict=True)))


def through(
    x: Tensor,
    weight_IN: Tensor,
    spiking: bool,
    calls: float | None = None,
    patches: Callable[[Tensor], Tensor] | None = None,
) -> Synapses:
    """Synaptic operations of inputs x (..., B, I) with these weights; only their zeros matter.

    `calls`: how often each observation's inputs are applied; None: as often as x holds them.
    `patches`: of a convolution, cuts inputs into the patches that share these weights.
    """
    batch = x.shape[-2]
    calls = x[..., 0].numel() / batch if calls is None else calls
    fan_out_I = (weight_IN != 0).sum(1).double()
    active_I, places = (x != 0).flatten(0, -2).sum(0).double(), 1
    if patches is not None:
        active_PI = patches(active_I.unsqueeze(0))
        active_I, places = active_PI.sum(0), len(active_PI)
    effective = float(active_I @ fan_out_I) / batch
    calls = calls * places
    dense = calls * weight_IN.numel()
    if spiking:
        return Synapses(dense, 0.0, effective, calls * float(fan_out_I.sum()))
    return Synapses(dense, effective)
