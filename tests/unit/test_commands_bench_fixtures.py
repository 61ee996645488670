"""What `spikerl bench` times: a run's own actor, where the keys that were typed are its."""

from __future__ import annotations

from pathlib import Path

import torch
from builders import popsan_config, small_config
from exports import config, policy_of, saved, task
from shell import refusal

from spikerl.commands.bench.fixtures import BenchFixtures


def test_an_actor_of_another_shape_is_refused(tmp_path: Path) -> None:
    run = saved(policy_of(config(), task(4, 1)), tmp_path / "run")
    asked = small_config()
    line = str(refusal(BenchFixtures, asked, str(run)))
    parts = "with population, cuba_lif, rate, populations 10, 10"
    remedy = f"its actor is popsan [12, 9] {parts}; give its keys, not popsan [16] {parts}"
    assert line == f"run={run}: {remedy}"
    asked.actor.actor = popsan_config([12, 9])
    timed = BenchFixtures(asked, str(run)).spiking("reference")
    weight = policy_of(config(), task(4, 1)).actor.layers[0].weight_IN
    assert torch.equal(timed.layers[0].weight_IN, weight)
