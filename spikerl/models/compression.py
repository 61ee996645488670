"""Smaller policies: pruned by magnitude, then quantised, matrix by matrix; early exit.

prune      the round(share n) of a matrix's n weights nearest to 0 become 0, the first ones if some
           are equal; not the weights of the output populations of `rate`, `membrane` and `ilc`: a
           neuron has only one there, and pruning it would remove the neuron
quantise   w = s q,  q = clip(round(w / s), -Q, Q),  Q = 2^(bits - 1) - 1;  of the scales
           s = j max|w| / (100 Q), j = 1 to 100, the one of the least squared error, the largest if
           there are several; a matrix of zeros has s = 1

Biases, receptive fields and learned neuron parameters stay float32. A product with w = s q equals s
times the product with the integers q, up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from spikerl.errors import BadRequest
from spikerl.models.actor import Actor, SpikingActor, connections
from spikerl.snn.early_exit import EarlyExit
from spikerl.types import Task

BITS = range(2, 17)
CANDIDATES = 100  # scales tried for each matrix
SCALE_BYTES = 4  # size of a quantised matrix's scale, a float32


@dataclass(kw_only=True)
class Compression:
    """How a policy was compressed, as recorded in its policy.json."""

    prune: float | None  # pruned share of each matrix
    bits: dict[str, int]  # of each quantised matrix, by name; empty: none is quantised
    scales: dict[str, float]  # s of each quantised matrix, by name
    early_exit: EarlyExit | None
    finetune: int | None = None  # steps of fine-tuning

    def check(self, actor: Actor, weights: dict[str, Tensor], task: Task) -> None:
        """Raise ValueError unless this describes these weights of this actor."""
        if self.prune is not None and not 0.0 < self.prune < 1.0:
            raise ValueError("compression.prune")
        if self.finetune is not None and self.finetune < 1:
            raise ValueError("compression.finetune")
        if self.bits.keys() != self.scales.keys():
            raise ValueError("compression.scales")
        if not self.bits.keys() <= connections(actor).keys():
            raise ValueError("compression.bits")
        if any(bits not in BITS for bits in self.bits.values()):
            raise ValueError("compression.bits")
        for name, bits in self.bits.items():
            scale = self.scales[name]
            if not (scale > 0.0 and float(np.float32(scale)) == scale):
                raise ValueError("compression.scales")
            w = weights[name].numpy()
            if not np.array_equal(on_grid(w, scale, bits), w):
                raise ValueError(f"compression: {name} does not lie on its grid")
        if self.early_exit is not None:
            if not isinstance(actor, SpikingActor) or actor.carries or task.choices is not None:
                raise ValueError("compression.early_exit")
            self.early_exit.check(actor.decoder, actor.spike_steps)


def prunable(actor: Actor) -> dict[str, nn.Parameter]:
    return {n: w for n, w in connections(actor).items() if n != "decoder.weight_AP"}


@torch.no_grad()
def prune(actor: Actor, share: float, key: str = "prune") -> None:
    """Set that share of each prunable matrix to 0, in place.

    Raises BadRequest for `key` if the share rounds to none or all of a matrix's weights.
    """
    if not 0.0 < share < 1.0:
        raise BadRequest(key, share, "give a share above 0 and below 1")
    for name, weight in prunable(actor).items():
        flat = weight.view(-1)
        count = round(share * len(flat))
        if not 0 < count < len(flat):
            remedy = f"of the {len(flat)} weights of {name} that is {'all' if count else 'none'}"
            raise BadRequest(key, share, f"{remedy}; give another share")
        flat[flat.abs().argsort(stable=True)[:count]] = 0.0


def nonzero(actor: Actor) -> Tensor:
    """Flat mask over all parameters: 0 for each prunable weight that is 0, else 1."""
    weights = prunable(actor)
    each = [p != 0 if n in weights else torch.ones_like(p) for n, p in actor.named_parameters()]
    return torch.cat([own.flatten().float() for own in each])


@torch.no_grad()
def quantise(
    actor: Actor, bits: Mapping[str, int], scales: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Round each matrix to its grid, in place; returns the scales, the best ones if none given."""
    used = {}
    for name, weight in connections(actor).items():
        w = weight.numpy()
        used[name] = scales[name] if scales else best_scale(w, bits[name])
        weight.copy_(torch.from_numpy(on_grid(w, used[name], bits[name])))
    return used


def best_scale(w: np.ndarray, bits: int) -> float:
    most = float(np.abs(w).max())
    if most == 0.0:
        return 1.0
    unit = most / (CANDIDATES * (2 ** (bits - 1) - 1))
    candidates = [float(np.float32(j * unit)) for j in range(CANDIDATES, 0, -1)]
    # Scales below float32's normal range are not used; if all are, s = 1 rounds w to 0.
    usable = [s for s in candidates if s >= float(np.finfo(np.float32).tiny)] or [1.0]
    return min(usable, key=lambda s: float(np.square(np.float64(w) - on_grid(w, s, bits)).sum()))


def on_grid(w: np.ndarray, scale: float, bits: int) -> np.ndarray:
    """Each weight rounded to the nearest point of the grid, float32."""
    most = 2 ** (bits - 1) - 1
    integers = np.clip(np.round(np.float64(w) / scale), -most, most)
    return np.asarray(integers.astype(np.float32) * np.float32(scale))


def footprints(actor: Actor, bits: Mapping[str, int]) -> tuple[int, int]:
    """Bytes of all parameters and buffers, stored in full and without the weights of 0.

    The second includes, for each matrix, a bit map of the weights that are stored.
    """
    weights = connections(actor)
    stored = sum(p.numel() * p.element_size() for p in [*actor.parameters(), *actor.buffers()])
    full = packed = stored - sum(w.numel() * w.element_size() for w in weights.values())
    for name, w in weights.items():
        each, scale = bits.get(name, 8 * w.element_size()), SCALE_BYTES * (name in bits)
        full += math.ceil(w.numel() * each / 8) + scale
        packed += math.ceil(int((w != 0).sum()) * each / 8) + math.ceil(w.numel() / 8) + scale
    return full, packed


def bits_of(actor: Actor, given: object) -> dict[str, int]:
    """Bits by matrix name; `given` is one number for all matrices or a list with one for each."""
    names = list(connections(actor))
    each = given if isinstance(given, list) else [given] * len(names)
    if len(each) != len(names):
        remedy = f"give one number, or one for each of {', '.join(names)}"
        raise BadRequest("bits", given, remedy)
    if any(type(bits) is not int or bits not in BITS for bits in each):
        remedy = f"give {BITS[0]} to {BITS[-1]}, or a list of such numbers"
        raise BadRequest("bits", given, remedy)
    return dict(zip(names, each, strict=True))
