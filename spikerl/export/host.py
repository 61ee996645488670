"""The parts of a policy that an exported network leaves to its host, as the contract describes
them, in numpy and float64: normaliser and encoder before the first layer, decoder and action
scaling after the last.

Shape legend   T spike steps, B observations, N neurons of the last layer, O observation entries, P
neurons of one population, A action entries.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from spikerl.types import Task

DECODERS = ("rate", "linear", "membrane", "ilc")


class Host:
    """Computes a contract's encoder and decoder from its arrays (`contract.encoder_arrays`,
    `contract.decoder_arrays`).
    """

    def __init__(self, contract: dict[str, Any]) -> None:
        """Raises KeyError, TypeError or ValueError with the name of a missing or invalid key."""
        self.steps = int(contract["spike_steps"])
        n, a = contract["normalizer"], contract["action"]
        self.mean_O, self.std_O = array(n, "mean"), array(n, "std")
        self.clip = float(n["clip"])
        self.low, self.half_range, self.least, self.most = (
            array(a, key) for key in ("low", "half_range", "least", "most")
        )
        encoder = contract["encoder"]
        self.encoder = encoder["name"]
        self.encodes = self.encoder in ("population", "tanh_population")  # spikes, else currents
        self.inputs = len(self.mean_O)
        if self.encoder in ("population", "tanh_population", "analog"):
            self.centre_OP, self.width_OP = array(encoder, "mean"), array(encoder, "std")
            self.charge = float(encoder["threshold"])
            fields = self.centre_OP.shape
            if self.width_OP.shape != fields or fields[:-1] != self.mean_O.shape:
                raise ValueError("encoder, whose arrays do not fit")
            if not self.width_OP.all():  # may be negative, since only its square is used
                raise ValueError("encoder.std")
            self.inputs = self.centre_OP.size
        elif self.encoder != "direct":
            raise ValueError("encoder")
        decoder = contract["decoder"]
        self.decoder = decoder["name"]
        if self.decoder not in DECODERS:
            raise ValueError("decoder.name")
        self.read = str(decoder["read"]) if "read" in decoder else "mean"
        self.decay = float(decoder["voltage_decay"]) if "read" in decoder else 0.0
        self.weight, self.bias_A = array(decoder, "weight"), array(decoder, "bias")
        acts = self.weight.shape[self.decoder == "linear"] if self.weight.ndim == 2 else 0
        if (acts,) != self.bias_A.shape or self.bias_A.shape != self.low.shape:
            raise ValueError("decoder, whose arrays do not fit")
        if self.read not in ("last", "mean", "max"):
            raise ValueError("decoder.read")
        self.outputs = len(self.weight) if self.decoder == "linear" else self.weight.size

        self.sizes = contract["sizes"]

    def check_layers(self, widths: list[int]) -> None:
        """Raise ValueError unless the layers of a file are those of the contract."""
        described = (self.sizes["encoder"], self.sizes["layers"])
        if described != (self.inputs, widths) or widths[-1] != self.outputs:
            raise ValueError("its layers are not those of its contract")

    def encode(self, obs_BO: np.ndarray) -> np.ndarray:
        """Spikes or currents, (T, B, O P) or (T, B, O)."""
        x = (obs_BO.astype(np.float64) - self.mean_O) / self.std_O
        x = np.minimum(np.maximum(x, -self.clip), self.clip)
        if self.encoder == "direct":
            return np.repeat(x[None], self.steps, 0)
        if self.encoder == "tanh_population":
            x = np.tanh(x)
        distance_BOP = x[:, :, None] - self.centre_OP
        activity = np.exp(-0.5 * distance_BOP**2 / np.square(self.width_OP)).reshape(len(x), -1)
        if self.encoder == "analog":
            return np.repeat(activity[None], self.steps, 0)
        voltage, spikes = np.zeros_like(activity), []
        for _ in range(self.steps):
            voltage = voltage + activity
            spikes.append((voltage > self.charge).astype(np.float64))
            voltage = voltage - self.charge * spikes[-1]
        return np.stack(spikes)

    def actions(self, spikes_TBN: np.ndarray) -> np.ndarray:
        """Actions in the environment's units, float32 (B, A)."""
        act = self.low + (np.tanh(self.decode(spikes_TBN)) + 1.0) * self.half_range
        return np.minimum(np.maximum(act, self.least), self.most).astype(np.float32)

    def decode(self, spikes_TBN: np.ndarray) -> np.ndarray:
        """The decoder's outputs y, (B, A), before tanh."""
        if self.decoder == "linear":
            return spikes_TBN.mean(0) @ self.weight + self.bias_A
        spikes_TBAP = spikes_TBN.reshape(*spikes_TBN.shape[:2], *self.weight.shape)
        charge_TBA = (spikes_TBAP * self.weight).sum(-1) + self.bias_A
        if self.decoder == "rate":
            return charge_TBA.mean(0)
        voltages = [charge_TBA[0]]
        for charge in charge_TBA[1:]:
            voltages.append(self.decay * voltages[-1] + charge)
        if self.read == "last":
            return voltages[-1]
        if self.read == "mean":
            return np.mean(voltages, 0)
        high, low = np.max(voltages, 0), np.min(voltages, 0)
        return np.where(np.abs(high) > np.abs(low), high, low)


def check_outside(contract: dict[str, Any], task: Task) -> None:
    """Raise ValueError unless normaliser and action scaling, in every contract, fit the task."""
    for group, keys, size in (
        ("normalizer", ("mean", "std"), task.obs_dim),
        ("action", ("low", "half_range", "least", "most"), task.act_dim),
    ):
        for key in keys:
            if array(contract[group], key).shape != (size,):
                raise ValueError(f"{group}.{key}, which does not fit")
    if not (array(contract["normalizer"], "std") > 0.0).all():
        raise ValueError("normalizer.std")
    if not float(contract["normalizer"]["clip"]) > 0.0:
        raise ValueError("normalizer.clip")


def array(data: dict[str, Any], key: str) -> np.ndarray:
    try:
        values = np.array(data[key], np.float64)
    except (TypeError, ValueError):  # ragged, or not numbers
        raise ValueError(f"{key}, which is not an array of numbers") from None
    if not np.isfinite(values).all():
        raise ValueError(f"{key}, which is not finite")
    return values
