"""Spike-driven causal attention over the steps of an episode (Huang et al., CVPR 2025,
arXiv:2504.03800): queries, keys and values are spikes, and there is no softmax.

`pssa`   x_i = q_i * sum_j P_ij (k_j * v_j), over j <= i with i - j < window: P is learned, one for
         each pair of positions in a context, and begins as 1; * is entrywise
`tssa`   x_i = sum_j (q_i . k_j) v_j, over j <= i: a head's entries at all spike steps form one
         vector, so the dot product sums over both

Both give the drive of a further layer of neurons. Padding is masked out.

Shape legend   T spike steps, B batch, K positions of a context, D entries, H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """From spikes q, k, v (T, B, K, D) to a drive (T, B, K, D)."""

    def __init__(self, context: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window

    def forward(self, q: Tensor, k: Tensor, v: Tensor, there_BK: Tensor) -> Tensor:
        raise NotImplementedError


class PSSA(Attention):
    """Positional spiking self-attention; the number of heads has no effect."""

    def __init__(self, context: int, heads: int, window: int) -> None:
        super().__init__(context, heads, window)
        self.position_KK = nn.Parameter(torch.ones(context, context, dtype=torch.float32))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, there_BK: Tensor) -> Tensor:
        kv = k * v * there_BK.unsqueeze(-1)
        return q * ((self.position_KK * seen(self.position_KK, self.window)) @ kv)


class TSSA(Attention):
    """Temporal spiking self-attention; `window` has no effect."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, there_BK: Tensor) -> Tensor:
        queries, keys, values = (self.by_head(x) for x in (q, k, v))
        scores = queries @ keys.mT
        scores = scores * seen(scores, scores.shape[-1]) * there_BK[:, None, None, :]
        T, B, K, D = q.shape
        drive = (scores @ values).view(B, self.heads, K, T, D // self.heads)
        return drive.permute(3, 0, 2, 1, 4).reshape(T, B, K, D)

    def by_head(self, x: Tensor) -> Tensor:
        """(B, H, K, T D / H)."""
        T, B, K, D = x.shape
        parts = x.view(T, B, K, self.heads, D // self.heads).permute(1, 3, 2, 0, 4)
        return parts.reshape(B, self.heads, K, T * D // self.heads)


def seen(like: Tensor, window: int) -> Tensor:
    """Mask (K, K): 1 if position i (row) sees position j (column), else 0; `like`: (..., K, K)."""
    place = torch.arange(like.shape[-1], dtype=torch.int64, device=like.device)
    behind = place.unsqueeze(1) - place
    return ((behind >= 0) & (behind < window)).to(like.dtype)


ATTENTIONS: dict[str, type[Attention]] = {"pssa": PSSA, "tssa": TSSA}
