"""Actors: spiking, and dense.

Shape legend   B batch, O observation entries, A action entries, N neurons.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from spikerl import kernels
from spikerl.errors import BadRequest
from spikerl.kernels import reference
from spikerl.kernels.gradient import Pullback
from spikerl.models.sequence import ConditionConfig, SequenceConfig
from spikerl.models.spikeformer import Spikeformer, SpikeformerConfig
from spikerl.models.transformer import Transformer, TransformerConfig
from spikerl.schema import Registry, check_sizes
from spikerl.snn.batchnorm import RECALIBRATE, CaReBN
from spikerl.snn.conv import ConvConfig
from spikerl.snn.decoders import DECODERS, DecoderConfig
from spikerl.snn.early_exit import EarlyExit
from spikerl.snn.encoders import ENCODERS, EncoderConfig
from spikerl.snn.linear import Linear, Linears, ListOf
from spikerl.snn.neurons import NEURONS, Neuron, NeuronConfig


def check_prune(share: float | None) -> None:
    if share is not None and not 0.0 < share < 1.0:
        raise BadRequest("actor.prune", share, "give a share above 0 and below 1, or null")


@dataclass(kw_only=True)
class PopSANConfig:
    """Population-coded spiking actor (Tang et al., CoRL 2020, arXiv:2010.09635)."""

    name: str
    hidden_sizes: list[int]
    spike_steps: int  # T, spike steps per decision
    lr: float  # of the actor's Adam
    # Of the loss: a layer's cost times the mean number of its spikes per neuron and spike step. One
    # for all layers, or a list of one for each, the output population last.
    spike_cost: Any = 0.0
    spike_cost_start: int = 0  # steps before which spikes cost nothing
    spike_cost_warmup: int = 0  # steps, from there on, over which the costs rise from 0
    prune: float | None = None  # share of each matrix of weights that is 0 from the first step on

    def __post_init__(self) -> None:
        check_sizes("actor.hidden_sizes", self.hidden_sizes)
        check_prune(self.prune)
        if not 1 <= self.spike_steps <= 1000:
            raise BadRequest("actor.spike_steps", self.spike_steps, "give 1 to 1000")
        if not self.lr > 0.0:
            raise BadRequest("actor.lr", self.lr, "give a value above 0")
        costs = self.spike_cost if isinstance(self.spike_cost, list) else [self.spike_cost]
        real = all(type(cost) in (int, float) and 0.0 <= cost < math.inf for cost in costs)
        if not real or not costs:
            remedy = "give a number of 0 or more, or a list of one for each layer"
            raise BadRequest("actor.spike_cost", self.spike_cost, remedy)
        for key in ("spike_cost_start", "spike_cost_warmup"):
            if getattr(self, key) < 0:
                raise BadRequest(f"actor.{key}", getattr(self, key), "give 0 or more")

    def spike_costs(self, layers: int) -> list[float]:
        """Of each layer; empty where spikes cost nothing."""
        given = self.spike_cost
        costs = given if isinstance(given, list) else [given] * layers
        if len(costs) != layers:
            remedy = f"the actor has {layers} spiking layers; give one number, or as many as those"
            raise BadRequest("actor.spike_cost", given, remedy)
        return [float(cost) for cost in costs] if any(costs) else []


@dataclass(kw_only=True)
class CareBNConfig(PopSANConfig):
    """The same with CaRe-BN between a layer's weights and its neurons (arXiv:2509.23791)."""

    recalibration_interval: int | None  # steps; null: running moments are only followed
    recalibration_batches: int  # of algo.batch_size observations

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recalibration_interval is not None and self.recalibration_interval < 1:
            remedy = "give at least 1, or null"
            raise BadRequest("actor.recalibration_interval", self.recalibration_interval, remedy)
        if self.recalibration_batches < 1:
            remedy = "give at least 1"
            raise BadRequest("actor.recalibration_batches", self.recalibration_batches, remedy)


@dataclass(kw_only=True)
class MLPConfig:
    """Dense baseline: ReLU layers and tanh."""

    name: str
    hidden_sizes: list[int]
    lr: float
    prune: float | None = None  # as of PopSANConfig

    def __post_init__(self) -> None:
        check_sizes("actor.hidden_sizes", self.hidden_sizes)
        check_prune(self.prune)
        if not self.lr > 0.0:
            raise BadRequest("actor.lr", self.lr, "give a value above 0")


@dataclass(kw_only=True)
class ConvSANConfig(ConvConfig, PopSANConfig):
    """Spiking convolutions before the spiking layers (DSQN, arXiv:2201.09754)."""

    def __post_init__(self) -> None:
        PopSANConfig.__post_init__(self)
        self.check()


@dataclass(kw_only=True)
class CNNConfig(ConvConfig, MLPConfig):
    """Their dense twin: ReLU convolutions before the ReLU layers."""

    def __post_init__(self) -> None:
        MLPConfig.__post_init__(self)
        self.check()


@dataclass(kw_only=True)
class ProposalConfig:
    """Of a policy that chooses among proposed actions (`models/proposals.py`)."""

    samples: int  # n, from which it chooses
    phi: float  # most that the actor changes one
    hidden_sizes: list[int]  # of what proposes
    critic_hidden_sizes: list[int]  # of what chooses

    def __post_init__(self) -> None:
        check_sizes("proposals.hidden_sizes", self.hidden_sizes)
        check_sizes("proposals.critic_hidden_sizes", self.critic_hidden_sizes)
        if not (1 <= self.samples <= 1000 and 0.0 <= self.phi <= 2.0):
            raise BadRequest("proposals.samples", self.samples, "give 1 to 1000; phi 0 to 2")


@dataclass(kw_only=True)
class ActorConfig:
    """What an actor's shape and arithmetic depend on; a dense actor has no spiking parts, and one
    over sequences neurons alone.
    """

    actor: PopSANConfig | MLPConfig | SequenceConfig
    encoder: EncoderConfig | None
    neuron: NeuronConfig | None
    decoder: DecoderConfig | None
    proposals: ProposalConfig | None = None  # else the actor's outputs are the actions
    conditioning: ConditionConfig | None = None  # of a saved policy over sequences

    def parts(self) -> list[type[Any]]:
        """The classes that it configures."""
        parts: list[type[Any]] = [ACTORS.part(self.actor)]
        if self.encoder:
            parts.append(ENCODERS.part(self.encoder))
        if self.neuron:
            parts.append(NEURONS.part(self.neuron))
        if self.decoder:
            parts.append(DECODERS.part(self.decoder))
        return parts

    def shape(self) -> str:
        """Whatever two actors must share for one to take the other's weights."""
        if isinstance(self.actor, SequenceConfig):
            return self.actor.shape()
        text = f"{self.actor.name} {self.actor.hidden_sizes}"
        if isinstance(self.actor, ConvConfig):
            c = self.actor
            text += f" behind {c.filters} filters of {c.kernel_sizes}, {c.strides} on {c.image}"
        if self.encoder and self.decoder and self.neuron:
            text += f" with {self.encoder.name}, {self.neuron.name}, {self.decoder.name}"
            sizes = [getattr(part, "pop_size", None) for part in (self.encoder, self.decoder)]
            text += f", populations {sizes[0]}, {sizes[1]}"
        if self.proposals:
            text += ", choosing among proposals"
        return text


@dataclass(eq=False)
class Activity:
    """How a spiking actor fires: counts of each neuron, over observations and spike steps."""

    spikes: list[Tensor]  # of the encoder, of each hidden layer, of the output: (N,)
    inside: list[Tensor]  # voltages inside the surrogate window, the same but for the encoder
    samples: int  # spike steps of all observations
    observations: int
    encoder_spikes: bool = True  # else it gives currents, whose sums have no meaning here

    def __add__(self, other: Activity) -> Activity:
        spikes = [a + b for a, b in zip(self.spikes, other.spikes, strict=True)]
        inside = [a + b for a, b in zip(self.inside, other.inside, strict=True)]
        samples = self.samples + other.samples
        observations = self.observations + other.observations
        return Activity(spikes, inside, samples, observations, self.encoder_spikes)

    @property
    def spike_steps(self) -> float:
        """Of a decision, mean over observations."""
        return self.samples / self.observations

    @property
    def firing_rate(self) -> float:
        """Spikes per spike step, mean over all hidden and output neurons."""
        return float(torch.cat(self.spikes[1:]).mean()) / self.samples

    @property
    def window_fraction(self) -> float:
        """Of their voltages, those that a gradient passes."""
        return float(torch.cat(self.inside).mean()) / self.samples

    @property
    def layers(self) -> list[float | None]:
        """Firing rates of the encoder (None where it gives currents) and of each layer."""
        rates = [float(counts.mean()) / self.samples for counts in self.spikes]
        return [rates[0] if self.encoder_spikes else None, *rates[1:]]

    @property
    def layer_windows(self) -> list[float]:
        """Window fractions, without the encoder's."""
        return [float(counts.mean()) / self.samples for counts in self.inside]

    @property
    def silent(self) -> list[float]:
        """Shares of neurons that never fired, without the encoder's."""
        return [float((counts == 0).double().mean()) for counts in self.spikes[1:]]

    @property
    def saturated(self) -> list[float]:
        """Shares of neurons that always fired, without the encoder's."""
        return [float((counts == self.samples).double().mean()) for counts in self.spikes[1:]]


class SpikingActor(nn.Module):
    """Encoder, spiking layers, decoder, tanh: (B, O) -> (B, A) in [-1, 1]."""

    def __init__(
        self,
        obs_dim: int,
        act_dim: int,
        actor: PopSANConfig,
        encoder: EncoderConfig,
        neuron: NeuronConfig,
        decoder: DecoderConfig,
        *,
        dtype: torch.dtype = torch.float32,
        kernel: str = "reference",
    ) -> None:
        super().__init__()
        self.obs_dim, self.act_dim = obs_dim, act_dim
        self.spike_steps, self.kernel = actor.spike_steps, kernel
        self.early_exit: EarlyExit | None = None  # of a policy that acts; training has none
        # Of the layers' products; voltages and thresholds keep the weights' type.
        self.dtype = dtype
        self.encoder = ENCODERS.part(encoder)(encoder, obs_dim, actor.spike_steps)
        hidden = actor.hidden_sizes
        decodes = DECODERS.part(decoder)
        population = decodes.population(decoder, act_dim)
        sizes = [self.encoder.outputs, *hidden, *([population] if population else [])]
        self.layers = Linears(sizes, convolutions(actor, sizes[0]))
        self.neurons = ListOf[Neuron](NEURONS.part(neuron)(neuron) for _ in self.layers)
        normed = sizes[1:] if isinstance(actor, CareBNConfig) else []
        self.norms = ListOf[CaReBN](CaReBN(size, neuron.threshold) for size in normed)
        self.decoder = decodes(decoder, act_dim, hidden[-1], actor.spike_steps)
        self.spike_costs = actor.spike_costs(len(self.layers))  # in the end; empty: nothing
        self.spike_cost_start = actor.spike_cost_start
        self.spike_cost_warmup = actor.spike_cost_warmup
        self.spike_cost_L: Tensor | None = None  # now

    def forward(self, obs_BO: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Actions; `generator` is drawn from only where the encoder is random."""
        return kernels.named(self.kernel).actions(self, obs_BO, generator)

    def mean(self, obs_BO: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Actions before their tanh."""
        return kernels.named(self.kernel).actions(self, obs_BO, generator, False)

    def vjp(
        self, obs_BO: Tensor, generator: torch.Generator | None, squash: bool = True
    ) -> tuple[Tensor, Pullback]:
        """Actions, or what they are the tanh of, and the way back to the parameters' gradient."""
        return kernels.named(self.kernel).vjp(self, obs_BO, generator, squash)

    def schedule(self, step: int, total_steps: int) -> None:
        """Give the surrogates their slopes, and spikes their costs, after `step` steps of a run."""
        for neuron in self.neurons:
            neuron.schedule(min(step / total_steps, 1.0))
        if not self.spike_costs:
            return
        if self.spike_cost_L is None:  # one place, from which a recorded update reads it
            self.spike_cost_L = self.layers[0].weight_IN.new_zeros(len(self.spike_costs))
        behind = step - self.spike_cost_start
        share = min(behind / self.spike_cost_warmup, 1.0) if self.spike_cost_warmup else 1.0
        now = share if behind >= 0 else 0.0
        costs = [now * cost for cost in self.spike_costs]
        self.spike_cost_L.copy_(torch.tensor(costs, dtype=torch.float64))

    @property
    def carries(self) -> bool:
        """Whether a decision depends on the one before."""
        return any(neuron.carries for neuron in self.neurons)

    @torch.no_grad()
    def recalibrate(self, batches: Iterable[Tensor], generator: torch.Generator | None) -> None:
        """Measure the moments that drives are normalised with anew, on all these observations."""
        for norm in self.norms:
            norm.begin_recalibration()
        for obs_BO in batches:
            reference.spikes(self, obs_BO, generator, moments=RECALIBRATE)
        for norm in self.norms:
            norm.end_recalibration()

    def activity(self, obs_BO: Tensor, generator: torch.Generator | None = None) -> Activity:
        """Over any number of observations, in pieces of bounded memory."""
        activity = None
        for piece in obs_BO.split(1024):
            layers, states = reference.record(self, piece, generator)
            inside = [
                torch.stack([neuron.passes(state) for state in own])
                for neuron, own in zip(self.neurons, states, strict=True)
            ]
            taken_TB1 = reference.taken(self, layers[-1])
            part = Activity(
                [(s * taken_TB1).double().sum((0, 1)).cpu() for s in layers],
                [(near * taken_TB1).double().sum((0, 1)).cpu() for near in inside],
                int(taken_TB1.sum()),
                len(piece),
                self.encoder.spikes,
            )
            activity = activity + part if activity else part
        assert activity is not None
        return activity


class MLPActor(nn.Module):
    """Dense actor, (B, O) -> (B, A) in [-1, 1]."""

    carries = False

    def __init__(
        self,
        obs_dim: int,
        act_dim: int,
        actor: MLPConfig,
        *,
        dtype: torch.dtype = torch.float32,
        kernel: str = "reference",
    ) -> None:
        super().__init__()
        self.obs_dim, self.act_dim, self.dtype, self.kernel = obs_dim, act_dim, dtype, kernel
        sizes = [obs_dim, *actor.hidden_sizes, act_dim]
        self.layers = Linears(sizes, convolutions(actor, obs_dim))

    def forward(self, obs_BO: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return kernels.named(self.kernel).dense_actions(self, obs_BO)

    def mean(self, obs_BO: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Actions before their tanh."""
        return kernels.named(self.kernel).dense_actions(self, obs_BO, False)

    def vjp(
        self, obs_BO: Tensor, generator: torch.Generator | None, squash: bool = True
    ) -> tuple[Tensor, Pullback]:
        """As `SpikingActor.vjp`."""
        return kernels.named(self.kernel).dense_vjp(self, obs_BO, squash)


Actor = SpikingActor | MLPActor
SequenceActor = Spikeformer | Transformer


def convolutions(actor: PopSANConfig | MLPConfig, inputs: int) -> list[Linear]:
    return actor.layers(inputs) if isinstance(actor, ConvConfig) else []


def least_obs(config: ActorConfig) -> int:
    """Entries of the smallest observation that such an actor takes."""
    return config.actor.places if isinstance(config.actor, ConvConfig) else 1


def connections(actor: Actor) -> dict[str, nn.Parameter]:
    """Its weight matrices by name: no biases, no receptive fields, nothing of a neuron."""
    fields = ("encoder.mean_OP", "encoder.std_OP")
    return {n: p for n, p in actor.named_parameters() if p.dim() > 1 and n not in fields}


ACTORS: Registry[Any, Actor | SequenceActor] = Registry(
    "actor",
    popsan=(PopSANConfig, SpikingActor),
    care_bn=(CareBNConfig, SpikingActor),
    conv=(ConvSANConfig, SpikingActor),
    mlp=(MLPConfig, MLPActor),
    cnn=(CNNConfig, MLPActor),
    spikeformer=(SpikeformerConfig, Spikeformer),
    transformer=(TransformerConfig, Transformer),
)


def build_actor(
    config: ActorConfig,
    obs_dim: int,
    act_dim: int,
    *,
    dtype: torch.dtype = torch.float32,
    kernel: str = "reference",
) -> Actor:
    if isinstance(config.actor, MLPConfig):
        return MLPActor(obs_dim, act_dim, config.actor, dtype=dtype, kernel=kernel)
    encoder, neuron, decoder = config.encoder, config.neuron, config.decoder
    if encoder is None or neuron is None or decoder is None:
        raise ValueError("a spiking actor needs an encoder, a neuron and a decoder")
    assert isinstance(config.actor, PopSANConfig)
    return SpikingActor(
        obs_dim, act_dim, config.actor, encoder, neuron, decoder, dtype=dtype, kernel=kernel
    )


def build_sequence(
    config: ActorConfig,
    obs_dim: int,
    act_dim: int,
    *,
    kernel: str = "reference",
    folded: bool = False,
) -> SequenceActor:
    """`folded`: what acts, its normalisation in its weights."""
    if isinstance(config.actor, TransformerConfig):
        return Transformer(obs_dim, act_dim, config.actor, kernel=kernel)
    if not isinstance(config.actor, SpikeformerConfig) or config.neuron is None:
        raise ValueError("a spikeformer needs a neuron")
    return Spikeformer(obs_dim, act_dim, config.actor, config.neuron, kernel=kernel, folded=folded)


def build_network(
    config: ActorConfig,
    obs_dim: int,
    act_dim: int,
    *,
    dtype: torch.dtype = torch.float32,
    kernel: str = "reference",
) -> Actor | SequenceActor:
    """What is trained."""
    if isinstance(config.actor, SequenceConfig):
        return build_sequence(config, obs_dim, act_dim, kernel=kernel)
    return build_actor(config, obs_dim, act_dim, dtype=dtype, kernel=kernel)


def inference_actor(
    config: ActorConfig, actor: Actor | SequenceActor, act_dim: int
) -> tuple[ActorConfig, Actor | SequenceActor]:
    """What acts once it is trained: the first `act_dim` outputs, normalisation in the weights.

    The same two where that is what they are.
    """
    if isinstance(actor, SequenceActor):
        return config, actor.inference()
    if actor.act_dim == act_dim and not isinstance(config.actor, CareBNConfig):
        return config, actor
    with torch.device("meta"):
        small = build_actor(config, actor.obs_dim, act_dim, dtype=actor.dtype)
    own = small.state_dict()
    first = {
        name: p[tuple(slice(n) for n in own[name].shape)].clone()
        for name, p in actor.state_dict().items()
    }
    if isinstance(config.actor, CareBNConfig):
        small.load_state_dict(first, assign=True)
        assert isinstance(small, SpikingActor)
        for i, (layer, norm) in enumerate(zip(small.layers, small.norms, strict=True)):
            weight, bias = norm.folded(layer.weight_IN, layer.bias_N)
            first |= {f"layers.{i}.weight_IN": weight, f"layers.{i}.bias_N": bias}
        first = {name: p for name, p in first.items() if not name.startswith("norms.")}
        c = config.actor
        plain = PopSANConfig(
            name="popsan", hidden_sizes=c.hidden_sizes, spike_steps=c.spike_steps, lr=c.lr
        )
        config = replace(config, actor=plain)
    with torch.device("meta"):
        small = build_actor(config, actor.obs_dim, act_dim, dtype=actor.dtype, kernel=actor.kernel)
    small.load_state_dict(first, assign=True)
    return config, small


@torch.no_grad()
def copy_weights(actor: nn.Module, source: nn.Module) -> None:
    """Give `actor` the weights of `source`, which may have only its first outputs."""
    own = actor.state_dict()
    for name, p in source.state_dict().items():
        own[name][tuple(slice(n) for n in p.shape)] = p
