"""Small networks over sequences, contexts for them, and the same networks in plain PyTorch.

Shape legend   T spike steps, B batch, K steps of a context, D entries of a token, H heads.
"""

from __future__ import annotations

from typing import Any

import torch
from builders import lif_config
from plain import Fire
from torch import Tensor, nn
from torch.nn import functional

from spikerl.algos.decision_transformer import DecisionTransformer, DecisionTransformerConfig
from spikerl.models.actor_config import ActorConfig
from spikerl.models.spikeformer import Spikeformer, SpikeformerConfig
from spikerl.models.transformer import Transformer, TransformerConfig
from spikerl.types import Contexts

LIF = lif_config(voltage_decay=0.25)
SIZES: dict[str, Any] = {"context": 5, "dim": 8, "layers": 2, "heads": 2, "lr": 1e-3}


def spikeformer_config(**changes: Any) -> SpikeformerConfig:
    own = {"name": "spikeformer", "attention": "pssa", "window": 3, "spike_steps": 3}
    return SpikeformerConfig(**(SIZES | own | {"norm_share": 0.5} | changes))


def transformer_config(**changes: Any) -> TransformerConfig:
    own = {"name": "transformer", "timesteps": 4, "dropout": 0.0}
    return TransformerConfig(**(SIZES | own | changes))


def decision_config(**changes: Any) -> DecisionTransformerConfig:
    own: dict[str, Any] = {
        "name": "decision_transformer",
        "batch_size": 6,
        "gamma": 1.0,
        "norm_interval": 1,
        "norm_clip": None,
        "max_grad_norm": 0.25,
        "weight_decay": 0.01,
        "warmup_share": 0.0,
        "return_scale": 10.0,
        "target_return": None,
    }
    return DecisionTransformerConfig(**(own | changes))


def actor_config(kind: str = "pssa") -> ActorConfig:
    """The config of an actor of one block."""
    if kind == "dense":
        dense = transformer_config(layers=1)
        return ActorConfig(actor=dense, encoder=None, neuron=None, decoder=None)
    actor = spikeformer_config(attention=kind, layers=1)
    return ActorConfig(actor=actor, encoder=None, neuron=LIF, decoder=None)


def network(kind: str = "pssa", **changes: Any) -> Spikeformer | Transformer:
    """A network for 3 observation and 2 action entries."""
    torch.manual_seed(3)
    if kind == "dense":
        return Transformer(3, 2, transformer_config(**changes))
    made = Spikeformer(3, 2, spikeformer_config(attention=kind, **changes), LIF)
    with torch.no_grad():
        for name, p in made.named_parameters():  # so that every layer fires
            if "bias_N" in name or "beta_N" in name or "position" in name:
                p.add_(0.3 * torch.randn(p.shape, dtype=torch.float32))
            if "gamma_N" in name or "ln.weight" in name:
                p.mul_(2.0)
            if "linear.weight_IN" in name:
                p.mul_(20.0)
    return made


def learner(made: Spikeformer | Transformer, **settings: Any) -> DecisionTransformer:
    parts = {key: settings.pop(key) for key in ("world", "weight") if key in settings}
    generator = torch.Generator().manual_seed(0)
    config = decision_config(**settings)
    return DecisionTransformer(made, None, config, actor_lr=1e-2, generator=generator, **parts)


def contexts(count: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Contexts:
    """Contexts of 5 steps; every fourth is full, the others lack their first one to three steps."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(count, 5, *shape, generator=draw, dtype=dtype)

    missing = torch.arange(count) % 4
    there = torch.arange(5) >= missing.unsqueeze(1)
    time = (torch.arange(5) - missing.unsqueeze(1)) * there
    full = Contexts(normal(3), normal(2).clamp(-1, 1), 10.0 * normal(), time, there)
    mask = there.unsqueeze(2)
    return full._replace(obs=full.obs * mask, act=full.act * mask, togo=full.togo * there)


class Rect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, voltage: Tensor) -> Tensor:
        ctx.save_for_backward(voltage)
        return Fire()(voltage).to(voltage.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (voltage,) = ctx.saved_tensors
        return grads[0] * ((voltage - 0.5).abs() < 0.5)


def lif(drive: list[Tensor]) -> list[Tensor]:
    """The spikes of a LIF layer; `drive` and the result have an entry for each spike step."""
    voltage, spikes, out = 0.0 * drive[0], 0.0 * drive[0], []
    for x in drive:
        voltage = 0.25 * voltage * (1.0 - spikes) + x
        spikes = Rect.apply(voltage)
        out.append(spikes)
    return out


class PlainSpikeformer(nn.Module):
    """The paper's equations on torch's own layers, with loops over positions and spike steps."""

    def __init__(self, source: Spikeformer) -> None:
        super().__init__()
        self.c, self.theta = source.config, 0.0
        self.names: dict[str, str] = {}  # the names of its parts, by the names in the source
        self.parts = nn.ModuleDict()
        self.positions = nn.ParameterDict()
        for path, part in source.named_modules():
            name = path.replace(".", "_")
            made: nn.Module | None = None
            if hasattr(part, "weight_IN"):
                made = nn.Linear(*part.weight_IN.shape)
                made.weight.data = part.weight_IN.detach().T.clone()
                made.bias.data = part.bias_N.detach().clone()
            elif hasattr(part, "gamma_N"):
                made = nn.BatchNorm1d(len(part.gamma_N))
                made.weight.data = part.gamma_N.detach().clone()
                made.bias.data = part.beta_N.detach().clone()
            elif isinstance(part, nn.LayerNorm):
                made = nn.LayerNorm(part.normalized_shape)
                made.load_state_dict(part.state_dict())
            elif hasattr(part, "position_KK"):
                self.positions[name] = nn.Parameter(part.position_KK.detach().clone())
            if made is not None:
                self.parts[name] = made

    def ptbn(self, name: str, x: list[Tensor]) -> list[Tensor]:
        joined = torch.stack(x)  # (T, B, K, D)
        by_batch = self.parts[f"{name}_bn"](joined.flatten(0, 2)).view_as(joined)
        mixed = self.theta * self.parts[f"{name}_ln"](joined) + (1.0 - self.theta) * by_batch
        return list(mixed)

    def layer(self, name: str, x: list[Tensor]) -> list[Tensor]:
        return self.ptbn(f"{name}_norm", [self.parts[f"{name}_linear"](one) for one in x])

    def attention(
        self, name: str, q: list[Tensor], k: list[Tensor], v: list[Tensor], there: Tensor
    ) -> list[Tensor]:
        T, (B, K, D) = len(q), q[0].shape
        rows: list[list[Tensor]] = [[] for _ in range(T)]
        for i in range(K):
            total = [torch.zeros(B, D, dtype=q[0].dtype) for _ in range(T)]
            for j in range(i + 1):
                on = there[:, j].unsqueeze(1).to(q[0].dtype)
                if self.c.attention == "pssa":
                    if i - j < self.c.window:
                        weight = self.positions[f"{name}_attention"][i, j] * on
                        total = [
                            total[t] + weight * q[t][:, i] * k[t][:, j] * v[t][:, j]
                            for t in range(T)
                        ]
                    continue
                width = D // self.c.heads
                for h in range(self.c.heads):
                    at = slice(h * width, (h + 1) * width)
                    score = on[:, 0] * torch.stack(
                        [(q[t][:, i, at] * k[t][:, j, at]).sum(1) for t in range(T)]
                    ).sum(0)
                    for t in range(T):
                        part = torch.zeros(B, D, dtype=q[0].dtype)
                        part[:, at] = score.unsqueeze(1) * v[t][:, j, at]
                        total[t] = total[t] + part
            for t in range(T):
                rows[t].append(total[t])
        return [torch.stack(row, 1) for row in rows]

    def forward(self, steps: Contexts) -> Tensor:
        before = torch.cat([torch.zeros_like(steps.act[:, :1]), steps.act[:, :-1]], 1)
        token = torch.cat([steps.obs, before, steps.togo.unsqueeze(2)], 2)
        x = [self.parts["embed_norm"](self.parts["embed"](token))] * self.c.spike_steps
        for i in range(self.c.layers):
            b = f"blocks_{i}"
            s = lif(x)
            q, k, v = (lif(self.layer(f"{b}_{n}", s)) for n in ("query", "key", "value"))
            s = lif(self.attention(b, q, k, v, steps.there))
            x = [one + more for one, more in zip(x, self.layer(f"{b}_out", s), strict=True)]
            s = lif(self.layer(f"{b}_wide", lif(x)))
            x = [one + more for one, more in zip(x, self.layer(f"{b}_narrow", s), strict=True)]
        mean = torch.stack(self.ptbn("norm", x)).mean(0)
        return torch.tanh(self.parts["head"](mean))

    def state_of(self, name: str) -> Tensor:
        """The counterpart here of the parameter `name` of the source."""
        path, _, last = name.rpartition(".")
        key = path.replace(".", "_")
        if last == "position_KK":
            return self.positions[key].data
        part: Any = self.parts[key]
        names = {"gamma_N": "weight", "beta_N": "bias", "mean_N": "running_mean",
                 "var_N": "running_var", "weight_IN": "weight", "bias_N": "bias"}  # fmt: skip
        found: Tensor = getattr(part, names.get(last, last)).data
        return found.T if last == "weight_IN" else found


class PlainTransformer(nn.Module):
    """GPT-2's blocks with torch's own attention."""

    def __init__(self, source: Transformer) -> None:
        super().__init__()
        self.c = source.config
        self.parts = nn.ModuleDict()
        self.time = nn.Parameter(source.embed_time.detach().clone())
        for path, part in source.named_modules():
            name = path.replace(".", "_")
            if hasattr(part, "weight_IN"):
                made: nn.Module = nn.Linear(*part.weight_IN.shape)
                made.weight.data = part.weight_IN.detach().T.clone()
                made.bias.data = part.bias_N.detach().clone()
                self.parts[name] = made
            elif isinstance(part, nn.LayerNorm):
                self.parts[name] = nn.LayerNorm(part.normalized_shape)

    def forward(self, steps: Contexts) -> Tensor:
        p, (B, K) = self.parts, steps.there.shape
        time = self.time[torch.minimum(steps.time, torch.tensor(len(self.time) - 1))]
        x = torch.zeros(B, 3 * K, self.c.dim, dtype=steps.obs.dtype)
        x[:, 0::3] = p["embed_togo"](steps.togo.unsqueeze(2)) + time
        x[:, 1::3] = p["embed_obs"](steps.obs) + time
        x[:, 2::3] = p["embed_act"](steps.act) + time
        x = p["embed_norm"](x)
        causal = torch.ones(3 * K, 3 * K, dtype=torch.bool).tril()
        seen = causal & steps.there.repeat_interleave(3, 1)[:, None, None, :]
        seen = seen | torch.eye(3 * K, dtype=torch.bool)  # for padding, whose output is not used
        for i in range(self.c.layers):
            b = f"blocks_{i}"
            q, k, v = p[f"{b}_qkv"](p[f"{b}_norms_0"](x)).chunk(3, 2)
            q, k, v = (one.unflatten(2, (self.c.heads, -1)).transpose(1, 2) for one in (q, k, v))
            y = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
            x = x + p[f"{b}_out"](y.transpose(1, 2).flatten(2))
            x = x + p[f"{b}_narrow"](torch.relu(p[f"{b}_wide"](p[f"{b}_norms_1"](x))))
        return torch.tanh(p["head"](p["norm"](x)[:, 1::3]))

    def state_of(self, name: str) -> Tensor:
        """The counterpart here of the parameter `name` of the source."""
        path, _, last = name.rpartition(".")
        if last == "embed_time":
            return self.time.data
        part: Any = self.parts[path.replace(".", "_")]
        names = {"weight_IN": "weight", "bias_N": "bias"}
        found: Tensor = getattr(part, names.get(last, last)).data
        return found.T if last == "weight_IN" else found
