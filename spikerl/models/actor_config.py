"""Config classes of actors: one for each kind, and `ActorConfig` for all groups together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from spikerl.errors import BadRequest
from spikerl.models.sequence import ConditionConfig, SequenceConfig
from spikerl.schema import check_sizes
from spikerl.snn.conv import ConvConfig
from spikerl.snn.decoders import DecoderConfig
from spikerl.snn.encoders import EncoderConfig
from spikerl.snn.neurons import NeuronConfig

MOST_SPIKE_STEPS = 1000


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
    # Added to the loss: a layer's cost times its mean number of spikes per neuron and spike step. A
    # number for all layers, or a list with one for each layer, the output population last.
    spike_cost: Any = 0.0
    spike_cost_start: int = 0  # steps before which spikes cost nothing
    spike_cost_warmup: int = 0  # steps, from there on, over which the costs rise from 0
    prune: float | None = None  # share of each weight matrix that is 0 throughout training

    def __post_init__(self) -> None:
        check_sizes("actor.hidden_sizes", self.hidden_sizes)
        check_prune(self.prune)
        if not 1 <= self.spike_steps <= MOST_SPIKE_STEPS:
            raise BadRequest("actor.spike_steps", self.spike_steps, f"give 1 to {MOST_SPIKE_STEPS}")
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

    @property
    def spikes_cost(self) -> bool:
        return any(self.spike_cost) if isinstance(self.spike_cost, list) else self.spike_cost > 0.0

    def spike_costs(self, layers: int) -> list[float]:
        """The cost of each layer's spikes; empty if spikes cost nothing."""
        given = self.spike_cost
        costs = given if isinstance(given, list) else [given] * layers
        if len(costs) != layers:
            remedy = f"the actor has {layers} spiking layers; give one number, or as many as those"
            raise BadRequest("actor.spike_cost", given, remedy)
        return [float(cost) for cost in costs] if self.spikes_cost else []


@dataclass(kw_only=True)
class CareBNConfig(PopSANConfig):
    """PopSAN with CaRe-BN between a layer's weights and its neurons (arXiv:2509.23791)."""

    recalibration_interval: int | None  # steps between recalibrations; null: none
    recalibration_batches: int  # batches per recalibration, of algo.batch_size observations each

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
    prune: float | None = None  # as in PopSANConfig

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
    """Dense counterpart of `ConvSANConfig`: ReLU convolutions before the ReLU layers."""

    def __post_init__(self) -> None:
        MLPConfig.__post_init__(self)
        self.check()


@dataclass(kw_only=True)
class ProposalConfig:
    """Keys of a policy that chooses among proposed actions (`models/proposals.py`)."""

    samples: int  # n, proposals for each observation
    phi: float  # largest change of a proposal by the actor, in units of half the action range
    hidden_sizes: list[int]  # of the decoder that proposes
    critic_hidden_sizes: list[int]  # of the critic that chooses

    def __post_init__(self) -> None:
        check_sizes("proposals.hidden_sizes", self.hidden_sizes)
        check_sizes("proposals.critic_hidden_sizes", self.critic_hidden_sizes)
        if not (1 <= self.samples <= 1000 and 0.0 <= self.phi <= 2.0):
            raise BadRequest("proposals.samples", self.samples, "give 1 to 1000; phi 0 to 2")


@dataclass(kw_only=True)
class ActorConfig:
    """All settings that an actor's shape and arithmetic depend on. A dense actor has none of the
    spiking groups; an actor over sequences has at most a neuron.
    """

    actor: PopSANConfig | MLPConfig | SequenceConfig
    encoder: EncoderConfig | None
    neuron: NeuronConfig | None
    decoder: DecoderConfig | None
    proposals: ProposalConfig | None = None  # None: the actor's outputs are the actions
    conditioning: ConditionConfig | None = None  # only in a saved policy over sequences

    def unread(self) -> dict[str, str]:
        """Keys that have no effect with these settings, each with a remedy for the user."""
        actor, encoder, neuron, keys = self.actor, self.encoder, self.neuron, dict[str, str]()
        if neuron:
            key = "surrogate_slope" if neuron.surrogate == "rect" else "surrogate_window"
            keys[f"neuron.{key}"] = f"surrogate={neuron.surrogate} has none; leave it out"
        if encoder and encoder.name in ("poisson", "analog"):
            keys["encoder.threshold"] = f"encoder={encoder.name} has none; leave it out"
        if isinstance(actor, PopSANConfig) and not actor.spikes_cost:
            remedy = "spikes cost nothing; set actor.spike_cost, or leave it out"
            keys |= dict.fromkeys(("actor.spike_cost_start", "actor.spike_cost_warmup"), remedy)
        if isinstance(actor, CareBNConfig) and actor.recalibration_interval is None:
            remedy = "set actor.recalibration_interval, or leave it out"
            keys["actor.recalibration_batches"] = remedy
        if isinstance(actor, SequenceConfig):
            keys |= {f"actor.{key}": remedy for key, remedy in actor.unread().items()}
        return keys

    def constants(self) -> dict[str, Any]:
        """By key, the constants that together with the weights determine the actions."""
        groups = {"encoder": self.encoder, "neuron": self.neuron, "decoder": self.decoder}
        keys = {f"{g}.{k}": v for g, part in groups.items() if part for k, v in vars(part).items()}
        if isinstance(self.actor, PopSANConfig):
            keys["actor.spike_steps"] = self.actor.spike_steps
        # mean_range and var only set initial weights.
        unused = {"encoder.mean_range", "encoder.var", *self.unread()}
        if self.neuron and self.neuron.name == "plif":
            unused.add("neuron.voltage_decay")
        unused |= {key for key in keys if key.startswith("neuron.surrogate")}
        return {key: value for key, value in keys.items() if key not in unused}

    def shape(self) -> str:
        """Description of everything that two actors must share to exchange weights."""
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
            if "learned" in (self.encoder.name, self.decoder.name):  # weights for each spike step
                assert isinstance(self.actor, PopSANConfig)
                text += f", {self.actor.spike_steps} spike steps"
        if self.proposals:
            text += ", choosing among proposals"
        return text
