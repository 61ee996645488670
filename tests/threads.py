"""Workers as threads of one process, which exchange data without starting other processes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from spikerl.distributed.world import World

Result = TypeVar("Result")


class Table:
    """A list with a place for each worker: each writes its own value, then reads all."""

    def __init__(self, size: int) -> None:
        self.places: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=60)

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.places[rank] = value
        self.barrier.wait()
        everyone = list(self.places)
        self.barrier.wait()
        return everyone


@dataclass(frozen=True)
class ThreadWorld(World):
    table: Table = field(default_factory=lambda: Table(1))

    def sum_(self, tensor: Tensor) -> None:
        tensor.copy_(sum(self.table.exchange(self.rank, tensor.clone())))

    def gather(self, tensor: Tensor) -> list[Tensor]:
        return [part.clone() for part in self.table.exchange(self.rank, tensor)]

    def gather_objects(self, value: Any) -> list[Any]:
        return self.table.exchange(self.rank, value)

    def broadcast(self, value: Any) -> Any:
        return self.gather_objects(value)[0]

    def barrier(self) -> None:
        self.gather_objects(None)


def worlds(size: int) -> list[World]:
    table = Table(size)
    return [ThreadWorld(rank, size, rank, table=table) for rank in range(size)]


def run_in_threads(calls: list[Callable[[], Result]]) -> list[Result]:
    """Run each call in a thread of its own; if one fails, the others wait at most 60 s for it."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [done.result() for done in [pool.submit(call) for call in calls]]
