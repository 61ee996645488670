"""Sizes are bounded before anything is allocated."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from shell import spikerl

from spikerl.config.build import build
from spikerl.config.memory import least_bytes, memory
from spikerl.envs.make import make_env, task_of

IMAGES = "env=CartPole algo=dqn actor=cnn actor.image=[2,2]"
ONES, WIDE = ",".join(["1"] * 16), ",".join(["65536"] * 16)
HUGE = [
    ("algo.batch_size=4000000000", "algo.batch_size"),
    ("actor.hidden_sizes=[2000000,2000000]", "actor.hidden_sizes"),
    ("algo.critic_hidden_sizes=[2000000,2000000]", "algo.critic_hidden_sizes"),
    ("algo.replay_capacity=100000000000 total_steps=100000000000", "algo.replay_capacity"),
    ("world_size=4000 num_envs=4000 algo.batch_size=4000", "world_size"),
    ("algo=bcq dataset=d algo.batch_size=1000000 algo.target_samples=1000", "algo.target_samples"),
    (
        "algo=decision_transformer dataset=d actor=transformer actor.dim=16000 actor.layers=100",
        "actor.dim",
    ),
    (
        "algo=decision_transformer dataset=d actor=transformer actor.dim=16384"
        " actor.timesteps=1000000",
        "actor.timesteps",
    ),
    (
        "algo=decision_transformer dataset=d actor=spikeformer algo.batch_size=9000000",
        "algo.batch_size",
    ),
    ("algo=proxy_td3 algo.proxy_steps=100000000", "algo.proxy_steps"),
    ("experiment=care_bn actor.recalibration_batches=100000000", "actor.recalibration_batches"),
    (
        f"{IMAGES} actor.kernel_sizes=[1] actor.filters=[65536] actor.hidden_sizes=[200000]",
        "actor.hidden_sizes",
    ),
    (
        f"{IMAGES} actor.kernel_sizes=[{ONES}] actor.strides=[{ONES}] actor.filters=[{WIDE}]",
        "actor.filters",
    ),
    ("decoder=learned actor.spike_steps=1000 actor.hidden_sizes=[20000]", "actor.hidden_sizes"),
    ("decoder=ilc decoder.pop_size=1000000 actor.hidden_sizes=[8]", "decoder.pop_size"),
    ("num_envs=100000", "num_envs"),
    ("threads=100000", "threads"),
    (f"total_steps={1 << 63}", "total_steps"),
]


@pytest.mark.parametrize(("typed", "key"), HUGE)
def test_sizes_are_bounded_before_they_are_allocated(typed: str, key: str) -> None:
    assert spikerl("train", "device=cpu", *typed.split()).line.startswith(f"{key}=")


def test_every_published_setting_fits_a_small_machine(default: dict[str, Any]) -> None:
    config = build(default)
    with closing(make_env(config.env)) as env:
        needs = least_bytes(config, task_of(env))
        four = replace(config.run, world_size=4, nnodes=4, node_rank=0, rdzv="host:1")
        shared = least_bytes(replace(config, run=four), task_of(env))
    assert needs["algo.replay_capacity"] == 1_000_000 * (2 * 17 + 6 + 4) * 4
    assert shared["algo.replay_capacity"] * 4 == needs["algo.replay_capacity"]
    assert sum(needs.values()) < 1 << 28


@pytest.mark.parametrize(
    ("groups", "limit"),
    [
        ("0::/job/step\n", "job/step/memory.max"),
        ("0::/job/step\n", "job/memory.max"),
        ("0::/job/step\n", "memory.max"),
        ("2:cpu:/\n3:memory:/job/step\n", "memory/job/memory.limit_in_bytes"),
    ],
)
def test_a_limit_of_any_group_above_counts(groups: str, limit: str, tmp_path: Path) -> None:
    (tmp_path / "groups").write_text(groups)
    (tmp_path / limit).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / limit).write_text("1000000\n")
    assert memory(tmp_path / "groups", tmp_path) == 1_000_000
