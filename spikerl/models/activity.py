"""Firing statistics of a spiking actor.

Shape legend   N neurons.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(eq=False)
class Activity:
    """Counts for each neuron, summed over observations and spike steps."""

    spikes: list[Tensor]  # spikes, (N,) each: encoder, hidden layers, output population
    inside: list[Tensor]  # voltages inside the surrogate window, likewise without the encoder
    samples: int  # spike steps of all observations
    observations: int
    encoder_spikes: bool = True  # False: spikes[0] sums currents and is not a count

    def __add__(self, other: Activity) -> Activity:
        spikes = [a + b for a, b in zip(self.spikes, other.spikes, strict=True)]
        inside = [a + b for a, b in zip(self.inside, other.inside, strict=True)]
        samples = self.samples + other.samples
        observations = self.observations + other.observations
        return Activity(spikes, inside, samples, observations, self.encoder_spikes)

    @property
    def spike_steps(self) -> float:
        """Spike steps per decision, mean over observations."""
        return self.samples / self.observations

    @property
    def firing_rate(self) -> float:
        """Spikes per spike step, mean over all hidden and output neurons."""
        return float(torch.cat(self.spikes[1:]).mean()) / self.samples

    @property
    def window_fraction(self) -> float:
        """Share of the hidden and output neurons' voltages that lie in the surrogate window."""
        return float(torch.cat(self.inside).mean()) / self.samples

    @property
    def layers(self) -> list[float | None]:
        """Firing rates of the encoder (None where it gives currents) and of each layer."""
        rates = [float(counts.mean()) / self.samples for counts in self.spikes]
        return [rates[0] if self.encoder_spikes else None, *rates[1:]]

    @property
    def layer_windows(self) -> list[float]:
        """Window fraction of each layer, without the encoder."""
        return [float(counts.mean()) / self.samples for counts in self.inside]

    @property
    def silent(self) -> list[float]:
        """Share of neurons that never fired in each layer, without the encoder."""
        return [float((counts == 0).double().mean()) for counts in self.spikes[1:]]

    @property
    def saturated(self) -> list[float]:
        """Share of neurons that always fired in each layer, without the encoder."""
        return [float((counts == self.samples).double().mean()) for counts in self.spikes[1:]]
