"""Decision Transformer: the dense counterpart of `spikeformer.py` (Chen et al., NeurIPS 2021,
arXiv:2106.01345).

A step is three tokens, R_t, s_t and a_t, each embedded and added to a learned embedding of its
time; the action is read at the token of s_t. Blocks are GPT-2's: causal softmax attention and two
layers with ReLU, each after a layer normalisation and with dropout before the residual addition.

Shape legend   B batch, K steps of a context, L = 3 K tokens, D entries, H heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spikerl.models.sequence import SequenceConfig
from spikerl.snn.linear import Linear, ListOf
from spikerl.types import Contexts

WIDER = 4  # width between a block's two feed-forward layers, in units of D
WEIGHT_STD = 0.02  # of the blocks' initial weights
UNSEEN = -1e4  # attention score of a masked token


@dataclass(kw_only=True)
class TransformerConfig(SequenceConfig):
    timesteps: int  # times with an embedding of their own; later ones share the last
    dropout: float

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("give 1 to 1000000", "timesteps", 1 <= self.timesteps <= 1_000_000)
        self.check("give a value in [0, 1)", "dropout", 0.0 <= self.dropout < 1.0)


def on_tokens(layer: Linear, x: Tensor) -> Tensor:
    """x W + b, from (..., I) to (..., N)."""
    y: Tensor = layer(x.flatten(0, -2))
    return y.view(*x.shape[:-1], layer.outputs)


def norm_of(entries: int) -> nn.LayerNorm:
    return nn.LayerNorm(entries, dtype=torch.float32)


def small(inputs: int, outputs: int) -> Linear:
    layer = Linear(inputs, outputs)
    nn.init.normal_(layer.weight_IN, std=WEIGHT_STD)
    nn.init.zeros_(layer.bias_N)
    return layer


def dropped(x: Tensor, share: float, generator: torch.Generator | None) -> Tensor:
    """Dropout: zero a share of the entries and scale up the rest; identity without a generator."""
    if generator is None or share == 0.0:
        return x
    mask = torch.rand(x.shape, generator=generator, dtype=torch.float32, device=x.device) >= share
    return x * mask / (1.0 - share)


class Block(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        D, self.heads, self.dropout = config.dim, config.heads, config.dropout
        self.norms = ListOf[nn.LayerNorm](norm_of(D) for _ in range(2))
        self.qkv, self.out = small(D, 3 * D), small(D, D)
        self.wide, self.narrow = small(D, WIDER * D), small(WIDER * D, D)

    def forward(
        self, x_BLD: Tensor, seen_B1LL: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        def drop(x: Tensor) -> Tensor:
            return dropped(x, self.dropout, generator)

        B, L, D = x_BLD.shape
        qkv = on_tokens(self.qkv, self.norms[0](x_BLD)).view(B, L, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, L, D / H)
        scores = (q @ k.mT) / math.sqrt(q.shape[-1])
        weights = drop(scores.masked_fill(~seen_B1LL, UNSEEN).softmax(-1))
        attended = (weights @ v).transpose(1, 2).reshape(B, L, D)
        x_BLD = x_BLD + drop(on_tokens(self.out, attended))
        wide = on_tokens(self.wide, self.norms[1](x_BLD)).relu()
        return x_BLD + drop(on_tokens(self.narrow, wide))


class Transformer(nn.Module):
    """Contexts (B, K, ...) to actions (B, K, A) in [-1, 1]."""

    carries = True

    def __init__(
        self, obs_dim: int, act_dim: int, config: TransformerConfig, *, kernel: str = "reference"
    ) -> None:
        super().__init__()
        self.obs_dim, self.act_dim, self.kernel, self.config = obs_dim, act_dim, kernel, config
        D = config.dim
        self.embed_togo, self.embed_obs = Linear(1, D), Linear(obs_dim, D)
        self.embed_act = Linear(act_dim, D)
        times = torch.empty(config.timesteps, D, dtype=torch.float32)
        self.embed_time = nn.Parameter(times.normal_())
        self.embed_norm, self.norm = norm_of(D), norm_of(D)
        self.blocks = ListOf[Block](Block(config) for _ in range(config.layers))
        self.head = Linear(D, act_dim)

    def forward(self, steps: Contexts, generator: torch.Generator | None = None) -> Tensor:
        """`generator`: given only in training, for dropout."""
        B, K = steps.there.shape
        time = self.embed_time[steps.time.clamp(max=self.config.timesteps - 1)]
        tokens = (
            on_tokens(self.embed_togo, steps.togo.unsqueeze(2)),
            on_tokens(self.embed_obs, steps.obs),
            on_tokens(self.embed_act, steps.act),
        )
        x = torch.stack([token + time for token in tokens], 2).flatten(1, 2)
        x = dropped(self.embed_norm(x), self.config.dropout, generator)
        place = torch.arange(3 * K, dtype=torch.int64, device=x.device)
        there = steps.there.repeat_interleave(3, 1)[:, None, None, :]
        seen = (place <= place.unsqueeze(1)) & there
        for block in self.blocks:
            x = block(x, seen, generator)
        at_obs = self.norm(x).view(B, K, 3, -1)[:, :, 1]
        return torch.tanh(on_tokens(self.head, at_obs))

    def schedule(self, share: float) -> None:
        """Nothing changes in the course of a run."""

    def inference(self) -> Transformer:
        """The network as it acts: itself."""
        return self
