"""The least time of an update whose products are all dense, at the rate of the fastest library."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from spikerl.models.actor import MLPActor, SpikingActor
from spikerl.models.critic import Critics


@dataclass(kw_only=True)
class Roofline:
    product_gflops: dict[str, float]  # of large float32 products, by library
    copy_gb_s: float  # of 64 MB, bytes read and written
    update_gflop: dict[int, float]  # dense arithmetic of an update, by batch


def roofline(
    actor: SpikingActor | MLPActor,
    critic: Critics,
    policy_delay: int,
    batches: list[int],
    device: torch.device,
) -> Roofline:
    source = torch.zeros(16 << 20, device=device)
    target = torch.zeros_like(source)
    copy = _least_s(lambda: target.copy_(source), device)
    return Roofline(
        product_gflops=product_gflops(device),
        copy_gb_s=2 * source.nbytes / copy / 1e9,
        update_gflop={b: b * flops_per_row(actor, critic, policy_delay) / 1e9 for b in batches},
    )


def product_gflops(device: torch.device) -> dict[str, float]:
    """The rates of PyTorch's own float32 products and, on a CPU, of oneDNN's.

    PyTorch's are MKL's, which on AMD's processors run at half the rate of oneDNN's or less.
    """
    width = 512 if device.type == "cpu" else 4096  # enough to keep the device busy
    left, right = torch.randn(2, width, width, device=device).unbind()
    products: dict[str, Callable[[], object]] = {"PyTorch": lambda: torch.mm(left, right)}
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        blocked, weight = left.to_mkldnn(), right.to_mkldnn()
        products["oneDNN"] = lambda: nn.functional.linear(blocked, weight)
    with torch.no_grad():
        return {
            library: 2 * width**3 / _least_s(product, device) / 1e9
            for library, product in products.items()
        }


def flops_per_row(actor: SpikingActor | MLPActor, critic: Critics, policy_delay: int) -> float:
    """Multiplications and additions of the products of one TD3 update, for each row of its batch.

    A backward pass costs as much as the forward pass for the gradients of inputs, and as much again
    for those of weights. The first layer's inputs need no gradient, except the critic's actions.
    """
    steps = actor.spike_steps if isinstance(actor, SpikingActor) else 1
    layers = [layer.weight_IN.shape for layer in actor.layers]
    widths = [critic.weights_CIN[0].shape[1], *(w.shape[2] for w in critic.weights_CIN)]
    actor_forward = steps * sum(2.0 * i * n for i, n in layers)
    critic_layers = [2.0 * i * n for i, n in pairwise(widths)]
    one_critic, its_inputs = sum(critic_layers), sum(critic_layers[1:])
    critic_step = 2 * one_critic + 2 * (2 * one_critic + its_inputs)  # target; loss and gradients
    # The inputs of a spiking actor's first layer need one too, one product for all steps.
    first = 2.0 * layers[0][0] * layers[0][1]
    to_inputs = actor_forward - steps * first
    to_inputs += first if isinstance(actor, SpikingActor) else 0.0
    actor_step = 2 * one_critic + 2 * actor_forward + to_inputs
    return critic_step + actor_forward + actor_step / policy_delay


def _least_s(call: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(12):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[2:])
