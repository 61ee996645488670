"""From normalised observations to what drives the first layer.

Shape legend   T spike steps, B batch, O observation entries, P neurons of one population, K inputs.

An encoder gives (T, B, K), or (1, B, K) where every spike step gets the same.

`population`        Gaussian receptive fields, deterministic spikes (PopSAN)
`poisson`           the same fields, spikes drawn at every spike step (PopSAN)
`tanh_population`   `population` of tanh(obs) (Proxy Target)
`analog`            the fields' activity itself, as a current (MDC-SAN)
`direct`            the observation itself, as a current
`learned`           a learned matrix, one column of currents for each spike step (ACSF)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spikerl.errors import BadRequest
from spikerl.snn.linear import Linear
from spikerl.snn.surrogates import straight_through


@dataclass(kw_only=True)
class EncoderConfig:
    """Of an encoder without settings: `direct`, `learned`."""

    name: str


@dataclass(kw_only=True)
class PopulationConfig(EncoderConfig):
    """Gaussian population code (arXiv:2010.09635)."""

    pop_size: int  # P, neurons per observation entry
    mean_range: list[float]  # centres start evenly spaced over this range
    var: float  # width squared that every neuron starts with
    threshold: float  # of deterministic spikes: fires strictly above, loses as much on a spike

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
    def outputs(self) -> int:
        return self.mean_OP.numel()

    @property
    def random(self) -> bool:
        return self.config.name == "poisson"

    @property
    def squashes(self) -> bool:
        return self.config.name == "tanh_population"

    def squashed(self, obs_BO: Tensor) -> Tensor:
        """What the receptive fields see."""
        return torch.tanh(obs_BO) if self.squashes else obs_BO

    def activity(self, obs_BO: Tensor) -> Tensor:
        """A, (B, K)."""
        distance = self.squashed(obs_BO).unsqueeze(-1) - self.mean_OP
        return torch.exp(-0.5 * distance.pow(2) / self.std_OP.pow(2)).flatten(1)

    def uniform(
        self, batch: int, spike_steps: int, generator: torch.Generator | None
    ) -> Tensor | None:
        """What the Poisson coder draws: (T, B, K) in [0, 1)."""
        if not self.random:
            return None
        shape, mean = (spike_steps, batch, self.mean_OP.numel()), self.mean_OP
        return torch.rand(shape, generator=generator, dtype=mean.dtype, device=mean.device)

    def forward(
        self, obs_BO: Tensor, spike_steps: int, generator: torch.Generator | None
    ) -> Tensor:
        """Only the Poisson coder draws from `generator`."""
        drive = self.activity(obs_BO)
        if self.config.name == "analog":
            return drive.unsqueeze(0)
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


class DirectEncoder(nn.Module):
    """Every entry of the observation is a current."""

    random = False

    def __init__(self, obs_dim: int) -> None:
        super().__init__()
        self.outputs = obs_dim

    def forward(
        self, obs_BO: Tensor, spike_steps: int, generator: torch.Generator | None
    ) -> Tensor:
        return obs_BO.unsqueeze(0)


class LearnedEncoder(nn.Module):
    """The learned matrix coder of the adaptive coding framework (Qin, IJCAI 2023, 2211.11760).

    One affine map of the observation gives O currents for each spike step.
    """

    random = False

    def __init__(self, obs_dim: int, spike_steps: int) -> None:
        super().__init__()
        self.outputs = obs_dim
        self.map = Linear(obs_dim, obs_dim * spike_steps)

    def forward(
        self, obs_BO: Tensor, spike_steps: int, generator: torch.Generator | None
    ) -> Tensor:
        return self.map(obs_BO).unflatten(1, (spike_steps, self.outputs)).transpose(0, 1)


Encoder = PopulationEncoder | DirectEncoder | LearnedEncoder


def build_encoder(config: EncoderConfig, obs_dim: int, spike_steps: int) -> Encoder:
    if isinstance(config, PopulationConfig):
        return PopulationEncoder(obs_dim, config)
    if config.name == "direct":
        return DirectEncoder(obs_dim)
    return LearnedEncoder(obs_dim, spike_steps)
