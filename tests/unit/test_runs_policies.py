"""The policies of a run folder: which one is chosen, and on which device it acts."""

from __future__ import annotations

from pathlib import Path

import builders
import numpy as np
import pytest
import torch
from builders import toy_policy
from shell import refusal

from spikerl.errors import BadRequest
from spikerl.runs.policies import find_policy, load_policy

DENSE = builders.dense_config([7])
OBS = np.random.default_rng(2).normal(3.0, 4.0, (9, 4))


def test_the_final_policy_before_a_checkpoints(tmp_path: Path) -> None:
    """Without a final policy the newest checkpoint's counts, even if `latest` is older, as after a
    kill.
    """
    for name in ("step_0000000001", "step_0000000002"):
        newest = tmp_path / "checkpoints" / name
        newest.mkdir(parents=True)
        toy_policy(DENSE).save(newest)
    (tmp_path / "checkpoints/latest").symlink_to("step_0000000001")
    assert find_policy(tmp_path, key="run") == newest
    toy_policy(DENSE).save(tmp_path)
    assert find_policy(tmp_path, key="run") == tmp_path


@pytest.mark.parametrize("name", ["x" * 300, "policy.json", "", "\0"])
def test_no_folder(name: str, tmp_path: Path) -> None:
    toy_policy(DENSE).save(tmp_path)
    with pytest.raises(BadRequest, match="no policy there"):
        load_policy(tmp_path / "below" / name)


@pytest.mark.parametrize("device", ["cpu", "cpu:0", torch.device("cpu"), torch.device("cpu", 0)])
def test_devices(device: str | torch.device, tmp_path: Path) -> None:
    policy = toy_policy(builders.spiking(builders.POPULATION))
    policy.save(tmp_path)
    loaded = load_policy(tmp_path, device=device)
    assert loaded.device == torch.device("cpu")
    np.testing.assert_array_equal(loaded(OBS), policy(OBS))


@pytest.mark.parametrize(
    ("device", "line"),
    [
        ("cuda", "device=cuda: 0 CUDA devices are visible here"),
        (torch.device("cuda", 3), "device=cuda:3: 0 CUDA devices are visible here"),
        ("tpu", "device=tpu: give auto, cpu, cuda or cuda:N"),
        (torch.device("meta"), "device=meta: give auto, cpu, cuda or cuda:N"),
    ],
)
def test_devices_that_are_not_there(
    device: str | torch.device, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    toy_policy(DENSE).save(tmp_path)
    assert str(refusal(load_policy, tmp_path, device=device)).startswith(line)
