"""What bench times: an actor that fires like a trained one, and learners that train it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from spikerl.algos import ALGOS
from spikerl.algos.offpolicy import OffPolicy
from spikerl.algos.proxy_td3 import ProxyTD3Config
from spikerl.algos.td3 import TD3Config
from spikerl.commands.bench.baselines import set_active_shares, set_firing_rates
from spikerl.config.build import Config, why_layered
from spikerl.distributed.world import ALONE, World
from spikerl.errors import BadRequest
from spikerl.machine import current_device
from spikerl.models.actor import Actor, SpikingActor
from spikerl.models.actor_config import ActorConfig
from spikerl.models.critic import Critics
from spikerl.models.networks import build_actor
from spikerl.models.normalizer import RunningNorm
from spikerl.models.policy import Policy
from spikerl.runs.policies import load_policy
from spikerl.snn.neurons import NeuronConfig
from spikerl.training.start import task_for
from spikerl.types import Batch

# Firing rates of the encoder and of each layer in the HalfCheetah policy that PopSAN's authors
# published, as `spikerl eval` measures them.
TRAINED_RATES = [0.196, 0.329, 0.509, 0.710]
TRAINED = "trained rates"  # names weights with these rates
# Shares of the units of a critic's hidden layers that are not 0, after 80 000 steps of HalfCheetah:
# 0.40 to 0.42 and 0.23 to 0.28, in four critics of two runs.
TRAINED_ACTIVE_SHARES = [0.41, 0.27]
# As in training, updates follow each other; the first of a turn has cold caches.
UPDATES_PER_TURN = 20


class BenchFixtures:
    """Actors, learners and batches to time. `device`: this worker's own, if there are several."""

    def __init__(
        self, config: Config, run: str | None = None, device: torch.device | None = None
    ) -> None:
        if not isinstance(build_actor(config.actor, 1, 1), SpikingActor):
            raise BadRequest("actor", config.actor.actor.name, "bench times a spiking actor")
        if why := why_layered(config.actor, torch.float32):
            remedy = f"bench times actors that run in one call of kernel=cpu; this one has {why}"
            raise BadRequest("actor", config.actor.shape(), remedy)
        if not isinstance(config.algo, TD3Config) or isinstance(config.algo, ProxyTD3Config):
            raise BadRequest("algo", config.algo.name, "bench times TD3; leave it out")
        self.config, self.run, self.algo = config, run, config.algo
        self.kernel = config.resolved.kernel.choice
        self.task = task_for(config)
        self.threads = int(config.resolved.threads.choice)
        torch.set_num_threads(self.threads)
        self.device = device or current_device(config.resolved.device.choice)
        self.obs = torch.randn(4096, self.task.obs_dim).clamp(-3.0, 3.0)
        self.actor, self.weights = self.given_actor()
        self.obs, self.actor = self.obs.to(self.device), self.actor.to(self.device)

    def given_actor(self) -> tuple[SpikingActor, str]:
        """The actor that is timed, and a word for where its weights are from."""
        if self.run is not None:
            policy = load_policy(self.run)
            if policy.task.obs_dim != self.task.obs_dim or policy.task.act_dim != self.task.act_dim:
                raise BadRequest("run", self.run, f"its task is not {self.task.env_id}")
            if not isinstance(policy.actor, SpikingActor):
                raise BadRequest("run", self.run, "its actor is dense")
            own, typed = policy.config.shape(), self.config.actor.shape()
            if own != typed:
                raise BadRequest("run", self.run, f"its actor is {own}; give its keys, not {typed}")
            return policy.actor, "run"
        return self.actor_at_trained_rates(self.config.actor), TRAINED

    def actor_at_trained_rates(self, config: ActorConfig) -> SpikingActor:
        """An actor that fires like a trained one."""
        actor = build_actor(config, self.task.obs_dim, self.task.act_dim)
        assert isinstance(actor, SpikingActor)
        hidden = len(actor.layers) - 1
        inner = np.interp(np.linspace(0, 1, hidden), [0, 1], TRAINED_RATES[1:3]).tolist()
        set_firing_rates(actor, [TRAINED_RATES[0], *inner, TRAINED_RATES[-1]], self.obs[:256].cpu())
        return actor

    def spiking(self, kernel: str, neuron: NeuronConfig | None = None) -> SpikingActor:
        """A copy of the actor that runs in `kernel`; with `neuron`, an actor of such neurons."""
        config, source = self.config.actor, self.actor
        if neuron is not None:
            config = replace(config, neuron=neuron)
            source = self.actor_at_trained_rates(config)
        actor = build_actor(config, self.task.obs_dim, self.task.act_dim, kernel=kernel)
        actor.load_state_dict(source.state_dict())
        assert isinstance(actor, SpikingActor)
        return actor.to(self.device)

    def policy(self, actor: Actor) -> Policy:
        return Policy(self.task, self.config.actor, actor, RunningNorm(self.task.obs_dim, 3.0))

    def learner(
        self,
        actor: Actor,
        critic_dtype: torch.dtype = torch.float32,
        world: World = ALONE,
        algo: TD3Config | None = None,
    ) -> OffPolicy:
        """A learner of this actor: TD3, or what `algo` configures."""
        O, A, algo = self.task.obs_dim, self.task.act_dim, algo or self.algo  # noqa: E741
        kernel = actor.kernel if isinstance(actor, SpikingActor) else self.kernel
        critic = Critics(O, A, algo.critic_hidden_sizes, dtype=critic_dtype, kernel=kernel)
        hidden = len(algo.critic_hidden_sizes)
        shares = np.interp(np.linspace(0, 1, hidden), [0, 1], TRAINED_ACTIVE_SHARES).tolist()
        set_active_shares(critic, shares, self.obs[:256].cpu())
        generator = torch.Generator(self.device).manual_seed(0)
        learner = ALGOS.part(algo)(
            actor,
            critic.to(self.device),
            algo,
            actor_lr=1e-4,
            generator=generator,
            world=world,
            weight=1.0 / world.size,
        )
        assert isinstance(learner, OffPolicy)
        return learner

    def batch(self, size: int) -> Batch:
        rows, following = (self.obs[torch.randint(len(self.obs), (size,))] for _ in range(2))
        act = torch.rand(size, self.task.act_dim) * 2.0 - 1.0
        live, discount = torch.zeros(size, dtype=torch.bool), torch.full((size,), 0.99)
        fields = (rows, act, torch.randn(size), following, live, discount)
        return Batch(*(field.to(self.device) for field in fields))
