"""Membrane equations. A step is a function of drive and state; nothing here remembers anything.

Shape legend   B batch, N neurons.

`cuba_lif`   c = dc c + x;  v = dv v (1 - o) + c;  o = [v > th]      (hard reset to 0)
    elsewhere: PopSAN "LIF", Proxy Target "CLIF", NIR `CubaLIF`, SpikingJelly `CUBALIFNode`,
    snnTorch `Synaptic`

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
        for key in ("current_decay", "voltage_decay"):
            if not 0.0 <= getattr(self, key) <= 1.0:
                raise BadRequest(f"neuron.{key}", getattr(self, key), "give a value in [0, 1]")
        for key in ("threshold", "surrogate_window"):
            if not getattr(self, key) > 0.0:
                raise BadRequest(f"neuron.{key}", getattr(self, key), "give a value above 0")


class CubaLIFState(NamedTuple):
    current_BN: Tensor
    voltage_BN: Tensor
    spikes_BN: Tensor


class CubaLIF:
    """Current-based LIF; its reset is applied on entry, so a neuron that fired starts from zero."""

    def __init__(self, config: CubaLIFConfig) -> None:
        self.config = config

    def initial(self, drive_BN: Tensor) -> CubaLIFState:
        zero = torch.zeros_like(drive_BN)
        return CubaLIFState(zero, zero, zero)

    def step(self, drive_BN: Tensor, state: CubaLIFState) -> CubaLIFState:
        c = self.config
        current = c.current_decay * state.current_BN + drive_BN
        voltage = c.voltage_decay * state.voltage_BN * (1.0 - state.spikes_BN) + current
        return CubaLIFState(current, voltage, rect_spike(voltage - c.threshold, c.surrogate_window))
