"""Critics.

Shape legend   B batch, O observation entries, A action entries, I inputs, N outputs, C critics.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from spikerl import kernels
from spikerl.kernels.gradient import Gradient
from spikerl.snn.linear import uniform
from spikerl.types import Batch


class Critics(nn.Module):
    """Q networks with ReLU layers, side by side in one batched product per layer."""

    def __init__(
        self,
        obs_dim: int,
        act_dim: int,
        hidden_sizes: list[int],
        *,
        networks: int = 2,
        dtype: torch.dtype = torch.float32,
        kernel: str = "reference",
    ) -> None:
        super().__init__()
        self.dtype, self.kernel = dtype, kernel
        sizes = [obs_dim + act_dim, *hidden_sizes, 1]
        self.weights_CIN, self.biases_C1N = nn.ParameterList(), nn.ParameterList()
        for i, n in pairwise(sizes):
            bound = 1.0 / math.sqrt(i)  # as torch initialises a linear layer
            self.weights_CIN.append(uniform(bound, networks, i, n))
            self.biases_C1N.append(uniform(bound, networks, 1, n))

    def forward(self, obs_BO: Tensor, act_BA: Tensor) -> Tensor:
        """Every network's values, (C, B)."""
        return kernels.named(self.kernel).values(self, obs_BO, act_BA)

    def td_target(self, rows: Batch, next_act: Tensor, bonus_B: Tensor | None = None) -> Tensor:
        """rew + discount (1 - terminated) (min_c Q_c(next_obs, next_act) + bonus), (B,)."""
        return kernels.named(self.kernel).td_target(self, rows, next_act, bonus_B)

    def critic_backward(
        self, obs_BO: Tensor, act_BA: Tensor, target_B: Tensor, into: Gradient
    ) -> Tensor:
        """Write the loss sum_c mean_b (Q_c - target)^2 and its gradient; the mean of all values."""
        return kernels.named(self.kernel).critic_backward(self, obs_BO, act_BA, target_B, into)

    def actor_loss_grad(
        self, obs_BO: Tensor, act_BA: Tensor, into: Gradient, lowest: bool = False
    ) -> Tensor:
        """Write the loss -mean Q_1 (`lowest`: -mean min_c Q_c); returns its gradient with respect
        to the actions, (B, A). The critics' weights get no gradient.
        """
        return kernels.named(self.kernel).actor_loss_grad(self, obs_BO, act_BA, into, lowest)
