"""Sampling of actions, and update steps of a network's weights.

Shape legend   B batch, A actions.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from spikerl.kernels import reference
from spikerl.kernels.gradient import Moments, SamplePullback
from spikerl.kernels.prepared import check_shape, plain


class StepCalls:
    lib: ctypes.CDLL

    def add_clipped_noise(
        self, act_BA: Tensor, noise_BA: Tensor, std: float, bound: float
    ) -> Tensor:
        """As `reference.add_clipped_noise`."""
        if not plain(act_BA) or not plain(noise_BA) or noise_BA.shape != act_BA.shape:
            return reference.add_clipped_noise(act_BA, noise_BA, std, bound)
        self.lib.spikerl_add_clipped_noise(
            act_BA.numel(), act_BA.data_ptr(), noise_BA.data_ptr(), std, bound
        )
        return noise_BA

    def squashed(
        self, mean_BA: Tensor, log_std_BA: Tensor, noise_BA: Tensor, low: float, high: float
    ) -> tuple[Tensor, Tensor]:
        """As `reference.squashed`."""
        if torch.is_grad_enabled():
            return reference.squashed(mean_BA, log_std_BA, noise_BA, low, high)
        return self.squashed_vjp(mean_BA, log_std_BA, noise_BA, low, high)[:2]

    def squashed_vjp(
        self, mean_BA: Tensor, log_std_BA: Tensor, noise_BA: Tensor, low: float, high: float
    ) -> tuple[Tensor, Tensor, SamplePullback]:
        """As `reference.squashed_vjp`, without autograd."""
        given = (mean_BA, log_std_BA, noise_BA)
        if any(x.dtype != torch.float32 or x.shape != mean_BA.shape for x in given):
            return reference.squashed_vjp(mean_BA, log_std_BA, noise_BA, low, high)
        mean, log_std, noise = (x.contiguous() for x in (mean_BA, log_std_BA, noise_BA))
        act, spread, log_prob = (
            torch.empty_like(mean),
            torch.empty_like(mean),
            mean.new_empty(len(mean)),
        )
        places = (x.data_ptr() for x in (act, log_prob, spread))
        self.lib.spikerl_squashed(
            *mean.shape, mean.data_ptr(), log_std.data_ptr(), noise.data_ptr(), low, high, *places
        )

        def pull(by_act_BA: Tensor, by_log_prob_B: Tensor) -> tuple[Tensor, Tensor]:
            check_shape(by_act_BA, *mean.shape)
            check_shape(by_log_prob_B, len(mean))
            grads = (by_act_BA.float().contiguous(), by_log_prob_B.float().contiguous())
            given = (log_std, act, spread, *grads)
            found = torch.empty_like(mean), torch.empty_like(mean)
            self.lib.spikerl_squashed_backward(
                *mean.shape, *(x.data_ptr() for x in given), low, high,
                *(x.data_ptr() for x in found),
            )  # fmt: skip
            return found

        return act, log_prob, pull

    def adam(
        self, moments: Moments, gradient: Tensor, lr: float, max_norm: float, masked: Tensor
    ) -> None:
        """As `reference.adam`, in one pass."""
        if gradient.dtype != torch.float32:
            return reference.adam(moments, gradient, lr, max_norm, masked)
        weights, step, mean, square = (m.data_ptr() for m in moments)
        places = (weights, gradient.data_ptr(), mean, square, step)
        self.lib.spikerl_adam(len(gradient) - 1, *places, lr, max_norm, masked.data_ptr())
        return None

    def polyak(self, target: Tensor, online: Tensor, tau: float, masked: Tensor) -> None:
        """As `reference.polyak`."""
        if not plain(target) or not plain(online) or target.shape != online.shape:
            return reference.polyak(target, online, tau, masked)
        places = (target.data_ptr(), online.data_ptr(), tau, masked.data_ptr())
        self.lib.spikerl_polyak(len(target), *places)
        return None
