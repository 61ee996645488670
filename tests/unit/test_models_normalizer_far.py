"""Normalised observations keep their precision where the mean is large against the deviation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spikerl.models.normalizer import RunningNorm

CPU = torch.device("cpu")


def norm_of(rows: np.ndarray) -> RunningNorm:
    norm = RunningNorm(rows.shape[1], clip=5.0)
    norm.add(rows)
    norm.merge([norm.collect()])
    return norm


def waves(offset: float) -> np.ndarray:
    """50 different values between offset - 1 and offset + 1."""
    return offset + np.linspace(-1.0, 1.0, 50)[:, None]


@pytest.mark.parametrize("offset", [0.0, 100.0, 4.5e6, 5.0e7, 1.7e9])
def test_as_many_values_are_seen_as_there_are(offset: float) -> None:
    norm = norm_of(waves(offset))
    seen = norm.observe(waves(offset), CPU)
    assert seen.dtype == torch.float32
    assert len(seen.unique()) == 50
    wanted = np.linspace(-1.0, 1.0, 50) / np.sqrt(np.linspace(-1.0, 1.0, 50).var() + 2.0**-23)
    np.testing.assert_allclose(seen[:, 0].numpy(), wanted, atol=1e-5)
    assert norm.far == (offset > 1e6)


def test_near_means_are_subtracted_in_float32() -> None:
    rows = waves(100.0)
    norm = norm_of(rows)
    mean, std = norm.mean_std
    old = ((torch.from_numpy(rows.astype(np.float32)) - mean) / std).clamp(-5.0, 5.0)
    assert torch.equal(norm.observe(rows, CPU), old)


@pytest.mark.parametrize("steps", [1, 400])
def test_what_does_not_vary_changes_nothing(steps: int) -> None:
    """A constant, such as a mass of 8.9, is not `far`, although its deviation is only rounding."""
    norm = RunningNorm(1, clip=5.0)
    for _ in range(steps):
        norm.add(np.full((7, 1), 8.9))
        norm.merge([norm.collect()])
    assert not norm.far
    clock = RunningNorm(1, clip=5.0)
    for _ in range(steps):
        clock.add(np.full((7, 1), 1.7e9 + 0.1))
        clock.merge([clock.collect()])
    assert not clock.far


def test_replayed_rows_are_centred_exactly() -> None:
    """The mean 1.7e9 + 37 is no float32 number; it is subtracted without being rounded to one."""
    norm = norm_of(waves(1.7e9 + 37.0))
    stored = torch.tensor([[1.7e9]], dtype=torch.float32)
    deviation = np.sqrt(np.linspace(-1.0, 1.0, 50).var() + 2.0**-23)
    wide = RunningNorm(1, clip=None)
    wide.load(norm.state())
    assert wide.normalize(stored).item() == pytest.approx(-37.0 / deviation, rel=1e-6)


def test_what_float32_storage_loses_is_said() -> None:
    rows = np.concatenate([waves(100.0), waves(1e4), waves(1.7e9)], 1)
    said = norm_of(rows).coarse()
    assert list(said) == [2]
    assert "entry 2" in said[2]
    assert "steps of 1.3e+02" in said[2]
    assert norm_of(rows[:, :2]).coarse() == {}
