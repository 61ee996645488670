"""What every learning rule shares: the target value, and the one door from loss to weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from spikerl.distributed.world import ALONE, World
from spikerl.errors import NonFinite
from spikerl.gradient import Gradient, Moments
from spikerl.snn import kernels
from spikerl.types import Batch


def td_target(batch: Batch, next_value: Tensor) -> Tensor:
    """rew + discount * next_value, without the second term where the episode terminated."""
    return batch.rew + batch.discount * (~batch.terminated) * next_value


def flatten(module: nn.Module) -> Tensor:
    """Move a module's parameters into one contiguous vector that they become views of.

    Adam, Polyak averaging, an all-reduce and a checksum are then one call each. Move the module to
    its device first.
    """
    params = list(module.parameters())
    flat = torch.cat([p.detach().flatten() for p in params])
    pieces = flat.split([p.numel() for p in params])
    for p, piece in zip(params, pieces, strict=True):
        p.data = piece.view_as(p)
    return flat


class Guard:
    """Notices what is not finite, on the device, and masks writes to weights.

    In fp32 and bf16 every write is masked from the first bad update on, and `check` (once per log
    interval) raises and names it. Under fp16 a bad gradient is ordinary: the loss scale was too
    large. Then that one update is masked, critic, actor and targets together, and the scale halves;
    it doubles after `GROWTH_INTERVAL` good updates.
    """

    GROWTH_INTERVAL = 2000

    def __init__(self, device: torch.device | str, *, scales_loss: bool) -> None:
        self.scales_loss = scales_loss
        self.scale = torch.tensor(65536.0 if scales_loss else 1.0, device=device)
        self.streak = torch.zeros((), dtype=torch.int64, device=device)  # good updates in a row
        self.masked = torch.zeros((), device=device)  # 1 while writes are masked
        self.bad = torch.zeros((), device=device)  # updates that ended masked, since the last check
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)  # updates, fp16 only

    def close(self) -> None:
        """End an update: count it, and adapt the loss scale."""
        if not self.scales_loss:
            self.bad += self.masked
            return
        bad = self.masked > 0
        self.skipped += bad
        self.streak.copy_(torch.where(bad, 0, self.streak + 1))
        grow = (self.streak > 0) & (self.streak % self.GROWTH_INTERVAL == 0)
        self.scale.copy_(self.scale * torch.where(bad, 0.5, torch.where(grow, 2.0, 1.0)))
        self.masked.zero_()

    def state(self) -> dict[str, Tensor]:
        return {"scale": self.scale, "streak": self.streak, "skipped": self.skipped}

    def check(self, updates: int) -> None:
        """Raise if one of the first `updates` was bad; the weights hold their last good values."""
        bad = int(self.bad)
        self.bad.zero_()
        if bad:
            raise NonFinite(f"update {updates - bad}: the loss or a gradient is NaN or infinite")
        if float(self.scale) < 2.0**-14:
            raise NonFinite("fp16: gradients are not finite at any loss scale; use bf16 or fp32")


class Stepper:
    """The one door from a gradient to new weights: sum over workers, unscale, check, clip, step.

    `gradient` is what the learning rule fills before each call.
    """

    def __init__(
        self,
        module: nn.Module,
        lr: float,
        guard: Guard,
        *,
        max_grad_norm: float | None = None,
        world: World = ALONE,
        weight: float = 1.0,
        kernel: str = "reference",
    ) -> None:
        self.flat = flatten(module)
        scale = guard.scale if guard.scales_loss else None
        self.gradient = Gradient(list(module.parameters()), weight=weight, scale=scale)
        self.lr, self.max_norm = lr, math.inf if max_grad_norm is None else max_grad_norm
        step, zeros = torch.zeros((), device=self.flat.device), torch.zeros_like(self.flat)
        self.moments = Moments(self.flat, step, zeros, zeros.clone())
        self.guard, self.world, self.kernel = guard, world, kernel

    def __call__(self) -> Tensor:
        """Step, unless something was not finite; the loss over the global batch."""
        guard, vector = self.guard, self.gradient.vector
        self.world.sum_(vector)
        if guard.scales_loss:
            vector[:-1] /= guard.scale
        loss = self.gradient.loss.clone()
        adam = kernels.named(self.kernel).adam
        adam(self.moments, vector, self.lr, self.max_norm, guard.masked)
        return loss

    def state(self) -> dict[str, Tensor]:
        """The live tensors of weights and Adam's moments."""
        return self.moments._asdict()
