"""Memory blocks that calls of the library reuse."""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class BlockCache(threading.local):
    """Gives out the block released last first, as it may still be in the processor's cache. Each
    thread has blocks of its own.
    """

    KEPT = 16  # most free blocks kept

    def __init__(self) -> None:
        self.free: list[Tensor] = []  # released last comes first

    def acquire(self, size: int) -> Tensor:
        for i, block in enumerate(self.free):
            if len(block) == size:
                return self.free.pop(i)
        return torch.empty(size, dtype=torch.float32)

    def release(self, *blocks: Tensor) -> None:
        self.free = [*blocks, *self.free][: self.KEPT]


blocks = BlockCache()
