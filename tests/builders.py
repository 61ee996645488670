"""PopSAN's published settings, and small modules built from them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from spikerl import kernels
from spikerl.algos.bc import BCConfig
from spikerl.algos.bcq import BCQConfig
from spikerl.algos.ddpg import DDPGConfig
from spikerl.algos.dqn import DQNConfig
from spikerl.algos.iql import IQLConfig
from spikerl.algos.ppo import PPOConfig
from spikerl.algos.proxy_td3 import ProxyTD3Config
from spikerl.algos.sac import SACConfig
from spikerl.algos.td3 import TD3Config
from spikerl.algos.td3_bc import TD3BCConfig
from spikerl.config.build import Choices, Config
from spikerl.config.run import RunConfig
from spikerl.distributed.world import BackendConfig
from spikerl.energy.meter import EnergyConfig
from spikerl.envs.config import EnvConfig
from spikerl.kernels import KernelConfig
from spikerl.models.actor import SpikingActor
from spikerl.models.actor_config import ActorConfig, CareBNConfig, MLPConfig, PopSANConfig
from spikerl.models.critic import Critics
from spikerl.models.networks import build_actor
from spikerl.models.normalizer import RunningNorm
from spikerl.models.policy import Policy
from spikerl.models.precision import PrecisionConfig
from spikerl.snn.decoders import DecoderConfig, MembraneConfig, RateConfig, VoltageConfig
from spikerl.snn.encoders import EncoderConfig, PopulationConfig
from spikerl.snn.linear import ListOf
from spikerl.snn.neurons import (
    NEURONS,
    ALIFConfig,
    CubaLIFConfig,
    DynamicConfig,
    LIFConfig,
    Neuron,
    NeuronConfig,
    PLIFConfig,
)
from spikerl.types import Resolved, Task

POPULATION = PopulationConfig(
    name="population", pop_size=10, mean_range=[-3.0, 3.0], var=0.15, threshold=0.999
)
POISSON = PopulationConfig(
    name="poisson", pop_size=10, mean_range=[-3.0, 3.0], var=0.15, threshold=0.999
)
NEURON: dict[str, Any] = {
    "threshold": 0.5,
    "reset": "hard",
    "surrogate": "rect",
    "surrogate_window": 0.5,
    "surrogate_slope": 2.0,
    "surrogate_slope_end": None,
}
CUBA_LIF = CubaLIFConfig(name="cuba_lif", current_decay=0.5, voltage_decay=0.75, **NEURON)


def lif_config(**changes: Any) -> LIFConfig:
    return LIFConfig(**({**NEURON, "name": "lif", "voltage_decay": 0.75} | changes))


def plif_config(**changes: Any) -> PLIFConfig:
    return PLIFConfig(**({**NEURON, "name": "plif", "voltage_decay": 0.5} | changes))


def alif_config(**changes: Any) -> ALIFConfig:
    own = {"voltage_decay": 0.5, "adaptation": 0.5, "adaptation_decay": 0.5}
    return ALIFConfig(**({**NEURON, "name": "alif"} | own | changes))


def dynamic_config(**changes: Any) -> DynamicConfig:
    """With thetas that are not the published ones but binary fractions, whose sums are exact."""
    own = {"theta_v": -0.25, "theta_u": 0.5, "theta_r": 0.125, "theta_s": 0.25}
    return DynamicConfig(**({**NEURON, "name": "dynamic", "current_decay": 0.5} | own | changes))


def neuron_of(config: NeuronConfig) -> Neuron:
    return NEURONS.part(config)(config)


def with_neurons(actor: SpikingActor, config: NeuronConfig) -> SpikingActor:
    """`actor` itself, its neurons replaced."""
    actor.neurons = ListOf(neuron_of(config) for _ in actor.layers)
    return actor


def fill(module: nn.Module, values: dict[str, Any]) -> None:
    """Set the parameters that `values` names to its values."""
    with torch.no_grad():
        for name, value in values.items():
            module.get_parameter(name).copy_(torch.tensor(value))


RATE = RateConfig(name="rate", pop_size=10)


def membrane_config(**changes: Any) -> MembraneConfig:
    own: dict[str, Any] = {"name": "membrane", "pop_size": 10, "voltage_decay": 1.0, "read": "last"}
    return MembraneConfig(**(own | changes))


def voltage_config(read: str = "last", voltage_decay: float = 0.5) -> VoltageConfig:
    return VoltageConfig(name="voltage", read=read, voltage_decay=voltage_decay)


def popsan_config(hidden: list[int], spike_steps: int = 5, **changes: Any) -> PopSANConfig:
    own: dict[str, Any] = {"hidden_sizes": hidden, "spike_steps": spike_steps, "lr": 1e-4}
    return PopSANConfig(**({"name": "popsan"} | own | changes))


def care_bn_config(hidden: list[int], spike_steps: int = 5) -> CareBNConfig:
    return CareBNConfig(
        name="care_bn",
        hidden_sizes=hidden,
        spike_steps=spike_steps,
        lr=1e-4,
        recalibration_interval=None,
        recalibration_batches=1,
    )


def spiking(encoder: EncoderConfig) -> ActorConfig:
    return ActorConfig(actor=popsan_config([6, 5]), encoder=encoder, neuron=CUBA_LIF, decoder=RATE)


def dense_config(hidden: list[int]) -> ActorConfig:
    mlp = MLPConfig(name="mlp", hidden_sizes=hidden, lr=1e-3)
    return ActorConfig(actor=mlp, encoder=None, neuron=None, decoder=None)


def popsan(
    obs_dim: int,
    act_dim: int,
    hidden: list[int],
    *,
    spike_steps: int = 5,
    encoder: EncoderConfig = POPULATION,
    neuron: NeuronConfig = CUBA_LIF,
    decoder: DecoderConfig = RATE,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> SpikingActor:
    config = popsan_config(hidden, spike_steps, **changes)
    return SpikingActor(obs_dim, act_dim, config, encoder, neuron, decoder, dtype=dtype)


def twin_critic(
    obs_dim: int, act_dim: int, hidden: list[int], dtype: torch.dtype = torch.float32
) -> Critics:
    return Critics(obs_dim, act_dim, hidden, dtype=dtype)


def ddpg_config(**changes: Any) -> DDPGConfig:
    return DDPGConfig(**(COMMON | REPLAYING | NOISE | {"name": "ddpg"} | changes))


def td3_config(**changes: Any) -> TD3Config:
    return TD3Config(**(COMMON | REPLAYING | NOISE | DELAY | {"name": "td3"} | changes))


def proxy_td3_config(**changes: Any) -> ProxyTD3Config:
    own = {"name": "proxy_td3", "proxy_steps": 3, "proxy_lr": 1e-3, "proxy_hidden_sizes": [64, 64]}
    return ProxyTD3Config(**(COMMON | REPLAYING | NOISE | DELAY | own | changes))


def sac_config(**changes: Any) -> SACConfig:
    own = {
        "name": "sac",
        "temperature": 0.2,
        "learn_temperature": False,
        "target_entropy": None,
        "temperature_lr": 3e-4,
        "log_std": "separate",
        "log_std_hidden_sizes": [64, 64],
        "log_std_lr": 1e-3,
        "log_std_range": [-20.0, 2.0],
        "critic_warmup": 0,
    }
    return SACConfig(**(COMMON | REPLAYING | own | changes))


def ppo_config(**changes: Any) -> PPOConfig:
    own = {
        "name": "ppo",
        "rollout_steps": 100,
        "norm_interval": 100,
        "epochs": 2,
        "clip_ratio": 0.2,
        "gae_lambda": 0.95,
        "entropy_coef": 0.0,
        "log_std": -0.5,
        "target_kl": None,
        "normalize_advantage": "minibatch",
        "ratio": "joint",
    }
    return PPOConfig(**(COMMON | own | changes))


def dqn_config(**changes: Any) -> DQNConfig:
    own = {
        "name": "dqn",
        "tau": 1.0,
        "double": False,
        "duelling": False,
        "n_step": 1,
        "target_interval": 1,
        "epsilon_start": 1.0,
        "epsilon_end": 0.1,
        "epsilon_steps": 100,
    }
    return DQNConfig(**(ALL | REPLAYING | own | changes))


def bc_config(**changes: Any) -> BCConfig:
    return BCConfig(**(ALL | {"name": "bc"} | changes))


def td3_bc_config(**changes: Any) -> TD3BCConfig:
    own = {"name": "td3_bc", "tau": 0.005, "alpha": 2.5}
    return TD3BCConfig(**(COMMON | DELAY | own | changes))


def iql_config(**changes: Any) -> IQLConfig:
    own = {"name": "iql", "tau": 0.005, "expectile": 0.7, "beta": 3.0}
    return IQLConfig(**(COMMON | own | changes))


def bcq_config(**changes: Any) -> BCQConfig:
    own = {
        "name": "bcq",
        "tau": 0.005,
        "phi": 0.05,
        "least_weight": 0.75,
        "target_samples": 3,
        "act_samples": 4,
        "vae_hidden_sizes": [8],
        "vae_lr": 1e-3,
    }
    return BCQConfig(**(COMMON | own | changes))


ALL: dict[str, Any] = {
    "batch_size": 32,
    "gamma": 0.99,
    "norm_interval": 50,
    "norm_clip": 3.0,
    "max_grad_norm": None,
}
COMMON: dict[str, Any] = {**ALL, "critic_lr": 1e-3, "critic_hidden_sizes": [64, 64]}
REPLAYING: dict[str, Any] = {
    "tau": 0.005,
    "replay_capacity": 1000,
    "random_steps": 0,
    "learning_starts": 0,
    "update_interval": 1,
    "updates_per_step": 1.0,
}
NOISE: dict[str, Any] = {"explore_noise": 0.1, "critic_warmup": 0}
DELAY: dict[str, Any] = {
    "policy_delay": 2,
    "first_policy_update": 0,
    "target_noise": 0.2,
    "noise_clip": 0.5,
}


INVERTED_PENDULUM = EnvConfig(
    name="InvertedPendulum",
    version="v5",
    id="InvertedPendulum-v5",
    max_episode_steps=50,
    vectorizer="sync",
)


CARTPOLE = EnvConfig(
    name="CartPole", version="v1", id="CartPole-v1", max_episode_steps=50, vectorizer="sync"
)


def small_config(
    *,
    env: EnvConfig = INVERTED_PENDULUM,
    encoder: PopulationConfig = POPULATION,
    num_envs: int = 1,
    total_steps: int = 200,
    steps_per_epoch: int = 100,
    eval_episodes: int = 3,
    seed: int = 0,
    scaling: str = "strong",
    **algo: Any,
) -> Config:
    """The config of a run that takes seconds: small networks, and every interval short."""
    settings = {
        "batch_size": 10,
        "critic_hidden_sizes": [16],
        "random_steps": 50,
        "learning_starts": 50,
        "update_interval": 10,
        "norm_interval": 10,
    }
    run = RunConfig(
        seed=seed,
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        eval_episodes=eval_episodes,
        num_envs=num_envs,
        world_size=None,
        scaling=scaling,
        device="cpu",
        threads=1,
        plugins=[],
        deterministic=False,
        max_restarts=0,
        nnodes=1,
        node_rank=None,
        rdzv=None,
        run_dir=None,
        init_from=None,
        resume=None,
        config=None,
        init_policy="last",
        keep_replay=True,
        logger=[],
    )
    return Config(
        run=run,
        env=env,
        actor=ActorConfig(
            actor=popsan_config([16]), encoder=encoder, neuron=CUBA_LIF, decoder=RATE
        ),
        algo=td3_config(**(settings | algo)),
        precision=PrecisionConfig(name="fp32", actor="fp32", critic="fp32"),
        backend=BackendConfig(name="auto"),
        energy=EnergyConfig(name="none", file=None),
        resolved=Choices(
            device=Resolved("cpu", "requested"),
            threads=Resolved("1", "requested"),
            kernel=Resolved("reference", "requested"),
            backend=Resolved("none", "one worker exchanges nothing"),
            energy=Resolved("none", "requested"),
        ),
        own_products=False,
        world_size=1,
        raw={},
    )


def with_run(config: Config, **changes: Any) -> Config:
    """A copy of `config` with other values of keys at the top level."""
    return replace(config, run=replace(config.run, **changes))


LOW, HIGH = np.array([-1.0, 0.0, -3.0]), np.array([2.0, 0.4, -1.0])


def toy_policy(config: ActorConfig, obs_shape: tuple[int, ...] = (4,)) -> Policy:
    """A policy with actions from LOW to HIGH that has seen 50 observations around 3."""
    task = Task("Toy-v0", obs_shape, (3,), LOW, HIGH, 10)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kernel = kernels.resolve(KernelConfig(name="auto", path=None), "cpu").choice
        actor = build_actor(config, task.obs_dim, 3, kernel=kernel)
    norm = RunningNorm(task.obs_dim, 2.5)
    norm.add(np.random.default_rng(1).normal(3.0, 2.0, (50, task.obs_dim)))
    norm.merge([norm.collect()])
    return Policy(task, config, actor, norm)
