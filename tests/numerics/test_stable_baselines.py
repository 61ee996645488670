"""Stable-Baselines3 on the same rows with the same weights: advantages, densities, whole updates.

All networks are dense; spikerl's actors and critics hold the same weights in another layout.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3 as sb3
import torch
from builders import dqn_config, ppo_config, sac_config
from plain import cut, flat, linears, transitions
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.distributions import (
    DiagGaussianDistribution,
    SquashedDiagGaussianDistribution,
)
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch import Tensor, nn

from spikerl.algos.dqn import DQN
from spikerl.algos.ppo import PPO
from spikerl.algos.replay import Replay, Sampler
from spikerl.algos.returns import gae
from spikerl.algos.sac import SAC
from spikerl.envs.vector import Steps
from spikerl.kernels import reference
from spikerl.models.actor import MLPActor
from spikerl.models.actor_config import MLPConfig
from spikerl.models.critic import Critics

OBS = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
ACT = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
STEPS, ENVS = 25, 4


class Spaces(gym.Env[Any, Any]):
    """An environment with spaces alone, which is all that Stable-Baselines3 reads of it here."""

    observation_space, action_space = OBS, ACT


class Rollout:
    """Random rows with every kind of end; `buffer` has them as Stable-Baselines3 stores them."""

    def __init__(self, policy_says: Any, trace: float) -> None:
        draw = np.random.default_rng(0)
        self.obs = draw.normal(size=(STEPS + 1, ENVS, 3)).astype(np.float32)
        self.act = draw.normal(size=(STEPS, ENVS, 2)).astype(np.float32)
        self.rew = draw.normal(size=(STEPS, ENVS)).astype(np.float32)
        self.terminated = draw.random((STEPS, ENVS)) < 0.1
        self.last = self.terminated | (draw.random((STEPS, ENVS)) < 0.1)
        final = draw.normal(size=(STEPS, ENVS, 3)).astype(np.float32)
        self.next_obs = np.where(self.last[..., None], final, self.obs[1:])

        self.buffer = RolloutBuffer(STEPS, OBS, ACT, "cpu", trace, 0.9, ENVS)
        truncated = self.last & ~self.terminated
        starts = np.concatenate([np.zeros((1, ENVS), bool), self.last])
        for t in range(STEPS):
            value, logp = policy_says(self.obs[t], self.act[t])
            worth = policy_says(self.next_obs[t], self.act[t])[0].numpy()
            reward = self.rew[t] + 0.9 * truncated[t] * worth  # as its collect_rollouts does
            self.buffer.add(self.obs[t], self.act[t], reward, starts[t], value, logp)
        value, _ = policy_says(self.obs[-1], self.act[-1])
        self.buffer.compute_returns_and_advantage(value, starts[-1])


@pytest.mark.parametrize("trace", [0.0, 0.95, 1.0])
def test_advantages(trace: float) -> None:
    def value(obs: np.ndarray) -> Tensor:
        return torch.from_numpy(obs).square().sum(-1) - 2.0

    rows = Rollout(lambda obs, act: (value(obs), torch.zeros(ENVS)), trace)
    ends = torch.from_numpy(rows.terminated), torch.from_numpy(rows.last)
    seen = torch.from_numpy(rows.rew), value(rows.obs[:-1]), value(rows.next_obs), *ends
    ours = gae(*seen, gamma=0.9, gae_lambda=trace)
    assert rows.terminated.sum() > 4
    assert rows.last.sum() > rows.terminated.sum() + 4
    np.testing.assert_allclose(ours.numpy(), rows.buffer.advantages, rtol=1e-4, atol=1e-5)


def random(*shape: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


def test_a_squashed_gaussian() -> None:
    mean, log_std, noise = (0.5 * random(50, 3, seed=seed) for seed in range(3))
    theirs = SquashedDiagGaussianDistribution(3, epsilon=0.0).proba_distribution(mean, log_std)
    act, logp = reference.squashed(mean, log_std, noise, -20.0, 2.0)
    u = mean + log_std.exp() * noise
    torch.testing.assert_close(act, torch.tanh(u))
    torch.testing.assert_close(logp, theirs.log_prob(act, u), rtol=1e-8, atol=1e-10)


def ppo(**given: Any) -> PPO:
    torch.manual_seed(0)
    actor = MLPActor(3, 2, MLPConfig(name="mlp", hidden_sizes=[16, 12], lr=1e-3))
    critic = Critics(3, 0, [24, 16], networks=1)
    own = {"batch_size": 25, "epochs": 3, "gamma": 0.9, "critic_lr": 3e-3, "log_std": -0.3}
    generator = torch.Generator()
    return PPO(actor, critic, ppo_config(**(own | given)), actor_lr=3e-3, generator=generator)


def test_a_gaussian() -> None:
    ours, mean, act = ppo(), random(50, 2).float(), random(50, 2, seed=1).float()
    theirs = DiagGaussianDistribution(2).proba_distribution(mean, ours.log_std.value_A.detach())
    logp = ours.pi.log_prob(mean, act).detach()
    assert logp.shape == (50, 2)
    torch.testing.assert_close(logp.sum(1), theirs.log_prob(act))


def give(linears: list[nn.Linear], weights: list[Tensor], biases: list[Tensor]) -> None:
    """Copy weights, with a row for each input, and biases into linear layers."""
    for layer, weight, bias in zip(linears, weights, biases, strict=True):
        layer.weight.data.copy_(weight.detach().T)
        layer.bias.data.copy_(bias.detach().flatten())


@pytest.mark.parametrize("target_kl", [None, 0.004])
def test_a_rollouts_updates(target_kl: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """No gradient is clipped: Stable-Baselines3's PPO would clip that of all networks together."""
    ours = ppo(entropy_coef=0.01, target_kl=target_kl)
    actor, critic = ours.actor, ours.critic
    theirs = sb3.PPO(
        "MlpPolicy",
        Spaces(),
        n_steps=STEPS,
        batch_size=25,
        n_epochs=3,
        learning_rate=3e-3,
        ent_coef=0.01,
        vf_coef=1.0,
        max_grad_norm=np.inf,
        target_kl=target_kl,
        device="cpu",
        policy_kwargs={
            "net_arch": {"pi": [16, 12], "vf": [24, 16]},
            "activation_fn": nn.ReLU,
            "log_std_init": -0.3,
            "optimizer_kwargs": {"eps": 1e-8},
        },
    )
    theirs.set_logger(Logger(None, []))
    policy = theirs.policy
    mean = linears(policy.mlp_extractor.policy_net, policy.action_net)
    value = linears(policy.mlp_extractor.value_net, policy.value_net)
    give(mean, [x.weight_IN for x in actor.layers], [x.bias_N for x in actor.layers])
    give(value, [w[0] for w in critic.weights_CIN], [b[0] for b in critic.biases_C1N])
    policy.action_net = nn.Sequential(policy.action_net, nn.Tanh())  # as the program's actors act

    @torch.no_grad()
    def says(obs: np.ndarray, act: np.ndarray) -> tuple[Tensor, Tensor]:
        now, logp, _ = policy.evaluate_actions(torch.from_numpy(obs), torch.from_numpy(act))
        return now.flatten(), logp

    rows = Rollout(says, 0.95)
    theirs.rollout_buffer = rows.buffer
    replay = Replay(STEPS * ENVS, 3, 2, width=ENVS)
    fields = rows.obs, rows.act, rows.rew, rows.next_obs, rows.terminated, rows.last
    for t in range(STEPS):
        replay.add(*Steps(*(field[t] for field in fields)), discount=0.9)

    # Row t * ENVS + n of spikerl is row n * STEPS + t of Stable-Baselines3.
    draw, orders = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)

    def permutation(count: int) -> np.ndarray:
        order = torch.randperm(count, generator=orders)
        return (order % ENVS * STEPS + order // ENVS).numpy()

    monkeypatch.setattr(np.random, "permutation", permutation)
    found = ours.train(Sampler(replay, draw, lambda obs: obs), 12, 25)
    theirs.train()
    logged = theirs.logger.name_to_value
    assert len(found) == 12 if target_kl is None else 2 < len(found) < 12
    steps = policy.optimizer.state[policy.log_std]["step"]
    assert ours.updates == int(steps) == len(found)

    def of(name: str) -> float:
        return float(torch.stack([m[name] for m in found]).mean())

    if target_kl is None:  # else its means include the minibatch at which it stopped
        assert of("critic_loss") == pytest.approx(logged["train/value_loss"], rel=1e-4)
        assert of("entropy") == pytest.approx(-logged["train/entropy_loss"], rel=1e-4)
        assert of("clip_fraction") == pytest.approx(logged["train/clip_fraction"], rel=1e-4)
        loss = logged["train/policy_gradient_loss"] + 0.01 * logged["train/entropy_loss"]
        assert of("actor_loss") == pytest.approx(loss, rel=1e-3)
    close: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(ours.log_std.value_A, policy.log_std, **close)
    torch.testing.assert_close(ours.actor_optimizer.flat, flat(nn.Sequential(*mean)), **close)
    values = nn.ModuleList([nn.Sequential(*value)])
    torch.testing.assert_close(ours.critic_optimizer.flat, flat(values), **close)


@pytest.mark.parametrize("learned", [False, True])
def test_updates_of_replayed_rows(learned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stable-Baselines3's SAC draws noise for observations before that for next observations, and
    its critics' loss is half of ours.
    """
    torch.manual_seed(0)
    own = {"log_std": "shared", "learn_temperature": learned, "temperature_lr": 3e-3, "tau": 0.1}
    actor = MLPActor(3, 4, MLPConfig(name="mlp", hidden_sizes=[16, 12], lr=1e-3))
    critic = Critics(3, 2, [16, 12])
    config = sac_config(**own, critic_lr=3e-3)
    ours = SAC(actor, critic, config, actor_lr=3e-3, generator=torch.Generator())
    theirs = sb3.SAC(
        "MlpPolicy",
        Spaces(),
        ent_coef="auto_0.2" if learned else 0.2,
        learning_rate=3e-3,
        gamma=0.9,
        tau=0.1,
        buffer_size=1,
        device="cpu",
        policy_kwargs={"net_arch": [16, 12]},
    )
    theirs.set_logger(Logger(None, []))
    pi: Any = theirs.policy.actor
    pi.action_dist.epsilon = 0.0
    *hidden, last = actor.layers
    give(linears(pi.latent_pi), [x.weight_IN for x in hidden], [x.bias_N for x in hidden])
    halves = last.weight_IN.chunk(2, 1), last.bias_N.chunk(2)
    give([pi.mu, pi.log_std], list(halves[0]), list(halves[1]))
    for nets in (theirs.critic, theirs.critic_target):
        for c, net in enumerate(nets.q_networks):
            weights, biases = critic.weights_CIN, critic.biases_C1N
            give(linears(net), [w[c] for w in weights], [b[c] for b in biases])

    batches = cut(transitions(5 * 32, torch.float32), 32)
    draw = torch.Generator().manual_seed(0)
    for batch in batches:
        noise = list(torch.randn(2, 32, 2, generator=draw))
        ours_draws, their_draws = iter(noise), iter(noise[::-1])
        monkeypatch.setattr(ours, "noise", lambda like, draws=ours_draws: next(draws))
        monkeypatch.setattr(
            torch.distributions.normal,
            "_standard_normal",
            lambda shape, dtype, device, draws=their_draws: next(draws),
        )
        end, rew = batch.terminated.float(), batch.rew
        rows = ReplayBufferSamples(
            batch.obs, batch.act, batch.next_obs, end.unsqueeze(1), rew.unsqueeze(1)
        )
        monkeypatch.setattr(theirs.replay_buffer, "sample", lambda *_, rows=rows, **__: rows)
        found = {name: float(value) for name, value in ours.run_updates(batch, 1)[0].items()}
        theirs.train(1)
        logged = theirs.logger.name_to_value
        assert found["critic_loss"] == pytest.approx(2.0 * logged["train/critic_loss"], rel=1e-3)
        assert found["actor_loss"] == pytest.approx(logged["train/actor_loss"], rel=1e-3)
        assert found["temperature"] == pytest.approx(logged["train/ent_coef"], rel=1e-5)
        if learned:
            price = float(ours.optimizers["temperature"].gradient.loss)
            assert price == pytest.approx(logged["train/ent_coef_loss"], rel=1e-3)
    close: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-4}
    q, q_target = (nn.ModuleList(nets.q_networks) for nets in (theirs.critic, theirs.critic_target))
    torch.testing.assert_close(ours.critic_optimizer.flat, flat(q), **close)
    torch.testing.assert_close(ours.targets["critic"], flat(q_target), **close)
    both = nn.Linear(12, 4)
    both.weight.data = torch.cat([pi.mu.weight, pi.log_std.weight]).detach()
    both.bias.data = torch.cat([pi.mu.bias, pi.log_std.bias]).detach()
    their_actor = flat(nn.Sequential(*linears(pi.latent_pi), both))
    torch.testing.assert_close(ours.actor_optimizer.flat, their_actor, **close)


class Choices(gym.Env[Any, Any]):
    """The same with discrete actions."""

    observation_space, action_space = OBS, gym.spaces.Discrete(2)


@pytest.mark.parametrize("clipped", [10.0, 0.01])
def test_dqn_updates_of_replayed_rows(clipped: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stable-Baselines3's DQN is neither double nor duelling; its `train` updates no target."""
    torch.manual_seed(0)
    actor = MLPActor(3, 2, MLPConfig(name="mlp", hidden_sizes=[16, 12], lr=1e-3))
    config = dqn_config(max_grad_norm=clipped, target_interval=3)
    ours = DQN(actor, None, config, actor_lr=3e-3, generator=torch.Generator())
    theirs = sb3.DQN(
        "MlpPolicy",
        Choices(),
        learning_rate=3e-3,
        gamma=0.9,
        max_grad_norm=clipped,
        buffer_size=1,
        device="cpu",
        policy_kwargs={"net_arch": [16, 12]},
    )
    theirs.set_logger(Logger(None, []))
    for net in (theirs.q_net, theirs.q_net_target):
        layers = actor.layers
        give(linears(net.q_net), [x.weight_IN for x in layers], [x.bias_N for x in layers])
    for number, batch in enumerate(cut(transitions(7 * 32, torch.float32), 32)):
        batch = batch._replace(act=nn.functional.one_hot((batch.act[:, 0] > 0).long(), 2).float())
        act, end = batch.act[:, 1:].long(), batch.terminated.float().unsqueeze(1)
        rew = 5.0 * batch.rew  # on both sides of where the loss turns linear
        rows = ReplayBufferSamples(batch.obs, act, batch.next_obs, end, rew.unsqueeze(1))
        monkeypatch.setattr(theirs.replay_buffer, "sample", lambda *_, rows=rows, **__: rows)
        (found,) = ours.run_updates(batch._replace(rew=rew), 1)
        theirs.train(1, batch_size=32)
        if number % 3 == 2:
            theirs.q_net_target.load_state_dict(theirs.q_net.state_dict())
        logged = theirs.logger.name_to_value["train/loss"]
        assert float(found["critic_loss"]) == pytest.approx(logged, rel=1e-4)
    close: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-4}
    for mine, net in (
        (ours.actor_optimizer.flat, theirs.q_net),
        (ours.targets["actor"], theirs.q_net_target),
    ):
        torch.testing.assert_close(mine, flat(nn.Sequential(*linears(net.q_net))), **close)
