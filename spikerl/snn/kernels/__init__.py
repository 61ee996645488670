"""Who runs actor and critics: two operations, with one module for each implementation.

`actions(net, obs_BO, generator)` of a spiking network: (B, A) in [-1, 1].
`values(x_BI, weights_CIN, biases_C1N, dtype)` of C networks with ReLU layers: (C, B).
Both are differentiable. `reference` and `linear.relu_values` are the definitions that every other
kernel is tested against. A kernel's name is `reference`, `triton` or `cpu/PATH`, PATH being a set
of processor instructions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from spikerl.errors import BadRequest
from spikerl.linear import relu_values
from spikerl.snn.kernels import cpu, native, reference
from spikerl.snn.kernels.reference import SpikingNet
from spikerl.types import Resolved

Actions = Callable[[SpikingNet, Tensor, torch.Generator | None], Tensor]
Values = Callable[[Tensor, list[Tensor], list[Tensor], torch.dtype], Tensor]


@dataclass(kw_only=True)
class KernelConfig:
    name: str
    path: str | None  # of kernel=cpu: avx512, avx2, portable; null: the best that is there

    def __post_init__(self) -> None:
        if self.path is None:
            return
        if self.name != "cpu":
            raise BadRequest("kernel.path", self.path, "has a meaning with kernel=cpu only")
        if self.path not in native.supported_paths():
            here = ", ".join(native.supported_paths())
            raise BadRequest("kernel.path", self.path, f"this processor runs {here}")


def resolve(
    config: KernelConfig, device: str, actor_dtype: torch.dtype = torch.float32
) -> Resolved:
    """The kernel that runs, and why; what it needs is built here, before any worker starts."""
    if config.name == "reference":
        return Resolved("reference", "requested")
    if device != "cpu":
        return _on_gpu(config, device)
    if config.name == "triton":
        raise BadRequest("kernel", "triton", f"this run uses {device}; it needs a CUDA device")
    path = config.path or native.supported_paths()[0]
    try:
        cpu.kernel(path)
    except native.Unbuilt as error:
        if config.name == "cpu":
            raise BadRequest("kernel", "cpu", f"{error}; use kernel=auto") from None
        return Resolved("reference", str(error))
    reason = "requested" if config.name == "cpu" else "a C++ compiler is there"
    if actor_dtype != torch.float32:
        reason += f"; layer by layer, for the actor's products are {actor_dtype}"
    return Resolved(f"cpu/{path}", reason)


def _on_gpu(config: KernelConfig, device: str) -> Resolved:
    if config.name == "cpu":
        raise BadRequest("kernel", "cpu", f"this run uses {device}; use kernel=auto")
    try:
        from spikerl.snn.kernels import triton  # noqa: F401
    except ImportError:
        if config.name == "triton":
            remedy = "triton is not installed; use kernel=auto"
            raise BadRequest("kernel", "triton", remedy) from None
        return Resolved("reference", "triton is not installed")
    return Resolved("triton", "requested" if config.name == "triton" else "a CUDA device")


def actions(name: str) -> Actions:
    """The operation in the kernel that `resolve` chose."""
    kind, _, path = name.partition("/")
    if kind == "triton":
        from spikerl.snn.kernels import triton

        return triton.actions
    return cpu.kernel(path).actions if kind == "cpu" else reference.actions


def values(name: str) -> Values:
    kind, _, path = name.partition("/")
    return cpu.kernel(path).values if kind == "cpu" else relu_values


def one_action(name: str, net: SpikingNet) -> cpu.OneAction | None:
    """How `net` acts on one raw observation without a tensor; None where the kernel has no way."""
    kind, _, path = name.partition("/")
    alone = kind == "cpu" and cpu.fused(net) and not net.encoder.random
    return cpu.OneAction(cpu.kernel(path), net) if alone else None
