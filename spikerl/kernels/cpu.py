"""Actor and critics on the CPU in C++: a spiking network in one call, driven by events.

What a call covers: encoders population, poisson and tanh_population, up to 16 layers of any width,
cuba_lif and lif neurons with hard reset and the rectangular surrogate, the rate decoder, float32.
Elsewhere layers run one after the other, with one call for a layer's scan where neurons are such.
Critics in float32 are covered whole; others are PyTorch's.

Shape legend   T spike steps, B batch, O observation entries, K encoder neurons, N, M neurons,
A actions, C critics.
"""

from __future__ import annotations

import ctypes
import threading
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from spikerl.kernels import build as native
from spikerl.kernels import reference
from spikerl.kernels.build import Neurons, Pointer, Units
from spikerl.kernels.coverage import MAX_STEPS, why_no_scan
from spikerl.kernels.gradient import Gradient, Moments, Pullback, SamplePullback
from spikerl.kernels.prepared import (
    PreparedActor,
    PreparedCritic,
    PreparedDense,
    addresses,
    constants,
    pointers,
)
from spikerl.kernels.reference import DenseNet, SpikingNet, ValueNet
from spikerl.snn.encoders import PoissonEncoder, PopulationEncoder
from spikerl.snn.neurons import PLIF, Neuron
from spikerl.types import Batch, Task


class CPUKernel:
    """The kernels of one processor path, as functions of tensors."""

    def __init__(self, path: str) -> None:
        self.lib = native.library(path)
        self.tiles = path == "amx"
        self.actors: WeakKeyDictionary[SpikingNet, PreparedActor] = WeakKeyDictionary()
        self.critics: WeakKeyDictionary[ValueNet, PreparedCritic] = WeakKeyDictionary()
        self.dense: WeakKeyDictionary[DenseNet, PreparedDense] = WeakKeyDictionary()

    def prepare(self, net: SpikingNet) -> PreparedActor:
        """The network as the library reads it, made again when its tensors have moved."""
        ready = self.actors.get(net)
        if ready is None or ready.moved(net):
            ready = self.actors[net] = PreparedActor(net)
        return ready

    def prepare_critic(self, critic: ValueNet, act_dim: int) -> PreparedCritic:
        ready = self.critics.get(critic)
        if ready is None or ready.moved(critic):
            ready = self.critics[critic] = PreparedCritic(critic, act_dim, self.tiles)
        return ready

    def prepare_dense(self, net: DenseNet) -> PreparedDense:
        ready = self.dense.get(net)
        if ready is None or ready.moved(net):
            ready = self.dense[net] = PreparedDense(net)
        return ready

    # --- the actor --------------------------------------------------------------------------------

    def actions(
        self,
        net: SpikingNet,
        obs_BO: Tensor,
        generator: torch.Generator | None,
        squash: bool = True,
    ) -> Tensor:
        """As `reference.actions`."""
        ready = self.prepare(net)
        if not covered(ready, obs_BO) or obs_BO.requires_grad:
            if net.early_exit is not None and squash:
                return reference.early_actions(net, obs_BO, generator, net.early_exit)
            return reference.act(reference.outputs(net, obs_BO, generator, self.scan), squash)
        obs_BO, uniform = self.inputs(net, obs_BO, generator)
        if not torch.is_grad_enabled():
            return self.forward(ready, obs_BO, uniform, None, squash)
        act: Tensor = _Actions.apply(self, ready, obs_BO, uniform, squash, *ready.params)
        return act

    def inputs(
        self, net: SpikingNet, obs_BO: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor | None]:
        """What the receptive fields see, and what a random encoder draws."""
        encoder = net.encoder
        assert isinstance(encoder, PopulationEncoder)  # `fused` has looked
        uniform = None
        if isinstance(encoder, PoissonEncoder):
            uniform = encoder.uniform(len(obs_BO), net.spike_steps, generator)
        return encoder.squash(obs_BO).contiguous(), uniform

    def forward(
        self,
        ready: PreparedActor,
        obs_BO: Tensor,
        uniform_TBK: Tensor | None,
        saved: Tensor | None,
        squash: bool,
    ) -> Tensor:
        """Actions; `saved` takes what `backward` needs."""
        batch = len(obs_BO)
        act = obs_BO.new_empty(batch, ready.net.act_dim)
        self.lib.spikerl_forward(
            ready.net,
            batch,
            obs_BO.data_ptr(),
            uniform_TBK.data_ptr() if uniform_TBK is not None else None,
            act.data_ptr(),
            saved.data_ptr() if saved is not None else None,
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

        `act_BA`: the actions, where they were squashed. `by_spike_L`: of the loss, what each spike
        of a layer adds to it.
        """
        self.lib.spikerl_backward(
            ready.net, len(obs_BO), obs_BO.data_ptr(), poisson,
            None if act_BA is None else act_BA.data_ptr(), grad_BA.data_ptr(),
            None if by_spike_L is None else by_spike_L.data_ptr(), saved.data_ptr(),
            at, torch.get_num_threads(),
        )  # fmt: skip

    def count_spikes(self, ready: PreparedActor, batch: int, saved: Tensor) -> Tensor:
        """Spikes of each layer over all samples and steps, of what `forward` saved."""
        counts_L = torch.empty(ready.net.layers, dtype=torch.int64)
        self.lib.spikerl_count_spikes(ready.net, batch, saved.data_ptr(), counts_L.data_ptr())
        return counts_L

    def saved_block(self, ready: PreparedActor, batch: int) -> Tensor:
        """For what `forward` saves."""
        return _blocks.acquire(-(-self.lib.spikerl_saved_bytes(ready.net, batch) // 4))

    def scan(self, neuron: Neuron, drive_TBN: Tensor) -> Tensor:
        """Spikes of one layer."""
        covers = why_no_scan(neuron) is None and len(drive_TBN) <= MAX_STEPS
        if drive_TBN.dtype != torch.float32 or not covers:
            return reference.scan(neuron, drive_TBN)
        neurons = drive_TBN[0].numel()
        flat = nn.functional.pad(drive_TBN.flatten(1), (0, -neurons % 16))
        decay = neuron.decay if isinstance(neuron, PLIF) else None
        spikes: Tensor = _Scan.apply(self, constants(neuron), flat, decay)
        return spikes[:, :neurons].reshape(drive_TBN.shape)

    def vjp(
        self,
        net: SpikingNet,
        obs_BO: Tensor,
        generator: torch.Generator | None,
        squash: bool = True,
    ) -> tuple[Tensor, Pullback]:
        """As `reference.vjp`, without autograd where one call covers the network."""
        ready = self.prepare(net)
        if not covered(ready, obs_BO):
            return reference.vjp(net, obs_BO, generator, squash, self.scan)
        obs_BO, uniform = self.inputs(net, obs_BO, generator)
        saved = [self.saved_block(ready, len(obs_BO))]
        act = self.forward(ready, obs_BO, uniform, saved[0], squash)

        def pull(grad_BA: Tensor, into: Gradient) -> dict[str, Tensor]:
            room = saved.pop()  # a second way back finds nothing, and fails
            added, by_spike_L = {}, None
            if net.spike_cost_L is not None:
                spikes_L = torch.from_numpy(ready.widths[1:]) * (len(obs_BO) * net.spike_steps)
                by_spike_L = net.spike_cost_L / spikes_L  # a spike is this share of the loss
                loss = (by_spike_L * self.count_spikes(ready, len(obs_BO), room)).sum()
                into.loss += loss * into.weight
                added = {"spike_loss": loss}
                by_spike_L = by_spike_L * into.factor
            poisson, grad_BA = uniform is not None, grad_BA.contiguous()
            own = act if squash else None
            self.backward(ready, obs_BO, poisson, own, grad_BA, room, into.at, by_spike_L)
            _blocks.release(room)
            return added

        return act, pull

    # --- critics ----------------------------------------------------------------------------------

    def values(self, critic: ValueNet, obs_BO: Tensor, act_BA: Tensor) -> Tensor:
        """Values (C, B)."""
        ready = self.prepare_critic(critic, act_BA.shape[1])
        if not covered(ready, obs_BO, act_BA) or torch.is_grad_enabled():
            return reference.values(critic, obs_BO, act_BA)
        obs, act = obs_BO.contiguous(), act_BA.contiguous()
        values = obs.new_empty(ready.all.networks, len(obs))
        places = (obs.data_ptr(), act.data_ptr(), values.data_ptr())
        self.lib.spikerl_values(ready.all, len(obs), *places, torch.get_num_threads())
        return values

    def td_target(
        self, critic: ValueNet, rows: Batch, act_BA: Tensor, bonus_B: Tensor | None = None
    ) -> Tensor:
        """As `reference.td_target`."""
        ready = self.prepare_critic(critic, act_BA.shape[1])
        obs, rew, discount = rows.next_obs, rows.rew, rows.discount
        bonus = () if bonus_B is None else (bonus_B.contiguous(),)
        if not covered(ready, obs, act_BA, rew, discount, *bonus) or torch.is_grad_enabled():
            return reference.td_target(critic, rows, act_BA, bonus_B)
        fields = [x.contiguous() for x in (obs, act_BA, rew, discount, rows.terminated)]
        target = torch.empty_like(fields[2])
        places = (x.data_ptr() for x in (*fields, target))
        added = bonus[0].data_ptr() if bonus else None
        self.lib.spikerl_td_target(ready.all, len(obs), *places, added, torch.get_num_threads())
        return target

    def add_clipped_noise(
        self, act_BA: Tensor, noise_BA: Tensor, std: float, bound: float
    ) -> Tensor:
        """As `reference.add_clipped_noise`."""
        if not act_BA.dtype == noise_BA.dtype == torch.float32 or not act_BA.is_contiguous():
            return reference.add_clipped_noise(act_BA, noise_BA, std, bound)
        self.lib.spikerl_add_clipped_noise(
            act_BA.numel(), act_BA.data_ptr(), noise_BA.data_ptr(), std, bound
        )
        return noise_BA

    def squashed(
        self, mean_BA: Tensor, log_std_BA: Tensor, noise_BA: Tensor, low: float, high: float
    ) -> tuple[Tensor, Tensor]:
        """As `reference.squashed`."""
        if torch.is_grad_enabled():
            return reference.squashed(mean_BA, log_std_BA, noise_BA, low, high)
        return self.squashed_vjp(mean_BA, log_std_BA, noise_BA, low, high)[:2]

    def squashed_vjp(
        self, mean_BA: Tensor, log_std_BA: Tensor, noise_BA: Tensor, low: float, high: float
    ) -> tuple[Tensor, Tensor, SamplePullback]:
        """As `reference.squashed_vjp`, without autograd."""
        if any(x.dtype != torch.float32 for x in (mean_BA, log_std_BA, noise_BA)):
            return reference.squashed_vjp(mean_BA, log_std_BA, noise_BA, low, high)
        mean, log_std, noise = (x.contiguous() for x in (mean_BA, log_std_BA, noise_BA))
        act, spread, log_prob = (
            torch.empty_like(mean),
            torch.empty_like(mean),
            mean.new_empty(len(mean)),
        )
        places = (x.data_ptr() for x in (act, log_prob, spread))
        self.lib.spikerl_squashed(
            *mean.shape, mean.data_ptr(), log_std.data_ptr(), noise.data_ptr(), low, high, *places
        )

        def pull(by_act_BA: Tensor, by_log_prob_B: Tensor) -> tuple[Tensor, Tensor]:
            given = (log_std, act, spread, by_act_BA.contiguous(), by_log_prob_B.contiguous())
            found = torch.empty_like(mean), torch.empty_like(mean)
            self.lib.spikerl_squashed_backward(
                *mean.shape, *(x.data_ptr() for x in given), low, high,
                *(x.data_ptr() for x in found),
            )  # fmt: skip
            return found

        return act, log_prob, pull

    def critic_backward(
        self, critic: ValueNet, obs_BO: Tensor, act_BA: Tensor, target_B: Tensor, into: Gradient
    ) -> Tensor:
        """As `reference.critic_backward`."""
        ready = self.prepare_critic(critic, act_BA.shape[1])
        if not covered(ready, obs_BO, act_BA, target_B):
            return reference.critic_backward(critic, obs_BO, act_BA, target_B, into)
        obs, act, target = obs_BO.contiguous(), act_BA.contiguous(), target_B.contiguous()
        mean = target.new_empty(())
        self.lib.spikerl_critic_backward(
            ready.all, len(obs), obs.data_ptr(), act.data_ptr(), target.data_ptr(), into.weight,
            into.at, into.loss.data_ptr(), mean.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return mean

    def actor_loss_grad(
        self,
        critic: ValueNet,
        obs_BO: Tensor,
        act_BA: Tensor,
        into: Gradient,
        lowest: bool = False,
    ) -> Tensor:
        """As `reference.actor_loss_grad`."""
        ready = self.prepare_critic(critic, act_BA.shape[1])
        if not covered(ready, obs_BO, act_BA):
            return reference.actor_loss_grad(critic, obs_BO, act_BA, into, lowest)
        obs, act = obs_BO.contiguous(), act_BA.contiguous()
        grad = torch.empty_like(act)
        value = self.lib.spikerl_actor_loss_grad(
            ready.all if lowest else ready.first, len(obs), obs.data_ptr(), act.data_ptr(),
            -into.weight, grad.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        into.loss.fill_(-into.weight * value)
        return grad

    # --- a dense actor ----------------------------------------------------------------------------

    def dense_actions(self, net: DenseNet, obs_BO: Tensor, squash: bool = True) -> Tensor:
        """As `reference.dense_actions`."""
        ready = self.prepare_dense(net)
        if not covered(ready, obs_BO) or torch.is_grad_enabled():
            return reference.dense_actions(net, obs_BO, squash)
        return self.dense_forward(ready, obs_BO.contiguous(), None, squash)

    def dense_forward(
        self, ready: PreparedDense, obs_BO: Tensor, saved: Tensor | None, squash: bool
    ) -> Tensor:
        """Actions; `saved` takes what the way back needs."""
        act = obs_BO.new_empty(len(obs_BO), ready.widths[-1])
        self.lib.spikerl_dense_forward(
            ready.net, len(obs_BO), obs_BO.data_ptr(), act.data_ptr(),
            None if saved is None else saved.data_ptr(), squash, torch.get_num_threads(),
        )  # fmt: skip
        return act

    def dense_vjp(
        self, net: DenseNet, obs_BO: Tensor, squash: bool = True
    ) -> tuple[Tensor, Pullback]:
        """As `reference.dense_vjp`, without autograd."""
        ready = self.prepare_dense(net)
        if not covered(ready, obs_BO):
            return reference.dense_vjp(net, obs_BO, squash)
        obs, batch = obs_BO.contiguous(), len(obs_BO)
        saved = [_blocks.acquire(self.lib.spikerl_dense_saved_bytes(ready.net, batch) // 4)]
        act = self.dense_forward(ready, obs, saved[0], squash)

        def pull(grad_BA: Tensor, into: Gradient) -> dict[str, Tensor]:
            room, grad = saved.pop(), grad_BA.contiguous()  # a second way back finds nothing
            self.lib.spikerl_dense_backward(
                ready.net, batch, obs.data_ptr(), act.data_ptr() if squash else None,
                grad.data_ptr(), room.data_ptr(), into.at, torch.get_num_threads(),
            )  # fmt: skip
            _blocks.release(room)
            return {}

        return act, pull

    def mse_backward(self, net: DenseNet, obs_BO: Tensor, goal_BA: Tensor, into: Gradient) -> None:
        """As `reference.mse_backward`."""
        ready = self.prepare_dense(net)
        if not covered(ready, obs_BO, goal_BA):
            return reference.mse_backward(net, obs_BO, goal_BA, into)
        obs, goal = obs_BO.contiguous(), goal_BA.contiguous()
        self.lib.spikerl_mse_backward(
            ready.net, len(obs), obs.data_ptr(), goal.data_ptr(), into.weight, into.at,
            into.loss.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return None

    # --- weights ----------------------------------------------------------------------------------

    def adam(
        self, moments: Moments, gradient: Tensor, lr: float, max_norm: float, masked: Tensor
    ) -> None:
        """As `reference.adam`, in one pass."""
        if gradient.dtype != torch.float32:
            return reference.adam(moments, gradient, lr, max_norm, masked)
        weights, step, mean, square = (m.data_ptr() for m in moments)
        places = (weights, gradient.data_ptr(), mean, square, step)
        self.lib.spikerl_adam(len(gradient) - 1, *places, lr, max_norm, masked.data_ptr())
        return None

    def polyak(self, target: Tensor, online: Tensor, tau: float, masked: Tensor) -> None:
        """As `reference.polyak`."""
        if target.dtype != torch.float32:
            return reference.polyak(target, online, tau, masked)
        places = (target.data_ptr(), online.data_ptr(), tau, masked.data_ptr())
        self.lib.spikerl_polyak(len(target), *places)
        return None


class OneAction:
    """Actions of one network for one raw observation at a time, without a tensor.

    What `actions` and `Task.to_env` compute, at a fifth of the cost of getting there.
    """

    def __init__(self, kernel: CPUKernel, net: SpikingNet, task: Task) -> None:
        self.kernel, self.net = kernel, net
        self.lock = threading.Lock()  # threads that act share the two arrays
        self.obs_O, self.act_A = np.empty(task.obs_dim), np.empty(task.act_dim, np.float32)
        self.ready = kernel.prepare(net)
        self.places = Pointer(self.obs_O.ctypes.data), Pointer(self.act_A.ctypes.data)
        self.kept = tuple(np.ascontiguousarray(array).reshape(-1) for array in task.units)
        self.units = Units(*(array.ctypes.data for array in self.kept))

    def __call__(self, obs_O: np.ndarray, norm_2O: Tensor, clip: float) -> np.ndarray | None:
        """The action (A,) in the environment's units; None where the observation is not finite.

        `norm_2O`: mean and standard deviation that the observation is normalised with.
        """
        with self.lock:
            self.obs_O[:] = obs_O
            if self.ready.moved(self.net):
                self.ready = self.kernel.prepare(self.net)
            return self.act_A.copy() if self.run(norm_2O.data_ptr(), clip) else None

    def run(self, norm: int, clip: float) -> bool:
        """The library's call, from array to array; False: the observation is not finite."""
        obs, act = self.places
        net, units = self.ready.net, self.units
        return bool(self.kernel.lib.spikerl_act(net, units, obs, norm, clip, act))


def covered(ready: PreparedActor | PreparedCritic | PreparedDense, *inputs: Tensor) -> bool:
    return ready.fused and all(x.dtype == torch.float32 for x in inputs)


@cache
def kernel(path: str) -> CPUKernel:
    """Raises native.Unbuilt where it cannot be built or loaded."""
    return CPUKernel(path)


class _Actions(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernel: CPUKernel,
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
        saved, ctx.saved = ctx.saved, None  # a second backward pass finds nothing, and fails
        places, grad_BA = pointers(addresses(grads)), grad_BA.contiguous()
        act, at = act_BA if ctx.squash else None, ctypes.addressof(places)
        ctx.kernel.backward(ctx.ready, obs_BO, ctx.poisson, act, grad_BA, saved, at)
        _blocks.release(saved)
        return None, None, None, None, None, *grads


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernel: CPUKernel, neurons: Neurons, drive_TM: Tensor, decay: Tensor | None
    ) -> Tensor:
        drive_TM = drive_TM.contiguous()
        spikes, voltage = torch.empty_like(drive_TM), torch.empty_like(drive_TM)
        if decay is not None:
            neurons.voltage_decay = float(decay)
        places = (t.data_ptr() for t in (drive_TM, spikes, voltage))
        kernel.lib.spikerl_scan(neurons, *drive_TM.shape, *places, torch.get_num_threads())
        ctx.kernel, ctx.neurons, ctx.learns = kernel, neurons, decay is not None
        ctx.save_for_backward(voltage)
        return spikes

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TM: Tensor) -> tuple[Tensor | None, ...]:
        (voltage,) = ctx.saved_tensors
        grad_TM, out = grad_TM.contiguous(), torch.empty_like(voltage)
        places = (t.data_ptr() for t in (grad_TM, voltage, out))
        threads = torch.get_num_threads()
        by_decay = ctx.kernel.lib.spikerl_scan_back(ctx.neurons, *grad_TM.shape, *places, threads)
        return None, None, out, voltage.new_tensor(by_decay) if ctx.learns else None


class _BlockCache:
    """Blocks that one update leaves for the next: what was used last still lies in a cache."""

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


_blocks = _BlockCache()
