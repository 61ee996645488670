"""Batch normalisation of a spiking layer's drive.

Moments are over the batch and all spike steps, of all workers. A network that acts uses running
moments; the normalisation is then an affine map, which folds into the layer's weights.

`CaReBN` (Xu et al., ICLR 2026, arXiv:2509.23791): each update moves the running moments by a Kalman
gain, so that they follow quickly while the network changes and average while it does not; at
intervals they are measured anew on many replayed observations (recalibration).
`TDBN` (Zheng et al., AAAI 2021, arXiv:2011.05280): gamma begins at the threshold, beta at 0; each
update moves the running moments a tenth of the way towards the batch's.

Shape legend   T spike steps, B batch, N neurons, M = T B.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

EPS = 1e-5  # added to the variance
MOMENTUM = 0.1  # of TDBN's running moments, as torch's BatchNorm has it
MEMORY = 0.8  # share of the running moments' expected error that is kept from update to update

RUNNING, BATCH, RECALIBRATE = "running", "batch", "recalibrate"  # which moments a pass uses


def fixed(value: Tensor) -> nn.Parameter:
    """A parameter that is not learned."""
    return nn.Parameter(value, requires_grad=False)


def alone(total: Tensor) -> None:
    """In-place sum over workers for a single worker: nothing to do."""


class Rows(NamedTuple):
    """The operations of a normalisation that read every row of a drive (T, B, N); kernels replace
    them with faster ones.
    """

    sums: Callable[[Tensor], Tensor]  # sums of x and of its squares, (2 N,) in float64
    affine: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (x - mean) factor + beta
    # z = (x - mean) inverse, and z gamma + beta; arguments x, mean, inverse, gamma, beta
    normalise: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    gradient_sums: Callable[[Tensor, Tensor], Tensor]  # sums of g and of g z, (2, N)
    # factor (g - mean of g - z mean of g z); arguments g, z, factor and both means as (2, N)
    gradient: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _sums(x_TBN: Tensor) -> Tensor:
    """Computed from moments in the drive's own type, to avoid a float64 copy of the drive."""
    count = x_TBN[..., 0].numel()
    mean = x_TBN.sum((0, 1)) / count
    within = (x_TBN - mean).square_().sum((0, 1)).double()
    mean = mean.double()
    return torch.cat([count * mean, within + count * mean.square()])


def _affine(x_TBN: Tensor, mean_N: Tensor, factor_N: Tensor, beta_N: Tensor) -> Tensor:
    return (x_TBN - mean_N) * factor_N + beta_N


def _normalise(
    x_TBN: Tensor, mean_N: Tensor, inverse_N: Tensor, gamma_N: Tensor, beta_N: Tensor
) -> tuple[Tensor, Tensor]:
    normal = (x_TBN - mean_N) * inverse_N
    return normal, normal * gamma_N + beta_N


def _gradient_sums(grad_TBN: Tensor, normal_TBN: Tensor) -> Tensor:
    return torch.stack([grad_TBN.sum((0, 1)), (grad_TBN * normal_TBN).sum((0, 1))])


def _gradient(grad_TBN: Tensor, normal_TBN: Tensor, factor_N: Tensor, mean_2N: Tensor) -> Tensor:
    return factor_N * (grad_TBN - mean_2N[0] - normal_TBN * mean_2N[1])


ROWS = Rows(_sums, _affine, _normalise, _gradient_sums, _gradient)


class BatchNorm(nn.Module):
    """y = gamma (x - mean) / sqrt(var + eps) + beta.

    The running moments are parameters that are not learned, so that code which copies, averages or
    saves a network's parameters includes them. They move in the forward pass, even if the update is
    later dropped because its gradient is not finite.
    """

    def __init__(self, neurons: int, gamma: float, beta: float) -> None:
        super().__init__()
        start = torch.full((neurons,), gamma, dtype=torch.float32)
        self.gamma_N, self.beta_N = nn.Parameter(start), nn.Parameter(torch.full_like(start, beta))
        self.mean_N = fixed(torch.zeros_like(start))
        self.var_N = fixed(torch.ones_like(start))
        self.sum_: Callable[[Tensor], None] = alone  # over workers, in place
        self.held = False  # while true, batches leave the running moments unchanged

    def forward(self, drive_TBN: Tensor, moments: str = RUNNING, rows: Rows = ROWS) -> Tensor:
        if moments == RUNNING:
            return self.affine(drive_TBN, self.mean_N, self.var_N, rows)
        sums = self.sums(drive_TBN, rows)
        mean, var = self.moments_of(sums, drive_TBN)
        if not self.held:
            self.follow(mean, var, sums[0] / len(drive_TBN), len(drive_TBN))
        y: Tensor = _Normalise.apply(drive_TBN, self.gamma_N, self.beta_N, mean, var, sums[0],
                                     self.sum_, rows)  # fmt: skip
        return y

    def affine(self, drive_TBN: Tensor, mean: Tensor, var: Tensor, rows: Rows = ROWS) -> Tensor:
        affine = _affine if torch.is_grad_enabled() else rows.affine
        return affine(drive_TBN, mean, self.gamma_N * (var + EPS).rsqrt(), self.beta_N)

    @torch.no_grad()
    def sums(self, drive_TBN: Tensor, rows: Rows) -> Tensor:
        """Number of rows, sums and sums of squares over all workers, (1 + 2 N,) in float64."""
        sums = rows.sums(drive_TBN)
        total = torch.cat([sums.new_full((1,), drive_TBN[..., 0].numel()), sums])
        self.sum_(total)
        return total

    def moments_of(self, sums: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        count, (total, squares) = sums[0], sums[1:].unflatten(0, (2, -1))
        mean = total / count
        var = (squares / count - mean.square()).clamp(min=0.0)
        return mean.to(like.dtype), var.to(like.dtype)

    def follow(self, mean: Tensor, var: Tensor, samples: Tensor, spike_steps: int) -> None:
        """Move the running moments towards those of a batch of `samples` observations."""
        raise NotImplementedError

    @torch.no_grad()
    def factor(self) -> Tensor:
        """The factor of the affine map with the running moments, (N,)."""
        return self.gamma_N * (self.var_N + EPS).rsqrt()

    @torch.no_grad()
    def folded(self, weight_IN: Tensor, bias_N: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's weights and biases with the affine map of the running moments folded in."""
        factor = self.factor()
        return weight_IN * factor, (bias_N - self.mean_N) * factor + self.beta_N


class CaReBN(BatchNorm):
    def __init__(self, neurons: int, threshold: float) -> None:
        super().__init__(neurons, 0.5 * threshold, 0.5 * threshold)
        # Expected squared errors of the running moments.
        self.mean_error_N = fixed(torch.zeros_like(self.mean_N))
        self.var_error_N = fixed(torch.zeros_like(self.mean_N))
        # Sums accumulated during a recalibration, as `sums` returns them.
        self.measured = torch.zeros(1 + 2 * neurons, dtype=torch.float64)

    def forward(self, drive_TBN: Tensor, moments: str = RUNNING, rows: Rows = ROWS) -> Tensor:
        if moments == RECALIBRATE:
            self.measured = self.measured.to(drive_TBN.device) + self.sums(drive_TBN, rows)
            return self.affine(drive_TBN, *self.moments_of(self.measured, drive_TBN), rows)
        return super().forward(drive_TBN, moments, rows)

    @torch.no_grad()
    def follow(self, mean: Tensor, var: Tensor, samples: Tensor, spike_steps: int) -> None:
        """Move by a Kalman gain, counting all spike steps of an observation as one sample."""
        freedom = (samples - 1.0).clamp(min=1.0)
        noise = var / freedom, 2.0 * var.square() / freedom  # variances of the batch's moments
        for running, error, new, own in (
            (self.mean_N, self.mean_error_N, mean, noise[0]),
            (self.var_N, self.var_error_N, var, noise[1]),
        ):
            off = new - running
            error.mul_(MEMORY).add_((1.0 - MEMORY) * off.square())
            # If both are 0 the feature is constant, and there is nothing to follow.
            total = error + own
            running.add_(torch.where(total > 0.0, error / total, 0.0) * off)

    def begin_recalibration(self) -> None:
        self.measured.zero_()

    @torch.no_grad()
    def end_recalibration(self) -> None:
        mean, var = self.moments_of(self.measured, self.mean_N)
        self.mean_N.copy_(mean)
        self.var_N.copy_(var)


class TDBN(BatchNorm):
    def __init__(self, neurons: int, threshold: float) -> None:
        super().__init__(neurons, threshold, 0.0)

    @torch.no_grad()
    def follow(self, mean: Tensor, var: Tensor, samples: Tensor, spike_steps: int) -> None:
        """Move by `MOMENTUM` towards the batch's mean and unbiased variance."""
        rows = samples * spike_steps
        self.mean_N.add_(MOMENTUM * (mean - self.mean_N))
        self.var_N.add_(MOMENTUM * (var * (rows / (rows - 1.0).clamp(min=1.0)) - self.var_N))


class _Normalise(torch.autograd.Function):
    """Normalisation whose gradient includes that the moments depend on the rows of all workers."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TBN: Tensor,
        gamma_N: Tensor,
        beta_N: Tensor,
        mean_N: Tensor,
        var_N: Tensor,
        count: Tensor,
        sum_: Callable[[Tensor], None],
        rows: Rows,
    ) -> Tensor:
        inverse_N = (var_N + EPS).rsqrt()
        normal, y = rows.normalise(x_TBN, mean_N, inverse_N, gamma_N, beta_N)
        ctx.save_for_backward(normal, gamma_N * inverse_N, count)
        ctx.sum_, ctx.rows = sum_, rows
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        normal, factor_N, count = ctx.saved_tensors
        (grad,) = grads
        own = ctx.rows.gradient_sums(grad, normal)
        beta, gamma = own.clone()  # this worker's part; gradients are summed over workers later
        ctx.sum_(own)
        x = ctx.rows.gradient(grad, normal, factor_N, own / count.to(own.dtype))
        return x, gamma, beta, None, None, None, None, None
