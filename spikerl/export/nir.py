"""Format `nir`: the spiking layers as a graph of the Neuromorphic Intermediate Representation.

NIR's neurons are differential equations; a spike step is one Euler step of dt = 1e-4 s, the current
first and the voltage from the new current:

`cuba_lif`      CubaLIF: tau_syn dI/dt = -I + w_in S,  tau_mem dv/dt = v_leak - v + r I
                with tau = dt / (1 - decay), w_in = tau_syn / dt, r = tau_mem / dt
`lif`, `plif`   LIF: tau dv/dt = v_leak - v + r I, with r = tau / dt

All fire strictly above v_threshold and are then set to v_reset = 0. The parts before the first
layer (normaliser, encoder) and after the last (decoder, action) are in the contract.

Shape legend   T spike steps, B observations, N neurons of a layer.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from spikerl.errors import BadRequest
from spikerl.export.host import Host
from spikerl.models.actor import SpikingActor
from spikerl.models.policy import Policy
from spikerl.snn.neurons import PLIF, CubaLIF, CubaLIFConfig, Neuron

DT = 1e-4  # seconds; the step that snnTorch's reader assumes
DEFLATED = 1032  # largest ratio of unpacked to packed size in deflate


def check_here() -> None:
    """Raise BadRequest if the package is not installed."""
    if find_spec("nir") is None:
        remedy = "nir is not installed; pip install 'spikerl[nir]'"
        raise BadRequest("format", "nir", remedy)


def write(policy: Policy, path: Path) -> None:
    nir: Any = import_module("nir")
    actor = policy.actor
    assert isinstance(actor, SpikingActor)
    nodes = {"input": nir.Input({"input": np.array([actor.encoder.outputs])})}
    for k, (layer, neuron) in enumerate(zip(actor.layers, actor.neurons, strict=True)):
        weight, bias = layer.weight_IN.detach().numpy(), layer.bias_N.detach().numpy()
        nodes[f"weights_{k}"] = nir.Affine(np.ascontiguousarray(weight.T), bias)
        nodes[f"neurons_{k}"] = neurons(nir, neuron, len(bias))
    nodes["output"] = nir.Output({"output": np.array([len(bias)])})
    names = list(nodes)
    edges = list(pairwise(names))
    metadata = {"dt": DT, "spike_steps": actor.spike_steps}
    nir.write(path, nir.NIRGraph(nodes=nodes, edges=edges, metadata=metadata))


def neurons(nir: Any, neuron: Neuron, n: int) -> Any:
    """One layer's neurons as a NIR node, with arrays of shape (n,)."""

    def all_of(value: float) -> np.ndarray:
        return np.full(n, value, np.float32)

    if isinstance(neuron, PLIF):
        decay = float(neuron.decay_logit.detach().sigmoid())
        if decay == 1.0:
            remedy = "cannot hold neuron=plif: a trained decay of 1 has no finite time constant"
            raise BadRequest("format", "nir", remedy)
    else:
        assert isinstance(neuron, CubaLIF)
        decay = neuron.config.voltage_decay
    tau = DT / (1.0 - decay)
    rest = {
        "r": all_of(tau / DT),
        "v_leak": all_of(0.0),
        "v_threshold": all_of(neuron.config.threshold),
        "v_reset": all_of(0.0),
    }
    if isinstance(neuron.config, CubaLIFConfig):
        tau_syn = DT / (1.0 - neuron.config.current_decay)
        w_in = all_of(tau_syn / DT)
        return nir.CubaLIF(tau_syn=all_of(tau_syn), tau_mem=all_of(tau), w_in=w_in, **rest)
    return nir.LIF(tau=all_of(tau), **rest)


class Interpreter:
    """NIR's equations in Euler steps, in float64; encoder and decoder as in the contract."""

    def __init__(self, path: Path, contract: dict[str, Any], scratch: Path) -> None:
        """Raises ValueError unless the file holds a graph of the form that `write` makes."""
        nir: Any = import_module("nir")
        check_content(path)
        graph = nir.read(path)
        self.host, self.dt = Host(contract), float(contract["dt"])
        if self.host.decoder == "ilc":  # graphs of this form have no lateral connections
            raise ValueError("decoder.name")
        following = dict(graph.edges)
        if len(following) < len(graph.edges):  # for example recurrent connections
            raise ValueError("it has nodes with more than one successor")
        name, self.layers, width = following["input"], [], self.host.inputs
        while name != "output":
            weights, cells = graph.nodes[name], graph.nodes[following[name]]
            width = check_layer(nir, weights, cells, width)
            self.layers.append((weights, cells))
            name = following[following[name]]
            if len(self.layers) > len(graph.nodes):
                raise ValueError("its edges lead round in a circle")
        self.host.check_layers([len(weights.bias) for weights, _ in self.layers])

    def spikes(self, obs_BO: np.ndarray) -> list[np.ndarray]:
        first = self.host.encode(obs_BO)
        layers, x_TBN = [first] if self.host.encodes else [], first
        for weights, cells in self.layers:
            x_TBN = self.scan(cells, x_TBN @ weights.weight.T.astype(np.float64) + weights.bias)
            layers.append(x_TBN)
        return [layer.astype(bool) for layer in layers]

    def actions(self, obs_BO: np.ndarray) -> np.ndarray:
        return self.host.actions(self.spikes(obs_BO)[-1].astype(np.float64))

    def scan(self, cells: Any, drive_TBN: np.ndarray) -> np.ndarray:
        """One layer's spikes, (T, B, N), from rest."""
        current = voltage = np.zeros(drive_TBN.shape[1:])
        spikes, dt = [], self.dt
        synapses = hasattr(cells, "tau_syn")
        tau = (cells.tau_mem if synapses else cells.tau).astype(np.float64)
        for drive in drive_TBN:
            if synapses:
                tau_syn = cells.tau_syn.astype(np.float64)
                current = current + dt / tau_syn * (cells.w_in * drive - current)
            else:
                current = drive
            voltage = voltage + dt / tau * (cells.v_leak - voltage + cells.r * current)
            fired = voltage > cells.v_threshold
            voltage = np.where(fired, cells.v_reset, voltage)
            spikes.append(fired.astype(np.float64))
        return np.stack(spikes)


def check_layer(nir: Any, weights: Any, cells: Any, inputs: int) -> int:
    """Number of neurons of a layer; ValueError unless its parts fit each other and `inputs`."""
    if type(weights) is not nir.Affine or type(cells) not in (nir.LIF, nir.CubaLIF):
        raise ValueError("it has nodes that no exported policy has")
    n = len(weights.bias)
    arrays = [value for key, value in vars(cells).items() if isinstance(value, np.ndarray)]
    fits = np.shape(weights.weight) == (n, inputs) and all(a.shape == (n,) for a in arrays)
    if not fits or not all(np.isfinite(a).all() for a in (weights.weight, weights.bias, *arrays)):
        raise ValueError("its layers do not fit each other")
    taus = [getattr(cells, key) for key in ("tau", "tau_mem", "tau_syn") if hasattr(cells, key)]
    if not all((tau > 0.0).all() for tau in taus):
        raise ValueError("it has a time constant that is not above 0")
    return n


def check_content(path: Path) -> None:
    """Raise ValueError if HDF5 would read other files, or data larger than the file can hold."""
    h5py: Any = import_module("h5py")
    size = path.stat().st_size
    claimed, seen = 0, set()
    with h5py.File(path, "r") as file:
        groups = [file]
        while groups:
            group = groups.pop()
            place = h5py.h5o.get_info(group.id).addr
            if place in seen:
                raise ValueError("its groups lead round in a circle")
            seen.add(place)
            for name in group:
                if type(group.get(name, getlink=True)) is not h5py.HardLink:
                    raise ValueError("it refers to other data")
                member = group[name]
                if isinstance(member, h5py.Group):
                    groups.append(member)
                elif member.external or member.is_virtual:
                    raise ValueError("it refers to other files")
                else:
                    claimed += member.nbytes
    if claimed > DEFLATED * size:
        raise ValueError("it claims more values than it holds")
