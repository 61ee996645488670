"""Learning algorithms: each file reads like its paper."""

from __future__ import annotations

from spikerl.algos.base import AlgoConfig, Learner
from spikerl.algos.bc import BC, BCConfig
from spikerl.algos.bcq import BCQ, BCQConfig
from spikerl.algos.ddpg import DDPG, DDPGConfig
from spikerl.algos.decision_transformer import DecisionTransformer, DecisionTransformerConfig
from spikerl.algos.dqn import DQN, DQNConfig
from spikerl.algos.iql import IQL, IQLConfig
from spikerl.algos.ppo import PPO, PPOConfig
from spikerl.algos.proxy_td3 import ProxyTD3, ProxyTD3Config
from spikerl.algos.sac import SAC, SACConfig
from spikerl.algos.td3 import TD3, TD3Config
from spikerl.algos.td3_bc import TD3BC, TD3BCConfig
from spikerl.schema import Registry

ALGOS: Registry[AlgoConfig, Learner] = Registry(
    "algo",
    ddpg=(DDPGConfig, DDPG),
    td3=(TD3Config, TD3),
    proxy_td3=(ProxyTD3Config, ProxyTD3),
    sac=(SACConfig, SAC),
    ppo=(PPOConfig, PPO),
    dqn=(DQNConfig, DQN),
    bc=(BCConfig, BC),
    td3_bc=(TD3BCConfig, TD3BC),
    iql=(IQLConfig, IQL),
    bcq=(BCQConfig, BCQ),
    decision_transformer=(DecisionTransformerConfig, DecisionTransformer),
)

__all__ = ["ALGOS", "AlgoConfig", "Learner"]
