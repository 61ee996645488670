"""Decision Transformer (Chen et al., NeurIPS 2021, arXiv:2106.01345) and Decision SpikeFormer
(Huang et al., CVPR 2025, arXiv:2504.03800): predict a dataset's actions from the preceding steps
and from the return that followed.

The network selects one of the two: `actor=transformer` or `actor=spikeformer`.

Shape legend   B batch, K steps of a context, A action entries, T steps of an episode.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from spikerl.algos.base import Learner, Metrics
from spikerl.algos.offpolicy import OfflineConfig
from spikerl.algos.replay import Sampler
from spikerl.algos.returns import returns_to_go
from spikerl.models.actor_config import ActorConfig
from spikerl.models.networks import SequenceActor
from spikerl.models.proposals import Proposer
from spikerl.models.sequence import ConditionConfig
from spikerl.types import Contexts


@dataclass(kw_only=True)
class DecisionTransformerConfig(OfflineConfig):
    anneals: ClassVar[bool] = True

    weight_decay: float  # AdamW's
    warmup_share: float  # share of the updates over which the learning rate rises; then it falls
    return_scale: float  # returns to go are divided by this
    # Return that evaluations aim at, in the environment's units; null: the dataset's best.
    target_return: float | None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("give 0 or more", lambda x: x >= 0.0, "weight_decay")
        self.check("give a value in [0, 1)", lambda x: 0.0 <= x < 1.0, "warmup_share")
        self.check("give a value above 0", lambda x: 0.0 < x <= 1e30, "return_scale")
        finite = "give a number, or null"
        self.check(finite, lambda x: x is None or abs(x) <= 1e30, "target_return")

    def unread(self, discrete: bool) -> dict[str, str]:
        return {"gamma": "returns to go are undiscounted; leave it out"}

    def lr_share(self, update: int, total: int) -> float:
        """Factor of the learning rate at update `update`: linear warmup, then a cosine to 0."""
        warmup = self.warmup_share * total
        if update < warmup:
            return min((update + 1) / warmup, 1.0)
        behind = min((update - warmup) / (total - warmup), 1.0)
        return 0.5 * (1.0 + math.cos(math.pi * behind))


class DecisionTransformer(Learner):
    config: DecisionTransformerConfig
    actor: SequenceActor

    def __init__(
        self, actor: SequenceActor, critic: None, config: DecisionTransformerConfig, **settings: Any
    ) -> None:
        super().__init__(actor, critic, config, **settings)
        self.lr = self.actor_optimizer.lr
        self.actor_optimizer.weight_decay = config.weight_decay
        # Highest return of a whole episode in the dataset; if it has none, of a piece of one.
        self.best_return = torch.full((), -math.inf, dtype=torch.float64)
        self.episodes = torch.zeros((), dtype=torch.int64)  # whole episodes seen

    def recorded(self, rew_T: np.ndarray, whole: bool) -> np.ndarray:
        """Record an episode of the dataset (`whole`) or a piece of one; its returns to go, (T,)."""
        togo_T = returns_to_go(rew_T)
        if whole and not self.episodes:
            self.best_return.fill_(-math.inf)  # pieces no longer count
        if whole or not self.episodes:
            self.best_return.clamp_(min=float(togo_T[0]))
        self.episodes += whole
        return togo_T

    def train(self, sampler: Sampler, gradient_steps: int, batch_size: int) -> list[Metrics]:
        length = self.actor.config.context
        return [self.update(sampler.contexts(batch_size, length)) for _ in range(gradient_steps)]

    def update(self, steps: Contexts) -> Metrics:
        """One update from this worker's contexts, whose returns to go are unscaled."""
        c, optimizer = self.config, self.actor_optimizer
        self.actor.schedule(self.updates / self.total_updates)
        optimizer.lr = self.lr * c.lr_share(self.updates, self.total_updates)

        # Minimise mean (pi(..., R_t, s_t)_t - a_t)^2, over all steps that are not padding, of all
        # workers, and over action entries.
        count = steps.there.sum(dtype=torch.float64)
        self.world.sum_(count)
        scaled = steps._replace(togo=steps.togo / c.return_scale)
        error_BKA = self.actor(scaled, self.generator) - steps.act
        total = (error_BKA.square() * steps.there.unsqueeze(2)).sum()
        entries = count.to(total.dtype) * steps.act.shape[2] * optimizer.gradient.weight
        # `partly`: layer norms whose share in PTBN has fallen to 0 are not part of the graph.
        optimizer.gradient.differentiate(total / entries, partly=True)
        loss = optimizer.step()

        self.guard.end_update()
        self.updates += 1
        self.refresh()
        return {"actor_loss": loss}

    def state(self) -> dict[str, Tensor]:
        own = {"dataset.best_return": self.best_return, "dataset.episodes": self.episodes}
        return super().state() | own

    @property
    def target_return(self) -> float:
        given = self.config.target_return
        return float(self.best_return) if given is None else given

    def notes(self) -> list[str]:
        whose = "the best of the dataset" if self.config.target_return is None else "requested"
        best = f"the dataset's best episode has {float(self.best_return):.6g}"
        return [f"evaluations aim at a return of {self.target_return:.6g} ({whose}); {best}"]

    def inference(
        self, config: ActorConfig, act_dim: int
    ) -> tuple[ActorConfig, SequenceActor | Proposer]:
        """The network, with the target return and its scale in the config."""
        config, actor = super().inference(config, act_dim)
        assert isinstance(actor, SequenceActor)
        aim = ConditionConfig(
            target_return=self.target_return, return_scale=self.config.return_scale
        )
        return replace(config, conditioning=aim), actor
