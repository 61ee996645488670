"""Memory that one call of the library leaves for the next."""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class BlockCache(threading.local):
    """What was used last still lies in a processor's cache. Each thread has blocks of its own."""

    KEPT = 16  # blocks

    def __init__(self) -> None:
        self.free: list[Tensor] = []  # the one given last comes first

    def acquire(self, size: int) -> Tensor:
        for i, block in enumerate(self.free):
            if len(block) == size:
                return self.free.pop(i)
        return torch.empty(size, dtype=torch.float32)

    def release(self, *blocks: Tensor) -> None:
        self.free = [*blocks, *self.free][: self.KEPT]


blocks = BlockCache()
