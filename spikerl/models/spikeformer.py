"""Decision SpikeFormer: a transformer whose blocks compute with spikes (Huang et al., CVPR 2025,
arXiv:2504.03800).

    x = LN(W [s_t, a_t-1, R_t] + b), the same at each spike step
    x = x + norm(o(attention(q(x), k(x), v(x))))       each of q, k, v: LIF(norm(W LIF(x) + b))
    x = x + norm(W LIF(norm(W LIF(x) + b)) + b)                         in each block
    a = tanh(W mean over spike steps of norm(x) + b)

norm is the one in `snn/ptbn.py`. Only the blocks' matrices multiply spikes; the embedding and the
head are dense, and the residual stream x is real-valued.

Shape legend   T spike steps, B batch, K steps of a context, M = B K tokens, D entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spikerl import kernels
from spikerl.kernels import reference
from spikerl.kernels.nets import Parts
from spikerl.models.sequence import SequenceConfig
from spikerl.snn.attention import ATTENTIONS
from spikerl.snn.batchnorm import TDBN
from spikerl.snn.linear import Linear, ListOf
from spikerl.snn.neurons import NEURONS, Neuron, NeuronConfig, State, copy_slopes
from spikerl.snn.ptbn import PTBN, NormedLinear, folded_behind
from spikerl.types import Contexts

WIDER = 4  # width between a block's two feed-forward layers, in units of D


@dataclass(kw_only=True)
class SpikeformerConfig(SequenceConfig):
    attention: str  # pssa, tssa
    window: int  # steps that pssa sees
    spike_steps: int  # T, spike steps per decision
    norm_share: float  # share of a run over which layer norm gives way to batch norm

    def __post_init__(self) -> None:
        super().__post_init__()
        remedy = f"one of {', '.join(sorted(ATTENTIONS))}"
        self.check(remedy, "attention", self.attention in ATTENTIONS)
        self.check("give 1 to 1000", "window", 1 <= self.window <= 1000)
        self.check("give 1 to 1000", "spike_steps", 1 <= self.spike_steps <= 1000)
        self.check("give a value in [0, 1]", "norm_share", 0.0 <= self.norm_share <= 1.0)

    def unread(self) -> dict[str, str]:
        if self.attention == "pssa":
            return {"heads": "pssa is the same with any; leave it out"}
        return {"window": "tssa sees all steps before; leave it out"}

    def shape(self) -> str:
        return f"{super().shape()} with {self.attention}"


class Block(nn.Module):
    def __init__(self, config: SpikeformerConfig, neuron: NeuronConfig, norm: float | None) -> None:
        super().__init__()
        D, made = config.dim, NEURONS.part(neuron)
        self.query, self.key, self.value, self.out = (NormedLinear(D, D, norm) for _ in range(4))
        self.wide, self.narrow = NormedLinear(D, WIDER * D, norm), NormedLinear(WIDER * D, D, norm)
        attention = ATTENTIONS[config.attention]
        self.attention = attention(config.context, config.heads, config.window)
        # Before the projections; of query, key and value; of the attention; before each of the two
        # feed-forward layers.
        self.neurons = ListOf[Neuron](made(neuron) for _ in range(7))

    def forward(self, x_TMD: Tensor, there_BK: Tensor, training: bool, kernel: Parts) -> Tensor:
        scan = kernel.scan
        first, *qkv, attended, before, between = self.neurons
        shape = (len(x_TMD), *there_BK.shape, x_TMD.shape[-1])

        def through(layer: NormedLinear, neuron: Neuron, spikes_TMI: Tensor) -> Tensor:
            drive_TMN = kernel.drive(layer.linear, neuron, spikes_TMI, spikes_TMI.dtype)
            return layer.normed(drive_TMN, training, kernel.rows)

        s = scan(first, x_TMD)
        parts = zip(qkv, (self.query, self.key, self.value), strict=True)
        q, k, v = (scan(neuron, through(layer, first, s)).view(shape) for neuron, layer in parts)
        drive = self.attention(q, k, v, there_BK).flatten(1, 2)
        x_TMD = x_TMD + through(self.out, attended, scan(attended, drive))
        s = scan(between, through(self.wide, before, scan(before, x_TMD)))
        return x_TMD + through(self.narrow, between, s)


class Spikeformer(nn.Module):
    """Contexts (B, K, ...) to actions (B, K, A) in [-1, 1]."""

    carries = True

    def __init__(
        self,
        obs_dim: int,
        act_dim: int,
        config: SpikeformerConfig,
        neuron: NeuronConfig,
        *,
        kernel: str = "reference",
        folded: bool = False,
    ) -> None:
        """`folded`: the network that acts, its normalisation folded into the weights."""
        super().__init__()
        self.obs_dim, self.act_dim, self.kernel = obs_dim, act_dim, kernel
        self.config, self.neuron = config, neuron
        norm = None if folded else neuron.threshold
        self.embed = Linear(obs_dim + act_dim + 1, config.dim)
        self.embed_norm = nn.LayerNorm(config.dim, dtype=torch.float32)
        self.blocks = ListOf[Block](Block(config, neuron, norm) for _ in range(config.layers))
        self.norm = None if norm is None else PTBN(config.dim, norm)
        self.head = Linear(config.dim, act_dim)

    def forward(
        self,
        steps: Contexts,
        generator: torch.Generator | None = None,
        kernel: Parts | None = None,
    ) -> Tensor:
        """`generator`: given only in training, where moments are those of the batch. `kernel`: None
        for the parts of `self.kernel`.
        """
        training = generator is not None
        kernel = kernel or kernels.named(self.kernel).parts
        before = nn.functional.pad(steps.act[:, :-1], (0, 0, 1, 0))
        token = torch.cat([steps.obs, before, steps.togo.unsqueeze(2)], 2).flatten(0, 1)
        x_MD = self.embed_norm(self.embed(token))
        x_TMD = x_MD.expand(self.config.spike_steps, *x_MD.shape)
        for block in self.blocks:
            x_TMD = block(x_TMD, steps.there, training, kernel)
        if self.norm is not None:
            x_TMD = self.norm(x_TMD, training, kernel.rows)
        act: Tensor = torch.tanh(self.head(x_TMD.mean(0)))
        return act.view(*steps.there.shape, self.act_dim)

    def counts(self, steps: Contexts) -> tuple[list[Tensor], list[Tensor]]:
        """Counts of spikes, and of voltages inside the surrogate window, (N,) for each layer of
        neurons, summed over the spike steps of all tokens that are not padding.
        """
        there_M = steps.there.flatten()
        spikes, inside = list[Tensor](), list[Tensor]()

        def watched(neuron: Neuron, drive_TMN: Tensor) -> Tensor:
            state, states = neuron.initial(drive_TMN[0]), list[State]()
            for drive in drive_TMN:
                state = neuron.step(drive, state)
                states.append(state)
            fired = torch.stack([state.spikes_BN for state in states])
            passed = torch.stack([neuron.passes(state) for state in states])
            for counts, which in ((spikes, fired), (inside, passed)):
                counts.append(which[:, there_M].double().sum((0, 1)).cpu())
            return fired

        self(steps, None, reference.parts._replace(scan=watched))
        return spikes, inside

    @property
    def norms(self) -> list[TDBN]:
        return [part for part in self.modules() if isinstance(part, TDBN)]

    def schedule(self, share: float) -> None:
        """Set theta of the norms and the surrogates' slopes after this share of a run."""
        span = self.config.norm_share
        for part in self.modules():
            if isinstance(part, PTBN):
                part.theta = max(1.0 - share / span, 0.0) if span > 0.0 else 0.0
            elif isinstance(part, Neuron):
                part.schedule(min(share, 1.0))

    def inference(self) -> Spikeformer:
        """The network as it acts, with normalisation folded into the weights."""
        assert self.norm is not None
        state = {name: p.detach().clone() for name, p in self.state_dict().items()}
        for name, part in self.named_modules():
            if isinstance(part, NormedLinear):
                state |= {f"{name}.{key}": value for key, value in part.folded().items()}
        state |= {f"head.{k}": v for k, v in folded_behind(self.norm, self.head).items()}
        with torch.device("meta"):
            small = Spikeformer(
                self.obs_dim, self.act_dim, self.config, self.neuron, kernel=self.kernel,
                folded=True,
            )  # fmt: skip
        own = small.state_dict()
        small.load_state_dict({name: state[name] for name in own}, assign=True)
        copy_slopes(small, self)
        return small
