"""Reads an actor's config from plain data, builds its network, and prepares that for acting."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from spikerl.models.actor import Actor, MLPActor, SpikingActor
from spikerl.models.actor_config import (
    ActorConfig,
    CareBNConfig,
    CNNConfig,
    ConvSANConfig,
    MLPConfig,
    PopSANConfig,
    ProposalConfig,
)
from spikerl.models.sequence import ConditionConfig, SequenceConfig
from spikerl.models.spikeformer import Spikeformer, SpikeformerConfig
from spikerl.models.transformer import Transformer, TransformerConfig
from spikerl.schema import Registry, parse
from spikerl.snn.conv import ConvConfig
from spikerl.snn.decoders import DECODERS
from spikerl.snn.encoders import ENCODERS
from spikerl.snn.neurons import NEURONS, copy_slopes

SequenceActor = Spikeformer | Transformer
ACTOR_GROUPS = ("actor", "encoder", "neuron", "decoder")

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


def parse_actor(data: dict[str, Any]) -> ActorConfig:
    """Parse the actor's groups of a config; a dense actor has no spiking groups."""
    actor = ACTORS.parse(data.get("actor"))
    proposals = None
    if (given := data.get("proposals")) is not None:
        proposals = parse(ProposalConfig, given, key="proposals")
    if isinstance(actor, SequenceConfig):
        neuron = NEURONS.parse(data.get("neuron")) if isinstance(actor, SpikeformerConfig) else None
        conditioning = None
        if (given := data.get("conditioning")) is not None:
            conditioning = parse(ConditionConfig, given, key="conditioning")
        return ActorConfig(
            actor=actor, encoder=None, neuron=neuron, decoder=None, conditioning=conditioning
        )
    if not isinstance(actor, PopSANConfig):
        return ActorConfig(
            actor=actor, encoder=None, neuron=None, decoder=None, proposals=proposals
        )
    return ActorConfig(
        actor=actor,
        encoder=ENCODERS.parse(data.get("encoder")),
        neuron=NEURONS.parse(data.get("neuron")),
        decoder=DECODERS.parse(data.get("decoder")),
        proposals=proposals,
    )


def modules_of(config: ActorConfig) -> set[str]:
    """Names of the modules that define or register the options chosen in the actor's groups."""
    registries: list[tuple[Registry[Any, Any], Any]] = [
        (ACTORS, config.actor),
        (ENCODERS, config.encoder),
        (NEURONS, config.neuron),
        (DECODERS, config.decoder),
    ]
    return set[str]().union(*(registry.modules(part) for registry, part in registries if part))


def least_obs(config: ActorConfig) -> int:
    """Entries of the smallest observation that this actor accepts."""
    return config.actor.pixels if isinstance(config.actor, ConvConfig) else 1


def build_actor(
    config: ActorConfig,
    obs_dim: int,
    act_dim: int,
    *,
    dtype: torch.dtype = torch.float32,
    kernel: str = "reference",
) -> Actor:
    kind: Any = ACTORS.part(config.actor)
    if isinstance(config.actor, MLPConfig):
        actor: Actor = kind(obs_dim, act_dim, config.actor, dtype=dtype, kernel=kernel)
        return actor
    encoder, neuron, decoder = config.encoder, config.neuron, config.decoder
    if encoder is None or neuron is None or decoder is None:
        raise ValueError("a spiking actor needs an encoder, a neuron and a decoder")
    actor = kind(
        obs_dim, act_dim, config.actor, encoder, neuron, decoder, dtype=dtype, kernel=kernel
    )
    return actor


def build_sequence(
    config: ActorConfig,
    obs_dim: int,
    act_dim: int,
    *,
    kernel: str = "reference",
    folded: bool = False,
) -> SequenceActor:
    """`folded`: build the network that acts, with normalisation folded into its weights."""
    kind: Any = ACTORS.part(config.actor)
    if isinstance(config.actor, TransformerConfig):
        actor: SequenceActor = kind(obs_dim, act_dim, config.actor, kernel=kernel)
        return actor
    if config.neuron is None:
        raise ValueError("a spikeformer needs a neuron")
    actor = kind(obs_dim, act_dim, config.actor, config.neuron, kernel=kernel, folded=folded)
    return actor


def build_network(
    config: ActorConfig,
    obs_dim: int,
    act_dim: int,
    *,
    dtype: torch.dtype = torch.float32,
    kernel: str = "reference",
) -> Actor | SequenceActor:
    """The network as it is trained."""
    if isinstance(config.actor, SequenceConfig):
        return build_sequence(config, obs_dim, act_dim, kernel=kernel)
    return build_actor(config, obs_dim, act_dim, dtype=dtype, kernel=kernel)


def inference_actor(
    config: ActorConfig, actor: Actor | SequenceActor, act_dim: int
) -> tuple[ActorConfig, Actor | SequenceActor]:
    """A trained network as it acts: only its first `act_dim` outputs, normalisation folded into the
    weights. Returns it with its config; both are unchanged if that is already their form.
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
    copy_slopes(small, actor)
    return config, small


@torch.no_grad()
def copy_weights(actor: nn.Module, source: nn.Module) -> None:
    """Copy the weights of `source`, which may have only the first of the actor's outputs."""
    own = actor.state_dict()
    for name, p in source.state_dict().items():
        own[name][tuple(slice(n) for n in p.shape)] = p
