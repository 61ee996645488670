"""Sums in shared memory: the same bits as gloo's, and what happens when a worker is gone."""

from __future__ import annotations

import glob
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from spawn import run_workers

from spikerl.distributed import shm_allreduce as sums_module
from spikerl.distributed.shm_allreduce import FOLDER
from spikerl.distributed.world import World, share_memory

pytestmark = pytest.mark.skipif(not os.access(FOLDER, os.W_OK), reason=f"no {FOLDER}")


def rows(world: World, count: int, length: int, dtype: torch.dtype) -> torch.Tensor:
    """The vectors of all workers, (count, ranks, length), drawn alike on each of them."""
    draw = torch.Generator().manual_seed(length)
    return torch.randn(count, world.size, length, generator=draw, dtype=dtype)


def sums_are_exact(world: World) -> None:
    assert world.shm is not None
    for dtype in (torch.float32, torch.float64):
        for length in (1, 513, 144_000):
            everyone = rows(world, 6, length, dtype)
            for k in range(6):
                if (k + world.rank) % 3 == 0:
                    time.sleep(0.002 * world.rank)  # another worker is late each time
                mine = everyone[k, world.rank].clone()
                world.sum_(mine)
                expected = everyone[k, 0].clone()
                for rank in range(1, world.size):
                    expected += everyone[k, rank]
                assert torch.equal(mine, expected)
    assert len(world.shm.buffers) == 6  # one for each size in bytes
    assert not glob.glob(f"{FOLDER}/*spikerl*")


def two_give_gloos_bits(world: World) -> None:
    mine = rows(world, 1, 1000, torch.float32)[0, world.rank]
    ours, gloos = mine.clone(), mine.clone()
    world.sum_(ours)
    dist.all_reduce(gloos)
    assert torch.equal(ours, gloos)


def what_has_no_room_takes_gloo(world: World) -> None:
    assert world.shm is not None
    counts = torch.ones(3, dtype=torch.int64)
    assert not world.shm.sum_(counts)
    assert not world.shm.sum_(torch.ones(4, 2)[:, 0])
    world.sum_(counts)
    assert counts.tolist() == [world.size] * 3


def a_machine_without_room(world: World) -> None:
    """One worker cannot open shared memory, later or from the start: all use gloo, none waits."""
    enter, fresh = sums_module._open, share_memory(replace(world, shm=None))
    assert fresh.shm is not None
    if world.rank == 1:
        sums_module._open = lambda name, total, rank: None
    mine = torch.ones(10)
    fresh.sum_(mine)
    assert mine.tolist() == [world.size] * 10
    assert fresh.shm.buffers == {40: None}
    assert share_memory(replace(world, shm=None)).shm is None
    sums_module._open = enter


def another_machine(world: World) -> None:
    """Workers on different machines use no shared memory."""
    if world.rank == 0:
        sums_module.MACHINE = Path("/proc/sys/kernel/ostype")
    assert share_memory(replace(world, shm=None)).shm is None


def everything(world: World) -> None:
    for check in (sums_are_exact, two_give_gloos_bits, what_has_no_room_takes_gloo):
        if check is not two_give_gloos_bits or world.size == 2:
            check(world)
    a_machine_without_room(world)
    another_machine(world)


@pytest.mark.parametrize("size", [2, 3])
def test_sums(size: int) -> None:
    run_workers(everything, size)


def one_leaves(world: World) -> None:
    world.sum_(torch.ones(10))
    if world.rank == 1:
        os._exit(0)  # without leaving the group, as after SIGKILL
    begun = time.monotonic()
    with pytest.raises(dist.DistNetworkError, match="worker 1 is gone"):
        world.sum_(torch.ones(10))
    assert time.monotonic() - begun < 5
    os._exit(0)  # the other worker is gone, so the group cannot be left in order


def test_a_worker_that_is_gone_is_noticed() -> None:
    run_workers(one_leaves, 2, seconds=60)


def one_is_late(world: World) -> None:
    assert world.shm is not None
    world.sum_(torch.ones(10))
    world.shm.timeout_s = 0.2
    if world.rank == 1:
        time.sleep(1.0)
        world.sum_(torch.ones(10))
        return
    with pytest.raises(dist.DistNetworkError, match=r"worker 1 did not come within 0\.2 s"):
        world.sum_(torch.ones(10))


def test_waiting_has_an_end() -> None:
    run_workers(one_is_late, 2, seconds=60)
