"""How a spiking actor fires.

Shape legend   N neurons.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(eq=False)
class Activity:
    """Counts of each neuron, over observations and spike steps."""

    spikes: list[Tensor]  # of the encoder, of each hidden layer, of the output: (N,)
    inside: list[Tensor]  # voltages inside the surrogate window, the same but for the encoder
    samples: int  # spike steps of all observations
    observations: int
    encoder_spikes: bool = True  # else it gives currents, whose sums have no meaning here

    def __add__(self, other: Activity) -> Activity:
        spikes = [a + b for a, b in zip(self.spikes, other.spikes, strict=True)]
        inside = [a + b for a, b in zip(self.inside, other.inside, strict=True)]
        samples = self.samples + other.samples
        observations = self.observations + other.observations
        return Activity(spikes, inside, samples, observations, self.encoder_spikes)

    @property
    def spike_steps(self) -> float:
        """Of a decision, mean over observations."""
        return self.samples / self.observations

    @property
    def firing_rate(self) -> float:
        """Spikes per spike step, mean over all hidden and output neurons."""
        return float(torch.cat(self.spikes[1:]).mean()) / self.samples

    @property
    def window_fraction(self) -> float:
        """Of their voltages, those that a gradient passes."""
        return float(torch.cat(self.inside).mean()) / self.samples

    @property
    def layers(self) -> list[float | None]:
        """Firing rates of the encoder (None where it gives currents) and of each layer."""
        rates = [float(counts.mean()) / self.samples for counts in self.spikes]
        return [rates[0] if self.encoder_spikes else None, *rates[1:]]

    @property
    def layer_windows(self) -> list[float]:
        """Window fractions, without the encoder's."""
        return [float(counts.mean()) / self.samples for counts in self.inside]

    @property
    def silent(self) -> list[float]:
        """Shares of neurons that never fired, without the encoder's."""
        return [float((counts == 0).double().mean()) for counts in self.spikes[1:]]

    @property
    def saturated(self) -> list[float]:
        """Shares of neurons that always fired, without the encoder's."""
        return [float((counts == self.samples).double().mean()) for counts in self.spikes[1:]]
