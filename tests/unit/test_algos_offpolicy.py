"""n-step targets by hand, of the off-policy algorithms with an actor and critics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from builders import ddpg_config, popsan, proxy_td3_config, sac_config, td3_config

from spikerl.algos.ddpg import DDPG
from spikerl.algos.offpolicy import OffPolicy, OffPolicyConfig
from spikerl.algos.proxy_td3 import ProxyTD3
from spikerl.algos.replay import Replay, Sampler
from spikerl.algos.sac import SAC
from spikerl.algos.td3 import TD3
from spikerl.models.critic import Critics


def three_steps(*, ends: bool) -> Sampler:
    """A sampler of three steps with rewards 1, 2, 4; gamma 0.9; the third may end the episode."""
    replay = Replay(3, 3, 2, torch.device("cpu"), width=1)
    obs_TNO = np.arange(12.0).reshape(4, 1, 3)
    for i, rew in enumerate([1.0, 2.0, 4.0]):
        last = np.array([ends and i == 2])
        transition = (obs_TNO[i], np.zeros((1, 2)), np.array([rew]), obs_TNO[i + 1], last, last)
        replay.add(*transition, discount=0.9)
    return Sampler(replay, torch.Generator().manual_seed(0), lambda obs: obs)


@pytest.mark.parametrize(
    ("algo", "config"),
    [
        (DDPG, ddpg_config(n_step=3)),
        (TD3, td3_config(n_step=3)),
        (ProxyTD3, proxy_td3_config(n_step=3, proxy_steps=1)),
        (SAC, sac_config(n_step=3)),
    ],
)
def test_targets_over_three_steps(algo: type[OffPolicy], config: OffPolicyConfig) -> None:
    """Rewards 1, 2, 4 end an episode: with gamma 0.9 the targets are 6.04, 5.6 and 4, and the loss
    of a critic whose value is 0 is the target's square.
    """
    actor, critic = popsan(3, 2, [8]), Critics(3, 2, [8], networks=config.critics)
    made = algo(actor, critic, config, actor_lr=1e-3, generator=torch.Generator())
    sampler, losses = three_steps(ends=True), set()
    for _ in range(30):
        made.critic_optimizer.flat.zero_()
        (metrics,) = made.train(sampler, 1, 1)
        losses.add(round(float(metrics["critic_loss"]) / config.critics, 3))
    assert losses == {36.482, 31.36, 16.0}


def test_a_target_looks_ahead_from_the_third_step() -> None:
    """Rewards 1, 2, 4 without an end, gamma 0.9, and a target critic whose value is 10 everywhere:
    the targets are 6.04 + 0.729 * 10, 5.6 + 0.81 * 10 and, for the last stored step, 4 + 0.9 * 10.
    """
    actor, critic = popsan(3, 2, [8]), Critics(3, 2, [8])
    td3 = TD3(actor, critic, td3_config(n_step=3), actor_lr=1e-3, generator=torch.Generator())
    sampler, losses = three_steps(ends=False), set()
    for _ in range(30):
        td3.critic_optimizer.flat.zero_()
        td3.targets["critic"].zero_()
        td3.critic_target.biases_C1N[-1].data.fill_(10.0)
        (metrics,) = td3.train(sampler, 1, 1)
        losses.add(round(float(metrics["critic_loss"]) / 2, 2))
    assert losses == {177.69, 187.69, 169.0}
