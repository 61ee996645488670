"""Format `nir`: the spiking layers as a graph of the Neuromorphic Intermediate Representation.

NIR's neurons are differential equations; a spike step is one forward Euler step of dt = 1e-4 s:

`cuba_lif`      CubaLIF: tau_syn dI/dt = -I + w_in S,  tau_mem dv/dt = v_leak - v + r I
                with tau = dt / (1 - decay), w_in = tau_syn / dt, r = tau_mem / dt
`lif`, `plif`   LIF: tau dv/dt = v_leak - v + r I, with r = tau / dt

All fire strictly above v_threshold and are then set to v_reset = 0. What comes before the first
layer (normaliser, encoder) and behind the last (decoder, action) is in the contract.

Shape legend   T spike steps, B observations, N neurons of a layer, O observation entries, P neurons
of one population, A action entries.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from spikerl.errors import BadRequest
from spikerl.models.actor import SpikingActor
from spikerl.models.policy import Policy
from spikerl.snn.neurons import PLIF, CubaLIF, CubaLIFConfig, Neuron

DT = 1e-4  # seconds; the step that snnTorch's reader assumes


def check_here() -> None:
    """BadRequest where the package is not installed."""
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
    """One layer's, arrays of its shape."""

    def all_of(value: float) -> np.ndarray:
        return np.full(n, value, np.float32)

    if isinstance(neuron, PLIF):
        decay = float(neuron.decay_logit.detach().sigmoid())
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
    """NIR's equations by forward Euler, in float64; encoder and decoder as the contract says."""

    def __init__(self, path: Path, contract: dict[str, Any], scratch: Path) -> None:
        nir: Any = import_module("nir")
        graph = nir.read(path)
        following = dict(graph.edges)
        name, self.layers = following["input"], []
        while name != "output":
            weights, cells = graph.nodes[name], graph.nodes[following[name]]
            self.layers.append((weights, cells))
            name = following[following[name]]
        self.contract, self.dt = contract, float(contract["dt"])
        self.encodes = contract["encoder"]["name"] in ("population", "tanh_population")

    def spikes(self, obs_BO: np.ndarray) -> list[np.ndarray]:
        first = self.encode(obs_BO)
        layers, x_TBN = [first] if self.encodes else [], first
        for weights, cells in self.layers:
            x_TBN = self.scan(cells, x_TBN @ weights.weight.T.astype(np.float64) + weights.bias)
            layers.append(x_TBN)
        return [layer.astype(bool) for layer in layers]

    def actions(self, obs_BO: np.ndarray) -> np.ndarray:
        a = self.contract["action"]
        y = self.decode(self.spikes(obs_BO)[-1].astype(np.float64))
        act = np.array(a["low"]) + (np.tanh(y) + 1.0) * a["half_range"]
        return np.minimum(np.maximum(act, a["least"]), a["most"]).astype(np.float32)

    def encode(self, obs_BO: np.ndarray) -> np.ndarray:
        """Spikes or currents, (T, B, O P) or (T, B, O)."""
        c, e = self.contract["normalizer"], self.contract["encoder"]
        x = (obs_BO.astype(np.float64) - c["mean"]) / c["std"]
        x = np.minimum(np.maximum(x, -c["clip"]), c["clip"])
        steps = self.contract["spike_steps"]
        if e["name"] == "direct":
            return np.repeat(x[None], steps, 0)
        if e["name"] == "tanh_population":
            x = np.tanh(x)
        distance_BOP = x[:, :, None] - e["mean"]
        activity = np.exp(-0.5 * distance_BOP**2 / np.square(e["std"])).reshape(len(x), -1)
        if e["name"] == "analog":
            return np.repeat(activity[None], steps, 0)
        voltage, spikes = np.zeros_like(activity), []
        for _ in range(steps):
            voltage = voltage + activity
            spikes.append((voltage > e["threshold"]).astype(np.float64))
            voltage = voltage - e["threshold"] * spikes[-1]
        return np.stack(spikes)

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

    def decode(self, spikes_TBN: np.ndarray) -> np.ndarray:
        """y, (B, A)."""
        d = self.contract["decoder"]
        weight, bias = np.array(d["weight"]), np.array(d["bias"])
        if d["name"] == "linear":
            return spikes_TBN.mean(0) @ weight + bias
        spikes_TBAP = spikes_TBN.reshape(*spikes_TBN.shape[:2], *weight.shape)
        charge_TBA = (spikes_TBAP * weight).sum(-1) + bias
        if d["name"] == "rate":
            return charge_TBA.mean(0)
        voltages = [charge_TBA[0]]
        for charge in charge_TBA[1:]:
            voltages.append(d["voltage_decay"] * voltages[-1] + charge)
        if d["read"] == "last":
            return voltages[-1]
        if d["read"] == "mean":
            return np.mean(voltages, 0)
        high, low = np.max(voltages, 0), np.min(voltages, 0)
        return np.where(np.abs(high) > np.abs(low), high, low)
