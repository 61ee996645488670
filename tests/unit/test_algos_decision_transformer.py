"""Learning from sequences by hand, against the update in plain PyTorch, and with two workers."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from builders import fill
from plain import float64
from sequences import (
    PlainSpikeformer,
    PlainTransformer,
    contexts,
    decision_config,
    learner,
    network,
)
from threads import run_in_threads, worlds

from spikerl.errors import NonFinite
from spikerl.models.spikeformer import Spikeformer
from spikerl.types import Contexts

KINDS = ("pssa", "tssa", "dense")


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_by_hand(kind: str) -> None:
    """If the network's actions are 0, the loss is the mean square of the actions of 5 + 4 real
    steps (the others are padding) of 2 entries.
    """
    made = learner(network(kind), weight_decay=0.0, max_grad_norm=None)
    fill(made.actor, {"head.weight_IN": [[0.0, 0.0]] * 8, "head.bias_N": [0.0, 0.0]})
    steps = contexts(2)
    act = torch.zeros(2, 5, 2)
    act[0, 2] = torch.tensor([1.0, -0.5])
    act[1, 4] = torch.tensor([0.5, 0.0])
    found = made.update(steps._replace(act=act))
    assert float(found["actor_loss"]) == pytest.approx((1.0 + 0.25 + 0.25) / 18)
    names = [name for name, p in made.actor.named_parameters() if p.requires_grad]
    slots = dict(zip(names, made.actor_optimizer.gradient.slots, strict=True))
    # The sum of 2 (0 - a) / 18 over steps; the derivative of tanh is 1 at 0.
    expected = torch.tensor([-3.0 / 18, 1.0 / 18])
    torch.testing.assert_close(slots["head.bias_N"], expected)
    assert made.updates == 1


def test_the_learning_rate_by_hand() -> None:
    """Of 10 updates the rate rises over two, then falls by half a cosine over eight."""
    config = decision_config(warmup_share=0.2)
    shares = [config.lr_share(n, 10) for n in range(11)]
    cosine = [(1 + math.cos(math.pi * n / 8)) / 2 for n in range(9)]
    assert shares == pytest.approx([0.5, 1.0, *cosine])
    assert decision_config().lr_share(0, 10) == 1.0
    made = learner(network("dense"), warmup_share=0.2)
    made.total_updates = 10
    for share in shares[:4]:
        made.update(contexts(2))
        assert made.actor_optimizer.lr == pytest.approx(1e-2 * share)


@pytest.mark.parametrize("kind", KINDS)
def test_updates_are_those_of_plain_pytorch(kind: str) -> None:
    """Losses, weights and running moments of four updates agree in float64; in the first two a
    Spikeformer mixes in layer normalisation (theta > 0).
    """
    with float64():
        source = network(kind).double()
        made = learner(source)
        made.total_updates = 4
        plain = PlainSpikeformer(source) if isinstance(source, Spikeformer) else None
        theirs = plain or PlainTransformer(source)  # type: ignore[arg-type]
        adam = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.01)
        for n in range(4):
            steps = contexts(6, torch.float64, n)
            found = made.update(steps)
            if plain is not None:
                plain.theta = (1.0, 0.5, 0.0, 0.0)[n]
            adam.param_groups[0]["lr"] = 1e-2 * (1 + math.cos(math.pi * n / 4)) / 2
            act = theirs(steps._replace(togo=steps.togo / 10.0))
            loss = ((act - steps.act)[steps.there] ** 2).mean()
            adam.zero_grad()
            loss.backward()
            for p in theirs.parameters():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.25)
            adam.step()
            assert float(found["actor_loss"]) == pytest.approx(loss.item(), rel=1e-6)
        for name, p in made.actor.named_parameters():
            torch.testing.assert_close(
                p.data, theirs.state_of(name), rtol=1e-5, atol=1e-7, msg=name
            )


@pytest.mark.parametrize("kind", KINDS)
def test_two_workers_are_one_with_both_batches(kind: str) -> None:
    """The workers' contexts have different numbers of steps that are no padding."""
    with float64():
        whole = learner(network(kind).double())
        both = [learner(network(kind).double(), world=w, weight=share) for w, share in zip(
            worlds(2), (0.25, 0.75), strict=True)]  # fmt: skip
        for made in both:
            if isinstance(made.actor, Spikeformer):
                for norm in made.actor.norms:
                    norm.sum_ = made.world.sum_
        for made in (whole, *both):
            made.total_updates = 4
        steps = contexts(8, torch.float64)
        parts = [Contexts(*(field[at] for field in steps)) for at in (slice(2), slice(2, 8))]
        for _ in range(3):
            alone = float(whole.update(steps)["actor_loss"])
            found = run_in_threads(
                [partial(own.update, part) for own, part in zip(both, parts, strict=True)]
            )
            losses = [float(one["actor_loss"]) for one in found]
            assert losses == pytest.approx([alone] * 2, rel=1e-9)
        first, second = (own.actor_optimizer.flat for own in both)
        assert torch.equal(first, second)
        torch.testing.assert_close(first, whole.actor_optimizer.flat, rtol=1e-6, atol=1e-8)
        assert not torch.equal(first, learner(network(kind).double()).actor_optimizer.flat)


def test_a_bad_update_changes_no_weight() -> None:
    made = learner(network("dense"))
    made.update(contexts(4))
    before = made.actor_optimizer.flat.clone()
    steps = contexts(4)
    made.update(steps._replace(obs=steps.obs * float("nan")))
    assert torch.equal(made.actor_optimizer.flat, before)
    with pytest.raises(NonFinite, match="update 1:"):
        made.check()


def test_dropout_is_drawn_from_the_run_s_own_stream() -> None:
    def losses(seed: int) -> list[float]:
        made = learner(network("dense", dropout=0.5))
        torch.manual_seed(seed)
        return [float(made.update(contexts(4))["actor_loss"]) for _ in range(2)]

    assert losses(0) == losses(1)
    made = learner(network("dense", dropout=0.5))
    steps = contexts(4)
    assert not torch.equal(made.actor(steps, made.generator), made.actor(steps, made.generator))
    assert torch.equal(made.actor(steps), made.actor(steps))


@pytest.mark.parametrize("kind", ["pssa", "dense"])
def test_it_learns_the_actions_that_a_return_followed(kind: str) -> None:
    """The recorded action is half the sign of the return to go."""
    made = learner(network(kind, layers=1), weight_decay=0.0)
    made.total_updates = 80
    losses = []
    for n in range(80):
        steps = contexts(16, seed=n)
        sign = 0.5 * steps.togo.sign().unsqueeze(2).expand_as(steps.act)
        losses.append(float(made.update(steps._replace(act=sign))["actor_loss"]))
    assert losses[0] > 0.25  # an action of 0 would have a loss of 0.25
    assert sum(losses[-5:]) / 5 < 0.14


def test_a_warm_up_that_ends_between_updates() -> None:
    """A warm-up of 2.5 updates: shares 1 / 2.5, 2 / 2.5 and 1; then the cosine over the remaining
    7.5 updates, half an update in.
    """
    config = decision_config(warmup_share=0.25)
    shares = [config.lr_share(n, 10) for n in range(4)]
    cosine = (1 + math.cos(math.pi * 0.5 / 7.5)) / 2
    assert shares == pytest.approx([0.4, 0.8, 1.0, cosine])
