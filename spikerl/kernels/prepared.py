"""Networks as the C++ library reads them: sizes, constants, and pointers to their parameters."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spikerl.kernels.build import Critic, Net, Neurons, Pointer
from spikerl.kernels.coverage import EQUATIONS, events, why_layered, why_no_matrix
from spikerl.kernels.nets import DenseNet, SpikingNet, ValueNet
from spikerl.snn.decoders import RateDecoder
from spikerl.snn.encoders import (
    AnalogEncoder,
    Encoder,
    PopulationEncoder,
    TanhPopulationEncoder,
)
from spikerl.snn.linear import Linear
from spikerl.snn.neurons import PLIF, Neuron
from spikerl.snn.surrogates import SURROGATES


def fused(net: SpikingNet) -> bool:
    """Whether one call runs the whole network."""
    return why_layered(net) is None and all(map(plain, net.parameters()))


class PreparedActor:
    """A spiking actor; if `fused` is false, only what `moved` compares is set."""

    def __init__(self, net: SpikingNet) -> None:
        self.params = list(net.parameters())
        self.at, self.owners = addresses(self.params), owners(net)
        self.early_exit = net.early_exit
        self.fused = fused(net)
        if not self.fused:
            return
        encoder, neuron, layers = net.encoder, net.neurons[0], list(net.layers)
        assert isinstance(encoder, PopulationEncoder)
        assert isinstance(net.decoder, RateDecoder)
        self.neuron, self.scale = neuron, neuron.scale
        act_dim, out_pop = net.decoder.weight_AP.shape
        widths = [layers[0].weight_IN.shape[0], *(len(layer.bias_N) for layer in layers)]
        self.widths = np.array(widths, np.int32)
        mean, std, *between, out_weight, out_bias = self.at
        of_layers, decays = between[: 2 * len(layers)], between[2 * len(layers) :]
        self.weights, self.biases = pointers(of_layers[0::2]), pointers(of_layers[1::2])
        self.decays = pointers(decays)
        self.net = Net(
            len(encoder.mean_OP), encoder.config.pop_size, act_dim, out_pop, net.spike_steps,
            len(layers), encoder.config.threshold, constants(neuron),
            ctypes.addressof(self.decays) if decays else None, self.widths.ctypes.data, mean, std,
            ctypes.addressof(self.weights), ctypes.addressof(self.biases), out_weight, out_bias,
            isinstance(encoder, AnalogEncoder), isinstance(encoder, TanhPopulationEncoder),
            net.early_exit.steps if net.early_exit else 0,
            net.early_exit.threshold if net.early_exit else 0.0,
        )  # fmt: skip

    def moved(self, net: SpikingNet) -> bool:
        """Whether it must be prepared anew: parameters were replaced (as `load_state_dict` does
        with `assign=True`) or moved, or early exit or the surrogate's slope changed.
        """
        same = unchanged(self.owners) and net.early_exit is self.early_exit
        same &= not self.fused or self.neuron.scale == self.scale  # a schedule changes it
        return not same or addresses(self.params) != self.at


class PreparedLayer:
    """One layer, and the encoder if that is the `source` of its input spikes."""

    def __init__(
        self, layer: Linear, source: Encoder | Neuron, steps: int, dtype: torch.dtype
    ) -> None:
        fields = [source.mean_OP, source.std_OP] if isinstance(source, PopulationEncoder) else []
        self.params = [*fields, layer.weight_IN, layer.bias_N]
        self.fused = events(layer, source, steps, dtype) and all(map(plain, self.params))
        if not self.fused:
            return
        self.widths = np.array(layer.weight_IN.shape, np.int32)
        self.weights, self.biases = (pointers([p.data_ptr()]) for p in self.params[-2:])
        self.net = Net(
            spike_steps=steps, layers=1, widths=self.widths.ctypes.data,
            weights=ctypes.addressof(self.weights), biases=ctypes.addressof(self.biases),
        )  # fmt: skip
        if isinstance(source, PopulationEncoder):
            self.net.obs_dim, self.net.pop_size = source.mean_OP.shape
            self.net.mean, self.net.std = addresses(fields)
            self.net.encoder_threshold = source.config.threshold


class PreparedCritic:
    """Critics: `all` networks, and the `first` alone. bf16 products need `tiles`, AMX units."""

    def __init__(self, net: ValueNet, act_dim: int, tiles: bool) -> None:
        self.params = [*net.weights_CIN, *net.biases_C1N]
        self.at, self.owners = addresses(self.params), owners(net)
        planes = {torch.float32: 3, **({torch.bfloat16: 1} if tiles else {})}.get(net.dtype)
        self.fused = planes is not None and all(map(plain, self.params))
        layers = len(self.params) // 2
        weights = self.params[:layers]
        networks, inputs, _ = weights[0].shape
        self.widths = np.array([inputs, *(w.shape[-1] for w in weights)], np.int32)
        self.places = pointers(self.at[:layers]), pointers(self.at[layers:])
        where = (self.widths.ctypes.data, *map(ctypes.addressof, self.places))
        sizes = (layers, inputs - act_dim, act_dim)
        self.all, self.first = (Critic(n, *sizes, *where, planes or 0) for n in (networks, 1))

    def moved(self) -> bool:
        return not unchanged(self.owners) or addresses(self.params) != self.at


class PreparedDense:
    """A dense network that maps observations to actions."""

    def __init__(self, net: DenseNet) -> None:
        self.params = [p for layer in net.layers for p in (layer.weight_IN, layer.bias_N)]
        self.at, self.owners = addresses(self.params), owners(net)
        self.fused = net.dtype == torch.float32 and all(map(plain, self.params))
        self.fused &= why_no_matrix(net.layers) is None
        widths = [net.layers[0].weight_IN.shape[0], *(len(layer.bias_N) for layer in net.layers)]
        self.widths = np.array(widths, np.int32)
        self.places = pointers(self.at[0::2]), pointers(self.at[1::2])
        where = (self.widths.ctypes.data, *map(ctypes.addressof, self.places))
        self.net = Critic(1, len(widths) - 1, widths[0], 0, *where, 3)

    def moved(self) -> bool:
        return not unchanged(self.owners) or addresses(self.params) != self.at


Owners = list[tuple[dict[str, Any], str, Any]]


def owners(net: Any) -> Owners:
    """For each parameter in `net`: the dictionary that holds it, its name there, and itself."""
    modules: list[nn.Module] = list(net.modules())
    return [(m._parameters, name, p) for m in modules for name, p in m._parameters.items()]


def unchanged(owners: Owners) -> bool:
    return all(parameters[name] is param for parameters, name, param in owners)


def covered(
    ready: PreparedActor | PreparedLayer | PreparedCritic | PreparedDense, *inputs: Tensor
) -> bool:
    """Whether the library runs it on these inputs, provided that `check_shape` accepts them."""
    return ready.fused and all(x.dtype == torch.float32 and x.device.type == "cpu" for x in inputs)


def check_shape(given: Tensor, *shape: int) -> None:
    """Raise ValueError for another shape: the library would read out of bounds, and PyTorch would
    broadcast.
    """
    if given.shape != shape:
        raise ValueError(f"a tensor of shape {tuple(given.shape)} where {shape} is due")


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def pointers(at: Sequence[int]) -> ctypes.Array[Any]:
    return (Pointer * len(at))(*at)


def constants(neuron: Neuron) -> Neurons:
    """Constants of equation and surrogate; a learned decay is passed separately for each layer."""
    c = neuron.config
    places = {
        "equation": EQUATIONS[type(neuron), c.reset],
        "surrogate": SURROGATES.index(c.surrogate),
    }
    given = {"scale": neuron.scale, "start": getattr(c, "start", 0.0) * c.threshold}
    if isinstance(neuron, PLIF):
        given["voltage_decay"] = 0.0
    for name in (field[0] for field in Neurons._fields_[2:]):
        given.setdefault(name, getattr(c, name, 1.0 if name == "voltage_decay" else 0.0))
    return Neurons(**places, **given)


def plain(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.is_contiguous()
