"""Progressive threshold-dependent batch normalisation (Huang et al., CVPR 2025, arXiv:2504.03800).

    y = theta tdLN(x) + (1 - theta) tdBN(x)

tdLN normalises over a token's entries, tdBN each entry over batch, tokens and spike steps; in both,
gamma begins as the neurons' threshold. theta falls linearly from 1 to 0 over the first part of a
run. A network that acts uses tdBN alone, with running moments: an affine map that folds into the
adjacent layer.

Shape legend   T spike steps, M tokens, I inputs, N outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spikerl.snn.batchnorm import BATCH, ROWS, RUNNING, TDBN, Rows
from spikerl.snn.linear import Linear

WEIGHT_STD = 0.02  # of the initial weights of layers that are normalised


class PTBN(nn.Module):
    """`theta` is set from outside, as training proceeds (`Spikeformer.schedule`)."""

    def __init__(self, neurons: int, threshold: float) -> None:
        super().__init__()
        self.ln, self.bn = nn.LayerNorm(neurons, dtype=torch.float32), TDBN(neurons, threshold)
        nn.init.constant_(self.ln.weight, threshold)
        self.theta = 0.0

    def forward(self, x_TMN: Tensor, training: bool, rows: Rows = ROWS) -> Tensor:
        y: Tensor = self.bn(x_TMN, BATCH if training else RUNNING, rows)
        if self.theta == 0.0 or not training:
            return y
        return torch.lerp(y, self.ln(x_TMN), self.theta)


class NormedLinear(nn.Module):
    """norm(x W + b); with threshold None x W + b alone, the form after folding."""

    def __init__(self, inputs: int, outputs: int, threshold: float | None) -> None:
        super().__init__()
        self.linear = Linear(inputs, outputs)
        nn.init.normal_(self.linear.weight_IN, std=WEIGHT_STD)
        nn.init.zeros_(self.linear.bias_N)
        self.norm = None if threshold is None else PTBN(outputs, threshold)

    def normed(self, x_TMN: Tensor, training: bool = False, rows: Rows = ROWS) -> Tensor:
        """Apply the norm, if there is one, to x W + b."""
        return x_TMN if self.norm is None else self.norm(x_TMN, training, rows)

    def folded(self) -> dict[str, Tensor]:
        """State of a layer without norm that is equivalent to this one when it acts."""
        assert self.norm is not None
        weight, bias = self.norm.bn.folded(self.linear.weight_IN, self.linear.bias_N)
        return {"linear.weight_IN": weight, "linear.bias_N": bias}


@torch.no_grad()
def folded_behind(norm: PTBN, layer: Linear) -> dict[str, Tensor]:
    """State of `layer` with the normalisation of its inputs folded into its weights."""
    bn = norm.bn
    factor_I = bn.factor()
    offset_I = bn.beta_N - bn.mean_N * factor_I
    return {
        "weight_IN": factor_I.unsqueeze(1) * layer.weight_IN,
        "bias_N": layer.bias_N + offset_I @ layer.weight_IN,
    }
