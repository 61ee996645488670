"""Membrane equations. A step is a function of drive and state; the modules keep no state.

Shape legend   B batch, N neurons.

With drive x, voltage v, spikes o = [v > th], and r(v, o) = v (1 - o) for reset=hard, v - th o for
reset=soft (on the right-hand sides, v and o are those of the previous spike step):

`lif`        v = dv r(v, o) + x
    elsewhere: Proxy Target "LIF"; snnTorch `Leaky(reset_delay=False)`, SpikingJelly
    `LIFNode(decay_input=False)`, Norse `LIFBoxCell` in other units
`cuba_lif`   c = dc c + x;  v = dv r(v, o) + c
    elsewhere: PopSAN "LIF", Proxy Target "CLIF", NIR `CubaLIF`, SpikingJelly `CUBALIFNode`,
    snnTorch `Synaptic(reset_delay=False)`; Norse `LIFCell` in other units, a current acting one
    spike step later
`plif`       lif with dv = sigmoid(w), w learned, one for each layer
    elsewhere: SpikingJelly `ParametricLIFNode(decay_input=False)`, whose 1/tau is 1 - dv
`alif`       a = da a + o;  v = dv r(v, o) + x;  o = [v > th + beta a]
    elsewhere: the adaptive neuron of LSNN (Bellec et al., 2018); Norse `LSNNCell` has a current too
`dynamic`    c = dc c + x;  v' = (1 - o) v + th_r o;  u' = u + th_s o;
             v = v' + v'^2 - v' - u' + c;  u = u' + th_v v' - th_u u'
    elsewhere: MDC-SAN's dynamic neuron, Proxy Target "DN" (whose code adds th_u u': theta_u < 0)
`residual_if` v = v - th o + x, from v = start th + r at a decision's beginning; after its n spikes
    r = clip(alpha max(v_end - v_begin, -th n), -th / 2, th / 2); 0 at an episode's beginning
    elsewhere: CRPI's, with start = 1/2

"CLIF" also names the unrelated Complementary LIF (ICML 2024); no neuron has that name here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spikerl.errors import BadRequest
from spikerl.schema import Registry
from spikerl.snn.surrogates import SURROGATES, reach, spike


@dataclass(kw_only=True)
class NeuronConfig:
    """Keys that every neuron has."""

    name: str
    threshold: float  # fires strictly above it
    reset: str  # hard: to 0 (dynamic: to theta_r); soft: by the threshold
    surrogate: str  # substitute for a spike's derivative: rect, triangle, sigmoid, atan
    surrogate_window: float  # of rect, whose value is 1 where |voltage - threshold| < this
    surrogate_slope: float  # of the other surrogates
    surrogate_slope_end: float | None  # slope reached linearly at the run's end; null: constant

    def __post_init__(self) -> None:
        for key in ("threshold", "surrogate_window", "surrogate_slope"):
            if not getattr(self, key) > 0.0:
                raise BadRequest(f"neuron.{key}", getattr(self, key), "give a value above 0")
        if self.surrogate_slope_end is not None and not self.surrogate_slope_end > 0.0:
            remedy = "give a value above 0, or null"
            raise BadRequest("neuron.surrogate_slope_end", self.surrogate_slope_end, remedy)
        if self.reset not in ("hard", "soft"):
            raise BadRequest("neuron.reset", self.reset, "give hard or soft")
        if self.surrogate not in SURROGATES:
            remedy = f"give one of {', '.join(SURROGATES)}"
            raise BadRequest("neuron.surrogate", self.surrogate, remedy)
        for key in ("voltage_decay", "current_decay", "adaptation_decay"):
            if hasattr(self, key) and not 0.0 <= getattr(self, key) <= 1.0:
                raise BadRequest(f"neuron.{key}", getattr(self, key), "give a value in [0, 1]")

    @property
    def slope_moves(self) -> bool:
        return self.surrogate != "rect" and self.surrogate_slope_end is not None


@dataclass(kw_only=True)
class LIFConfig(NeuronConfig):
    """Leaky integrate-and-fire neuron without a current of its own (arXiv:2505.24161)."""

    voltage_decay: float  # share of the membrane voltage kept by a neuron that did not fire


@dataclass(kw_only=True)
class CubaLIFConfig(LIFConfig):
    """Current-based leaky integrate-and-fire neuron (Tang et al., 2020, arXiv:2010.09635)."""

    current_decay: float  # share of the synaptic current kept from one spike step to the next


@dataclass(kw_only=True)
class PLIFConfig(LIFConfig):
    """LIF whose `voltage_decay` is learned, one for each layer; the key is its initial value."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.voltage_decay in (0.0, 1.0):
            remedy = "a learned decay begins between 0 and 1; use neuron=lif for a fixed one"
            raise BadRequest("neuron.voltage_decay", self.voltage_decay, remedy)


@dataclass(kw_only=True)
class ALIFConfig(LIFConfig):
    """LIF whose threshold rises with its own spikes (Bellec et al., 2018, arXiv:1803.09574)."""

    adaptation: float  # beta, by how much a spike raises the threshold
    adaptation_decay: float  # share of the adaptation kept from one spike step to the next

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adaptation < 0.0:
            raise BadRequest("neuron.adaptation", self.adaptation, "give 0 or more")


@dataclass(kw_only=True)
class ResidualIFConfig(NeuronConfig):
    """Integrate-and-fire whose residual carries over to the next decision (CRPI, ICML 2026)."""

    start: float  # initial voltage of a decision, as a share of the threshold
    alpha: float  # share of the residual that is carried over; 0: decisions are independent

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reset != "soft":
            raise BadRequest("neuron.reset", self.reset, "a residual is what a soft reset leaves")
        for key in ("start", "alpha"):
            if not 0.0 <= getattr(self, key) <= 1.0:
                raise BadRequest(f"neuron.{key}", getattr(self, key), "give a value in [0, 1]")


@dataclass(kw_only=True)
class DynamicConfig(NeuronConfig):
    """Second-order dynamic neuron (Zhang et al., AAAI 2022, MDC-SAN)."""

    current_decay: float
    theta_v: float  # coefficient of the voltage in the recovery variable's change
    theta_u: float  # coefficient of the recovery variable in its own change, subtracted
    theta_r: float  # voltage that a spike resets to
    theta_s: float  # increment of the recovery variable by a spike

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reset != "hard":
            remedy = "a dynamic neuron resets to theta_r; give hard"
            raise BadRequest("neuron.reset", self.reset, remedy)


class State(NamedTuple):
    voltage_BN: Tensor
    spikes_BN: Tensor
    # (B, N) each: a current (lif, cuba_lif), an adaptation (alif), current and recovery (dynamic)
    others: tuple[Tensor, ...] = ()


class Neuron(nn.Module):
    """One layer's neurons. A spike's reset is applied at the beginning of the next step."""

    others = 0  # number of tensors in a state beside voltage and spikes

    def __init__(self, config: NeuronConfig) -> None:
        super().__init__()
        self.config = config
        self.scale = config.surrogate_slope  # the surrogate's slope, or window for rect
        if config.surrogate == "rect":
            self.scale = config.surrogate_window

    @property
    def carries(self) -> bool:
        """Whether a decision depends on the one before."""
        return False

    def initial(self, drive_BN: Tensor) -> State:
        zero = torch.zeros_like(drive_BN)
        return State(zero, zero, (zero,) * self.others)

    def step(self, drive_BN: Tensor, state: State) -> State:
        raise NotImplementedError

    def excess(self, state: State) -> Tensor:
        """How far the voltages lie above their thresholds."""
        return state.voltage_BN - self.config.threshold

    def passes(self, state: State) -> Tensor:
        """Mask of voltages inside the surrogate's window."""
        return self.excess(state).abs() < reach(self.config.surrogate, self.scale)

    def schedule(self, share: float) -> None:
        """Set the surrogate's slope for the state after this share of the run."""
        c = self.config
        if c.slope_moves:
            assert c.surrogate_slope_end is not None
            self.scale = c.surrogate_slope + share * (c.surrogate_slope_end - c.surrogate_slope)

    def kept(self, state: State) -> Tensor:
        """The voltages after the reset."""
        if self.config.reset == "hard":
            return state.voltage_BN * (1.0 - state.spikes_BN)
        return state.voltage_BN - self.config.threshold * state.spikes_BN

    def fire(self, excess_BN: Tensor) -> Tensor:
        return spike(excess_BN, self.config.surrogate, self.scale)


def copy_slopes(to: nn.Module, source: nn.Module) -> None:
    """Copy the surrogates' current slopes from `source`; state dicts do not include them."""
    of_each = [[part for part in net.modules() if isinstance(part, Neuron)] for net in (to, source)]
    for neuron, other in zip(*of_each, strict=True):
        neuron.scale = other.scale


class CubaLIF(Neuron):
    """`cuba_lif`, and `lif` as the case current_decay = 0."""

    config: LIFConfig
    others = 1

    @property
    def current_decay(self) -> float:
        return self.config.current_decay if isinstance(self.config, CubaLIFConfig) else 0.0

    def step(self, drive_BN: Tensor, state: State) -> State:
        current = self.current_decay * state.others[0] + drive_BN
        voltage = self.config.voltage_decay * self.kept(state) + current
        return State(voltage, self.fire(voltage - self.config.threshold), (current,))


class PLIF(Neuron):
    config: PLIFConfig

    def __init__(self, config: PLIFConfig) -> None:
        super().__init__(config)
        decay = config.voltage_decay
        logit = math.log(decay / (1.0 - decay))
        self.decay_logit = nn.Parameter(torch.tensor(logit, dtype=torch.float32))

    @property
    def decay(self) -> Tensor:
        return torch.sigmoid(self.decay_logit)

    def step(self, drive_BN: Tensor, state: State) -> State:
        voltage = self.decay * self.kept(state) + drive_BN
        return State(voltage, self.fire(voltage - self.config.threshold))


class ALIF(Neuron):
    config: ALIFConfig
    others = 1

    def excess(self, state: State) -> Tensor:
        c = self.config
        return state.voltage_BN - (c.threshold + c.adaptation * state.others[0])

    def step(self, drive_BN: Tensor, state: State) -> State:
        c = self.config
        adapted = c.adaptation_decay * state.others[0] + state.spikes_BN
        voltage = c.voltage_decay * self.kept(state) + drive_BN
        excess = voltage - (c.threshold + c.adaptation * adapted)
        return State(voltage, self.fire(excess), (adapted,))


class ResidualIF(Neuron):
    config: ResidualIFConfig

    @property
    def carries(self) -> bool:
        return self.config.alpha > 0.0

    def initial(self, drive_BN: Tensor, residual_BN: Tensor | None = None) -> State:
        zero = torch.zeros_like(drive_BN)
        begin = zero + self.config.start * self.config.threshold
        return State(begin if residual_BN is None else begin + residual_BN, zero)

    def step(self, drive_BN: Tensor, state: State) -> State:
        voltage = self.kept(state) + drive_BN
        return State(voltage, self.fire(voltage - self.config.threshold))

    def residual(self, begin: State, states: list[State]) -> Tensor:
        """The residual r that is added to the next decision's initial voltage, (B, N)."""
        c, half = self.config, 0.5 * self.config.threshold
        n_BN = torch.stack([state.spikes_BN for state in states]).sum(0)
        gained_BN = self.kept(states[-1]) - begin.voltage_BN
        return (c.alpha * torch.maximum(gained_BN, -c.threshold * n_BN)).clamp(-half, half)


class Dynamic(Neuron):
    config: DynamicConfig
    others = 2

    def step(self, drive_BN: Tensor, state: State) -> State:
        c, fired = self.config, state.spikes_BN
        current = c.current_decay * state.others[0] + drive_BN
        v = state.voltage_BN * (1.0 - fired) + c.theta_r * fired
        u = state.others[1] + c.theta_s * fired
        # v is not cancelled: the order of float32 operations is that of the published code.
        voltage = v + v.square() - v - u + current
        recovery = u + c.theta_v * v - c.theta_u * u
        return State(voltage, self.fire(voltage - c.threshold), (current, recovery))


NEURONS: Registry[NeuronConfig, Neuron] = Registry(
    "neuron",
    lif=(LIFConfig, CubaLIF),
    cuba_lif=(CubaLIFConfig, CubaLIF),
    plif=(PLIFConfig, PLIF),
    alif=(ALIFConfig, ALIF),
    dynamic=(DynamicConfig, Dynamic),
    residual_if=(ResidualIFConfig, ResidualIF),
)
