"""Collectives over MPI: a c10d process group over mpi4py, since PyTorch's wheels have no MPI.

All of this program's exchanges over gloo or nccl also run over it. GPU tensors go through the host.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, Work
from torch.distributed import DistNetworkError
from torch.futures import Future

NAME = "mpi4py"  # c10d's own backend is called "mpi"; wheels are built without it


def join(timeout: timedelta) -> None:
    """Join the other workers."""
    import mpi4py

    mpi4py.rc.initialize = True
    from mpi4py import MPI

    if not MPI.Is_initialized():
        MPI.Init()
    comm = MPI.COMM_WORLD
    if NAME not in dist.Backend.backend_list:
        dist.Backend.register_backend(NAME, _create, devices=["cpu", "cuda"])
    store = HashStore()  # not shared, since MPI needs no store to meet
    dist.init_process_group(NAME, store=store, rank=comm.rank, world_size=comm.size,
                            timeout=timeout)  # fmt: skip


def _create(store: Any, rank: int, size: int, timeout: timedelta) -> MPIGroup:
    return MPIGroup(rank, size, timeout)


class _Done(Work):
    """The handle of a collective, which has already finished."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        self.future: Future[Any] = Future()
        self.future.set_result(result)

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        return True

    def get_future(self) -> Future[Any]:
        return self.future


class MPIGroup(dist.ProcessGroup):
    """All of MPI_COMM_WORLD, in a communicator of its own."""

    def __init__(self, rank: int, size: int, timeout: timedelta) -> None:
        from mpi4py import MPI

        super().__init__(rank, size)  # type: ignore[call-arg]
        self.mpi, self.comm, self.timeout_s = MPI, MPI.COMM_WORLD.Dup(), timeout.total_seconds()

    def getBackendName(self) -> str:
        return NAME

    def allreduce(self, tensors: Sequence[Tensor], opts: Any = None) -> _Done:  # type: ignore[override]
        assert opts is None or opts.reduceOp == dist.ReduceOp.SUM
        for tensor in tensors:
            host = on_host(tensor)
            self.finish(self.comm.Iallreduce(self.mpi.IN_PLACE, host.numpy(), self.mpi.SUM))
            if host.data_ptr() != tensor.data_ptr():
                tensor.copy_(host)
        return _Done(tensors)

    def broadcast(self, tensors: Sequence[Tensor], opts: Any = None) -> _Done:  # type: ignore[override]
        for tensor in tensors:
            host = on_host(tensor)
            root = 0 if opts is None else opts.rootRank
            self.finish(self.comm.Ibcast(host.numpy(), root))
            if host.data_ptr() != tensor.data_ptr():
                tensor.copy_(host)
        return _Done(tensors)

    def allgather(  # type: ignore[override]
        self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Any = None
    ) -> _Done:
        for parts, tensor in zip(outputs, inputs, strict=True):
            host = on_host(tensor)
            everyone = torch.empty(self.size(), *host.shape, dtype=host.dtype)
            self.finish(self.comm.Iallgather(host.numpy(), everyone.numpy()))
            for part, own in zip(parts, everyone, strict=True):
                part.copy_(own)
        return _Done(outputs)

    def barrier(self, opts: Any = None) -> _Done:
        self.finish(self.comm.Ibarrier())
        return _Done([])

    def finish(self, request: Any) -> None:
        """Wait for a request to finish; DistNetworkError after the timeout."""
        start = time.monotonic()
        while not request.Test():
            waited = time.monotonic() - start
            if waited > self.timeout_s:
                text = f"a worker did not come to a collective within {self.timeout_s:g} s"
                raise DistNetworkError(text)
            if waited > 1e-3:  # late: leave the core to workers that compute
                time.sleep(1e-4)


def on_host(tensor: Tensor) -> Tensor:
    """The tensor itself if MPI can read it, else a copy."""
    return tensor.detach().cpu().contiguous()
