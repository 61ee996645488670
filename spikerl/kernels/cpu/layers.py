"""One layer at a time: event-driven products of spikes and weights, and neurons' scans.

Shape legend   T spike steps, B batch, I inputs, N neurons, M = B N.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from spikerl.kernels import reference
from spikerl.kernels.build import Neurons
from spikerl.kernels.coverage import MAX_STEPS, why_no_scan
from spikerl.kernels.cpu.blocks import blocks
from spikerl.kernels.nets import Parts, SpikingNet
from spikerl.kernels.prepared import (
    PreparedLayer,
    address,
    addresses,
    check_shape,
    constants,
    covered,
    plain,
    pointers,
)
from spikerl.snn.batchnorm import ROWS, Rows
from spikerl.snn.decoders import ILCDecoder
from spikerl.snn.encoders import PoissonEncoder, PopulationEncoder
from spikerl.snn.linear import Linear
from spikerl.snn.neurons import PLIF, Neuron


def encoded(
    net: SpikingNet, obs_BO: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, Tensor | None]:
    """The inputs of the receptive fields, and the random numbers of a Poisson encoder."""
    encoder = net.encoder
    assert isinstance(encoder, PopulationEncoder)  # the caller has checked that
    uniform = None
    if isinstance(encoder, PoissonEncoder):
        uniform = encoder.uniform(len(obs_BO), net.spike_steps, generator)
    return encoder.squash(obs_BO).contiguous(), uniform


class LayerCalls:
    """The operations on one layer; inputs that the library does not cover run in PyTorch."""

    def __init__(self, lib: ctypes.CDLL) -> None:
        self.lib = lib
        rows = Rows(
            self.row_sums, self.row_affine, self.row_normalise, self.row_gradient_sums,
            self.row_gradient,
        )  # fmt: skip
        self.parts = Parts(self.first, self.drive, self.scan, self.connected_scan, rows)

    def first(self, net: SpikingNet, obs_BO: Tensor, generator: torch.Generator | None) -> Tensor:
        """As `reference.first`."""
        layer = PreparedLayer(net.layers[0], net.encoder, net.spike_steps, net.dtype)
        if not covered(layer, obs_BO) or obs_BO.requires_grad:
            return reference.first(net, obs_BO, generator)
        check_shape(obs_BO, len(obs_BO), layer.net.obs_dim)
        return self.driven(layer, *encoded(net, obs_BO, generator), None)

    def drive(self, layer: Linear, neuron: Neuron, x_TBI: Tensor, dtype: torch.dtype) -> Tensor:
        """As `reference.drive`."""
        ready = PreparedLayer(layer, neuron, len(x_TBI), dtype)
        if not covered(ready, x_TBI) or x_TBI.shape[-1] != ready.widths[0]:
            return reference.drive(layer, neuron, x_TBI, dtype)
        return self.driven(ready, None, None, x_TBI)

    def driven(
        self,
        layer: PreparedLayer,
        obs_BO: Tensor | None,
        uniform_TBI: Tensor | None,
        spikes_TBI: Tensor | None,
    ) -> Tensor:
        """The layer's drive (T, B, N) by `spikes_TBI`, or if None, by its encoder's spikes."""
        if torch.is_grad_enabled():
            drive_TBN: Tensor = _Drive.apply(
                self, layer, obs_BO, uniform_TBI, spikes_TBI, *layer.params
            )
            return drive_TBN
        drive_TBN, saved = self.run_drive(layer, obs_BO, uniform_TBI, spikes_TBI)
        blocks.release(saved)
        return drive_TBN

    def run_drive(
        self,
        layer: PreparedLayer,
        obs_BO: Tensor | None,
        uniform_TBI: Tensor | None,
        spikes_TBI: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The drive, and a block with what the backward pass needs."""
        if spikes_TBI is not None:
            spikes_TBI = spikes_TBI.contiguous()
        given = obs_BO if spikes_TBI is None else spikes_TBI[0]
        assert given is not None
        batch, net = len(given), layer.net
        saved = blocks.acquire(-(-self.lib.spikerl_drive_saved_bytes(net, batch) // 4))
        drive_TBN = given.new_empty(net.spike_steps, batch, int(layer.widths[1]))
        self.lib.spikerl_drive(
            net, batch, *map(address, (obs_BO, uniform_TBI, spikes_TBI, drive_TBN, saved)),
            torch.get_num_threads(),
        )  # fmt: skip
        return drive_TBN, saved

    # --- neurons ----------------------------------------------------------------------------------

    def scan(self, neuron: Neuron, drive_TBN: Tensor) -> Tensor:
        """As `reference.scan`."""
        if not _scans(neuron, drive_TBN):
            return reference.scan(neuron, drive_TBN)
        neurons = drive_TBN[0].numel()
        flat = drive_TBN.flatten(1)
        if neurons % 16:
            flat = nn.functional.pad(flat, (0, -neurons % 16))
        spikes: Tensor = _Scan.apply(self, constants(neuron), flat, _decay(neuron))
        return spikes[:, :neurons].reshape(drive_TBN.shape)

    def connected_scan(self, neuron: Neuron, drive_TBN: Tensor, decoder: ILCDecoder) -> Tensor:
        """As `reference.connected_scan`."""
        lateral = decoder.lateral_APP, decoder.lateral_bias_N
        if not _scans(neuron, drive_TBN) or not all(map(plain, lateral)):
            return reference.connected_scan(neuron, drive_TBN, decoder)
        spikes: Tensor = _ConnectedScan.apply(
            self, constants(neuron), drive_TBN, *lateral, _decay(neuron)
        )
        return spikes

    # --- normalisation ----------------------------------------------------------------------------

    def row_sums(self, x_TBN: Tensor) -> Tensor:
        if x_TBN.dtype != torch.float32:
            return ROWS.sums(x_TBN)
        x = x_TBN.contiguous()
        sums = x.new_empty(2 * x.shape[-1], dtype=torch.float64)
        self.lib.spikerl_row_sums(*_rows(x), address(x), address(sums))
        return sums

    def row_affine(self, x_TBN: Tensor, *given: Tensor) -> Tensor:
        if x_TBN.dtype != torch.float32 or not all(map(plain, given)):
            return ROWS.affine(x_TBN, *given)
        x = x_TBN.contiguous()
        y = torch.empty_like(x)
        self.lib.spikerl_row_affine(*_rows(x), *map(address, (x, *given, y)))
        return y

    def row_normalise(self, x_TBN: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
        if x_TBN.dtype != torch.float32 or not all(map(plain, given)):
            return ROWS.normalise(x_TBN, *given)
        x = x_TBN.contiguous()
        normal, y = torch.empty_like(x), torch.empty_like(x)
        self.lib.spikerl_row_normalise(*_rows(x), *map(address, (x, *given, normal, y)))
        return normal, y

    def row_gradient_sums(self, grad_TBN: Tensor, normal_TBN: Tensor) -> Tensor:
        if grad_TBN.dtype != torch.float32 or not plain(normal_TBN):
            return ROWS.gradient_sums(grad_TBN, normal_TBN)
        grad = grad_TBN.contiguous()
        sums = grad.new_empty(2, grad.shape[-1])
        self.lib.spikerl_row_gradient_sums(*_rows(grad), *map(address, (grad, normal_TBN, sums)))
        return sums

    def row_gradient(self, grad_TBN: Tensor, *given: Tensor) -> Tensor:
        if grad_TBN.dtype != torch.float32 or not all(map(plain, given)):
            return ROWS.gradient(grad_TBN, *given)
        grad = grad_TBN.contiguous()
        out = torch.empty_like(grad)
        self.lib.spikerl_row_gradient(*_rows(grad), *map(address, (grad, *given, out)))
        return out


class _Drive(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        calls: LayerCalls,
        layer: PreparedLayer,
        obs_BO: Tensor | None,
        uniform_TBI: Tensor | None,
        spikes_TBI: Tensor | None,
        *params: Tensor,
    ) -> Tensor:
        drive_TBN, ctx.saved = calls.run_drive(layer, obs_BO, uniform_TBI, spikes_TBI)
        ctx.calls, ctx.layer, ctx.poisson = calls, layer, uniform_TBI is not None
        ctx.save_for_backward(obs_BO, *params)
        return drive_TBN

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TBN: Tensor) -> tuple[Tensor | None, ...]:
        obs_BO, *params = ctx.saved_tensors
        saved, ctx.saved = ctx.saved, None  # a second backward pass fails
        grads, grad_TBN = [torch.empty_like(p) for p in params], grad_TBN.contiguous()
        steps, batch, _ = grad_TBN.shape
        by_spike = None
        if obs_BO is None:
            by_spike = grad_TBN.new_empty(steps, batch, int(ctx.layer.widths[0]))
        places = pointers(addresses(grads))
        ctx.calls.lib.spikerl_drive_back(
            ctx.layer.net, batch, address(obs_BO), ctx.poisson, address(grad_TBN), saved.data_ptr(),
            ctypes.addressof(places), address(by_spike), torch.get_num_threads(),
        )  # fmt: skip
        blocks.release(saved)
        return None, None, None, None, by_spike, *grads


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, calls: LayerCalls, neurons: Neurons, drive_TM: Tensor, decay: Tensor | None
    ) -> Tensor:
        drive_TM = drive_TM.contiguous()
        spikes, voltage = torch.empty_like(drive_TM), torch.empty_like(drive_TM)
        if decay is not None:
            neurons.voltage_decay = float(decay)
        places = map(address, (drive_TM, spikes, voltage))
        calls.lib.spikerl_scan(neurons, *drive_TM.shape, *places, torch.get_num_threads())
        ctx.calls, ctx.neurons, ctx.learns = calls, neurons, decay is not None
        ctx.save_for_backward(voltage)
        return spikes

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TM: Tensor) -> tuple[Tensor | None, ...]:
        (voltage,) = ctx.saved_tensors
        grad_TM, out = grad_TM.contiguous(), torch.empty_like(voltage)
        places, threads = map(address, (grad_TM, voltage, out)), torch.get_num_threads()
        by_decay = ctx.calls.lib.spikerl_scan_back(ctx.neurons, *grad_TM.shape, *places, threads)
        return None, None, out, voltage.new_tensor(by_decay) if ctx.learns else None


class _ConnectedScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        calls: LayerCalls,
        neurons: Neurons,
        drive_TBN: Tensor,
        lateral_APP: Tensor,
        bias_N: Tensor,
        decay: Tensor | None,
    ) -> Tensor:
        drive_TBN = drive_TBN.contiguous()
        steps, batch, width = drive_TBN.shape
        if decay is not None:
            neurons.voltage_decay = float(decay)
        spikes = torch.empty_like(drive_TBN)
        voltage = drive_TBN.new_empty(batch, steps, width + -width % 16)
        calls.lib.spikerl_connected_scan(
            neurons, steps, batch, *lateral_APP.shape[:2],
            *map(address, (lateral_APP, bias_N, drive_TBN, spikes, voltage)),
        )  # fmt: skip
        ctx.calls, ctx.neurons, ctx.learns = calls, neurons, decay is not None
        ctx.save_for_backward(lateral_APP, spikes, voltage)
        return spikes

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TBN: Tensor) -> tuple[Tensor | None, ...]:
        lateral_APP, spikes, voltage = ctx.saved_tensors
        grad_TBN, out = grad_TBN.contiguous(), torch.empty_like(spikes)
        grad_APP, grad_N = torch.empty_like(lateral_APP), spikes.new_empty(spikes.shape[-1])
        by_decay = ctx.calls.lib.spikerl_connected_scan_back(
            ctx.neurons, *grad_TBN.shape[:2], *lateral_APP.shape[:2],
            *map(address, (lateral_APP, grad_TBN, spikes, voltage, out, grad_APP, grad_N)),
        )  # fmt: skip
        decay = voltage.new_tensor(by_decay) if ctx.learns else None
        return None, None, out, grad_APP, grad_N, decay


def _scans(neuron: Neuron, drive_TBN: Tensor) -> bool:
    covers = why_no_scan(neuron) is None and len(drive_TBN) <= MAX_STEPS
    return covers and drive_TBN.dtype == torch.float32


def _decay(neuron: Neuron) -> Tensor | None:
    return neuron.decay if isinstance(neuron, PLIF) else None


def _rows(x_TBN: Tensor) -> tuple[int, int]:
    return x_TBN.shape[:-1].numel(), x_TBN.shape[-1]
