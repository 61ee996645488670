"""Run a function in several gloo workers, with a deadline after which they are killed."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

import forkserver  # noqa: F401  sets what the process that starts the workers has imported
from torch.multiprocessing.spawn import start_processes

from spikerl.distributed.world import TIMEOUT_S


def run_workers(
    check: Callable[..., None], world_size: int, seconds: int = 120, timeout_s: float = TIMEOUT_S
) -> None:
    """Call `check(world)` in each worker; a failure in one of them is raised here."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    args = check, world_size, port, timeout_s
    context = start_processes(_enter, args, world_size, join=False, start_method="forkserver")
    assert context is not None
    deadline = time.monotonic() + seconds
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, f"the workers hung for {seconds} s"
    finally:
        for process in context.processes:
            process.kill()


def _enter(rank: int, check: Callable[..., None], size: int, port: int, timeout_s: float) -> None:
    import os

    import torch

    from spikerl.distributed.world import join, leave

    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    world = join("gloo", torch.device("cpu"), timeout_s)
    check(world)
    world.barrier()
    leave()
