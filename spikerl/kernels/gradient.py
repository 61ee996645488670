"""Where gradients are collected, and the state of Adam."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Gradient:
    """The gradient with respect to a network's parameters, and the loss as the vector's last entry.

    A single collective thus sums both, and code that computes them writes each part in place. With
    several workers, a loss is the mean over this worker's rows, and the loss and its gradient are
    stored times `weight`, this worker's share of the global batch: the sum over workers belongs to
    the mean over the global batch. `scale` (fp16) multiplies the gradient only. Parameters that are
    not learned keep entries of 0.
    """

    def __init__(
        self, params: Sequence[Tensor], *, weight: float = 1.0, scale: Tensor | None = None
    ) -> None:
        self.weight, self.scale = weight, scale
        sizes = [p.numel() for p in params]
        self.vector = params[0].detach().new_zeros(sum(sizes) + 1)
        *pieces, last = self.vector.split([*sizes, 1])
        learned = [(p, at) for p, at in zip(params, pieces, strict=True) if p.requires_grad]
        self.params = [p for p, _ in learned]
        self.slots = [piece.view(p.shape) for p, piece in learned]
        self.loss = last.view(())
        self.whole = self.vector.new_tensor(weight)
        # The C++ library writes a gradient for every parameter; for those that are not learned it
        # goes to memory that nobody reads.
        self.unread = [torch.empty_like(p) for p in params if not p.requires_grad]
        spare = iter(self.unread)
        at = [
            piece if p.requires_grad else next(spare)
            for p, piece in zip(params, pieces, strict=True)
        ]
        self.places = (ctypes.c_void_p * len(at))(*(tensor.data_ptr() for tensor in at))
        self.at = ctypes.addressof(self.places)

    @property
    def factor(self) -> Tensor:
        """The factor by which a loss is multiplied before it is differentiated."""
        return self.whole if self.scale is None else self.scale * self.weight

    def differentiate(self, loss: Tensor, *, partly: bool = False) -> None:
        """Write the loss and its gradient; `partly`: it may not depend on all parameters."""
        pieces = torch.autograd.grad(loss, self.params, self.factor, materialize_grads=partly)
        torch._foreach_copy_([*self.slots, self.loss], [*pieces, loss.detach() * self.weight])


# `pull(grad, into)` maps the gradient of a network's output to that of its parameters, written to
# `into`. A loss of the network's own (spikes) is added to `into.loss`, which must be set already;
# this worker's mean of it is returned by name.
Pullback = Callable[[Tensor, Gradient], dict[str, Tensor]]


def by_autograd(output: Tensor, own_loss: Tensor | None = None) -> tuple[Tensor, Pullback]:
    """A network's output, detached, and the pullback through its graph.

    `own_loss`: the cost of its spikes, in the same graph.
    """

    def pull(grad: Tensor, into: Gradient) -> dict[str, Tensor]:
        if own_loss is None:
            torch._foreach_copy_(into.slots, torch.autograd.grad(output, into.params, grad))
            return {}
        outputs, grads = (output, own_loss), (grad, into.factor)
        torch._foreach_copy_(into.slots, torch.autograd.grad(outputs, into.params, grads))
        spike_loss = own_loss.detach()
        into.loss += spike_loss * into.weight
        return {"spike_loss": spike_loss}

    return output.detach(), pull


# Maps gradients with respect to samples (B, A) and their log probabilities (B,) to those with
# respect to mean and log deviation.
SamplePullback = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Moments(NamedTuple):
    """What a step of Adam changes: flat weights and moments of a network, and the step count."""

    weights: Tensor
    step: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
