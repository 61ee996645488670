"""PPO against its equations, written the usual way in float64; rollouts and their ends.

Shape legend   T steps, N environments, B rows, A action entries.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from builders import fill, popsan, ppo_config, small_config
from plain import descend, doubled, flat, float64, length, q_networks
from torch import Tensor, nn
from torch.distributions import Categorical, Normal
from transitions_env import COUNTER

from spikerl.algos.ppo import PPO, Rows
from spikerl.algos.replay import Replay, Sampler
from spikerl.envs.make import make_env, task_of
from spikerl.envs.vector import Steps
from spikerl.errors import BadRequest
from spikerl.models.actor import Actor, MLPActor
from spikerl.models.actor_config import MLPConfig
from spikerl.models.critic import Critics
from spikerl.training.trainer import Trainer
from spikerl.types import Batch

STEPS, ENVS, EPOCHS = 25, 4, 3  # rollouts of 100 rows


def learner(
    kind: str = "dense", dtype: torch.dtype = torch.float64, discrete: bool = False, **given: Any
) -> PPO:
    own = {"batch_size": 30, "epochs": EPOCHS, "gamma": 0.9, "critic_hidden_sizes": [24, 16]}
    torch.manual_seed(0)
    actor: Actor = popsan(3, 2, [16, 12], dtype=dtype)
    if kind == "dense":
        actor = MLPActor(3, 2, MLPConfig(name="mlp", hidden_sizes=[16, 12], lr=1e-3), dtype=dtype)
    critic = Critics(3, 0, [24, 16], networks=1, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    config = ppo_config(**(own | given))
    ppo = PPO(actor, critic, config, actor_lr=0.01, generator=generator, discrete=discrete)
    return doubled(ppo) if dtype == torch.float64 else ppo


class Rollout:
    """A rollout of `ppo`'s policy on random data, with terminations, truncations and open ends."""

    def __init__(self, ppo: PPO) -> None:
        draw = np.random.default_rng(0)
        self.obs = draw.normal(size=(STEPS + 1, ENVS, 3)).astype(np.float32)
        self.final = draw.normal(size=(STEPS, ENVS, 3)).astype(np.float32)
        self.rew = draw.normal(size=(STEPS, ENVS)).astype(np.float32)
        self.terminated = draw.random((STEPS, ENVS)) < 0.1
        self.last = self.terminated | (draw.random((STEPS, ENVS)) < 0.1)
        self.next_obs = np.where(self.last[..., None], self.final, self.obs[1:])
        with torch.no_grad():
            mean = ppo.actor(torch.tensor(self.obs[:-1].reshape(-1, 3), dtype=ppo.actor.dtype))
        noise = np.exp(-0.5) * draw.normal(size=mean.shape)
        self.act = (mean.numpy() + noise).astype(np.float32).reshape(STEPS, ENVS, 2)
        if ppo.discrete:
            self.act = np.eye(2, dtype=np.float32)[self.act.argmax(-1)]
        self.replay = Replay(STEPS * ENVS, 3, 2, width=ENVS)
        fields = (self.obs, self.act, self.rew, self.next_obs, self.terminated, self.last)
        for t in range(STEPS):
            self.replay.add(*Steps(*(field[t] for field in fields)), discount=0.9)

    def tensor(self, array: np.ndarray) -> Tensor:
        return torch.tensor(array).double().flatten(0, 1)


def advantages(rollout: Rollout, value: nn.Module, trace: float) -> tuple[Tensor, Tensor]:
    """Advantages summed term by term, one environment at a time; and the critic's targets."""
    found = torch.zeros(STEPS, ENVS)
    with torch.no_grad():
        now, then = (
            value(torch.tensor(o).double()).squeeze(-1)
            for o in (rollout.obs[:-1], rollout.next_obs)
        )
    for n in range(ENVS):
        for t in range(STEPS):
            factor = 1.0
            for k in range(t, STEPS):
                follows = 0.0 if rollout.terminated[k, n] else 0.9 * then[k, n]
                found[t, n] += factor * (rollout.rew[k, n] + follows - now[k, n])
                factor *= 0.9 * trace
                if rollout.last[k, n]:
                    break
    return found.flatten(), (found + now).flatten()


def minibatches(ppo: PPO, patch: pytest.MonkeyPatch, rollout: Rollout) -> list[Tensor]:
    """A list to which every later update of `ppo` appends its rows' numbers in the rollout."""
    obs, found = rollout.tensor(rollout.obs[:-1]), []
    update = ppo.update

    def noting(rows: Rows) -> Any:
        found.append((rows.obs.unsqueeze(1) == obs).all(-1).nonzero()[:, 1])
        return update(rows)

    patch.setattr(ppo, "update", noting)
    return found


def burst(ppo: PPO, rollout: Rollout) -> list[dict[str, Tensor]]:
    due = ppo.config.updates_due(STEPS * ENVS, 1)
    draw = torch.Generator().manual_seed(1)
    return ppo.train(Sampler(rollout.replay, draw, Tensor.double), due, ppo.config.batch_size)


RULES: dict[str, dict[str, Any]] = {
    "joint": {},
    "per_entry": {"ratio": "per_entry", "normalize_advantage": "rollout"},
    "entropy": {"entropy_coef": 0.05, "gae_lambda": 0.5, "log_std": -1.0},
    "per_entry_entropy": {"ratio": "per_entry", "entropy_coef": 0.05},
    "clipped": {"max_grad_norm": 0.05, "clip_ratio": 0.05, "entropy_coef": 0.05},
    "discrete": {"discrete": True, "entropy_coef": 0.05},
    "discrete_per_entry": {"discrete": True, "ratio": "per_entry", "max_grad_norm": 0.05},
}


def usual(pi: Actor, obs: Tensor, act: Tensor, log_std: Tensor | None) -> tuple[Tensor, Tensor]:
    """Log probability and entropy (B, K): K is the action entries if Gaussian, 1 if categorical."""
    if log_std is not None:
        gaussian = Normal(pi(obs), log_std.exp())
        return gaussian.log_prob(act), gaussian.entropy()
    softmax = Categorical(logits=pi(obs, squash=False))
    return softmax.log_prob(act.argmax(1))[:, None], softmax.entropy()[:, None]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ["spiking", "dense"])
def test_a_rollouts_updates_are_the_usual_ones(
    kind: str, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each update's losses, divergences and gradients agree, and all parameters after the last."""
    with float64():
        ours = learner(kind, **RULES[rule])
        c, rollout = ours.config, Rollout(ours)
        pi, values = copy.deepcopy(ours.actor), q_networks(ours.critic)
        (value,) = values
        std = None if ours.discrete else torch.full((2,), c.log_std, requires_grad=True)
        chosen = minibatches(ours, monkeypatch, rollout)
        found = burst(ours, rollout)

        pi_adam = torch.optim.Adam(pi.parameters(), lr=0.01)
        adams = [pi_adam] if std is None else [pi_adam, torch.optim.Adam([std], lr=0.01)]
        value_adam = torch.optim.Adam(value.parameters(), lr=1e-3)
        obs, act = rollout.tensor(rollout.obs[:-1]), rollout.tensor(rollout.act)
        advantage, ret = advantages(rollout, value, c.gae_lambda)
        with torch.no_grad():
            before, _ = usual(pi, obs, act, std)
        whole = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        assert len(chosen) == len(found) == 3 * EPOCHS
        for index, metrics in zip(chosen, found, strict=True):
            a = advantage[index]
            a = (a - a.mean()) / (a.std() + 1e-8)
            if c.normalize_advantage == "rollout":
                a = whole[index]
            log_prob, entropy = usual(pi, obs[index], act[index], std)
            change = log_prob - before[index]
            if c.ratio == "joint":
                ratio, entropy = change.sum(1).exp(), entropy.sum(1)
            else:
                ratio, a = change.exp(), a[:, None]
            bounded = ratio.clamp(1.0 - c.clip_ratio, 1.0 + c.clip_ratio)
            loss = -torch.minimum(ratio * a, bounded * a).mean() - c.entropy_coef * entropy.mean()
            descend(loss, *adams, max_norm=c.max_grad_norm)
            v = value(obs[index]).squeeze(1)
            value_loss = ((v - ret[index]) ** 2).mean()
            descend(value_loss, value_adam, max_norm=c.max_grad_norm)
            joint = change.sum(1)
            expected = {
                "critic_loss": value_loss.item(),
                "q_mean": v.mean().item(),
                "actor_loss": loss.item(),
                "entropy": entropy.mean().item(),
                "approx_kl": (joint.exp() - 1.0 - joint).mean().item(),
                "clip_fraction": ((ratio - 1.0).abs() > c.clip_ratio).double().mean().item(),
            }
            got = {name: float(x) for name, x in metrics.items()}
            assert got == pytest.approx(expected, rel=1e-6, abs=1e-9)
        assert float(found[-1]["clip_fraction"]) > 0.0
        ours.check()
        checked = [
            (ours.actor_optimizer, pi_adam, flat(pi)),
            (ours.critic_optimizer, value_adam, flat(values)),
        ]
        if std is not None:
            checked.append((ours.optimizers["log_std"], adams[1], std.detach()))
        assert len(ours.optimizers) == len(checked)
        for stepper, adam, weights in checked:
            torch.testing.assert_close(stepper.flat, weights, rtol=1e-6, atol=1e-8)
            gradient = stepper.gradient.vector[:-1].norm().item()
            assert gradient == pytest.approx(length(adam), rel=1e-5)


def by_hand(**given: Any) -> PPO:
    """A PPO that, for an observation of 1, takes its two actions with probability 1/4 and 3/4."""
    own = {"normalize_advantage": "rollout", "critic_hidden_sizes": [1], "clip_ratio": 0.2}
    actor = MLPActor(1, 2, MLPConfig(name="mlp", hidden_sizes=[1], lr=1e-3))
    fill(actor, {"layers.0.weight_IN": [[1.0]], "layers.0.bias_N": [0.0]})
    fill(actor, {"layers.1.weight_IN": [[0.0, math.log(3.0)]], "layers.1.bias_N": [5.0, 5.0]})
    critic, generator = Critics(1, 0, [1], networks=1), torch.Generator().manual_seed(0)
    config = ppo_config(**(own | given))
    return PPO(actor, critic, config, actor_lr=0.01, generator=generator, discrete=True)


ENTROPY = 0.25 * math.log(4.0) + 0.75 * math.log(4.0 / 3.0)


def test_a_categorical_update_by_hand() -> None:
    """Both rows have the second action, whose old probability was 1/2: the ratio is 1.5, clipped
    at 1.2.

    Advantage 1 gives min(1.5, 1.2), advantage -1 gives min(-1.5, -1.2). By the logits, the first
    has no gradient, the second half of 1.5 ([second] - p), and the entropy -p (log p + H).
    """
    ppo = by_hand(entropy_coef=0.1)
    gradients: list[Tensor] = []
    step = ppo.actor_optimizer.step

    def noting() -> Tensor:
        gradients.extend(slot.clone() for slot in ppo.actor_optimizer.gradient.slots)
        return step()

    ppo.actor_optimizer.step = noting  # type: ignore[method-assign]
    act, old = torch.tensor([[0.0, 1.0]] * 2), torch.full((2, 1), math.log(0.5))
    rows = Rows(torch.ones(2, 1), act, old, torch.tensor([1.0, -1.0]), torch.zeros(2))
    found = ppo.update(rows)
    assert found is not None
    assert float(found["entropy"]) == pytest.approx(ENTROPY)
    assert float(found["actor_loss"]) == pytest.approx(0.5 * (1.5 - 1.2) - 0.1 * ENTROPY)
    assert float(found["approx_kl"]) == pytest.approx(0.5 - math.log(1.5))
    assert float(found["clip_fraction"]) == 1.0
    p = (0.25, 0.75)
    by_entropy = [0.1 * q * (math.log(q) + ENTROPY) for q in p]
    wanted = [0.75 * -0.25 + by_entropy[0], 0.75 * 0.25 + by_entropy[1]]
    assert gradients[3].tolist() == pytest.approx(wanted)  # of the last layer's bias


def test_numbered_actions_are_drawn_as_often_as_they_are_likely() -> None:
    ppo = by_hand()
    act = ppo.explore(torch.ones(9000, 1), torch.Generator().manual_seed(0))
    assert torch.equal(act.sum(1), torch.ones(9000))
    counts = Counter(act.argmax(1).tolist())
    assert abs(counts[1] - 6750) < 4.0 * math.sqrt(9000 * 0.25 * 0.75)


def test_every_row_once_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Minibatches have at least batch_size rows, in a new order in each epoch and rollout."""
    ppo = learner()
    rollout = Rollout(ppo)
    chosen = minibatches(ppo, monkeypatch, rollout)
    draw = torch.Generator().manual_seed(1)
    for _ in range(2):
        assert len(ppo.train(Sampler(rollout.replay, draw, Tensor.double), 9, 30)) == 9
    assert ppo.updates == 18
    assert [len(index) for index in chosen] == [34, 33, 33] * 6
    epochs = [torch.cat(chosen[i : i + 3]) for i in range(0, 18, 3)]
    assert all(epoch.sort().values.equal(torch.arange(100)) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 6


@pytest.mark.parametrize(
    ("batch_size", "world", "step", "updates"),
    [
        (30, 1, 99, 0),
        (30, 1, 100, 6),
        (30, 1, 299, 12),
        (100, 1, 100, 2),
        (25, 2, 100, 4),
        (60, 2, 200, 4),
    ],
)
def test_updates_due(batch_size: int, world: int, step: int, updates: int) -> None:
    """Two epochs follow each rollout of 100 rows; the batch grows with the number of workers."""
    assert ppo_config(batch_size=batch_size).updates_due(step, world) == updates


def test_updates_stop_at_the_first_divergence_beyond_the_target() -> None:
    """Beyond 1.5 times target_kl neither that update nor any later one of the rollout is made."""
    with float64():
        free = learner()
        kl = [float(m["approx_kl"]) for m in burst(free, Rollout(free))]
        assert kl[0] == pytest.approx(0.0, abs=1e-12)
        for k in (1, 4, 7):
            assert max(kl[:k]) < 0.999 * kl[k]
            stopped = learner(target_kl=0.999 * kl[k] / 1.5)
            found = burst(stopped, Rollout(stopped))
            assert [float(m["approx_kl"]) for m in found] == kl[:k]
            assert stopped.updates == int(stopped.actor_optimizer.moments.step) == k
        generous = learner(target_kl=max(kl) / 1.5 * 1.01)
        assert len(burst(generous, Rollout(generous))) == 3 * EPOCHS


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"norm_interval": 150}, "algo.norm_interval"),  # it would change within a rollout
        ({"norm_interval": 50}, "algo.norm_interval"),
        ({"batch_size": 1}, "algo.batch_size"),  # every advantage would be 0
        ({"batch_size": 101}, "algo.batch_size"),
    ],
)
def test_what_would_not_be_learned_from(given: dict[str, Any], key: str) -> None:
    with pytest.raises(BadRequest) as refused:
        ppo_config(**given)
    assert refused.value.args[0] == key
    ppo_config(batch_size=1, normalize_advantage="rollout", norm_interval=200)


@contextmanager
def trainer_of(**given: Any) -> Iterator[Trainer]:
    """A trainer with rollouts of ten steps of two environments that observe [step, episode]."""
    own = {"rollout_steps": 20, "norm_interval": 20, "batch_size": 10, "norm_clip": None}
    training = small_config(
        env=COUNTER, num_envs=2, total_steps=60, steps_per_epoch=60, eval_episodes=1
    )
    training = replace(training, algo=ppo_config(**(own | given)))
    with closing(make_env(COUNTER)) as one:
        task = task_of(one)
    with closing(Trainer(training, task)) as trainer:
        yield trainer


def rollouts(trainer: Trainer, patch: pytest.MonkeyPatch) -> list[tuple[int, Batch, Rows]]:
    """Train to the end. For each rollout: the count of observations in the normaliser before it,
    its rows, and the rows that minibatches are drawn from.
    """
    found = []
    prepare = trainer.algo.prepare  # type: ignore[attr-defined]

    def noting(batch: Batch, *args: Any) -> Rows:
        found.append((trainer.norm.count, batch, prepare(batch, *args)))
        return found[-1][2]

    patch.setattr(trainer.algo, "prepare", noting)
    (row,) = trainer.epochs()
    assert (row["step"], row["updates"]) == (60, 3 * 2 * 2)
    return found


def test_a_rollout_is_seen_as_it_was_acted_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rollout's observations enter the normaliser only after its updates."""
    with trainer_of() as trainer:
        raw: list[np.ndarray] = []
        seen: list[Tensor] = []
        normalize, act = trainer.norm.normalize, trainer.act

        def acting() -> None:
            raw.append(trainer.envs.obs)
            seen.append(normalize(torch.from_numpy(raw[-1].astype(np.float32))))
            act()

        monkeypatch.setattr(trainer, "act", acting)
        found = rollouts(trainer, monkeypatch)
        assert [count for count, _, _ in found] == [0, 20, 40]
        for k, (_, batch, _) in enumerate(found):
            assert torch.equal(batch.obs, torch.cat(seen[10 * k : 10 * k + 10]))
        assert trainer.norm.count == 60
        np.testing.assert_allclose(trainer.norm.mean_O, np.concatenate(raw).mean(0), rtol=1e-12)


def test_no_advantage_comes_from_behind_a_reset() -> None:
    """A resume that resets environments leaves a row that is not its episode's last before it."""
    ppo = by_hand(gamma=0.5, gae_lambda=1.0, normalize_advantage="minibatch")
    obs = torch.tensor([[0.0], [1.0], [5.0], [6.0]])
    next_obs = torch.tensor([[1.0], [2.0], [6.0], [7.0]])  # the next row's observation is 5, not 2
    rew, no = torch.tensor([1.0, 10.0, 100.0, 1000.0]), torch.zeros(4, dtype=torch.bool)
    ppo.value = lambda obs: 0.0 * obs[:, 0]  # type: ignore[method-assign]
    act = torch.eye(2)[[0, 1, 0, 1]]
    rows = ppo.prepare(Batch(obs, act, rew, next_obs, no, torch.full((4,), 0.5)), no, 1)
    assert rows.advantage.tolist() == [6.0, 10.0, 600.0, 1000.0]


def test_returns_end_in_the_value_of_the_true_successor(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a truncation and at the rollout's end, the value is of the same episode's next
    observation, not of the next episode's first.
    """
    with trainer_of(norm_interval=None, gae_lambda=1.0, gamma=0.5, log_std=0.0) as trainer:
        monkeypatch.setattr(trainer.algo, "value", lambda obs: 3.0 * obs[:, 0] + 7.0 * obs[:, 1])
        for _, batch, rows in rollouts(trainer, monkeypatch):
            obs, rew, end, ret = (
                f.unflatten(0, (10, 2)) for f in (batch.obs, batch.rew, batch.terminated, rows.ret)
            )
            for n in range(2):
                for t in range(10):
                    (step, episode), follows = obs[t, n].tolist(), 0.0
                    last = t == 9 or obs[t + 1, n, 1] > episode
                    if not last:
                        follows = float(ret[t + 1, n])
                    elif not end[t, n]:
                        follows = 3.0 * (step + 1.0) + 7.0 * episode
                    expected = float(rew[t, n]) + 0.5 * follows
                    assert float(ret[t, n]) == pytest.approx(expected, rel=1e-6, abs=0.05)
        assert trainer.replay.between(40, 60)[:, 4:6].abs().max() > 1.0  # stored unclipped


def test_a_gaussian_draws_for_each_entry() -> None:
    """With a log deviation of -1, actions are mean + e^-1 eps."""
    ppo = learner(dtype=torch.float32, log_std=-1.0)
    obs = torch.randn(50, 3, generator=torch.Generator().manual_seed(2))
    noise = torch.randn(50, 2, generator=torch.Generator().manual_seed(3))
    expected = ppo.actor(obs).detach() + math.exp(-1.0) * noise
    torch.testing.assert_close(ppo.explore(obs, torch.Generator().manual_seed(3)), expected)
