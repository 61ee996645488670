"""Membrane equations. A step is a function of drive and state; nothing here remembers anything.

Shape legend   B batch, N neurons.

`cuba_lif`   c = dc c + x;  v = dv v (1 - o) + c;  o = [v > th]      (hard reset to 0)
    elsewhere: PopSAN "LIF", Proxy Target "CLIF", NIR `CubaLIF`, SpikingJelly `CUBALIFNode`,
    snnTorch `Synaptic`
`lif`        v = dv v (1 - o) + x;  o = [v > th]                     (hard reset to 0)
    elsewhere: Proxy Target "LIF"

"CLIF" also names the unrelated Complementary LIF (ICML 2024) and is therefore not used here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from spikerl.errors import BadRequest
from spikerl.snn.surrogates import rect_spike


@dataclass(kw_only=True)
class CubaLIFConfig:
    """Current-based leaky integrate-and-fire neuron (Tang et al., 2020, arXiv:2010.09635)."""

    name: str
    current_decay: float  # share of the synaptic current kept from one spike step to the next
    voltage_decay: float  # share of the membrane voltage kept by a neuron that did not fire
    threshold: float  # fires strictly above it
    surrogate_window: float  # a gradient passes where |voltage - threshold| < this

    def __post_init__(self) -> None:
        check_neuron(self, "current_decay", "voltage_decay")


@dataclass(kw_only=True)
class LIFConfig:
    """Leaky integrate-and-fire neuron without a current of its own (arXiv:2505.24161)."""

    name: str
    voltage_decay: float
    threshold: float
    surrogate_window: float

    def __post_init__(self) -> None:
        check_neuron(self, "voltage_decay")


NeuronConfig = CubaLIFConfig | LIFConfig


def check_neuron(config: NeuronConfig, *decays: str) -> None:
    for key in decays:
        if not 0.0 <= getattr(config, key) <= 1.0:
            raise BadRequest(f"neuron.{key}", getattr(config, key), "give a value in [0, 1]")
    for key in ("threshold", "surrogate_window"):
        if not getattr(config, key) > 0.0:
            raise BadRequest(f"neuron.{key}", getattr(config, key), "give a value above 0")


class CubaLIFState(NamedTuple):
    current_BN: Tensor
    voltage_BN: Tensor
    spikes_BN: Tensor


class CubaLIF:
    """Current-based LIF; its reset is applied on entry, so a neuron that fired starts from zero.

    `lif` is the same with a current that keeps nothing.
    """

    def __init__(self, config: NeuronConfig) -> None:
        self.config = config
        self.current_decay = 0.0 if isinstance(config, LIFConfig) else config.current_decay

    def initial(self, drive_BN: Tensor) -> CubaLIFState:
        zero = torch.zeros_like(drive_BN)
        return CubaLIFState(zero, zero, zero)

    def step(self, drive_BN: Tensor, state: CubaLIFState) -> CubaLIFState:
        c = self.config
        current = self.current_decay * state.current_BN + drive_BN
        voltage = c.voltage_decay * state.voltage_BN * (1.0 - state.spikes_BN) + current
        return CubaLIFState(current, voltage, rect_spike(voltage - c.threshold, c.surrogate_window))
