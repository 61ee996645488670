"""From normalised observations to input spikes.

Shape legend   T spike steps, B batch, O observation entries, P neurons of one population.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spikerl.errors import BadRequest
from spikerl.snn.surrogates import straight_through


@dataclass(kw_only=True)
class PopulationConfig:
    """Gaussian population code, `population` (deterministic) or `poisson` (arXiv:2010.09635)."""

    name: str
    pop_size: int  # P, neurons per observation entry
    mean_range: list[float]  # centres start evenly spaced over this range
    var: float  # width squared that every neuron starts with
    threshold: float  # of the deterministic coder: fires strictly above, loses as much on a spike

    def __post_init__(self) -> None:
        if self.pop_size < 1:
            raise BadRequest("encoder.pop_size", self.pop_size, "give at least 1")
        if len(self.mean_range) != 2 or self.mean_range[0] > self.mean_range[1]:
            raise BadRequest("encoder.mean_range", self.mean_range, "give [low, high]")
        for key in ("var", "threshold"):
            if not getattr(self, key) > 0.0:
                raise BadRequest(f"encoder.{key}", getattr(self, key), "give a value above 0")


class PopulationEncoder(nn.Module):
    """Each entry s drives P neurons with A = exp(-(s - mean)^2 / (2 std^2)), mean and std learned.

    Deterministic: v += A; o = [v > threshold]; v -= threshold * o.
    Poisson: o = [u < A] with u ~ U[0, 1), independently at each spike step.
    Backward, a spike passes its gradient unchanged to what caused it (v, or A).
    """

    def __init__(self, obs_dim: int, config: PopulationConfig) -> None:
        super().__init__()
        self.config = config
        low, high = config.mean_range
        centres = torch.linspace(low, high, config.pop_size)
        self.mean_OP = nn.Parameter(centres.repeat(obs_dim, 1))
        self.std_OP = nn.Parameter(torch.full_like(self.mean_OP, math.sqrt(config.var)))

    @property
    def random(self) -> bool:
        return self.config.name == "poisson"

    def activity(self, obs_BO: Tensor) -> Tensor:
        """A, (B, O * P)."""
        distance = obs_BO.unsqueeze(-1) - self.mean_OP
        return torch.exp(-0.5 * distance.pow(2) / self.std_OP.pow(2)).flatten(1)

    def uniform(
        self, batch: int, spike_steps: int, generator: torch.Generator | None
    ) -> Tensor | None:
        """What the Poisson coder draws: (T, B, O * P) in [0, 1)."""
        if not self.random:
            return None
        shape, mean = (spike_steps, batch, self.mean_OP.numel()), self.mean_OP
        return torch.rand(shape, generator=generator, dtype=mean.dtype, device=mean.device)

    def forward(
        self, obs_BO: Tensor, spike_steps: int, generator: torch.Generator | None
    ) -> Tensor:
        """Spikes (T, B, O * P); only the Poisson coder draws from `generator`."""
        drive = self.activity(obs_BO)
        uniform = self.uniform(len(obs_BO), spike_steps, generator)
        if uniform is not None:
            spikes = (uniform < drive.detach()).to(drive.dtype)
            return straight_through(drive.expand_as(spikes), spikes)
        threshold = self.config.threshold
        voltage, spikes_T = torch.zeros_like(drive), []
        for _ in range(spike_steps):
            voltage = voltage + drive
            spikes = straight_through(voltage, (voltage.detach() > threshold).to(drive.dtype))
            voltage = voltage - threshold * spikes
            spikes_T.append(spikes)
        return torch.stack(spikes_T)
