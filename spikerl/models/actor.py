"""Actors: spiking, and dense.

Shape legend   B batch, O observation entries, A action entries, N neurons.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from spikerl import kernels
from spikerl.kernels import reference
from spikerl.kernels.gradient import Pullback
from spikerl.models.activity import Activity
from spikerl.models.actor_config import CareBNConfig, MLPConfig, PopSANConfig
from spikerl.snn.batchnorm import RECALIBRATE, CaReBN
from spikerl.snn.conv import ConvConfig
from spikerl.snn.decoders import DECODERS, DecoderConfig
from spikerl.snn.early_exit import EarlyExit
from spikerl.snn.encoders import ENCODERS, EncoderConfig
from spikerl.snn.linear import Linear, Linears, ListOf
from spikerl.snn.neurons import NEURONS, Neuron, NeuronConfig


class SpikingActor(nn.Module):
    """Encoder, spiking layers, decoder, tanh: (B, O) -> (B, A) in [-1, 1]."""

    def __init__(
        self,
        obs_dim: int,
        act_dim: int,
        actor: PopSANConfig,
        encoder: EncoderConfig,
        neuron: NeuronConfig,
        decoder: DecoderConfig,
        *,
        dtype: torch.dtype = torch.float32,
        kernel: str = "reference",
    ) -> None:
        super().__init__()
        self.obs_dim, self.act_dim = obs_dim, act_dim
        self.spike_steps, self.kernel = actor.spike_steps, kernel
        self.early_exit: EarlyExit | None = None  # set in loaded policies, never in training
        # Operands of the layers' products; voltages and thresholds keep the weights' type.
        self.dtype = dtype
        self.encoder = ENCODERS.part(encoder)(encoder, obs_dim, actor.spike_steps)
        hidden = actor.hidden_sizes
        decodes = DECODERS.part(decoder)
        population = decodes.population(decoder, act_dim)
        sizes = [self.encoder.outputs, *hidden, *([population] if population else [])]
        self.layers = Linears(sizes, convolutions(actor, sizes[0]))
        self.neurons = ListOf[Neuron](NEURONS.part(neuron)(neuron) for _ in self.layers)
        normed = sizes[1:] if isinstance(actor, CareBNConfig) else []
        self.norms = ListOf[CaReBN](CaReBN(size, neuron.threshold) for size in normed)
        self.decoder = decodes(decoder, act_dim, hidden[-1], actor.spike_steps)
        self.spike_costs = actor.spike_costs(len(self.layers))  # after warmup; empty: no cost
        self.spike_cost_start = actor.spike_cost_start
        self.spike_cost_warmup = actor.spike_cost_warmup
        self.spike_cost_L: Tensor | None = None  # current costs, set by `schedule`

    def forward(
        self, obs_BO: Tensor, generator: torch.Generator | None = None, squash: bool = True
    ) -> Tensor:
        """Actions; without `squash`, their values before tanh. Only a random encoder draws from
        `generator`.
        """
        return kernels.named(self.kernel).actions(self, obs_BO, generator, squash)

    def vjp(
        self, obs_BO: Tensor, generator: torch.Generator | None, squash: bool = True
    ) -> tuple[Tensor, Pullback]:
        """As `forward`, with a function that maps the gradient back to the parameters'."""
        return kernels.named(self.kernel).vjp(self, obs_BO, generator, squash)

    def schedule(self, step: int, total_steps: int) -> None:
        """Set the surrogates' slopes and the spike costs for the state after `step` steps."""
        for neuron in self.neurons:
            neuron.schedule(min(step / total_steps, 1.0))
        if not self.spike_costs:
            return
        if self.spike_cost_L is None:  # allocated once: CUDA graphs read it at a fixed address
            self.spike_cost_L = self.layers[0].weight_IN.new_zeros(len(self.spike_costs))
        behind = step - self.spike_cost_start
        share = min(behind / self.spike_cost_warmup, 1.0) if self.spike_cost_warmup else 1.0
        now = share if behind >= 0 else 0.0
        costs = [now * cost for cost in self.spike_costs]
        self.spike_cost_L.copy_(torch.tensor(costs, dtype=torch.float64))

    @property
    def carries(self) -> bool:
        """Whether a decision depends on the one before."""
        return any(neuron.carries for neuron in self.neurons)

    @torch.no_grad()
    def recalibrate(self, batches: Iterable[Tensor], generator: torch.Generator | None) -> None:
        """Measure the moments of the normalised drives anew, on all these observations."""
        for norm in self.norms:
            norm.begin_recalibration()
        for obs_BO in batches:
            reference.spikes(self, obs_BO, generator, moments=RECALIBRATE)
        for norm in self.norms:
            norm.end_recalibration()

    def activity(self, obs_BO: Tensor, generator: torch.Generator | None = None) -> Activity:
        """Firing statistics on any number of observations, which are split to bound memory."""
        activity = None
        for piece in obs_BO.split(1024):
            layers, states = reference.record(self, piece, generator)
            inside = [
                torch.stack([neuron.passes(state) for state in own])
                for neuron, own in zip(self.neurons, states, strict=True)
            ]
            taken_TB1 = reference.taken(self, layers[-1])
            part = Activity(
                [(s * taken_TB1).double().sum((0, 1)).cpu() for s in layers],
                [(near * taken_TB1).double().sum((0, 1)).cpu() for near in inside],
                int(taken_TB1.sum()),
                len(piece),
                self.encoder.spikes,
            )
            activity = activity + part if activity else part
        assert activity is not None
        return activity


class MLPActor(nn.Module):
    """Dense actor, (B, O) -> (B, A) in [-1, 1]."""

    carries = False

    def __init__(
        self,
        obs_dim: int,
        act_dim: int,
        actor: MLPConfig,
        *,
        dtype: torch.dtype = torch.float32,
        kernel: str = "reference",
    ) -> None:
        super().__init__()
        self.obs_dim, self.act_dim, self.dtype, self.kernel = obs_dim, act_dim, dtype, kernel
        sizes = [obs_dim, *actor.hidden_sizes, act_dim]
        self.layers = Linears(sizes, convolutions(actor, obs_dim))

    def forward(
        self, obs_BO: Tensor, generator: torch.Generator | None = None, squash: bool = True
    ) -> Tensor:
        """As `SpikingActor.forward`."""
        return kernels.named(self.kernel).dense_actions(self, obs_BO, squash)

    def vjp(
        self, obs_BO: Tensor, generator: torch.Generator | None, squash: bool = True
    ) -> tuple[Tensor, Pullback]:
        """As `SpikingActor.vjp`."""
        return kernels.named(self.kernel).dense_vjp(self, obs_BO, squash)


Actor = SpikingActor | MLPActor


def convolutions(actor: PopSANConfig | MLPConfig, inputs: int) -> list[Linear]:
    return actor.layers(inputs) if isinstance(actor, ConvConfig) else []


def connections(actor: Actor) -> dict[str, nn.Parameter]:
    """An actor's weight matrices by name, without biases, receptive fields or neuron parameters."""
    fields = ("encoder.mean_OP", "encoder.std_OP")
    return {n: p for n, p in actor.named_parameters() if p.dim() > 1 and n not in fields}
