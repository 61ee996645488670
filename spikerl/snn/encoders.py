"""From normalised observations to the inputs of the first layer.

Shape legend   T spike steps, B batch, O observation entries, P neurons of one population, K inputs.

An encoder returns (T, B, K), or (1, B, K) if every spike step gets the same.

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
from spikerl.schema import MOST_WIDTH, Registry
from spikerl.snn.linear import Linear
from spikerl.snn.surrogates import straight_through


@dataclass(kw_only=True)
class EncoderConfig:
    """Config of an encoder without settings: `direct`, `learned`."""

    name: str


@dataclass(kw_only=True)
class PopulationConfig(EncoderConfig):
    """Gaussian population code (arXiv:2010.09635)."""

    pop_size: int  # P, neurons per observation entry
    mean_range: list[float]  # centres start evenly spaced over it; a single one in its middle
    var: float  # initial squared width of every receptive field
    threshold: float  # for deterministic spikes: a neuron fires above it, and a spike subtracts it

    def __post_init__(self) -> None:
        if not 1 <= self.pop_size <= MOST_WIDTH:
            raise BadRequest("encoder.pop_size", self.pop_size, f"give 1 to {MOST_WIDTH}")
        if len(self.mean_range) != 2 or self.mean_range[0] > self.mean_range[1]:
            raise BadRequest("encoder.mean_range", self.mean_range, "give [low, high]")
        for key in ("var", "threshold"):
            if not getattr(self, key) > 0.0:
                raise BadRequest(f"encoder.{key}", getattr(self, key), "give a value above 0")


class Encoder(nn.Module):
    """Maps `obs_dim` observation entries to `outputs` inputs of the first layer."""

    spikes = False  # whether the outputs are spikes; else they are currents
    random = False  # whether it draws from the generator
    outputs: int

    def __init__(self, config: EncoderConfig, obs_dim: int, spike_steps: int) -> None:
        super().__init__()
        self.config = config

    def forward(
        self, obs_BO: Tensor, spike_steps: int, generator: torch.Generator | None
    ) -> Tensor:
        raise NotImplementedError


class PopulationEncoder(Encoder):
    """Each entry s drives P neurons with A = exp(-(s - mean)^2 / (2 std^2)), mean and std learned.

    v += A; o = [v > threshold]; v -= threshold * o.
    Backward, a spike passes its gradient unchanged to v.
    """

    config: PopulationConfig
    spikes = True

    def __init__(self, config: PopulationConfig, obs_dim: int, spike_steps: int) -> None:
        super().__init__(config, obs_dim, spike_steps)
        low, high = config.mean_range
        if config.pop_size == 1:  # linspace would return `low`
            low = high = 0.5 * (low + high)
        shape = (obs_dim, config.pop_size)
        mean_OP, std_OP = (torch.empty(shape, dtype=torch.float32) for _ in range(2))
        # On the device "meta", sizes from an untrusted file must allocate nothing, and linspace
        # would import torch's compiler.
        if not mean_OP.is_meta:
            mean_OP.copy_(torch.linspace(low, high, config.pop_size, dtype=torch.float32))
            std_OP.fill_(math.sqrt(config.var))
        self.mean_OP, self.std_OP = nn.Parameter(mean_OP), nn.Parameter(std_OP)
        self.outputs = self.mean_OP.numel()

    def squash(self, obs_BO: Tensor) -> Tensor:
        """The values to which the receptive fields respond."""
        return obs_BO

    def activity(self, obs_BO: Tensor) -> Tensor:
        """Activity A of the receptive fields, (B, K)."""
        distance = self.squash(obs_BO).unsqueeze(-1) - self.mean_OP
        return torch.exp(-0.5 * distance.pow(2) / self.std_OP.pow(2)).flatten(1)

    def forward(
        self, obs_BO: Tensor, spike_steps: int, generator: torch.Generator | None
    ) -> Tensor:
        drive = self.activity(obs_BO)
        threshold = self.config.threshold
        voltage, spikes_T = torch.zeros_like(drive), []
        for _ in range(spike_steps):
            voltage = voltage + drive
            spikes = straight_through(voltage, (voltage.detach() > threshold).to(drive.dtype))
            voltage = voltage - threshold * spikes
            spikes_T.append(spikes)
        return torch.stack(spikes_T)


class TanhPopulationEncoder(PopulationEncoder):
    """`population` of tanh(obs)."""

    def squash(self, obs_BO: Tensor) -> Tensor:
        return torch.tanh(obs_BO)


class PoissonEncoder(PopulationEncoder):
    """o = [u < A] with u ~ U[0, 1), independently at each spike step.

    Backward, a spike passes its gradient unchanged to A.
    """

    random = True

    def uniform(self, batch: int, spike_steps: int, generator: torch.Generator | None) -> Tensor:
        """The random numbers u, (T, B, K)."""
        shape, mean = (spike_steps, batch, self.mean_OP.numel()), self.mean_OP
        return torch.rand(shape, generator=generator, dtype=mean.dtype, device=mean.device)

    def forward(
        self, obs_BO: Tensor, spike_steps: int, generator: torch.Generator | None
    ) -> Tensor:
        drive = self.activity(obs_BO)
        uniform = self.uniform(len(obs_BO), spike_steps, generator)
        spikes = (uniform < drive.detach()).to(drive.dtype)
        return straight_through(drive.expand_as(spikes), spikes)


class AnalogEncoder(PopulationEncoder):
    """The activity A itself, as a current at every spike step."""

    spikes = False

    def forward(
        self, obs_BO: Tensor, spike_steps: int, generator: torch.Generator | None
    ) -> Tensor:
        return self.activity(obs_BO).unsqueeze(0)


class DirectEncoder(Encoder):
    """Every entry of the observation is a current."""

    def __init__(self, config: EncoderConfig, obs_dim: int, spike_steps: int) -> None:
        super().__init__(config, obs_dim, spike_steps)
        self.outputs = obs_dim

    def forward(
        self, obs_BO: Tensor, spike_steps: int, generator: torch.Generator | None
    ) -> Tensor:
        return obs_BO.unsqueeze(0)


class LearnedEncoder(Encoder):
    """The learned matrix coder of the adaptive coding framework (Qin, IJCAI 2023, 2211.11760).

    An affine map of the observation gives O currents for each spike step.
    """

    def __init__(self, config: EncoderConfig, obs_dim: int, spike_steps: int) -> None:
        super().__init__(config, obs_dim, spike_steps)
        self.outputs = obs_dim
        self.map = Linear(obs_dim, obs_dim * spike_steps)

    def forward(
        self, obs_BO: Tensor, spike_steps: int, generator: torch.Generator | None
    ) -> Tensor:
        return self.map(obs_BO).unflatten(1, (spike_steps, self.outputs)).transpose(0, 1)


ENCODERS: Registry[EncoderConfig, Encoder] = Registry(
    "encoder",
    population=(PopulationConfig, PopulationEncoder),
    poisson=(PopulationConfig, PoissonEncoder),
    tanh_population=(PopulationConfig, TanhPopulationEncoder),
    analog=(PopulationConfig, AnalogEncoder),
    direct=(EncoderConfig, DirectEncoder),
    learned=(EncoderConfig, LearnedEncoder),
)
