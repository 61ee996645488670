"""What an update would take if every product were dense and ran as fast as products can here."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch

from spikerl.models.actor import MLPActor, SpikingActor
from spikerl.models.critic import Critics


@dataclass(kw_only=True)
class Roofline:
    product_gflops: float  # of float32 products, 512 x 512 x 512
    copy_gb_s: float  # read and written, 64 MB
    update_gflop: dict[int, float]  # dense arithmetic of an update, by batch


def roofline(
    actor: SpikingActor | MLPActor,
    critic: Critics,
    policy_delay: int,
    batches: list[int],
    device: torch.device,
) -> Roofline:
    left, right = torch.randn(2, 512, 512, device=device).unbind()
    source = torch.zeros(16 << 20, device=device)
    target = torch.zeros_like(source)
    product = _least_s(lambda: torch.mm(left, right), device)
    copy = _least_s(lambda: target.copy_(source), device)
    return Roofline(
        product_gflops=2 * 512**3 / product / 1e9,
        copy_gb_s=2 * source.nbytes / copy / 1e9,
        update_gflop={b: b * flops_per_row(actor, critic, policy_delay) / 1e9 for b in batches},
    )


def flops_per_row(actor: SpikingActor | MLPActor, critic: Critics, policy_delay: int) -> float:
    """Multiplications and additions of the products of one TD3 update, for each row of its batch.

    A pass back costs what the pass forward does for the inputs and once more for the weights; the
    first layer's inputs need none, but for the critic's actions.
    """
    steps = actor.spike_steps if isinstance(actor, SpikingActor) else 1
    layers = [layer.weight_IN.shape for layer in actor.layers]
    widths = [critic.weights_CIN[0].shape[1], *(w.shape[2] for w in critic.weights_CIN)]
    acting = steps * sum(2.0 * i * n for i, n in layers)
    values = [2.0 * i * n for i, n in pairwise(widths)]
    one, back = sum(values), sum(values[1:])
    critics = 2 * one + 2 * (2 * one + back)  # targets; forward, weights, inputs
    # A spiking layer's first inputs have a gradient too, which is one product for all steps.
    first = 2.0 * layers[0][0] * layers[0][1]
    inputs = acting - steps * first + (first if isinstance(actor, SpikingActor) else 0.0)
    ascent = 2 * one + 2 * acting + inputs
    return critics + acting + ascent / policy_delay


def _least_s(call: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(12):
        begun = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begun)
    return min(times[2:])
