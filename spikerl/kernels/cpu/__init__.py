"""All operations on the CPU in C++: `spikerl/kernels/csrc`, built for one set of instructions.

`kernels/coverage.py` says which networks run in one call, and which layer by layer. Critics and
dense networks in float32 run in one call; others run in PyTorch, except critics in bf16 on amx.
"""

from __future__ import annotations

from functools import cache

from spikerl.kernels import build as native
from spikerl.kernels.cpu.dense import DenseCalls
from spikerl.kernels.cpu.network import NetworkCalls, OneAction
from spikerl.kernels.cpu.steps import StepCalls

__all__ = ["CPUKernel", "OneAction", "kernel"]


class CPUKernel(NetworkCalls, DenseCalls, StepCalls):
    """The kernels of one processor path, as functions of tensors."""

    def __init__(self, path: str) -> None:
        lib = native.library(path)
        NetworkCalls.__init__(self, lib)
        DenseCalls.__init__(self, lib, tiles=path == "amx")


@cache
def kernel(path: str) -> CPUKernel:
    """The kernels of one path; raises native.Unbuilt if they cannot be built or loaded."""
    return CPUKernel(path)
