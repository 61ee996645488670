"""What every learning rule shares: the target value, and the one door from loss to weights."""

from __future__ import annotations

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
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)  # updates, fp16 only

    def see(self, finite: Tensor, update: int) -> None:
        """Take notice of whether everything in this step of `update` was finite."""
        bad = ~finite
        if not self.scales_loss:
            self.first_bad.copy_(torch.where(bad & (self.first_bad < 0), update, self.first_bad))
        self.masked.copy_(torch.maximum(self.masked, bad.to(self.masked.dtype)))

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
        if (update := int(self.first_bad)) >= 0:
            raise NonFinite(f"update {update}: the loss or a gradient is NaN or infinite")
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
        self.flat = nn.Parameter(flat)
        self.summed = torch.cat([torch.zeros_like(flat), flat.new_zeros(1)])
        self.flat.grad = self.summed[:-1]
        self.optimizer = torch.optim.Adam([self.flat], lr=lr, fused=True)
        self.optimizer.state[self.flat] = {
            "step": torch.zeros((), device=flat.device),
            "exp_avg": torch.zeros_like(flat),
            "exp_avg_sq": torch.zeros_like(flat),
        }
        self.guard, self.max_grad_norm = guard, max_grad_norm
        self.world, self.weight = world, weight

    def __call__(self, loss: Tensor, update: int) -> Tensor:
        """Step, unless something was not finite; the loss over the global batch."""
        guard, grad = self.guard, self.summed[:-1]
        share = loss * self.weight
        pieces = torch.autograd.grad(share * guard.scale, self.params)
        torch.cat([*(p.flatten() for p in pieces), share.detach().view(1)], out=self.summed)
        self.world.sum_(self.summed)
        if guard.scales_loss:
            grad /= guard.scale
        norm, mean_loss = grad.norm(), self.summed[-1].clone()
        guard.see(torch.isfinite(mean_loss) & torch.isfinite(norm), update)
        if self.max_grad_norm is not None:
            grad *= (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        # A fused optimiser leaves weights, moments and its step count alone where this is 1.
        self.optimizer.found_inf = guard.masked  # type: ignore[attr-defined]
        self.optimizer.step()
        return mean_loss

    def state(self) -> dict[str, Tensor]:
        """The live tensors of weights and Adam's moments."""
        return {"weights": self.flat.detach(), **self.optimizer.state[self.flat]}


def polyak_(target: Tensor, online: Tensor, tau: float, masked: Tensor) -> None:
    """target <- (1 - tau) target + tau online, unless masked."""
    target.lerp_(online, (tau * (1.0 - masked)).to(target.dtype))
