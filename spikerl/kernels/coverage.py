"""Which networks and layers the compiled kernels cover; others run in PyTorch, as the manifest
records.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from spikerl.kernels.nets import SpikingNet
from spikerl.snn.decoders import RateDecoder
from spikerl.snn.encoders import (
    AnalogEncoder,
    Encoder,
    PoissonEncoder,
    PopulationEncoder,
    TanhPopulationEncoder,
)
from spikerl.snn.linear import Linear
from spikerl.snn.neurons import ALIF, PLIF, CubaLIF, Dynamic, Neuron, ResidualIF

MAX_LAYERS, MAX_STEPS = 16, 32  # as in csrc/spiking.h and csrc/neurons.h
MAX_INPUTS = 1 << 23  # per layer: lists of spikes store an input's number in 24 bits
COVERED_ENCODERS = (PopulationEncoder, PoissonEncoder, TanhPopulationEncoder, AnalogEncoder)
# The numbers of `with_neuron` in csrc/neurons.h for a neuron and its reset. A surrogate's number is
# its index in snn.surrogates.SURROGATES.
EQUATIONS: dict[tuple[type[Neuron], str], int] = {
    (CubaLIF, "hard"): 0,
    (CubaLIF, "soft"): 1,
    (ResidualIF, "soft"): 1,  # with an initial voltage of its own
    (PLIF, "hard"): 2,
    (PLIF, "soft"): 3,
    (ALIF, "hard"): 4,
    (ALIF, "soft"): 5,
    (Dynamic, "hard"): 6,
}


def why_no_scan(neuron: Neuron) -> str | None:
    """Why kernel=cpu does not run a layer's neurons over all spike steps; None if it does."""
    if (type(neuron), neuron.config.reset) not in EQUATIONS:
        return f"neuron={neuron.config.name}, which runs in PyTorch"
    return None


def triton_scans(neuron: Neuron) -> bool:
    """Whether kernel=triton runs a layer's neurons over all spike steps."""
    c = neuron.config
    return type(neuron) is CubaLIF and c.reset == "hard" and c.surrogate == "rect"


def why_no_matrix(layers: Iterable[Linear]) -> str | None:
    """Why the kernels do not compute these layers' products; None if they do."""
    plain = all(type(layer) is Linear for layer in layers)
    return None if plain else "convolutions, which run in PyTorch"


def events(layer: Linear, source: Encoder | Neuron, steps: int, dtype: torch.dtype) -> bool:
    """Whether kernel=cpu, when it runs layer by layer, computes a layer's products from lists of
    input spikes; `source`, the neuron or encoder that fires them, must be known to give 0 or 1.
    """
    if isinstance(source, Neuron):
        spikes = why_no_scan(source) is None
    else:
        spikes = type(source) in COVERED_ENCODERS and source.spikes
    plain = dtype == torch.float32 and why_no_matrix([layer]) is None
    few = steps <= MAX_STEPS and len(layer.weight_IN) <= MAX_INPUTS
    return spikes and plain and few


def why_layered(net: SpikingNet) -> str | None:
    """Why kernel=cpu runs a network layer by layer; None if one call runs all of it."""
    encoder, decoder = net.encoder, net.decoder
    if net.dtype != torch.float32:
        return f"products in {str(net.dtype).removeprefix('torch.')}"
    if type(encoder) not in COVERED_ENCODERS:
        kind = "runs in PyTorch" if encoder.spikes else "gives currents"
        return f"encoder={encoder.config.name}, which {kind}"
    if len(net.norms):
        return "normalised drives"
    if why := why_no_matrix(net.layers):
        return why
    if why := why_no_scan(net.neurons[0]):
        return why
    if net.neurons[0].carries:
        return "residuals that a decision leaves to the next"
    if type(decoder) is not RateDecoder:
        return f"decoder={decoder.config.name}, which runs in PyTorch"
    if net.spike_steps > MAX_STEPS:
        return f"more than {MAX_STEPS} spike steps"
    if any(len(layer.weight_IN) > MAX_INPUTS for layer in net.layers):
        return f"more than {MAX_INPUTS} inputs"
    return f"more than {MAX_LAYERS} layers" if len(net.layers) > MAX_LAYERS else None
