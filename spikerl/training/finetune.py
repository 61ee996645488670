"""A compressed actor learns to act as it did before, on observations that its actions lead to.

loss       mean (pi(s) - a)^2, over batch and entries; a are the actions of the actor before
           compression (values, where actions are discrete)
s          drawn from observations of the policy before compression and, after each of ROUNDS equal
           parts of the steps but the last, also from those of the compressed policy at that time
           (DAgger, Ross et al., 2011, arXiv:1011.0686)
update     Adam, at a rate that falls evenly from RATE to 0; pruned weights stay 0
grid       where a matrix is quantised, the actor acts with s q, Adam updates numbers w, and the
           gradient with respect to s q stands for that to w (straight-through); s is constant

Shape legend   M observations, B batch, O observation entries, A action entries.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from spikerl.algos.base import Guard, Optimizer
from spikerl.algos.bc import add_imitation
from spikerl.models.actor import Actor
from spikerl.models.compression import Compression, quantise

RATE = 3e-3
BATCH = 256
ROUNDS = 4


def finetune(
    actor: Actor,
    observe: Callable[[int], Tensor],
    goal: Callable[[Tensor], Tensor],
    steps: int,
    done: Compression,
    unpruned: Tensor | None,
    generator: torch.Generator,
    *,
    squash: bool = True,
) -> list[float]:
    """Train `actor`, which was compressed as `done` says, in place; return the loss of each step.

    `observe` maps a round to observations (M, O): in round 0 those of the policy before
    compression, then of this actor. `goal` maps observations to the actions to imitate, (M, A).
    `unpruned` is 0 for each parameter that was pruned. Raises NonFinite if a loss is not finite.
    """
    obs_MO = observe(0)
    act_MA = goal(obs_MO)
    guard = Guard(obs_MO.device, scales_loss=False)
    optimizer = Optimizer(actor, RATE, guard, kernel=actor.kernel, unpruned=unpruned)
    numbers, losses = optimizer.flat.clone(), []
    for step in range(steps):
        if step > 0 and (now := step * ROUNDS // steps) > (step - 1) * ROUNDS // steps:
            more_MO = observe(now)
            obs_MO, act_MA = torch.cat([obs_MO, more_MO]), torch.cat([act_MA, goal(more_MO)])
        rows = torch.randint(len(obs_MO), (BATCH,), generator=generator, dtype=torch.int64)
        pi, backward = actor.vjp(obs_MO[rows], generator, squash)
        optimizer.gradient.loss.zero_()
        backward(add_imitation(pi, act_MA[rows], optimizer.gradient), optimizer.gradient)
        optimizer.flat.copy_(numbers)
        optimizer.lr = RATE * (1.0 - step / steps)
        losses.append(float(optimizer.step()))
        numbers.copy_(optimizer.flat)
        if done.bits:
            quantise(actor, done.bits, done.scales)
        guard.end_update()
    guard.check(steps)
    return losses
