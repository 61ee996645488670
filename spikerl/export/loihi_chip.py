"""A bit-accurate emulator of Loihi's integer arithmetic that reads a file of format `loihi`.

It follows the chip's clock: at a chip step every neuron takes the spikes that arrived, updates its
state and sends its own spikes, which act one chip step later. See `loihi` for the rules.

Shape legend   T spike steps, B observations, I inputs, N neurons of a layer, A action entries,
P neurons of one population.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load

from spikerl.export.host import Host

MOST_INPUTS = 4096  # of a core; sums of that many weights are exact in float32


class Cells:
    """One layer of neurons and their incoming synapses."""

    def __init__(self, tensors: dict[str, np.ndarray], k: int, inputs: int) -> None:
        """Raises KeyError or ValueError unless the tensors are those of such a layer."""
        self.weight_IN = synapses(tensors[f"{k}.weight"])
        self.bias_N = doubled(tensors[f"{k}.bias"])
        if self.weight_IN.shape != (inputs, *self.bias_N.shape) or self.bias_N.ndim != 1:
            raise ValueError(f"layer {k}, whose weights do not fit")
        self.lateral_APP: np.ndarray | None = None
        if f"{k}.lateral" in tensors:
            self.lateral_APP = doubled(tensors[f"{k}.lateral"])
        self.vth = number(tensors[f"{k}.vth"], 17) << 6
        self.keep_u = 4096 - number(tensors[f"{k}.du"], 12) - 1
        self.keep_v = 4096 - number(tensors[f"{k}.dv"], 12)

    def rest(self, batch: int) -> None:
        self.u = np.zeros((batch, len(self.bias_N)), np.int64)
        self.v = self.u.copy()
        self.fired = np.zeros(self.u.shape, bool)

    def step(self, arrived_BI: np.ndarray, *, bias: bool) -> np.ndarray:
        """Whether each neuron fires, (B, N)."""
        a = arrived_BI.astype(np.float32) @ self.weight_IN
        if bias:
            a = a + self.bias_N
        if self.lateral_APP is not None:
            fired_BAP = self.fired.reshape(len(a), *self.lateral_APP.shape[:2]).astype(np.float32)
            a = a + np.einsum("bap,apq->baq", fired_BAP, self.lateral_APP).reshape(a.shape)
        u = shifted(self.u * self.keep_u) + (a.astype(np.int64) << 6)
        self.u = (u + (2**23 - 1)) % 2**24 - (2**23 - 1)  # from -(2^23 - 1) to 2^23
        self.v = np.clip(shifted(self.v * self.keep_v) + self.u, 1 - 2**23, 2**23 - 1)
        self.fired = self.v > self.vth
        self.v[self.fired] = 0
        return self.fired


class Interpreter:
    """The chip together with its host."""

    def __init__(self, path: Path, contract: dict[str, Any], scratch: Path) -> None:
        """Raises KeyError or ValueError unless the file has this format and fits its contract."""
        self.host = Host(contract)
        tensors = load(path.read_bytes())
        self.steps = int(tensors["spike_steps"][0])
        if self.steps != self.host.steps or not self.host.encodes:
            raise ValueError("its spike steps or its encoder are not those of the contract")
        self.layers: list[Cells] = []
        width = self.host.inputs
        while f"{len(self.layers)}.weight" in tensors:
            self.layers.append(Cells(tensors, len(self.layers), width))
            width = len(self.layers[-1].bias_N)
        self.host.check_layers([len(layer.bias_N) for layer in self.layers])
        *hidden, last = (layer.lateral_APP for layer in self.layers)
        actions, neurons = self.host.weight.shape
        wanted = (actions, neurons, neurons) if self.host.decoder == "ilc" else None
        found = None if last is None else last.shape
        if any(lateral is not None for lateral in hidden) or found != wanted:
            raise ValueError("its lateral weights are not those of its contract")

    def spikes(self, obs_BO: np.ndarray) -> list[np.ndarray]:
        encoded_TBN = self.host.encode(obs_BO).astype(bool)
        silence = np.zeros(encoded_TBN.shape[1:], bool)
        for layer in self.layers:
            layer.rest(len(obs_BO))
        sent = [silence, *(layer.fired for layer in self.layers)]  # in the previous chip step
        counted: list[list[np.ndarray]] = [[] for _ in self.layers]
        for step in range(self.steps + len(self.layers)):
            now = [encoded_TBN[step] if step < self.steps else silence]
            for k, layer in enumerate(self.layers):
                t = step - k - 1  # this layer's spike step
                own = 0 <= t < self.steps
                now.append(layer.step(sent[k], bias=own))
                if own:
                    counted[k].append(now[-1])
            sent = now
        return [encoded_TBN, *(np.stack(fired) for fired in counted)]

    def actions(self, obs_BO: np.ndarray) -> np.ndarray:
        return self.host.actions(self.spikes(obs_BO)[-1].astype(np.float64))


def synapses(halves: np.ndarray) -> np.ndarray:
    """Weights (I, N); ValueError if there are more inputs than float32 adds exactly."""
    if len(halves) > MOST_INPUTS:
        raise ValueError(f"weights from {len(halves)} inputs")
    return doubled(halves)


def doubled(halves: np.ndarray) -> np.ndarray:
    """The weights of which a file holds the halves, as float32 for fast sums."""
    if halves.dtype != np.int8:
        raise ValueError(f"weights of {halves.dtype}")
    return 2.0 * halves.astype(np.float32)


def number(array: np.ndarray, bits: int) -> int:
    """The unsigned number in a register; ValueError unless it has at most that many bits."""
    if array.shape != (1,) or array.dtype != np.int32 or not 0 <= array[0] < 2**bits:
        raise ValueError(f"a register of other than {bits} bits")
    return int(array[0])


def shifted(product: np.ndarray) -> np.ndarray:
    """Shift right by 12 bits, rounding towards zero."""
    return np.sign(product) * (np.abs(product) >> 12)
