"""The policy that a run starts from, and the folder of a run without run_dir."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from builders import INVERTED_PENDULUM, small_config
from shell import SHORT, spikerl

from spikerl.training.start import default_folder


@pytest.mark.parametrize(
    ("name", "env_id", "folder"),
    [
        ("InvertedPendulum", "InvertedPendulum-v5", "InvertedPendulum"),
        ("ALE/Pong_pixels", "ALE/Pong-v5", "ALE_Pong_pixels"),
        ("ALE/Pong_pixels", "ALE/Breakout-v5", "ALE_Breakout-v5"),  # with env.id= typed
        ("gym", "my_tasks:Track-v0", "my_tasks_Track-v0"),
    ],
)
def test_named_after_the_task(name: str, env_id: str, folder: str) -> None:
    config = small_config(env=replace(INVERTED_PENDULUM, name=name, id=env_id))
    found = default_folder(config)
    assert re.fullmatch(rf"outputs/{folder}/{config.algo.name}/[0-9_-]+_seed\d+", found), found


def test_pixels_of_another_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused: weights trained on pixels divided by 255 would get pixels of another scale."""
    monkeypatch.chdir(tmp_path)
    own = [word for word in SHORT if "critic" not in word and not word.startswith("env")]
    own += ["env=MinAtar/Breakout", "algo=dqn", "actor=cnn", "actor.filters=[4]", "total_steps=10"]
    scaled = [*own, "actor.pixel_max=255"]
    assert spikerl("train", *scaled, "run_dir=r").status == 0
    said = spikerl("train", *own, "init_from=r")
    line = "actor.pixel_max=1.0: the policy of r divides observations by another; give 255.0"
    assert said.line == line
    assert spikerl("train", *scaled, "init_from=r", "run_dir=on").status == 0
