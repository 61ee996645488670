"""Every file in conf/experiment composes, and a few updates change its networks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from recorded import episode, write
from shell import spikerl

from spikerl import load_policy
from spikerl.config.yaml_file import group_options


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def actor(folder: Path) -> dict[str, torch.Tensor]:
    return load_policy(folder).network.state_dict()


# For each kind of algorithm: settings that make a run short, and the updates that it then makes.
FEW = {
    "ppo": (
        ["algo.rollout_steps=60", "algo.norm_interval=60", "algo.batch_size=20", "algo.epochs=2"],
        6,
    ),
    "replaying": (
        ["algo.random_steps=30", "algo.learning_starts=60", "algo.update_interval=4",
         "algo.batch_size=8"], 4),
    "offline": (["env=InvertedPendulum", "dataset=d", "algo.batch_size=8"], 4),
}  # fmt: skip


# Slow ones: they have large networks, or differ little from another experiment.
LONG = ("dsformer/tssa", "dense/dqn_minatar", "proxy_target/clif", "dense/dqn_ram_pong",
        "dense/dqn_atari")  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in LONG else ())
        for name in group_options("experiment")
    ],
)
def test_experiments_learn(name: str) -> None:
    """Each experiment with its own networks, for a few updates; only td3_4000 has smaller ones."""
    sequences = name.startswith("dsformer/") or name.endswith("/decision_transformer")
    offline = name.startswith("offline/") or name.endswith("/bcq") or sequences
    short, updates = FEW["ppo" if name.endswith("ppo") else "offline" if offline else "replaying"]
    steps = updates if offline else 60
    if name.endswith(("lunarlander", "atari")):  # a quarter of an update for each step
        updates = 2 if name.endswith("lunarlander") else 1  # with eight environments; with one
    if offline:
        write(Path("d"), [episode(9)])
    if name == "spikerl/td3_4000":  # it is for GPUs, and its checkpoints take gigabytes
        short = [*short, "actor.hidden_sizes=[400,400]", "algo.critic_hidden_sizes=[400,400]"]
    few = [f"total_steps={steps}", f"steps_per_epoch={steps}", "eval_episodes=1",
           "env.max_episode_steps=20", "threads=1", "energy=none", "world_size=1"]  # fmt: skip
    assert spikerl("train", f"experiment={name}", *few, *short, "run_dir=run").status == 0
    (line,) = Path("run/metrics.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert row["updates"] == updates
    none = name == "offline/bc" or sequences
    assert row["critic_loss"] is None if none else np.isfinite(row["critic_loss"])
    # These algorithms have one network, and no loss of an actor.
    alone = "dqn" in name or name.startswith("dsqn/") or name == "care_bn/ram_pong"
    assert row["actor_loss"] is None if alone else np.isfinite(row["actor_loss"])
    first, last = actor(Path("run/checkpoints/step_0000000000")), actor(Path("run"))
    assert not all(torch.equal(first[k], last[k]) for k in first)
