"""Agreement with recorded outputs of the public code of PopSAN (Tang et al., CoRL 2020)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from builders import CUBA_LIF, POPULATION, RATE, popsan, popsan_config, td3_config, twin_critic
from published import MODEL, STATS, needs_published_policy

from spikerl.algos.td3 import TD3
from spikerl.envs.config import EnvConfig
from spikerl.envs.make import make_env, task_of
from spikerl.kernels import reference
from spikerl.models.actor import SpikingActor
from spikerl.models.actor_config import ActorConfig
from spikerl.models.critic import Critics
from spikerl.models.foreign import policy_of, read_stats, read_weights, recognise, translate
from spikerl.models.policy import Policy
from spikerl.training.evaluator import Evaluator
from spikerl.types import Batch

REFERENCE = Path(__file__).parents[1] / "reference"


def state(data: np.lib.npyio.NpzFile, prefix: str) -> dict[str, torch.Tensor]:
    named = {
        k.removeprefix(prefix): torch.from_numpy(data[k]) for k in data if k.startswith(prefix)
    }
    return translate(named)


def critic_state(data: np.lib.npyio.NpzFile, prefix: str) -> dict[str, torch.Tensor]:
    """The two critics' linear layers, stacked and transposed as Critics holds them."""
    stacked = {}
    for layer in range(3):
        weights = [data[f"{prefix}q{i}/q.{2 * layer}.weight"].T for i in (1, 2)]
        biases = [data[f"{prefix}q{i}/q.{2 * layer}.bias"][None] for i in (1, 2)]
        stacked[f"weights_CIN.{layer}"] = torch.from_numpy(np.stack(weights))
        stacked[f"biases_C1N.{layer}"] = torch.from_numpy(np.stack(biases))
    return stacked


def test_spikes_rates_actions_and_every_gradient() -> None:
    data = np.load(REFERENCE / "popsan_actor_hopper.npz")
    actor = popsan(11, 3, [256, 256])
    actor.load_state_dict(state(data, "param/"))
    obs = torch.from_numpy(data["obs"])

    spikes = actor.encoder(obs, 5, None).detach()
    np.testing.assert_array_equal(spikes.permute(1, 2, 0).numpy(), data["encoder_spikes"])
    rates = reference.spikes(actor, obs, None).mean(0).detach().numpy()
    np.testing.assert_array_equal(rates, data["population_rate"])

    act = actor(obs)
    np.testing.assert_allclose(act.detach().numpy(), data["action"], rtol=0, atol=1e-6)
    (act * torch.from_numpy(data["loss_weight"])).sum().backward()
    expected = state(data, "grad/")
    assert expected.keys() == dict(actor.named_parameters()).keys()
    for name, p in actor.named_parameters():
        assert p.grad is not None
        np.testing.assert_allclose(p.grad.numpy(), expected[name].numpy(), rtol=0, atol=1e-6)


def test_ten_td3_updates() -> None:
    data = np.load(REFERENCE / "popsan_td3_updates_hopper.npz")
    actor, critic = popsan(11, 3, [64, 64]), twin_critic(11, 3, [64, 64])
    actor.load_state_dict(state(data, "init/actor/"))
    critic.load_state_dict(critic_state(data, "init/"))
    config = td3_config(target_noise=0.0, policy_delay=2)
    td3 = TD3(actor, critic, config, actor_lr=1e-4, generator=torch.Generator())

    actor_losses = []
    for i in range(10):
        obs, next_obs, act, rew, terminated = (
            torch.from_numpy(data[k][i])
            for k in ("obs", "next_obs", "action", "reward", "terminated")
        )
        discount = torch.full_like(rew, 0.99)
        metrics = td3.run_updates(Batch(obs, act, rew, next_obs, terminated > 0, discount), 1)[0]
        assert float(metrics["critic_loss"]) == pytest.approx(data["critic_loss"][i], abs=1e-5)
        if "actor_loss" in metrics:
            actor_losses.append(float(metrics["actor_loss"]))
    np.testing.assert_allclose(actor_losses, data["actor_loss"], rtol=0, atol=1e-5)

    for module, expected in (
        (actor, state(data, "final/actor/")),
        (td3.actor_target, state(data, "final/target_actor/")),
        (critic, critic_state(data, "final/")),
        (td3.critic_target, critic_state(data, "final/target_")),
    ):
        for name, p in module.state_dict().items():
            error = torch.linalg.vector_norm(p - expected[name])
            assert error <= 1e-4 * torch.linalg.vector_norm(expected[name]), name


@pytest.fixture(scope="module")
def imported() -> Policy:
    config = ActorConfig(
        actor=popsan_config([256, 256]),
        encoder=POPULATION,
        neuron=CUBA_LIF,
        decoder=RATE,
    )
    env = make_env(HALF_CHEETAH)
    foreign = recognise(read_weights(MODEL), MODEL)
    return policy_of(foreign, config, task_of(env), read_stats(STATS), 3.0)


HALF_CHEETAH = EnvConfig(
    name="HalfCheetah",
    version="v5",
    id="HalfCheetah-v5",
    max_episode_steps=None,
    vectorizer="sync",
)


@needs_published_policy
def test_authors_policy_scores_what_it_scored(imported: Policy) -> None:
    """With the public code, its mean return over five episodes is 9 929."""
    evaluator = Evaluator(HALF_CHEETAH, 10, run_seed=0)
    result = evaluator.run(imported, 0)
    evaluator.close()
    assert len(result.returns) == 10
    assert result.lengths == [1000] * 10
    assert result.mean >= 9_700
    assert result.activity is not None
    assert result.activity.layers == pytest.approx([0.20, 0.33, 0.51, 0.71], abs=0.01)


@needs_published_policy
def test_authors_policy_acts_as_public_code_does(imported: Policy) -> None:
    """Actions agree to 1e-5 wherever no membrane is within 1e-5 of its threshold.

    `public_actions` repeats the public code's arithmetic in float64, a layer at a time over the
    spike steps; it shares no code with the kernel.
    """
    env = make_env(HALF_CHEETAH)
    obs, _ = env.reset(seed=0)
    seen = []
    for _ in range(300):
        seen.append(obs)
        obs, *_ = env.step(imported(obs))
    observations = np.stack(seen)
    assert isinstance(imported.actor, SpikingActor)
    expected, margin = public_actions(imported, observations)
    clear = margin > 1e-5
    assert clear.sum() >= 250
    np.testing.assert_allclose(imported(observations)[clear], expected[clear], rtol=0, atol=1e-5)
    one_by_one = np.stack([imported(o) for o in observations])
    np.testing.assert_allclose(one_by_one[clear], expected[clear], rtol=0, atol=1e-5)


def public_actions(policy: Policy, obs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Actions, and for each observation how near any voltage came to its threshold."""
    p = {k: v.double().numpy() for k, v in policy.actor.state_dict().items()}
    norm = policy.norm
    z = np.clip((obs - norm.mean_O) / np.sqrt(norm.var_O + np.finfo(np.float32).eps), -3, 3)
    drive = np.exp(-0.5 * (z[:, :, None] - p["encoder.mean_OP"]) ** 2 / p["encoder.std_OP"] ** 2)
    drive = drive.reshape(len(obs), -1)
    margin = np.full(len(obs), np.inf)
    voltage = np.zeros_like(drive)
    inputs = []
    for _ in range(5):
        voltage += drive
        margin = np.minimum(margin, abs(voltage - 0.999).min(1))
        inputs.append((voltage > 0.999).astype(float))
        voltage -= 0.999 * inputs[-1]
    for layer in range(3):
        weight, bias = p[f"layers.{layer}.weight_IN"], p[f"layers.{layer}.bias_N"]
        c = v = o = np.zeros((len(obs), len(bias)))
        outputs = []
        for spikes in inputs:
            c = 0.5 * c + spikes @ weight + bias
            v = 0.75 * v * (1 - o) + c
            o = (v > 0.5).astype(float)
            margin = np.minimum(margin, abs(v - 0.5).min(1))
            outputs.append(o)
        inputs = outputs
    rate = np.mean(inputs, 0).reshape(len(obs), 6, 10)
    return np.tanh((rate * p["decoder.weight_AP"]).sum(-1) + p["decoder.bias_A"]), margin


def test_critic_by_hand() -> None:
    """Checks the critic without `critic_state`, which could be wrong in the same way."""
    critic = Critics(1, 1, [1])
    with torch.no_grad():
        for i, (w, b) in enumerate(zip(critic.weights_CIN, critic.biases_C1N, strict=True)):
            w.copy_(torch.arange(w.numel()).view_as(w) + 1.0 + i)
            b.copy_(torch.tensor([0.5, -0.5]).view_as(b))
    q = critic(torch.tensor([[2.0]]), torch.tensor([[3.0]]))
    # first: relu(1*2 + 2*3 + .5) = 8.5, times 2, plus .5; second: relu(3*2 + 4*3 - .5) * 3 - .5
    assert q.tolist() == [[17.5], [52.0]]
