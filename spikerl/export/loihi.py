"""Format `loihi`: the spiking layers in the integers of Intel's first Loihi chip.

A layer has one scale s: its threshold is the integer s th, weights and biases are s w rounded to
even integers of 9 bits with sign, as the chip drops the lowest bit of weights of mixed sign. Biases
are synapses from a neuron that always fires. The current keeps (4096 - du - 1) / 4096 of its value,
the voltage (4096 - dv) / 4096, where du and dv have 12 bits.

u = wrap(u (4096 - du - 1) >> 12 + a << 6)      24 bits, the shift towards zero
v = clip(v (4096 - dv) >> 12 + u)               |v| < 2^23
o = [v > vth << 6], then v = 0                  vth of 17 bits; a is the sum of active weights

These are the rules of Lava's models that are bit-accurate with the chip (lava-nc/lava,
proc/lif/models.py, proc/dense/models.py, utils/weightutils.py). Here they are computed layer by
layer in float64, which represents such integers exactly; `loihi_chip` computes them independently,
from the file, in integers and in the chip's order.

Shape legend   T spike steps, B observations, I inputs, N neurons of a layer, A action entries,
P neurons of one population.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save

from spikerl.errors import BadRequest
from spikerl.export import proof
from spikerl.models.actor import SpikingActor
from spikerl.models.policy import Policy
from spikerl.snn.decoders import ILCDecoder
from spikerl.snn.neurons import PLIF, CubaLIF, Neuron

LARGEST_WEIGHT = 254  # largest even integer in a synapse of mixed sign
LARGEST_THRESHOLD = 2**17 - 1
UNITY = 4096  # 1.0 in the fixed-point decays
HALF_RANGE = 2.0**23  # of u and v

# Davies et al., IEEE Micro 2018; limits of a core as in nengo-loihi's block.py.
CORES = 128
CORE_NEURONS = 1024
CORE_INPUTS = CORE_OUTPUTS = 4096  # axons
CORE_SYNAPSES = 2**20 // 8  # of 8 bits each, not counting the headers of their lists

EQUATION = (
    "u = wrap24(toward_zero(u (4096 - du - 1) / 4096) + 64 a);"
    " v = clip(toward_zero(v (4096 - dv) / 4096) + u, -(2^23 - 1), 2^23 - 1);"
    " o = [v > 64 vth]; v = 0 where o"
)
TIMING = (
    "the encoder fires at chip steps 0 to T - 1; a spike acts one chip step later, so that layer k,"
    " from 0 on, does its spike step t at chip step t + k + 1; a neuron that fires at chip steps 0"
    " to T - 1 drives layer k through the biases, which act k chip steps later still; every"
    " decision begins at rest"
)


@dataclass
class Layer:
    """The integers of a layer on the chip; weights act on u in units of 64."""

    weight_IN: np.ndarray  # int64, even
    bias_N: np.ndarray
    lateral_APP: np.ndarray | None  # from neuron p to q of one output population
    vth: int
    du: int
    dv: int
    scale: float  # integers for one unit of the policy's voltage

    def tensors(self, k: int) -> dict[str, np.ndarray]:
        """The file's tensors by name; weights are stored halved, as their lowest bit is 0."""
        named = {"weight": self.weight_IN, "bias": self.bias_N, "lateral": self.lateral_APP}
        halves = {n: (w // 2).astype(np.int8) for n, w in named.items() if w is not None}
        numbers = {n: np.array([getattr(self, n)], np.int32) for n in ("vth", "du", "dv")}
        return {f"{k}.{name}": array for name, array in (halves | numbers).items()}


def check_policy(policy: Policy) -> None:
    """Raise BadRequest if the policy needs more than one chip, or larger integers for weights."""
    actor = policy.actor
    assert isinstance(actor, SpikingActor)
    cores_of(actor)
    quantised(actor)


def cores_of(actor: SpikingActor) -> int:
    lateral = actor.decoder.config.pop_size if isinstance(actor.decoder, ILCDecoder) else 0
    sizes = [actor.encoder.outputs, *(layer.bias_N.numel() for layer in actor.layers)]
    return cores(sizes, lateral)


def cores(sizes: list[int], lateral: int = 0) -> int:
    """Number of cores that encoder and layers need; BadRequest if the chip is too small.

    `lateral`: further inputs of the last layer. The encoder's neurons only relay the spikes that
    the host computed. A core's outgoing axons limit how many of its neurons can reach all cores of
    the next layer.
    """
    used, receivers = 0, 1
    for k in reversed(range(len(sizes))):
        inputs = 1
        if k > 0:
            inputs = sizes[k - 1] + 1 + (lateral if k == len(sizes) - 1 else 0)
        if inputs > CORE_INPUTS:
            what = f"layer {k} has {inputs} inputs, its bias's among them; a core has {CORE_INPUTS}"
            raise too_small(what)
        neurons = min(CORE_NEURONS, CORE_SYNAPSES // inputs, CORE_OUTPUTS // receivers)
        receivers = -(-sizes[k] // max(neurons, 1))
        used += receivers
        if used > CORES:
            raise too_small(f"its layers of {sizes} neurons take more than {CORES} cores")
    return used


def too_small(what: str) -> BadRequest:
    return BadRequest("format", "loihi", f"the chip is too small: {what}")


def quantised(actor: SpikingActor) -> list[Layer]:
    layers = []
    for k, (layer, neuron) in enumerate(zip(actor.layers, actor.neurons, strict=True)):
        weight, bias = exact(layer.weight_IN), exact(layer.bias_N)
        lateral = None
        if k == len(actor.neurons) - 1 and isinstance(actor.decoder, ILCDecoder):
            lateral = exact(actor.decoder.lateral_APP)
            bias = bias + exact(actor.decoder.lateral_bias_N)
        every = [weight, bias] if lateral is None else [weight, bias, lateral]
        largest = max(float(np.abs(w).max()) for w in every)
        threshold = neuron.config.threshold
        # The scale is chosen such that the scaled threshold is an integer and needs no rounding.
        vth = LARGEST_THRESHOLD
        if largest > 0.0:
            vth = int(min(threshold * LARGEST_WEIGHT / largest, LARGEST_THRESHOLD))
        if vth < 1:
            remedy = f"layer {k + 1} has weights of {largest / threshold:.3g} thresholds, of which"
            raise BadRequest("format", "loihi", f"{remedy} its integers hold {LARGEST_WEIGHT}")
        scale = vth / threshold
        integers = [2 * np.round(scale * w / 2).astype(np.int64) for w in every]
        du, dv = decays(neuron)
        side = integers[2] if lateral is not None else None
        layers.append(Layer(integers[0], integers[1], side, vth, du, dv, scale))
    return layers


def exact(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().double().numpy()


def decays(neuron: Neuron) -> tuple[int, int]:
    """du and dv for the decays nearest to those of the neuron."""
    if isinstance(neuron, PLIF):
        voltage, current = float(neuron.decay_logit.detach().double().sigmoid()), 0.0
    else:
        assert isinstance(neuron, CubaLIF)
        voltage, current = neuron.config.voltage_decay, neuron.current_decay
    du = UNITY - 1 - min(round(UNITY * current), UNITY - 1)
    return du, UNITY - max(round(UNITY * voltage), 1)


def write(policy: Policy, path: Path) -> None:
    assert isinstance(policy.actor, SpikingActor)
    tensors = {"spike_steps": np.array([policy.actor.spike_steps], np.int32)}
    for k, layer in enumerate(quantised(policy.actor)):
        tensors |= layer.tensors(k)
    path.write_bytes(save(tensors))


def facts(policy: Policy) -> dict[str, Any]:
    """Further keys of the contract."""
    actor = policy.actor
    assert isinstance(actor, SpikingActor)
    return {
        "chip": {
            "equation": EQUATION,
            "timing": TIMING,
            "file": "safetensors; layer k has k.weight (I, N), k.bias (N), k.lateral (A, P, P), of"
            " which the chip's are twice, and k.vth, k.du, k.dv",
            "scales": [layer.scale for layer in quantised(actor)],
            "chip_steps": actor.spike_steps + len(actor.layers),
            "cores": cores_of(actor),
        }
    }


@torch.no_grad()
def emulated(policy: Policy, obs_BO: np.ndarray) -> proof.Recorded:
    """The policy's spikes and actions with these integers, and its own encoder and decoder.

    Observations for which rounding decides a spike of the encoder are set aside.
    """
    actor = policy.actor
    assert isinstance(actor, SpikingActor)
    x = policy.norm.normalize(torch.from_numpy(obs_BO))
    clear = ~proof.encoder_near(actor.encoder, x, actor.spike_steps)
    below_TBN = actor.encoder(x[clear], actor.spike_steps, None).double().numpy()
    spikes = [below_TBN]
    for layer in quantised(actor):
        spikes.append(scan(layer, spikes[-1]))
    act_BA = proof.decoded(policy, torch.from_numpy(spikes[-1]))
    certain = clear.numpy()
    fired = [layer.astype(bool) for layer in spikes]
    return proof.Recorded(obs_BO[certain], fired, act_BA, int((~certain).sum()))


def scan(layer: Layer, below_TBI: np.ndarray) -> np.ndarray:
    """One layer's spikes (T, B, N), from rest."""
    drive_TBN = 64.0 * (below_TBI @ layer.weight_IN.astype(np.float64) + layer.bias_N)
    keep_u, keep_v = (UNITY - layer.du - 1) / UNITY, (UNITY - layer.dv) / UNITY
    u = v = fired = np.zeros(drive_TBN.shape[1:])
    spikes = []
    for drive in drive_TBN:
        if layer.lateral_APP is not None:
            fired_BAP = fired.reshape(len(fired), *layer.lateral_APP.shape[:2])
            side_BAP = np.einsum("bap,apq->baq", fired_BAP, layer.lateral_APP)
            drive = drive + 64.0 * side_BAP.reshape(fired.shape)
        u = np.trunc(u * keep_u) + drive
        u = u - 2.0 * HALF_RANGE * np.ceil((u - HALF_RANGE) / (2.0 * HALF_RANGE))
        v = np.clip(np.trunc(v * keep_v) + u, 1.0 - HALF_RANGE, HALF_RANGE - 1.0)
        fired = (v > 64.0 * layer.vth).astype(np.float64)
        v = v * (1.0 - fired)
        spikes.append(fired)
    return np.stack(spikes)
