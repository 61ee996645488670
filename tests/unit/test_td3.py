"""TD3's update against formulas worked by hand, and the guard between losses and weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders import POISSON, popsan, td3_config, twin_critic
from torch import Tensor, nn

from spikerl.algos.base import Guard, Stepper, flatten
from spikerl.algos.graphs import Graphed, Metrics
from spikerl.algos.td3 import TD3
from spikerl.errors import NonFinite
from spikerl.models.actor import MLPActor, MLPConfig
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
    flats = (td3.step_critic.flat, td3.step_actor.flat)
    targets = (td3.critic_target_flat, td3.actor_target_flat)
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
    metrics = td3.update(b)
    torch.testing.assert_close(metrics["critic_loss"], expected)
    torch.testing.assert_close(metrics["q_mean"], (p1.mean() + p2.mean()) / 2)


def test_actor_loss_uses_the_first_critic_after_its_step() -> None:
    td3, b = learner(target_noise=0.0), batch()
    before = copy.deepcopy(td3.actor)
    metrics = td3.update(b)
    with torch.no_grad():
        expected = -td3.critic(b.obs, before(b.obs))[0].mean()
    torch.testing.assert_close(metrics["actor_loss"], expected)


def test_first_adam_step_has_the_learning_rates_size() -> None:
    """After one step Adam moves each entry by lr, against the gradient's sign."""
    td3, b = learner(target_noise=0.0), batch()
    critic, actor = td3.step_critic.flat.detach().clone(), td3.step_actor.flat.detach().clone()
    td3.update(b)
    for stepper, before, lr in ((td3.step_critic, critic, 1e-3), (td3.step_actor, actor, 1e-3)):
        grad = stepper.gradient.vector[:-1]
        solid = grad.abs() > 1e-5
        assert solid.sum() > 10
        moved = (stepper.flat.detach() - before)[solid]
        torch.testing.assert_close(moved, -lr * grad[solid].sign(), rtol=2e-3, atol=0.0)


def test_actor_step_leaves_the_critic_alone() -> None:
    """The actor's loss passes through the critic, whose weights and gradient must not notice."""
    td3, b = learner(), batch()
    td3.update(b)
    before, grad = td3.step_critic.flat.detach().clone(), td3.step_critic.gradient.vector
    assert grad is not None
    grad_before = grad.clone()
    act, pull = td3.actor.vjp(b.obs, None)
    into = td3.step_actor.gradient
    pull(td3.critic.dq_da(b.obs, act, into), into)
    td3.step_actor()
    assert torch.equal(td3.step_critic.flat.detach(), before)
    assert torch.equal(grad, grad_before)
    assert all(p.grad is None for p in td3.critic.parameters())


@pytest.mark.parametrize("delay", [1, 2, 3])
def test_delay_counts_from_the_first_update(delay: int) -> None:
    td3 = learner(policy_delay=delay)
    for update in range(7):
        before = weights(td3)
        metrics = td3.update(batch(seed=update))
        due = update % delay == 0
        assert ("actor_loss" in metrics) == due
        critic, actor, critic_target, actor_target = same(before, weights(td3))
        assert not critic
        assert (actor, critic_target, actor_target) == (not due,) * 3
    assert td3.updates == 7


def test_targets_move_by_exactly_tau() -> None:
    td3 = learner(tau=0.25)
    before = weights(td3)
    td3.update(batch())
    now = weights(td3)
    torch.testing.assert_close(now[2], 0.75 * before[2] + 0.25 * now[0])
    torch.testing.assert_close(now[3], 0.75 * before[3] + 0.25 * now[1])


def test_smoothing_noise_is_clipped_then_the_action_is() -> None:
    td3 = learner(target_noise=1.0, noise_clip=0.5)
    inner = td3.smooth(torch.zeros(4000, 2))
    assert inner.abs().max() == 0.5
    # P(|N(0,1)| >= .5) = .617 of the draws sit on a bound
    assert float((inner.abs() == 0.5).float().mean()) == pytest.approx(0.617, abs=0.03)
    assert td3.smooth(torch.full((4000, 2), 0.9)).max() == 1.0
    narrow = learner(target_noise=0.1, noise_clip=0.5).smooth(torch.zeros(4000, 2))
    assert float(narrow.std()) == pytest.approx(0.1, rel=0.05)


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
    td3.step_critic.flat.data.add_(1.0)
    assert not torch.equal(td3.step_critic.flat.detach(), td3.critic_target_flat)
    assert not any(p.requires_grad for p in td3.actor_target.parameters())


def test_flatten_makes_parameters_views() -> None:
    module = nn.Linear(2, 3)
    values = [p.detach().clone() for p in module.parameters()]
    flat = flatten(module)
    for p, value in zip(module.parameters(), values, strict=True):
        assert torch.equal(p, value)
    flat.fill_(7.0)
    assert module(torch.ones(1, 2)).tolist() == [[21.0] * 3]


def test_gradient_clipping_by_hand() -> None:
    module = nn.Linear(2, 1, bias=False)
    guard = Guard("cpu", scales_loss=False)
    step = Stepper(module, 0.1, guard, max_grad_norm=1.0)
    gradient = step.gradient
    gradient.take((module(torch.tensor([[3.0, 4.0]]))).sum())  # gradient (3, 4), norm 5
    step()
    torch.testing.assert_close(gradient.vector[:-1], torch.tensor([0.6, 0.8]))
    gradient.take((module(torch.tensor([[0.3, 0.4]]))).sum())
    step()  # within the bound: unchanged
    torch.testing.assert_close(gradient.vector[:-1], torch.tensor([0.3, 0.4]))


@pytest.mark.parametrize("field", ["rew", "obs", "next_obs", "act"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_never_reaches_the_weights(field: str, bad: float) -> None:
    td3 = learner()
    td3.update(batch(seed=1))
    td3.check()
    before, moments = weights(td3), adam(td3)
    good = batch(seed=2)
    poisoned = getattr(good, field).clone()
    poisoned.flatten()[3] = bad
    td3.update(good._replace(**{field: poisoned}))
    td3.update(batch(seed=3))  # and everything after it is masked until somebody looks
    assert all(same(before, weights(td3)))
    assert all(same(moments, adam(td3)))
    with pytest.raises(NonFinite, match="update 1:"):
        td3.check()


def test_an_infinite_loss_is_bad_even_where_its_gradient_is_not() -> None:
    module = nn.Linear(2, 1)
    guard = Guard("cpu", scales_loss=False)
    step = Stepper(module, 0.1, guard)
    before = step.flat.detach().clone()
    step.gradient.take(module(torch.ones(1, 2)).sum() + float("inf"))
    step()
    guard.close()
    assert torch.equal(step.flat.detach(), before)
    with pytest.raises(NonFinite, match="update 4:"):
        guard.check(5)


def adam(td3: TD3) -> list[Tensor]:
    states = [s.state() for s in (td3.step_critic, td3.step_actor)]
    return [state[key].clone() for state in states for key in ("step", "exp_avg", "exp_avg_sq")]


def test_fp16_scaling_leaves_gradients_as_they_are() -> None:
    plain, scaled = learner(target_noise=0.0), learner(target_noise=0.0, scales_loss=True)
    for seed in range(3):
        plain.update(batch(seed=seed))
        scaled.update(batch(seed=seed))
    for a, b in (
        (plain.step_critic.gradient.vector, scaled.step_critic.gradient.vector),
        (plain.step_actor.gradient.vector, scaled.step_actor.gradient.vector),
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    for a, b in zip(weights(plain), weights(scaled), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert float(scaled.guard.scale) == 65536.0


def test_fp16_skips_a_bad_update_whole_and_halves_the_scale() -> None:
    td3 = learner(policy_delay=1, scales_loss=True)
    td3.update(batch(seed=0))
    before, moments = weights(td3), adam(td3)
    bad = batch(seed=1)
    td3.update(bad._replace(rew=bad.rew * float("inf")))
    assert all(same(before, weights(td3)))
    assert all(same(moments, adam(td3)))
    assert int(td3.guard.skipped) == 1
    assert float(td3.guard.scale) == 32768.0
    td3.check()  # ordinary under fp16
    td3.update(batch(seed=2))
    assert not any(same(before, weights(td3)))
    assert int(td3.guard.skipped) == 1


def test_fp16_scale_grows_after_enough_good_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Guard, "GROWTH_INTERVAL", 3)
    guard = Guard("cpu", scales_loss=True)
    scales = []
    for finite in (True, True, True, True, False, True, True, True):
        guard.masked.fill_(0.0 if finite else 1.0)
        guard.close()
        scales.append(float(guard.scale) / 65536.0)
    assert scales == [1.0, 1.0, 2.0, 2.0, 1.0, 1.0, 1.0, 2.0]


def test_fp16_that_never_fits_is_an_error() -> None:
    guard = Guard("cpu", scales_loss=True)
    for _ in range(31):
        guard.masked.fill_(1.0)
        guard.close()
    with pytest.raises(NonFinite, match="any loss scale"):
        guard.check(31)


def test_poisson_update_repeats_with_its_generator() -> None:
    def run(seed: int) -> Tensor:
        torch.manual_seed(0)
        actor = popsan(3, 2, [8], encoder=POISSON)
        critic = Critics(3, 2, [8])
        td3 = TD3(actor, critic, td3_config(), actor_lr=1e-3, generator=generator(seed))
        for i in range(3):
            td3.update(batch(seed=i))
        return td3.step_actor.flat.detach()

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_updates_between_two_moves_of_the_targets_share_one_pass() -> None:
    """Learning from five batches at once is learning from one after the other."""
    together, alone = learner(target_noise=0.0), learner(target_noise=0.0)
    batches = [batch(seed=seed) for seed in range(5)]
    passes = []
    whole, size = together.q_target, len(batches[0].rew)
    together.q_target = lambda rows: passes.append(len(rows.rew) // size) or whole(rows)  # type: ignore
    found = together.learn(Batch(*map(torch.cat, zip(*batches, strict=True))), 5)
    expected = [alone.update(b) for b in batches]
    assert passes == [1, 2, 2]  # the targets move on updates 0, 2 and 4
    assert [m.keys() for m in found] == [m.keys() for m in expected]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    for name, tensor in together.state().items():
        torch.testing.assert_close(tensor, alone.state()[name], rtol=1e-4, atol=1e-6)
    together.update(batches[0])
    assert passes[3:] == [1]  # update 5, and 6 would have been with it


@pytest.mark.parametrize("delay", [1, 2, 3])
def test_a_recorded_update_is_the_update(delay: int) -> None:
    """Everything that changes lies in fixed places: run again from them, it is the next update."""

    def record(work: Callable[[], Metrics], generator: torch.Generator) -> Any:
        found: Metrics = []
        slots: list[dict[str, Tensor]] = [
            {name: torch.zeros(()) for name in ("critic_loss", "q_mean", "actor_loss")}
            for _ in range(delay)
        ]
        for k, slot in enumerate(slots):
            if k < delay - 1:
                del slot["actor_loss"]
        found += slots

        def launch() -> None:
            for slot, m in zip(slots, work(), strict=True):
                for name, value in m.items():
                    slot[name].copy_(value)

        return launch, found

    recorded, plain = learner(policy_delay=delay), learner(policy_delay=delay)
    for td3 in (recorded, plain):
        td3.generator.manual_seed(5)
    recorded.graph = Graphed(
        lambda rows: recorded.between_moves(rows, 1, delay), recorded.generator, record
    )
    expected, found = [], []
    for burst in range(6):  # of 4 updates: some rounds are cut in two
        rows = Batch(
            *map(torch.cat, zip(*(batch(seed=4 * burst + k) for k in range(4)), strict=False))
        )
        expected += plain.learn(rows, 4)
        found += recorded.learn(rows, 4)
    assert recorded.graph.calls == {1: 23, 2: 6, 3: 4}[delay]
    assert recorded.updates == plain.updates == 24
    assert [m.keys() for m in found] == [m.keys() for m in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for name, tensor in recorded.state().items():
        assert torch.equal(tensor, plain.state()[name]), name


def test_smoothing_noise_is_each_batchs_own() -> None:
    td3 = learner(target_noise=0.2)
    rows = batch(seed=0)
    td3.update(rows)
    twice = Batch(*(torch.cat([field, field]) for field in rows))
    first, second = td3.q_target(twice).split(len(rows.rew))
    assert not torch.equal(first, second)
