"""The baselines of the benchmark compute what their names say: PopSAN's actor, updates of TD3."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from builders import INVERTED_PENDULUM, popsan, td3_config

from spikerl.algos.td3 import TD3
from spikerl.commands.bench import baselines
from spikerl.envs.config import EnvConfig
from spikerl.envs.make import make_env
from spikerl.kernels import reference
from spikerl.models.critic import Critics
from spikerl.types import Batch


def some_batch(rows: int) -> Batch:
    draw = torch.Generator().manual_seed(0)
    obs, next_obs = torch.randn(2, rows, 11, generator=draw)
    act, rew = torch.rand(rows, 3, generator=draw) * 2 - 1, torch.randn(rows, generator=draw)
    return Batch(obs, act, rew, next_obs, rew > 1.0, torch.full((rows,), 0.99))


def test_popsans_loop_is_the_same_actor() -> None:
    torch.manual_seed(0)
    ours = popsan(11, 3, [32, 24])
    theirs = baselines.PopSANActor(ours)
    obs, direction = torch.randn(20, 11), torch.randn(20, 3)
    expected = reference.actions(ours, obs, None)
    act = theirs(obs)
    torch.testing.assert_close(act, expected, rtol=0, atol=1e-6)
    (act * direction).sum().backward()
    (expected * direction).sum().backward()
    torch.testing.assert_close(theirs.mean.grad[0], ours.encoder.mean_OP.grad, rtol=1e-4, atol=1e-6)  # type: ignore[index]
    for layer, other in zip(theirs.layers, ours.layers, strict=True):
        assert layer.weight.grad is not None
        assert other.weight_IN.grad is not None
        torch.testing.assert_close(layer.weight.grad.T, other.weight_IN.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("delay", "first"), [(2, 0), (3, 1)])
def test_its_update_is_td3s(delay: int, first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without target noise, four updates leave the same weights."""
    monkeypatch.setattr(baselines, "TARGET_NOISE", 0.0)
    torch.manual_seed(0)
    actor, critic = popsan(11, 3, [32, 24]), Critics(11, 3, [256, 256])
    config = td3_config(
        target_noise=0.0, critic_hidden_sizes=[256, 256], policy_delay=delay,
        first_policy_update=first,
    )  # fmt: skip
    loop = baselines.popsan_loop(actor, 11, 3, config)
    for i, q in enumerate((loop.q1, loop.q2)):
        for n, layer in enumerate((*q.hidden, q.value)):
            with torch.no_grad():
                layer.weight.copy_(critic.weights_CIN[n][i].T)
                layer.bias.copy_(critic.biases_C1N[n][i, 0])
    loop.q1_target, loop.q2_target = copy.deepcopy(loop.q1), copy.deepcopy(loop.q2)
    ours = TD3(actor, critic, config, actor_lr=1e-4, generator=torch.Generator())
    batch = some_batch(40)
    for _ in range(4):
        ours.run_updates(batch, 1)
        loop.update(batch)
    second: Any = [q.hidden[1] for q in (loop.q1, loop.q2)]
    theirs_CIN = torch.stack([layer.weight.T for layer in second])
    torch.testing.assert_close(theirs_CIN, critic.weights_CIN[1], rtol=1e-3, atol=1e-5)
    theirs: Any = loop.actor.layers
    torch.testing.assert_close(theirs[1].weight.T, actor.layers[1].weight_IN, rtol=1e-3, atol=1e-5)
    assert ours.updates == loop.updates == 4


def test_weights_that_fire_as_trained_ones_do() -> None:
    torch.manual_seed(0)
    actor, obs = popsan(17, 6, [64, 48]), torch.randn(200, 17).clamp(-3, 3)
    rates = [0.2, 0.33, 0.51, 0.71]
    baselines.set_firing_rates(actor, rates, obs)
    spikes, states = reference.record(actor, obs, None)
    voltages = [torch.stack([state.voltage_BN for state in own]) for own in states]
    for layer, rate in zip(spikes, rates, strict=True):
        assert float(layer.mean()) == pytest.approx(rate, abs=0.01)
    for v in voltages:  # 0.22 to 0.32 in the published policy
        assert 0.15 < float(((v - 0.5).abs() < 0.5).float().mean()) < 0.5


def test_training_with_a_baseline() -> None:
    """It makes as many updates as spikerl with the same keys, even if the batch is larger than the
    replay.
    """
    algo = td3_config(
        batch_size=1000, critic_hidden_sizes=[12], learning_starts=10, update_interval=10,
        updates_per_step=0.5,
    )  # fmt: skip
    loop = baselines.dense_loop(4, 1, [16, 8], algo, torch.device("cpu"))
    assert [p.shape[0] for p in loop.q1.parameters()] == [12, 12, 1, 1]
    assert [p.shape[0] for p in loop.actor.parameters()] == [16, 16, 8, 8, 1, 1]
    steps, made = loop.train(make_env(INVERTED_PENDULUM)), []
    for _ in range(30):
        next(steps)
        made.append(loop.updates)
    assert made == [0] * 9 + [5] * 10 + [10] * 10 + [15]


def test_a_baseline_trains_on_the_environment_that_was_asked_for() -> None:
    """These arguments add a position, so that Hopper has 12 observations instead of 11."""
    kwargs = {"exclude_current_positions_from_observation": False}
    hopper = EnvConfig(
        name="Hopper", version="v5", id="Hopper-v5", max_episode_steps=None, vectorizer="sync",
        kwargs=kwargs,
    )  # fmt: skip
    loop = baselines.dense_loop(12, 3, [8], td3_config(), torch.device("cpu"))
    steps = loop.train(make_env(hopper))
    next(steps)
    next(steps)
    assert loop.updates == 2


def test_critics_whose_units_are_active_as_trained_ones_are() -> None:
    torch.manual_seed(0)
    critic, obs = Critics(17, 6, [128, 96]), torch.randn(256, 17)
    baselines.set_active_shares(critic, [0.4, 0.25], obs)
    x = torch.cat([obs, torch.rand(256, 6) * 2 - 1], -1).expand(2, -1, -1)
    for rate, weight, bias in zip([0.4, 0.25], critic.weights_CIN, critic.biases_C1N, strict=False):
        x = torch.relu(x @ weight + bias)
        for one in x:
            assert float((one > 0).float().mean()) == pytest.approx(rate, abs=0.02)
