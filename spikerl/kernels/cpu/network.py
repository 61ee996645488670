"""A whole spiking network in one event-driven call, forward and backward.

Shape legend   T spike steps, B batch, O observation entries, K encoder neurons, A actions.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from spikerl.kernels import reference
from spikerl.kernels.build import Pointer, Units
from spikerl.kernels.cpu.blocks import blocks
from spikerl.kernels.cpu.layers import LayerCalls, encoded
from spikerl.kernels.gradient import Gradient, Pullback
from spikerl.kernels.nets import SpikingNet
from spikerl.kernels.prepared import (
    PreparedActor,
    address,
    addresses,
    check_shape,
    covered,
    pointers,
)
from spikerl.types import Task


class NetworkCalls(LayerCalls):
    """The operations on whole networks; those that no single call covers run layer by layer."""

    def __init__(self, lib: ctypes.CDLL) -> None:
        super().__init__(lib)
        self.actors: WeakKeyDictionary[SpikingNet, PreparedActor] = WeakKeyDictionary()

    def prepare(self, net: SpikingNet) -> PreparedActor:
        """The network as the library reads it, prepared anew when its tensors have moved."""
        ready = self.actors.get(net)
        if ready is None or ready.moved(net):
            ready = self.actors[net] = PreparedActor(net)
        return ready

    def takes(self, ready: PreparedActor, obs_BO: Tensor) -> bool:
        """Whether the library runs the network on `obs_BO`; ValueError if the shape is wrong."""
        if not covered(ready, obs_BO):
            return False
        check_shape(obs_BO, len(obs_BO), ready.net.obs_dim)
        return True

    def actions(
        self,
        net: SpikingNet,
        obs_BO: Tensor,
        generator: torch.Generator | None,
        squash: bool = True,
    ) -> Tensor:
        """As `reference.actions`."""
        ready = self.prepare(net)
        learns = torch.is_grad_enabled()
        early = net.early_exit is not None and learns
        if not self.takes(ready, obs_BO) or obs_BO.requires_grad or early:
            return reference.actions(net, obs_BO, generator, squash, self.parts)
        obs_BO, uniform = encoded(net, obs_BO, generator)
        if not learns:
            return self.forward(ready, obs_BO, uniform, None, squash)
        act: Tensor = _Actions.apply(self, ready, obs_BO, uniform, squash, *ready.params)
        return act

    def forward(
        self,
        ready: PreparedActor,
        obs_BO: Tensor,
        uniform_TBK: Tensor | None,
        saved: Tensor | None,
        squash: bool,
    ) -> Tensor:
        """Actions; `saved`, if given, receives what `backward` needs."""
        batch = len(obs_BO)
        act = obs_BO.new_empty(batch, ready.net.act_dim)
        self.lib.spikerl_forward(
            ready.net,
            batch,
            obs_BO.data_ptr(),
            address(uniform_TBK),
            act.data_ptr(),
            address(saved),
            squash,
            torch.get_num_threads(),
        )
        return act

    def backward(
        self,
        ready: PreparedActor,
        obs_BO: Tensor,
        poisson: bool,
        act_BA: Tensor | None,
        grad_BA: Tensor,
        saved: Tensor,
        at: int,
        by_spike_L: Tensor | None = None,
    ) -> None:
        """Write each parameter's gradient to its address in the list at `at`.

        `act_BA`: the actions if they were squashed, else None. `by_spike_L`: for each layer, the
        gradient of the spike loss with respect to a single spike.
        """
        self.lib.spikerl_backward(
            ready.net, len(obs_BO), obs_BO.data_ptr(), poisson,
            address(act_BA), grad_BA.data_ptr(), address(by_spike_L), saved.data_ptr(),
            at, torch.get_num_threads(),
        )  # fmt: skip

    def count_spikes(self, ready: PreparedActor, batch: int, saved: Tensor) -> Tensor:
        """Number of spikes in each layer over all samples and steps, from what `forward` saved."""
        counts_L = torch.empty(ready.net.layers, dtype=torch.int64)
        self.lib.spikerl_count_spikes(ready.net, batch, saved.data_ptr(), counts_L.data_ptr())
        return counts_L

    def saved_block(self, ready: PreparedActor, batch: int) -> Tensor:
        """A block for what `forward` saves."""
        return blocks.acquire(-(-self.lib.spikerl_saved_bytes(ready.net, batch) // 4))

    def vjp(
        self,
        net: SpikingNet,
        obs_BO: Tensor,
        generator: torch.Generator | None,
        squash: bool = True,
    ) -> tuple[Tensor, Pullback]:
        """As `reference.vjp`, without autograd if one call covers the network."""
        ready = self.prepare(net)
        if not self.takes(ready, obs_BO) or net.early_exit is not None:
            return reference.vjp(net, obs_BO, generator, squash, self.parts)
        obs_BO, uniform = encoded(net, obs_BO, generator)
        saved = [self.saved_block(ready, len(obs_BO))]
        act = self.forward(ready, obs_BO, uniform, saved[0], squash)

        def pull(grad_BA: Tensor, into: Gradient) -> dict[str, Tensor]:
            check_shape(grad_BA, *act.shape)
            room = saved.pop()  # fails at a second call
            added, by_spike_L = {}, None
            if net.spike_cost_L is not None:
                spikes_L = torch.from_numpy(ready.widths[1:]).long()  # int32 could overflow
                spikes_L = spikes_L * (len(obs_BO) * net.spike_steps)
                by_spike_L = net.spike_cost_L / spikes_L  # what one spike adds to the loss
                loss = (by_spike_L * self.count_spikes(ready, len(obs_BO), room)).sum()
                into.loss += loss * into.weight
                added = {"spike_loss": loss}
                by_spike_L = by_spike_L * into.factor
            poisson, grad_BA = uniform is not None, grad_BA.float().contiguous()
            own = act if squash else None
            self.backward(ready, obs_BO, poisson, own, grad_BA, room, into.at, by_spike_L)
            blocks.release(room)
            return added

        return act, pull


class OneAction:
    """Actions of one network for one raw observation at a time, without tensors.

    Computes what `actions` and `Task.to_env` do, at a fifth of their overhead.
    """

    def __init__(self, kernel: NetworkCalls, net: SpikingNet, task: Task) -> None:
        self.kernel, self.net = kernel, net
        self.lock = threading.Lock()  # acting threads share the two arrays
        self.obs_O, self.act_A = np.empty(task.obs_dim), np.empty(task.act_dim, np.float32)
        self.ready = kernel.prepare(net)
        self.places = Pointer(self.obs_O.ctypes.data), Pointer(self.act_A.ctypes.data)
        self.kept = tuple(np.ascontiguousarray(array).reshape(-1) for array in task.units)
        self.units = Units(*(array.ctypes.data for array in self.kept))

    def __call__(self, obs_O: np.ndarray, norm_2O: Tensor, clip: float) -> np.ndarray | None:
        """The action (A,) in the environment's units; None if the observation is not finite, or if
        the network has changed into one that the library does not run.

        `norm_2O`: mean and standard deviation by which the observation is normalised.
        """
        with self.lock:
            self.obs_O[:] = obs_O
            if self.ready.moved(self.net):
                self.ready = self.kernel.prepare(self.net)
            if not self.ready.fused:
                return None
            return self.act_A.copy() if self.run(norm_2O.data_ptr(), clip) else None

    def run(self, norm: int, clip: float) -> bool:
        """Compute `act_A` from `obs_O`; False if the observation is not finite."""
        obs, act = self.places
        net, units = self.ready.net, self.units
        return bool(self.kernel.lib.spikerl_act(net, units, obs, norm, clip, act))


class _Actions(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernel: NetworkCalls,
        ready: PreparedActor,
        obs_BO: Tensor,
        uniform_TBK: Tensor | None,
        squash: bool,
        *params: Tensor,
    ) -> Tensor:
        saved = kernel.saved_block(ready, len(obs_BO))
        act = kernel.forward(ready, obs_BO, uniform_TBK, saved, squash)
        ctx.kernel, ctx.ready, ctx.poisson = kernel, ready, uniform_TBK is not None
        ctx.saved, ctx.squash = saved, squash
        ctx.save_for_backward(obs_BO, act, *params)
        return act

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_BA: Tensor) -> tuple[Tensor | None, ...]:
        obs_BO, act_BA, *params = ctx.saved_tensors
        grads = [torch.empty_like(p) for p in params]
        saved, ctx.saved = ctx.saved, None  # a second backward pass fails
        places, grad_BA = pointers(addresses(grads)), grad_BA.contiguous()
        act, at = act_BA if ctx.squash else None, ctypes.addressof(places)
        ctx.kernel.backward(ctx.ready, obs_BO, ctx.poisson, act, grad_BA, saved, at)
        blocks.release(saved)
        return None, None, None, None, None, *grads
