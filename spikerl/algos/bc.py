"""Behaviour cloning: regression of the policy onto a dataset's actions (Pomerleau, 1988)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from spikerl.algos.base import Metrics
from spikerl.algos.offpolicy import OfflineConfig, OffPolicy, batches
from spikerl.kernels.gradient import Gradient
from spikerl.types import Batch


@dataclass(kw_only=True)
class BCConfig(OfflineConfig):
    def unread(self, discrete: bool) -> dict[str, str]:
        return {"gamma": "nothing looks ahead; leave it out"}


class BC(OffPolicy):
    config: BCConfig

    def update(self, rows: Batch, numbers: range) -> list[Metrics]:
        """Make the updates with these numbers, each on an equal share of the rows."""
        optimizer, metrics = self.actor_optimizer, []
        for obs, act in batches(len(numbers), rows.obs, rows.act):
            # Minimise mean (pi(s) - a)^2, over batch and action entries.
            pi, backward = self.actor.vjp(obs, self.generator)
            optimizer.gradient.loss.zero_()
            metric = backward(add_imitation(pi, act, optimizer.gradient), optimizer.gradient)
            metrics.append(metric | {"actor_loss": optimizer.step()})
            self.guard.end_update()
        return metrics


def add_imitation(
    pi_BA: Tensor, act_BA: Tensor, into: Gradient, weight_B1: Tensor | float = 1.0
) -> Tensor:
    """Add mean w (pi - act)^2, over batch and action entries, to the loss.

    Returns the gradient with respect to `pi`, times `into.factor`.
    """
    error_BA = pi_BA - act_BA
    into.loss += (weight_B1 * error_BA.square()).mean() * into.weight
    return weight_B1 * error_BA * (2.0 / error_BA.numel() * into.factor)
