"""What every learning rule shares: the target value, and the one door from loss to weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from spikerl.distributed.world import ALONE, World
from spikerl.errors import NonFinite
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
        self.seen: list[tuple[int, Tensor]] = []  # since the last check
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)  # updates, fp16 only

    def see(self, finite: Tensor, update: int) -> None:
        """Take notice of whether everything in this step of `update` was finite."""
        self.masked.masked_fill_(~finite, 1.0)
        if not self.scales_loss:
            self.seen.append((update, finite))

    def close(self) -> None:
        """End an update: adapt the loss scale."""
        if not self.scales_loss:
            return
        bad = self.masked > 0
        self.skipped += bad
        self.streak.copy_(torch.where(bad, 0, self.streak + 1))
        grow = (self.streak > 0) & (self.streak % self.GROWTH_INTERVAL == 0)
        self.scale.copy_(self.scale * torch.where(bad, 0.5, torch.where(grow, 2.0, 1.0)))
        self.masked.zero_()

    def state(self) -> dict[str, Tensor]:
        return {"scale": self.scale, "streak": self.streak, "skipped": self.skipped}

    def check(self) -> None:
        """Raise if an update was bad; the weights still hold their last good values."""
        if self.masked > 0:
            update = next(update for update, finite in self.seen if not finite)
            raise NonFinite(f"update {update}: the loss or a gradient is NaN or infinite")
        self.seen.clear()
        if float(self.scale) < 2.0**-14:
            raise NonFinite("fp16: gradients are not finite at any loss scale; use bf16 or fp32")


class Stepper:
    """The one door from a loss to new weights: scale, backward, average, unscale, clip, step.

    With several workers, `loss` is the mean over this worker's rows and `weight` their share of
    the global batch: summed over workers, the gradient is that of the mean over the global batch.
    One collective carries the network's whole gradient and, as its last entry, the loss.
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
    ) -> None:
        self.params = list(module.parameters())
        flat = flatten(module)
        self.flat = flat
        self.summed = torch.cat([torch.zeros_like(flat), flat.new_zeros(1)])
        sizes = [p.numel() for p in self.params]
        *pieces, loss = self.summed.split([*sizes, 1])
        shapes = [p.shape for p in self.params]
        self.slots = [piece.view(s) for piece, s in zip(pieces, shapes, strict=True)]
        self.slots.append(loss.view(()))
        self.whole = flat.new_tensor(weight)  # what a loss is multiplied with, unless it is scaled
        self.lr = lr
        self.step = torch.zeros((), device=flat.device)
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(flat), torch.zeros_like(flat)
        self.guard, self.max_grad_norm = guard, max_grad_norm
        self.world, self.weight = world, weight

    def __call__(self, loss: Tensor, update: int) -> Tensor:
        """Step, unless something was not finite; the loss over the global batch."""
        guard, grad = self.guard, self.summed[:-1]
        share = loss.detach() * self.weight
        scaled = guard.scale * self.weight if guard.scales_loss else self.whole
        pieces = torch.autograd.grad(loss, self.params, scaled)
        torch._foreach_copy_(self.slots, [*pieces, share])
        self.world.sum_(self.summed)
        if guard.scales_loss:
            grad /= guard.scale
        mean_loss = self.summed[-1].clone()
        # The sum of squares is finite only if every entry is; NaN is below nothing.
        guard.see(torch.dot(self.summed, self.summed) < math.inf, update)
        if self.max_grad_norm is not None:
            grad *= (self.max_grad_norm / (grad.norm() + 1e-6)).clamp(max=1.0)
        self.adam()
        return mean_loss

    def adam(self) -> None:
        """One step of Adam; it leaves weights, moments and its count alone where masked.

        The function below torch.optim.Adam(fused=True), which spends longer on its own
        bookkeeping than a step of these vectors takes.
        """
        self.step += 1.0
        torch._fused_adam_(
            [self.flat],
            [self.summed[:-1]],
            [self.exp_avg],
            [self.exp_avg_sq],
            [],
            [self.step],
            lr=self.lr,
            beta1=0.9,
            beta2=0.999,
            weight_decay=0.0,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
            found_inf=self.guard.masked,
        )
        self.step -= self.guard.masked

    def state(self) -> dict[str, Tensor]:
        """The live tensors of weights and Adam's moments."""
        moments = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        return {"weights": self.flat, "step": self.step, **moments}


def polyak_(target: Tensor, online: Tensor, tau: float, masked: Tensor) -> None:
    """target <- (1 - tau) target + tau online, unless masked."""
    target.lerp_(online, (tau * (1.0 - masked)).to(target.dtype))
