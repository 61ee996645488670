"""The networks of a run, with first weights, and the algorithm that trains them."""

from __future__ import annotations

import torch

from spikerl.algos import ALGOS
from spikerl.algos.base import CriticsConfig, Learner
from spikerl.config.build import Config
from spikerl.distributed.world import World, share
from spikerl.models.actor import Actor
from spikerl.models.compression import nonzero, prune
from spikerl.models.critic import Critics
from spikerl.models.networks import build_network, copy_weights
from spikerl.models.policy import Policy
from spikerl.seeding import initialising
from spikerl.types import Task


def batch_share(config: Config, world: World) -> tuple[int, float]:
    """Rows that a worker draws for an update, and their share of the global batch."""
    size = config.algo.batch_size
    if config.run.scaling == "weak":
        return size, 1.0 / world.size
    rows = share(size, world.rank, world.size)
    # Workers cut their rollouts into minibatches, equally many on all of them.
    equal = ALGOS.part(config.algo).on_policy
    return rows, 1.0 / world.size if equal else rows / size


def build_learner(
    config: Config,
    task: Task,
    generator: torch.Generator,
    world: World,
    device: torch.device,
    init: Policy | None = None,
) -> Learner:
    """Build a run's learner. `generator`: for its updates. `init`: its actor's first weights."""
    algo, precision, kernel = config.algo, config.precision, config.resolved.kernel.choice
    learner = ALGOS.part(algo)
    with initialising(config.run.seed):
        actor = build_network(
            config.actor,
            algo.inputs(task.obs_dim, task.act_dim),
            algo.outputs(task.act_dim),
            dtype=precision.actor_dtype,
            kernel=kernel,
        )
        critic = None
        if isinstance(algo, CriticsConfig):
            critic = Critics(
                task.obs_dim,
                0 if learner.on_policy else task.act_dim,
                algo.critic_hidden_sizes,
                networks=algo.critics,
                dtype=precision.critic_dtype,
                kernel=kernel,
            ).to(device)
        if init is not None:
            copy_weights(actor, init.actor)
        unpruned = None
        if (pruned_share := config.actor.actor.prune) is not None:
            assert isinstance(actor, Actor)
            prune(actor, pruned_share, "actor.prune")
            unpruned = nonzero(actor).to(device)
        return learner(
            actor.to(device),
            critic,
            algo,
            actor_lr=config.actor.actor.lr,
            generator=generator,
            scales_loss=precision.scales_loss,
            world=world,
            weight=batch_share(config, world)[1],
            discrete=task.kind == "discrete",
            unpruned=unpruned,
        )
