"""Returns and advantages.

Shape legend   T steps, N environments.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def returns_to_go(rew_T: np.ndarray) -> np.ndarray:
    """Undiscounted sum of rewards from each step to the end of the episode; float64 (T,)."""
    return np.cumsum(rew_T[::-1].astype(np.float64))[::-1]


def gae(
    rew_TN: Tensor,
    value_TN: Tensor,
    next_value_TN: Tensor,
    terminated_TN: Tensor,
    last_TN: Tensor,
    *,
    gamma: float,
    gae_lambda: float,
) -> Tensor:
    """Generalised advantage estimates (Schulman et al., 2016, arXiv:1506.02438), (T, N).

    delta_t = rew + gamma next_value - value, where the next value is that of the true successor,
    and 0 if the episode terminated. A_t = delta_t + gamma lambda A_{t+1}; the second term is
    dropped where an episode ended by termination or truncation (`last`) and at the last row.
    """
    delta_TN = rew_TN + torch.where(terminated_TN, 0.0, gamma * next_value_TN) - value_TN
    advantage_TN = torch.empty_like(delta_TN)
    following = torch.zeros_like(delta_TN[0])
    for t in reversed(range(len(delta_TN))):
        following = delta_TN[t] + torch.where(last_TN[t], 0.0, gamma * gae_lambda * following)
        advantage_TN[t] = following
    return advantage_TN
