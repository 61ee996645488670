"""What the compiled kernels cover; the rest runs in PyTorch, and the manifest says so."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from spikerl.kernels.reference import SpikingNet
from spikerl.snn.decoders import RateDecoder
from spikerl.snn.encoders import PoissonEncoder, PopulationEncoder, TanhPopulationEncoder
from spikerl.snn.linear import Linear
from spikerl.snn.neurons import CubaLIF, Neuron

MAX_LAYERS, MAX_STEPS = 16, 32  # of csrc/spiking.h
ENCODERS = (PopulationEncoder, PoissonEncoder, TanhPopulationEncoder)


def why_no_scan(neuron: Neuron) -> str | None:
    """Why no kernel runs a layer's neurons over all spike steps; None where each does."""
    c = neuron.config
    if type(neuron) is not CubaLIF:
        return f"neuron={c.name}, which runs in PyTorch"
    if c.reset != "hard" or c.surrogate != "rect":
        return f"neuron.reset={c.reset} and neuron.surrogate={c.surrogate}, which run in PyTorch"
    return None


def why_no_matrix(layers: Iterable[Linear]) -> str | None:
    """Why no kernel runs such layers' products; None where each does."""
    plain = all(type(layer) is Linear for layer in layers)
    return None if plain else "convolutions, which run in PyTorch"


def why_layered(net: SpikingNet) -> str | None:
    """Why kernel=cpu runs a network layer by layer; None where one call runs all of it."""
    encoder, decoder = net.encoder, net.decoder
    if net.dtype != torch.float32:
        return f"products in {str(net.dtype).removeprefix('torch.')}"
    if type(encoder) not in ENCODERS:
        kind = "runs in PyTorch" if encoder.spikes else "gives currents"
        return f"encoder={encoder.config.name}, which {kind}"
    if len(net.norms):
        return "normalised drives"
    if why := why_no_matrix(net.layers):
        return why
    if why := why_no_scan(net.neurons[0]):
        return why
    if type(decoder) is not RateDecoder:
        return f"decoder={decoder.config.name}, which runs in PyTorch"
    if net.spike_steps > MAX_STEPS:
        return f"more than {MAX_STEPS} spike steps"
    return f"more than {MAX_LAYERS} layers" if len(net.layers) > MAX_LAYERS else None
