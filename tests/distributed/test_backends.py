"""With the same seed, all workers have the same bits, and the results over gloo and MPI agree."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from backends import differ, read, states, train
from spawn import run_workers

from spikerl.distributed import mpi

CLOSE = 1e-3


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_same_after_200_updates(size: int, tmp_path: Path) -> None:
    start = mpi.mpiexec(size)
    assert start
    assert not mpi.joined()  # only workers may join MPI: there an error ends the process
    run_workers(partial(train, out=tmp_path, backend="gloo"), size)
    gloo = read(tmp_path, "gloo", size)
    over_mpi = states(tmp_path, "mpi", size, [*start, sys.executable])
    for own in (gloo, over_mpi):
        for other in own[1:]:
            assert all(torch.equal(other[name], own[0][name]) for name in own[0])
    # The sum of two numbers is rounded in one way; with four, rounding depends on the order.
    assert differ(gloo[0], over_mpi[0]) <= (0.0 if size == 2 else CLOSE)
