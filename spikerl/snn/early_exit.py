"""A decision before the last spike step, once the action has settled.

Shape legend   B batch, A action entries.

Let a_t be the action decoded from the first t of T spike steps. The decision is a_e, where e is the
first t above k at which |a_t - a_(t-j)| < threshold for every action entry and j = 1 to k, or T if
there is none. RAPID-RL (arXiv:2109.08231) exits early along the layers of a network; this exits
along spike steps, for each observation by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from spikerl.errors import BadRequest
from spikerl.snn.decoders import (
    Decoder,
    ILCDecoder,
    LinearDecoder,
    MembraneDecoder,
    RateDecoder,
)

# Decoders that can read any number of spike steps.
READ_AT_ANY_STEP = (RateDecoder, LinearDecoder, MembraneDecoder, ILCDecoder)


@dataclass(kw_only=True)
class EarlyExit:
    threshold: float  # bound on the change of each action entry, which lies in [-1, 1]
    steps: int  # k, spike steps over which the change must have stayed below it

    def __post_init__(self) -> None:
        if not self.threshold > 0.0:
            raise BadRequest("early_exit", self.threshold, "give a value above 0")
        if self.steps < 1:
            raise BadRequest("exit_steps", self.steps, "give at least 1")

    def check(self, decoder: Decoder, spike_steps: int) -> None:
        """Refuse a decoder that needs all spike steps, and settings that can never exit early."""
        if type(decoder) not in READ_AT_ANY_STEP:
            remedy = f"decoder={decoder.config.name} reads all spike steps at once; leave it out"
            raise BadRequest("early_exit", self.threshold, remedy)
        if spike_steps == 1:
            remedy = "the policy has a single spike step, which nothing ends earlier; leave it out"
            raise BadRequest("early_exit", self.threshold, remedy)
        if self.steps >= spike_steps:
            remedy = f"the policy has {spike_steps} spike steps; give less than that"
            raise BadRequest("exit_steps", self.steps, remedy)

    def settled(self, act_BA: Sequence[Tensor]) -> Tensor:
        """Mask (B,) of decisions that end now; `act_BA`: the action at each spike step so far."""
        *before, last = act_BA[-1 - self.steps :]
        settled = last.new_full(last.shape[:1], len(before) == self.steps).bool()
        for act in before:
            settled &= ((last - act).abs() < self.threshold).all(1)
        return settled
