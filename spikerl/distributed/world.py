"""The workers of one run, as seen by one of them: all exchanges between them are here."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from spikerl.distributed import hosts, mpi, mpi_group
from spikerl.distributed.launchers import mpi_set, ranked
from spikerl.distributed.shm_allreduce import ShmAllReduce, open_shm_allreduce
from spikerl.errors import BadRequest, DiskError, RendezvousFailed, first_line
from spikerl.schema import Registry
from spikerl.types import Resolved

TIMEOUT_S = 600.0
PATIENCE_S = 0.2  # interval at which workers that wait for a disk report to each other
T = TypeVar("T")


def share(total: int, rank: int, size: int) -> int:
    """Worker `rank`'s share of `total` items: as even as possible, the first get one more."""
    return total // size + (rank < total % size)


@dataclass(kw_only=True)
class BackendConfig:
    name: str
    timeout_s: float = TIMEOUT_S  # an exchange that takes longer counts as a lost worker

    def __post_init__(self) -> None:
        if not 1 <= self.timeout_s <= 1e6:
            raise BadRequest("backend.timeout_s", self.timeout_s, "give 1 to 1e6 seconds")


BACKENDS: Registry[BackendConfig, None] = Registry(
    "backend", **dict.fromkeys(("auto", "gloo", "nccl", "mpi"), (BackendConfig, type(None)))
)


def resolve_world_size(asked: int | None) -> int:
    """The number of workers asked for or started by a launcher; BadRequest if they differ."""
    started = int(os.environ["WORLD_SIZE"]) if ranked() else None
    if asked is not None and started is not None and asked != started:
        remedy = f"the launcher started {started} workers; leave world_size out"
        raise BadRequest("world_size", asked, remedy)
    return started or asked or 1


def resolve_backend(
    config: BackendConfig, device: str, world_size: int, nnodes: int = 1
) -> Resolved:
    """The backend for collectives, and why."""
    here = 1 if hosts.has_own("gpus") else hosts.workers_here(world_size, nnodes)
    gpus = torch.cuda.device_count() if device.startswith("cuda") else 0
    if config.name == "nccl" and not gpus:
        remedy = "nccl needs CUDA devices and this run uses the CPU; use backend=gloo"
        raise BadRequest("backend", "nccl", remedy)
    if config.name == "nccl" and here > gpus:
        remedy = f"nccl needs a device per worker: {here} workers here, {gpus} devices"
        raise BadRequest("backend", "nccl", f"{remedy}; use backend=gloo or fewer workers")
    if config.name == "mpi":
        if why := mpi.missing() or (None if mpi.mpiexec(1) else f"no mpiexec; {mpi.EXTRA}"):
            raise BadRequest("backend", "mpi", why)
        if ranked() and not mpi_set():
            remedy = "mpiexec has not started the workers; start them with it, or use backend=gloo"
            raise BadRequest("backend", "mpi", remedy)
    elif config.name != "auto" and world_size > 1 and mpi_set():
        raise BadRequest("backend", config.name, "mpiexec started the workers; use backend=mpi")
    if config.name != "auto":
        return Resolved(config.name, "requested")
    if world_size == 1:
        return Resolved("none", "one worker exchanges nothing")
    if mpi_set():
        return Resolved("mpi", "mpiexec started the workers")
    if here <= gpus:
        return Resolved("nccl", "a CUDA device for each worker")
    return Resolved("gloo", "workers share a device" if gpus else "workers on the CPU")


@dataclass(frozen=True)
class World:
    """Rank `rank` of `size` workers; with one worker, every exchange is the identity.

    Results are bitwise equal on all workers: a sum is computed once and distributed, or by all in
    the same order, and gathered values are in rank order.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    exchange: str = "cpu"  # the device on which the backend requires gathered tensors
    shm: ShmAllReduce | None = None  # if all workers run on the CPU of one machine

    def sum_(self, tensor: Tensor) -> None:
        """Replace `tensor` by its sum over workers, in one collective."""
        if self.size > 1 and not (self.shm and self.shm.sum_(tensor)):
            dist.all_reduce(tensor)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Every worker's `tensor` (all of one shape), in rank order."""
        if self.size == 1:
            return [tensor]
        mine = tensor.to(self.exchange)
        gathered = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(gathered, mine)
        return [part.to(tensor.device) for part in gathered]

    def gather_objects(self, value: Any) -> list[Any]:
        """Every worker's plain data, in rank order; slow, for exchanges once an epoch."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value)
        return gathered

    def broadcast(self, value: Any) -> Any:
        """Rank 0's plain data."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def run_on_all(self, act: Callable[[], T]) -> list[T]:
        """Run `act`, which uses the disk, on every worker; returns the results in rank order.

        If one worker's disk fails or `act` raises BadRequest there, all raise that. It may take any
        time: workers keep reporting to each other meanwhile, so that no exchange times out.
        """

        def tell() -> tuple[Any, Any, str | None]:
            try:
                return act(), None, None
            except BadRequest as error:
                return None, error.args, None
            except OSError as error:
                return None, None, reason(error)

        if self.size == 1:
            everyone = [tell()]
        else:
            with ThreadPoolExecutor(1) as pool:
                mine = pool.submit(tell)
                while not all(self.gather_objects(bool(wait([mine], PATIENCE_S).done))):
                    pass
            everyone = self.gather_objects(mine.result())
        for rank, (_, refused, failed) in enumerate(everyone):
            if refused:
                raise BadRequest(*refused)
            if failed:
                raise DiskError(f"worker {rank}: {failed}" if self.size > 1 else failed)
        return [result for result, _, _ in everyone]


ALONE = World()


def reason(error: OSError) -> str:
    """The system's error message, with the file's name."""
    said = error.strerror or str(error)
    return f"{said}: {error.filename}" if error.filename else said


def join(backend: str, device: torch.device, timeout_s: float = TIMEOUT_S) -> World:
    """Join the other workers, as the launcher's environment variables say."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    exchange = str(device) if backend == "nccl" else "cpu"
    if size > 1 and backend == "mpi":
        mpi_group.join(timedelta(seconds=timeout_s))
    elif size > 1:
        bound = device if backend == "nccl" else None
        # gloo would resolve this machine's own name, which may fail or give another address.
        alone = os.environ.get("LOCAL_WORLD_SIZE") == str(size)
        other = "127.0.0.1" if alone else os.environ["MASTER_ADDR"]
        if interface := hosts.interface_to(other):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        timeout = timedelta(seconds=timeout_s)
        try:
            dist.init_process_group(backend, timeout=timeout, device_id=bound)
        except RuntimeError as error:  # the base of torch.distributed's errors
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            why = first_line(error)
            raise RendezvousFailed(
                f"worker {rank} of {size} did not meet the others at {where}: {why}"
            ) from error
    world = World(rank, size, int(os.environ.get("LOCAL_RANK", rank)), exchange)
    alike = backend == "gloo" and device.type == "cpu"
    return share_memory(world, timeout_s) if alike else world


def share_memory(world: World, timeout_s: float = TIMEOUT_S) -> World:
    """The world with sums through shared memory, if all workers are on one machine."""
    if world.size == 1:
        return world
    shm = open_shm_allreduce(world.rank, world.size, world.gather_objects, timeout_s)
    return replace(world, shm=shm)


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
