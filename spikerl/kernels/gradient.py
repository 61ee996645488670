"""Where an algorithm's gradient goes, and what Adam keeps."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Gradient:
    """The gradient of a loss by a network's parameters, in one vector whose last entry is the loss.

    One collective then carries both, and whoever computes it writes each part where it belongs.
    With several workers a loss is the mean over this worker's rows, and what is written is
    `weight`, their share of the global batch, times the loss and its gradient: summed over
    workers, those of the mean over the global batch. `scale`, if any, multiplies the gradient
    alone (fp16). Parameters that are not learned keep entries of 0.
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
        # Code that is not Python fills a place for each parameter; what is not learned has one that
        # nobody reads.
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
        """What a loss is multiplied with before it is differentiated."""
        return self.whole if self.scale is None else self.scale * self.weight

    def differentiate(self, loss: Tensor, *, partly: bool = False) -> None:
        """Differentiate `loss`, which depends on the parameters; `partly`: on some of them."""
        pieces = torch.autograd.grad(loss, self.params, self.factor, materialize_grads=partly)
        torch._foreach_copy_([*self.slots, self.loss], [*pieces, loss.detach() * self.weight])


# Of the gradient of a network's output, `pull(grad, into)` makes that of the parameters. What the
# network adds to the loss itself it adds to `into`, whose loss stands there already, and gives back
# by name: this worker's mean.
Pullback = Callable[[Tensor, Gradient], dict[str, Tensor]]


def by_autograd(output: Tensor, own_loss: Tensor | None = None) -> tuple[Tensor, Pullback]:
    """A network's output, and the way back through its graph.

    `own_loss`: what its spikes cost, in the same graph.
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


# Of the gradients by samples (B, A) and by their log probabilities (B,), it makes those by mean and
# by log deviation.
SamplePullback = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Moments(NamedTuple):
    """What Adam changes in a step: vectors of all parameters of a network, and its count."""

    weights: Tensor
    step: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
