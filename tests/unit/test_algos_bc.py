"""Behaviour cloning against numbers worked by hand, and with two workers."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from builders import bc_config, fill, popsan
from plain import cut, transitions
from threads import run_in_threads, worlds

from spikerl.algos.bc import BC
from spikerl.models.actor import Actor, MLPActor
from spikerl.models.actor_config import MLPConfig
from spikerl.types import Batch


def learner(actor: Actor, **settings: Any) -> BC:
    parts = {key: settings.pop(key) for key in ("world", "weight") if key in settings}
    generator = torch.Generator().manual_seed(0)
    return BC(actor, None, bc_config(**settings), actor_lr=1e-2, generator=generator, **parts)


def dense(hidden: int = 8) -> MLPActor:
    torch.manual_seed(0)
    return MLPActor(3, 2, MLPConfig(name="mlp", hidden_sizes=[hidden], lr=1e-3))


def test_loss_and_gradient_by_hand() -> None:
    """The policy's action is (0, 0), that of the only transition (1, -.5)."""
    actor = dense(1)
    fill(actor, {"layers.1.weight_IN": [[0.0, 0.0]], "layers.1.bias_N": [0.0, 0.0]})
    made, one = learner(actor), torch.tensor([0.0])
    act, obs = torch.tensor([[1.0, -0.5]]), torch.ones(1, 3)
    (found,) = made.run_updates(Batch(obs, act, one, obs, one > 0, one), 1)
    assert float(found["actor_loss"]) == 0.625  # (1 + .25) / 2
    assert made.actor_optimizer.gradient.slots[3].tolist() == [-1.0, 0.5]  # 2 (0 - a) / 2
    assert found.keys() == {"actor_loss"}
    assert made.updates == 1


@pytest.mark.parametrize("kind", ["dense", "spiking"])
def test_two_workers_are_one_with_both_batches(kind: str) -> None:
    def made(**own: Any) -> BC:
        torch.manual_seed(0)
        return learner(dense() if kind == "dense" else popsan(3, 2, [8]), **own)

    whole, both = made(), [made(world=world, weight=0.5) for world in worlds(2)]
    rows = transitions(16, torch.float32)
    for _ in range(3):
        losses = [float(whole.run_updates(rows, 1)[0]["actor_loss"])]
        parts = cut(rows, 8)
        found = run_in_threads(
            [partial(own.run_updates, part, 1) for own, part in zip(both, parts, strict=True)]
        )
        losses += [float(one[0]["actor_loss"]) for one in found]
        assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    first, second = (own.actor_optimizer.flat for own in both)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, whole.actor_optimizer.flat, rtol=1e-4, atol=1e-5)
    assert not torch.equal(first, made().actor_optimizer.flat)


def test_it_learns_the_actions() -> None:
    made, rows = learner(dense(32)), transitions(64, torch.float32)
    rows = rows._replace(act=torch.tanh(rows.obs[:, :2] - rows.obs[:, 1:]))
    losses = [float(made.run_updates(rows, 1)[0]["actor_loss"]) for _ in range(300)]
    assert losses[0] > 0.2
    assert losses[-1] < 0.01
