"""Actor and critics on the CPU in C++: a spiking network in one call, driven by events; ReLU nets.

What a call covers: encoders population and poisson, any number of layers up to 16 of any width,
cuba_lif and lif neurons with the rectangular surrogate, the rate decoder, float32. Elsewhere (an
actor whose products are bf16) layers run one after the other with one call for each layer's scan.

Shape legend   T spike steps, B batch, O observation entries, K encoder neurons, N, M neurons,
A actions.
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

from spikerl.linear import relu_values
from spikerl.snn.kernels import native, reference
from spikerl.snn.kernels.native import Net, Pointer
from spikerl.snn.kernels.reference import SpikingNet

MAX_LAYERS = 16  # of the source


class CPUKernel:
    """The kernels of one processor path, as functions of tensors."""

    def __init__(self, path: str) -> None:
        self.lib = native.library(path)
        self.prepared: WeakKeyDictionary[SpikingNet, Prepared] = WeakKeyDictionary()

    def actions(self, net: SpikingNet, obs_BO: Tensor, generator: torch.Generator | None) -> Tensor:
        """Actions (B, A) in [-1, 1]."""
        ready = self.prepare(net)
        if not ready.fused or obs_BO.requires_grad:
            return torch.tanh(net.decoder(reference.rates(net, obs_BO, generator, self.scan)))
        obs_BO = obs_BO.contiguous()
        uniform = net.encoder.uniform(len(obs_BO), net.spike_steps, generator)
        if not torch.is_grad_enabled():
            return self.forward(ready, obs_BO, uniform, None)
        act: Tensor = _Actions.apply(self, ready, obs_BO, uniform, *ready.params)
        return act

    def prepare(self, net: SpikingNet) -> Prepared:
        """The network as the library reads it, made again when its tensors have moved."""
        ready = self.prepared.get(net)
        if ready is None or ready.moved(net):
            ready = self.prepared[net] = Prepared(net)
        return ready

    def forward(
        self, ready: Prepared, obs_BO: Tensor, uniform_TBK: Tensor | None, saved: Tensor | None
    ) -> Tensor:
        batch = len(obs_BO)
        act = obs_BO.new_empty(batch, ready.net.act_dim)
        self.lib.spikerl_forward(
            ready.net,
            batch,
            obs_BO.data_ptr(),
            uniform_TBK.data_ptr() if uniform_TBK is not None else None,
            act.data_ptr(),
            saved.data_ptr() if saved is not None else None,
            torch.get_num_threads(),
        )
        return act

    def values(
        self, x_BI: Tensor, weights_CIN: list[Tensor], biases_C1N: list[Tensor], dtype: torch.dtype
    ) -> Tensor:
        """What `linear.relu_values` computes."""
        params = [*weights_CIN, *biases_C1N]
        plain = all(t.dtype == torch.float32 and t.is_contiguous() for t in params)
        if dtype != torch.float32 or not plain or x_BI.device.type != "cpu":
            return relu_values(x_BI, weights_CIN, biases_C1N, dtype)
        values: Tensor = _Values.apply(self, x_BI.contiguous(), *params)
        return values

    def scan(self, net: SpikingNet, drive_TBN: Tensor) -> Tensor:
        """Spikes of one layer."""
        if drive_TBN.dtype != torch.float32:
            return reference.scan(net, drive_TBN)
        neurons = drive_TBN[0].numel()
        flat = nn.functional.pad(drive_TBN.flatten(1), (0, -neurons % 16))
        spikes: Tensor = _Scan.apply(self, neuron_only(net, len(drive_TBN)), flat)
        return spikes[:, :neurons].reshape(drive_TBN.shape)


class OneAction:
    """Actions of one network for one raw observation at a time, without a tensor.

    What `actions` computes, at a fifth of the cost of getting there.
    """

    def __init__(self, kernel: CPUKernel, net: SpikingNet) -> None:
        self.kernel, self.net = kernel, net
        self.lock = threading.Lock()  # threads that act share the two arrays
        act_dim = len(net.decoder.bias_A)
        self.obs_O, self.act_A = np.empty(len(net.encoder.mean_OP)), np.empty(act_dim, np.float32)
        self.ready = kernel.prepare(net)
        self.places = Pointer(self.obs_O.ctypes.data), Pointer(self.act_A.ctypes.data)

    def __call__(self, obs_O: np.ndarray, norm_2O: Tensor, clip: float) -> np.ndarray | None:
        """The action (A,), float32; None where the observation is not finite.

        `norm_2O`: mean and standard deviation that the observation is normalised with.
        """
        obs, act = self.places
        with self.lock:
            self.obs_O[:] = obs_O
            if self.ready.moved(self.net):
                self.ready = self.kernel.prepare(self.net)
            norm = norm_2O.data_ptr()
            finite = self.kernel.lib.spikerl_act(self.ready.net, obs, norm, clip, act)
            return self.act_A.copy() if finite else None


@cache
def kernel(path: str) -> CPUKernel:
    """Raises native.Unbuilt where it cannot be built or loaded."""
    return CPUKernel(path)


def fused(net: SpikingNet) -> bool:
    """Whether one call covers the whole network."""
    first = net.layers[0].weight_IN
    plain = first.dtype == net.dtype == torch.float32 and first.device.type == "cpu"
    return plain and len(net.layers) <= MAX_LAYERS


class Prepared:
    """Pointers to a network's parameters, in the order of `net.parameters()`."""

    def __init__(self, net: SpikingNet) -> None:
        self.params = list(net.parameters())
        self.at = [p.data_ptr() for p in self.params]
        self.fused = fused(net)
        encoder, c, layers = net.encoder, net.neuron.config, list(net.layers)
        act_dim, out_pop = net.decoder.weight_AP.shape
        widths = [layers[0].weight_IN.shape[0], *(len(layer.bias_N) for layer in layers)]
        self.widths = np.array(widths, np.int32)
        self.weights = pointers([layer.weight_IN for layer in layers])
        self.biases = pointers([layer.bias_N for layer in layers])
        self.net = Net(
            len(encoder.mean_OP), encoder.config.pop_size, act_dim, out_pop, net.spike_steps,
            len(layers), encoder.config.threshold, net.neuron.current_decay, c.voltage_decay,
            c.threshold, c.surrogate_window, self.widths.ctypes.data, encoder.mean_OP.data_ptr(),
            encoder.std_OP.data_ptr(), ctypes.addressof(self.weights),
            ctypes.addressof(self.biases), net.decoder.weight_AP.data_ptr(),
            net.decoder.bias_A.data_ptr(),
        )  # fmt: skip

    def moved(self, net: SpikingNet) -> bool:
        """Whether its parameters lie elsewhere, or are others: `load_state_dict(assign=True)`."""
        same = net.encoder._parameters["mean_OP"] is self.params[0]
        return not same or [p.data_ptr() for p in self.params] != self.at


def pointers(tensors: list[Tensor]) -> ctypes.Array[Any]:
    return (Pointer * len(tensors))(*(t.data_ptr() for t in tensors))


def neuron_only(net: SpikingNet, spike_steps: int) -> Net:
    c = net.neuron.config
    return Net(
        spike_steps=spike_steps, current_decay=net.neuron.current_decay,
        voltage_decay=c.voltage_decay, threshold=c.threshold, window=c.surrogate_window,
    )  # fmt: skip


class _Actions(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernel: CPUKernel,
        ready: Prepared,
        obs_BO: Tensor,
        uniform_TBK: Tensor | None,
        *params: Tensor,
    ) -> Tensor:
        size = kernel.lib.spikerl_saved_bytes(ready.net, len(obs_BO))
        saved = _memory.take(-(-size // 4))
        act = kernel.forward(ready, obs_BO, uniform_TBK, saved)
        ctx.kernel, ctx.ready, ctx.poisson = kernel, ready, uniform_TBK is not None
        ctx.saved = saved
        ctx.save_for_backward(obs_BO, act, *params)
        return act

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_BA: Tensor) -> tuple[Tensor | None, ...]:
        obs_BO, act_BA, *params = ctx.saved_tensors
        grads = [torch.empty_like(p) for p in params]
        saved, ctx.saved = ctx.saved, None  # a second backward pass finds nothing, and fails
        mean, std, *layers, out_weight, out_bias = grads
        weights, biases = pointers(layers[0::2]), pointers(layers[1::2])
        grad_BA = grad_BA.contiguous()
        ctx.kernel.lib.spikerl_backward(
            ctx.ready.net, len(obs_BO), obs_BO.data_ptr(), ctx.poisson, act_BA.data_ptr(),
            grad_BA.data_ptr(), saved.data_ptr(), mean.data_ptr(), std.data_ptr(),
            ctypes.addressof(weights), ctypes.addressof(biases), out_weight.data_ptr(),
            out_bias.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        _memory.give(saved)
        return None, None, None, None, *grads


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernel: CPUKernel, net: Net, drive_TM: Tensor) -> Tensor:
        drive_TM = drive_TM.contiguous()
        spikes, voltage = torch.empty_like(drive_TM), torch.empty_like(drive_TM)
        places = (t.data_ptr() for t in (drive_TM, spikes, voltage))
        kernel.lib.spikerl_scan(net, drive_TM.shape[1], *places, torch.get_num_threads())
        ctx.kernel, ctx.net = kernel, net
        ctx.save_for_backward(voltage)
        return spikes

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TM: Tensor) -> tuple[Tensor | None, ...]:
        (voltage,) = ctx.saved_tensors
        grad_TM, out = grad_TM.contiguous(), torch.empty_like(voltage)
        places = (t.data_ptr() for t in (grad_TM, voltage, out))
        threads = torch.get_num_threads()
        ctx.kernel.lib.spikerl_scan_back(ctx.net, grad_TM.shape[1], *places, threads)
        return None, None, out


class _Values(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernel: CPUKernel, x_BI: Tensor, *params: Tensor) -> Tensor:
        layers, batch = len(params) // 2, len(x_BI)
        weights, biases = list(params[:layers]), list(params[layers:])
        nets = len(weights[0])
        values = [_memory.take(nets * batch * w.shape[-1]) for w in weights]
        widths = np.array([x_BI.shape[1], *(w.shape[-1] for w in weights)], np.int32)
        kernel.lib.spikerl_mlp_forward(
            nets, layers, widths.ctypes.data, batch, x_BI.data_ptr(), pointers(weights),
            pointers(biases), pointers(values), torch.get_num_threads(),
        )  # fmt: skip
        *hidden, last = values
        found = last.view(nets, batch).clone()
        _memory.give(last)
        if any(ctx.needs_input_grad):
            ctx.kernel, ctx.widths, ctx.hidden = kernel, widths, hidden
            ctx.save_for_backward(x_BI, *params)
        else:
            _memory.give(*hidden)
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_CB: Tensor) -> tuple[Tensor | None, ...]:
        x_BI, *params = ctx.saved_tensors
        layers = len(ctx.widths) - 1
        nets, batch = grad_CB.shape
        hidden, ctx.hidden = ctx.hidden, None  # a second backward pass finds nothing, and fails
        _, wants_x, wants_params, *_ = ctx.needs_input_grad
        x_grad = x_BI.new_empty(nets, *x_BI.shape) if wants_x else None
        grads = [torch.empty_like(p) for p in params] if wants_params else []
        grad_CB = grad_CB.contiguous()
        ctx.kernel.lib.spikerl_mlp_backward(
            nets, layers, ctx.widths.ctypes.data, batch, x_BI.data_ptr(),
            pointers(params[:layers]), pointers(hidden), grad_CB.data_ptr(),
            x_grad.data_ptr() if x_grad is not None else None,
            pointers(grads[:layers]) if grads else None,
            pointers(grads[layers:]) if grads else None, torch.get_num_threads(),
        )  # fmt: skip
        _memory.give(*hidden)
        x_sum = x_grad.sum(0) if x_grad is not None else None
        return (None, x_sum, *grads) if grads else (None, x_sum, *[None] * len(params))


class _Memory:
    """Blocks that one update leaves for the next: what was used last still lies in a cache."""

    KEPT = 16  # blocks

    def __init__(self) -> None:
        self.free: list[Tensor] = []  # the one given last comes first

    def take(self, size: int) -> Tensor:
        for i, block in enumerate(self.free):
            if len(block) == size:
                return self.free.pop(i)
        return torch.empty(size)

    def give(self, *blocks: Tensor) -> None:
        self.free = [*blocks, *self.free][: self.KEPT]


_memory = _Memory()
