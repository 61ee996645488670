"""A warm-up in which only the critics learn: the policy stays as it was, to the bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from builders import care_bn_config, small_config, td3_config
from trainers import Workers


@pytest.mark.parametrize("interval", [None, 10])
def test_normalised_drives_keep_their_moments(interval: int | None) -> None:
    """Neither batches nor a recalibration change the moments until the warm-up is over."""
    plain = small_config(total_steps=80, num_envs=1)
    normed = replace(care_bn_config([8]), recalibration_interval=interval)
    td3 = td3_config(
        batch_size=8, critic_hidden_sizes=[8], learning_starts=20, random_steps=20,
        update_interval=10, critic_warmup=30,
    )  # fmt: skip
    config = replace(plain, actor=replace(plain.actor, actor=normed), algo=td3)
    workers = Workers(config, 1)
    algo = workers.first.algo
    flats = (algo.actor_optimizer.flat, algo.critic_optimizer.flat)
    first = [flat.clone() for flat in flats]
    found = []
    for step in (40, 60):
        workers.train(step)
        found += [[torch.equal(*pair) for pair in zip(first, flats, strict=True)]]
    workers.first.close()
    assert algo.updates == 50
    assert found == [[True, False], [False, False]]


def test_moments_are_measured_anew_every_so_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """At step 20, where updates begin, and every 20 steps, on three batches of 8."""
    plain = small_config(total_steps=80, num_envs=1)
    normed = replace(care_bn_config([8]), recalibration_interval=20, recalibration_batches=3)
    td3 = td3_config(
        batch_size=8, critic_hidden_sizes=[8], learning_starts=20, random_steps=20,
        update_interval=10,
    )  # fmt: skip
    workers = Workers(replace(plain, actor=replace(plain.actor, actor=normed), algo=td3), 1)
    trainer, found = workers.first, []
    monkeypatch.setattr(
        trainer.algo.actor, "recalibrate",
        lambda batches, draw: found.append((trainer.step, [len(batch) for batch in batches])),
    )  # fmt: skip
    workers.train(60)
    trainer.close()
    assert found == [(20, [8] * 3), (40, [8] * 3), (60, [8] * 3)]
