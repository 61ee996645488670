"""TD3's update against formulas worked by hand, and the guard between losses and weights."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from builders import POISSON, popsan, td3_config, twin_critic
from torch import Tensor

from spikerl.algos.base import Metrics
from spikerl.algos.graphs import Graphed, Updates
from spikerl.algos.td3 import TD3
from spikerl.errors import NonFinite
from spikerl.models.actor import MLPActor
from spikerl.models.actor_config import MLPConfig
from spikerl.models.critic import Critics
from spikerl.types import Batch


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(rows: int = 8, obs_dim: int = 3, act_dim: int = 2, seed: int = 0) -> Batch:
    g = generator(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    return Batch(
        draw(rows, obs_dim),
        draw(rows, act_dim).clamp(-1, 1),
        draw(rows),
        draw(rows, obs_dim),
        torch.arange(rows) % 3 == 0,
        torch.full((rows,), 0.9),
    )


def learner(*, scales_loss: bool = False, **changes: object) -> TD3:
    torch.manual_seed(3)
    actor = MLPActor(3, 2, MLPConfig(name="mlp", hidden_sizes=[8], lr=1e-3))
    critic = twin_critic(3, 2, [8])
    return TD3(
        actor,
        critic,
        td3_config(**changes),
        actor_lr=1e-3,
        generator=generator(),
        scales_loss=scales_loss,
    )


def weights(td3: TD3) -> list[Tensor]:
    flats = (td3.critic_optimizer.flat, td3.actor_optimizer.flat)
    targets = (td3.targets["critic"], td3.targets["actor"])
    return [t.detach().clone() for t in (*flats, *targets)]


def same(a: list[Tensor], b: list[Tensor]) -> list[bool]:
    return [torch.equal(x, y) for x, y in zip(a, b, strict=True)]


def test_target_value_bootstraps_unless_terminated() -> None:
    b = Batch(
        torch.empty(2, 0),
        torch.empty(2, 0),
        torch.tensor([1.0, 1.0]),
        torch.empty(2, 0),
        torch.tensor([False, True]),
        torch.tensor([0.5, 0.5]),
    )
    assert b.td_target(torch.tensor([4.0, 4.0])).tolist() == [3.0, 1.0]


def test_critic_loss_is_the_textbook_formula() -> None:
    td3, before, b = learner(target_noise=0.0), learner(target_noise=0.0), batch()
    with torch.no_grad():
        next_act = before.actor_target(b.next_obs)
        q1, q2 = before.critic_target(b.next_obs, next_act)
        target = b.rew + 0.9 * (1.0 - b.terminated.float()) * torch.minimum(q1, q2)
        p1, p2 = before.critic(b.obs, b.act)
        expected = ((p1 - target) ** 2).mean() + ((p2 - target) ** 2).mean()
    metrics = td3.run_updates(b, 1)[0]
    torch.testing.assert_close(metrics["critic_loss"], expected)
    torch.testing.assert_close(metrics["q_mean"], (p1.mean() + p2.mean()) / 2)


def test_actor_loss_uses_the_first_critic_after_its_step() -> None:
    td3, b = learner(target_noise=0.0), batch()
    before = copy.deepcopy(td3.actor)
    metrics = td3.run_updates(b, 1)[0]
    with torch.no_grad():
        expected = -td3.critic(b.obs, before(b.obs))[0].mean()
    torch.testing.assert_close(metrics["actor_loss"], expected)


def test_first_adam_step_has_the_learning_rates_size() -> None:
    """After one step Adam moves each entry by lr, against the gradient's sign."""
    td3, b = learner(target_noise=0.0), batch()
    critic, actor = (
        td3.critic_optimizer.flat.detach().clone(),
        td3.actor_optimizer.flat.detach().clone(),
    )
    td3.run_updates(b, 1)
    for stepper, before, lr in (
        (td3.critic_optimizer, critic, 1e-3),
        (td3.actor_optimizer, actor, 1e-3),
    ):
        grad = stepper.gradient.vector[:-1]
        solid = grad.abs() > 1e-5
        assert solid.sum() > 10
        moved = (stepper.flat.detach() - before)[solid]
        torch.testing.assert_close(moved, -lr * grad[solid].sign(), rtol=2e-3, atol=0.0)


def test_actor_step_leaves_the_critic_alone() -> None:
    """The actor's loss passes through the critic, whose weights and gradient must not notice."""
    td3, b = learner(), batch()
    td3.run_updates(b, 1)
    before, grad = td3.critic_optimizer.flat.detach().clone(), td3.critic_optimizer.gradient.vector
    assert grad is not None
    grad_before = grad.clone()
    act, pull = td3.actor.vjp(b.obs, None)
    into = td3.actor_optimizer.gradient
    pull(td3.critic.actor_loss_grad(b.obs, act, into), into)
    td3.actor_optimizer.step()
    assert torch.equal(td3.critic_optimizer.flat.detach(), before)
    assert torch.equal(grad, grad_before)
    assert all(p.grad is None for p in td3.critic.parameters())


@pytest.mark.parametrize("delay", [1, 2, 3])
def test_delay_counts_from_the_first_update(delay: int) -> None:
    td3 = learner(policy_delay=delay)
    for update in range(7):
        before = weights(td3)
        metrics = td3.run_updates(batch(seed=update), 1)[0]
        due = update % delay == 0
        assert ("actor_loss" in metrics) == due
        critic, actor, critic_target, actor_target = same(before, weights(td3))
        assert not critic
        assert (actor, critic_target, actor_target) == (not due,) * 3
    assert td3.updates == 7


def test_targets_move_by_exactly_tau() -> None:
    td3 = learner(tau=0.25)
    before = weights(td3)
    td3.run_updates(batch(), 1)
    now = weights(td3)
    torch.testing.assert_close(now[2], 0.75 * before[2] + 0.25 * now[0])
    torch.testing.assert_close(now[3], 0.75 * before[3] + 0.25 * now[1])


def target_actions(td3: TD3, rows: Batch) -> list[Tensor]:
    """The next actions that the target critics get in an update on `rows`."""
    asked: list[Tensor] = []
    td_target = td3.critic_target.td_target

    def noting(rows: Batch, next_act: Tensor) -> Tensor:
        asked.append(next_act.clone())
        return td_target(rows, next_act)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(td3.critic_target, "td_target", noting)
        td3.run_updates(rows, 1)
    return asked


@pytest.mark.parametrize(
    ("action", "noise", "least", "most"),
    [(0.0, 1.0, -0.5, 0.5), (0.9, 1.0, 0.4, 1.0), (0.0, 0.1, -0.5, 0.5)],
)
def test_smoothing_noise_is_clipped_then_the_action_is(
    action: float, noise: float, least: float, most: float
) -> None:
    td3 = learner(target_noise=noise, noise_clip=0.5)
    td3.targets["actor"].zero_()
    td3.actor_target.layers[-1].bias_N.fill_(math.atanh(action))
    (act,) = target_actions(td3, batch(4000))
    if noise == 1.0:
        assert (act.min().item(), act.max().item()) == pytest.approx((least, most), abs=1e-6)
    if action == 0.0 and noise == 1.0:  # P(|N(0,1)| >= .5) = .617: the share of draws on a bound
        assert float((act.abs() == 0.5).float().mean()) == pytest.approx(0.617, abs=0.03)
    if noise == 0.1:
        assert float(act.std()) == pytest.approx(0.1, rel=0.05)


def test_exploration_noise_is_independent_and_bounded() -> None:
    td3 = learner(explore_noise=0.3)
    obs = torch.zeros(4000, 3)
    noise = td3.explore(obs, generator()) - td3.actor(obs).detach()
    assert float(noise.std(0)[0]) == pytest.approx(0.3, rel=0.05)
    assert float(torch.corrcoef(noise.T)[0, 1]) == pytest.approx(0.0, abs=0.06)
    assert td3.explore(obs, generator()).abs().max() <= 1.0


def test_targets_start_equal_and_apart() -> None:
    td3 = learner()
    online = weights(td3)
    assert torch.equal(online[0], online[2])
    assert torch.equal(online[1], online[3])
    td3.critic_optimizer.flat.data.add_(1.0)
    assert not torch.equal(td3.critic_optimizer.flat.detach(), td3.targets["critic"])
    assert not any(p.requires_grad for p in td3.actor_target.parameters())


@pytest.mark.parametrize("field", ["rew", "obs", "next_obs", "act"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_never_reaches_the_weights(field: str, bad: float) -> None:
    td3 = learner()
    td3.run_updates(batch(seed=1), 1)
    td3.check()
    before, moments = weights(td3), adam(td3)
    good = batch(seed=2)
    poisoned = getattr(good, field).clone()
    poisoned.flatten()[3] = bad
    td3.run_updates(good._replace(**{field: poisoned}), 1)
    td3.run_updates(batch(seed=3), 1)  # masked too, as are all updates until check() is called
    assert all(same(before, weights(td3)))
    assert all(same(moments, adam(td3)))
    with pytest.raises(NonFinite, match="update 1:"):
        td3.check()


def adam(td3: TD3) -> list[Tensor]:
    states = [s.state() for s in (td3.critic_optimizer, td3.actor_optimizer)]
    return [state[key].clone() for state in states for key in ("step", "exp_avg", "exp_avg_sq")]


def test_fp16_scaling_leaves_gradients_as_they_are() -> None:
    plain, scaled = learner(target_noise=0.0), learner(target_noise=0.0, scales_loss=True)
    for seed in range(3):
        plain.run_updates(batch(seed=seed), 1)
        scaled.run_updates(batch(seed=seed), 1)
    for a, b in (
        (plain.critic_optimizer.gradient.vector, scaled.critic_optimizer.gradient.vector),
        (plain.actor_optimizer.gradient.vector, scaled.actor_optimizer.gradient.vector),
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    for a, b in zip(weights(plain), weights(scaled), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert float(scaled.guard.scale) == 65536.0


def test_fp16_skips_a_bad_update_whole_and_halves_the_scale() -> None:
    td3 = learner(policy_delay=1, scales_loss=True)
    td3.run_updates(batch(seed=0), 1)
    before, moments = weights(td3), adam(td3)
    bad = batch(seed=1)
    td3.run_updates(bad._replace(rew=bad.rew * float("inf")), 1)
    assert all(same(before, weights(td3)))
    assert all(same(moments, adam(td3)))
    assert int(td3.guard.skipped) == 1
    assert float(td3.guard.scale) == 32768.0
    td3.check()  # no error: fp16 skips such updates
    td3.run_updates(batch(seed=2), 1)
    assert not any(same(before, weights(td3)))
    assert int(td3.guard.skipped) == 1


def test_poisson_update_repeats_with_its_generator() -> None:
    def run(seed: int) -> Tensor:
        torch.manual_seed(0)
        actor = popsan(3, 2, [8], encoder=POISSON)
        critic = Critics(3, 2, [8])
        td3 = TD3(actor, critic, td3_config(), actor_lr=1e-3, generator=generator(seed))
        for i in range(3):
            td3.run_updates(batch(seed=i), 1)
        return td3.actor_optimizer.flat.detach()

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_updates_up_to_the_next_change_of_the_targets_share_one_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Five updates in one call equal five calls."""
    batched, alone = learner(target_noise=0.0), learner(target_noise=0.0)
    batches = [batch(seed=seed) for seed in range(5)]
    passes, size = [], len(batches[0].rew)
    td_target = batched.critic_target.td_target

    def noting(rows: Batch, next_act: Tensor) -> Tensor:
        passes.append(len(rows.rew) // size)
        return td_target(rows, next_act)

    monkeypatch.setattr(batched.critic_target, "td_target", noting)
    found = batched.run_updates(Batch(*map(torch.cat, zip(*batches, strict=True))), 5)
    expected = [alone.run_updates(b, 1)[0] for b in batches]
    assert passes == [1, 2, 2]  # the targets change on updates 0, 2 and 4
    assert [m.keys() for m in found] == [m.keys() for m in expected]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    for name, tensor in batched.state().items():
        torch.testing.assert_close(tensor, alone.state()[name], rtol=1e-4, atol=1e-6)
    batched.run_updates(batches[0], 1)
    assert passes[3:] == [1]  # update 5; a sixth would share its pass


@pytest.mark.parametrize("delay", [1, 2, 3])
def test_a_recorded_update_is_the_update(delay: int) -> None:
    """All changing state is at fixed addresses: a launch of the recorded round is the next one."""

    def record(updates: Updates, generator: torch.Generator) -> Any:
        found: list[Metrics] = []
        slots: list[dict[str, Tensor]] = [
            {name: torch.zeros(()) for name in ("critic_loss", "q_mean", "actor_loss")}
            for _ in range(delay)
        ]
        for k, slot in enumerate(slots):
            if k < delay - 1:
                del slot["actor_loss"]
        found += slots

        def launch() -> None:
            for slot, m in zip(slots, updates(), strict=True):
                for name, value in m.items():
                    slot[name].copy_(value)

        return launch, found

    recorded, plain = learner(policy_delay=delay), learner(policy_delay=delay)
    for td3 in (recorded, plain):
        td3.generator.manual_seed(5)
    recorded.graph = Graphed(recorded.whole_round, recorded.generator, record)
    expected, found = [], []
    for burst in range(6):  # of 4 updates: some rounds are cut in two
        rows = Batch(
            *map(torch.cat, zip(*(batch(seed=4 * burst + k) for k in range(4)), strict=False))
        )
        expected += plain.run_updates(rows, 4)
        found += recorded.run_updates(rows, 4)
    assert recorded.graph.calls == {1: 23, 2: 6, 3: 4}[delay]
    assert recorded.updates == plain.updates == 24
    assert [m.keys() for m in found] == [m.keys() for m in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for name, tensor in recorded.state().items():
        assert torch.equal(tensor, plain.state()[name]), name


def test_smoothing_noise_is_each_batchs_own() -> None:
    rows = batch(seed=0)
    twice = Batch(*(torch.cat([field, field]) for field in rows))
    first, second = target_actions(learner(target_noise=0.2), twice)[0].split(len(rows.rew))
    assert not torch.equal(first, second)


def test_a_warm_up_leaves_the_policy_alone() -> None:
    """Of four updates the first and the third would change the policy; critics learn in all."""
    td3, plain = learner(critic_warmup=4), learner()
    before = weights(td3)
    for seed in range(4):
        metrics, usual = (
            td3.run_updates(batch(seed=seed), 1)[0],
            plain.run_updates(batch(seed=seed), 1)[0],
        )
        assert metrics.keys() == usual.keys()
        assert torch.equal(metrics["critic_loss"], usual["critic_loss"]) == (seed == 0)
    critic, actor, critic_target, actor_target = same(before, weights(td3))
    assert (critic, actor, critic_target, actor_target) == (False, True, False, True)
    assert float(td3.actor_optimizer.moments.step) == 0.0
    td3.run_updates(batch(seed=4), 1)
    critic, actor, critic_target, actor_target = same(before, weights(td3))
    assert (critic, actor, critic_target, actor_target) == (False, False, False, False)


def test_a_warm_up_that_ends_between_changes_of_the_policy() -> None:
    """The warm-up covers updates 0 to 2: the policy does not change at 2, but does at 4."""
    td3 = learner(critic_warmup=3)
    before = weights(td3)
    td3.run_updates(batch(32), 4)
    assert same(before, weights(td3))[1]
    td3.run_updates(batch(), 1)
    assert not same(before, weights(td3))[1]
