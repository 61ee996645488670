"""The arithmetic of an update: each kernel is an implementation of the same operations.

`reference` defines them, and every other kernel is tested against it. A kernel's name is
`reference`, `triton`, `triton/graphs` or `cpu/PATH`, where PATH is a set of processor instructions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from spikerl.errors import BadRequest
from spikerl.kernels import build as native
from spikerl.kernels import cpu, reference
from spikerl.kernels.gradient import Gradient, Moments, Pullback, SamplePullback
from spikerl.kernels.nets import DenseNet, Parts, SpikingNet, ValueNet
from spikerl.kernels.prepared import fused
from spikerl.schema import Registry
from spikerl.types import Batch, Resolved, Task


class Kernel(Protocol):
    """Shapes: observations (B, O), actions (B, A) in [-1, 1], values (C, B)."""

    parts: Parts  # for networks that run layer by layer

    def actions(
        self, net: SpikingNet, obs: Tensor, generator: torch.Generator | None, squash: bool = ..., /
    ) -> Tensor: ...

    def vjp(
        self, net: SpikingNet, obs: Tensor, generator: torch.Generator | None, squash: bool = ..., /
    ) -> tuple[Tensor, Pullback]: ...

    def values(self, critic: ValueNet, obs: Tensor, act: Tensor, /) -> Tensor: ...

    def td_target(
        self, critic: ValueNet, rows: Batch, act: Tensor, bonus: Tensor | None = ..., /
    ) -> Tensor: ...

    def squashed(
        self, mean: Tensor, log_std: Tensor, noise: Tensor, low: float, high: float, /
    ) -> tuple[Tensor, Tensor]: ...

    def squashed_vjp(
        self, mean: Tensor, log_std: Tensor, noise: Tensor, low: float, high: float, /
    ) -> tuple[Tensor, Tensor, SamplePullback]: ...

    def add_clipped_noise(
        self, act: Tensor, noise: Tensor, std: float, bound: float, /
    ) -> Tensor: ...

    def critic_backward(
        self, critic: ValueNet, obs: Tensor, act: Tensor, target: Tensor, into: Gradient, /
    ) -> Tensor: ...

    def actor_loss_grad(
        self, critic: ValueNet, obs: Tensor, act: Tensor, into: Gradient, lowest: bool = ..., /
    ) -> Tensor: ...

    def dense_actions(self, net: DenseNet, obs: Tensor, squash: bool = ..., /) -> Tensor: ...

    def dense_vjp(
        self, net: DenseNet, obs: Tensor, squash: bool = ..., /
    ) -> tuple[Tensor, Pullback]: ...

    def mse_backward(self, net: DenseNet, obs: Tensor, goal: Tensor, into: Gradient, /) -> None: ...

    def adam(
        self, moments: Moments, gradient: Tensor, lr: float, max_norm: float, masked: Tensor, /
    ) -> None: ...

    def polyak(self, target: Tensor, online: Tensor, tau: float, masked: Tensor, /) -> None: ...


@dataclass(kw_only=True)
class KernelConfig:
    name: str
    path: str | None  # cpu: amx, avx512, avx2, portable; null: the best. triton: graphs, or null

    def __post_init__(self) -> None:
        if self.path is None:
            return
        if self.name == "triton":
            if self.path != "graphs":
                raise BadRequest("kernel.path", self.path, "give graphs, or null")
            return
        if self.name != "cpu":
            remedy = "has a meaning with kernel=cpu and kernel=triton only"
            raise BadRequest("kernel.path", self.path, remedy)
        if self.path not in native.supported_paths():
            here = ", ".join(native.supported_paths())
            raise BadRequest("kernel.path", self.path, f"this processor runs {here}")


KERNELS: Registry[KernelConfig, None] = Registry(
    "kernel",
    **dict.fromkeys(("auto", "reference", "cpu", "triton"), (KernelConfig, type(None))),
)


def resolve(
    config: KernelConfig,
    device: str,
    layered: str | None = None,
    no_graphs: str | None = "no updates",
) -> Resolved:
    """The kernel to run, and why; its library is built here, before any worker starts.

    `layered`: why the actor runs layer by layer rather than in one call; None if it does not.
    `no_graphs`: what prevents a round of updates from being one CUDA graph; None: nothing.
    """
    if config.name == "reference":
        return Resolved("reference", "requested")
    if device != "cpu":
        return _on_gpu(config, device, no_graphs)
    if config.name == "triton":
        raise BadRequest("kernel", "triton", f"this run uses {device}; it needs a CUDA device")
    paths = [config.path] if config.path else native.supported_paths()
    path, unbuilt = native.first_built(paths)
    if path is None:
        if config.name == "cpu":
            raise BadRequest("kernel", "cpu", f"{unbuilt}; use kernel=auto")
        return Resolved("reference", unbuilt)
    reason = "requested" if config.name == "cpu" else "a C++ compiler is there"
    if unbuilt:  # the compiler is older than the processor
        reason += f"; not {paths[0]}: {unbuilt}"
    if layered:
        reason += f"; layer by layer because of {layered}"
    return Resolved(f"cpu/{path}", reason)


def here(name: str, device: str) -> str:
    """The kernel `name`, or if this machine cannot run it, the one that `auto` chooses here."""
    kind, _, path = name.partition("/")
    if kind != "cpu" or native.first_built([p for p in native.supported_paths() if p == path])[0]:
        return name
    return resolve(KernelConfig(name="auto", path=None), device).choice


def _on_gpu(config: KernelConfig, device: str, no_graphs: str | None) -> Resolved:
    if config.name == "cpu":
        raise BadRequest("kernel", "cpu", f"this run uses {device}; use kernel=auto")
    try:
        from spikerl.kernels import triton  # noqa: F401
    except ImportError:
        if config.name == "triton":
            remedy = "triton is not installed; use kernel=auto"
            raise BadRequest("kernel", "triton", remedy) from None
        return Resolved("reference", "triton is not installed")
    if config.name == "triton":
        return Resolved("triton/graphs" if config.path else "triton", "requested")
    if no_graphs is None:
        return Resolved("triton/graphs", "a CUDA device")
    return Resolved("triton", f"a CUDA device; no graphs with {no_graphs}")


@cache
def named(name: str) -> Kernel:
    """The kernel that `resolve` chose."""
    kind, _, path = name.partition("/")
    if kind == "cpu":
        return cpu.kernel(path)
    if kind == "triton":
        from spikerl.kernels import triton

        return triton  # type: ignore[return-value]  # mypy overlooks its `parts`
    return reference


def one_action(name: str, net: SpikingNet, task: Task) -> cpu.OneAction | None:
    """A function from one raw observation to an action, without tensors; None if the kernel has
    none for `net`.
    """
    kind, _, path = name.partition("/")
    alone = kind == "cpu" and fused(net) and not net.encoder.random
    return cpu.OneAction(cpu.kernel(path), net, task) if alone else None
