"""Where a run goes that names no folder."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from builders import INVERTED_PENDULUM, small_config

from spikerl.training.start import default_folder


@pytest.mark.parametrize(
    ("name", "env_id", "folder"),
    [
        ("InvertedPendulum", "InvertedPendulum-v5", "InvertedPendulum"),
        ("ALE/Pong_pixels", "ALE/Pong-v5", "ALE_Pong_pixels"),
        ("ALE/Pong_pixels", "ALE/Breakout-v5", "ALE_Breakout-v5"),  # env.id=, beside its group
        ("gym", "my_tasks:Track-v0", "my_tasks_Track-v0"),
    ],
)
def test_named_after_the_task(name: str, env_id: str, folder: str) -> None:
    config = small_config(env=replace(INVERTED_PENDULUM, name=name, id=env_id))
    found = default_folder(config)
    assert re.fullmatch(rf"outputs/{folder}/{config.algo.name}/[0-9_-]+_seed\d+", found), found
