"""Operations of an update, by hand and by PyTorch's own counter; the libraries' rates."""

from __future__ import annotations

import pytest
import torch
from builders import popsan, td3_config
from torch.utils.flop_counter import FlopCounterMode

from spikerl.algos.td3 import TD3
from spikerl.commands.bench import roofline
from spikerl.commands.bench.roofline import flops_per_row, product_gflops
from spikerl.commands.bench.table import roofline_lines
from spikerl.models.actor import MLPActor
from spikerl.models.actor_config import MLPConfig
from spikerl.models.critic import Critics
from spikerl.types import Batch


def test_by_hand() -> None:
    """Critics with 3 inputs (one is the action) and 2 hidden units; a spiking actor of 20-3-10
    neurons over 2 spike steps.
    """
    critic = Critics(2, 1, [2])
    one, back = 2 * (3 * 2 + 2), 2 * 2
    critics = 2 * one + 2 * (2 * one + back)
    dense = MLPActor(2, 1, MLPConfig(name="mlp", hidden_sizes=[3], lr=1e-3))
    acting, inputs = 2 * (2 * 3 + 3), 2 * 3
    expected = critics + acting + (2 * one + 2 * acting + inputs) / 2
    assert flops_per_row(dense, critic, 2) == expected
    spiking = popsan(2, 1, [3], spike_steps=2)
    acting, inputs = 2 * 2 * (20 * 3 + 3 * 10), 2 * 2 * 3 * 10 + 2 * 20 * 3
    expected = critics + acting + (2 * one + 2 * acting + inputs) / 2
    assert flops_per_row(spiking, critic, 2) == expected


def test_as_pytorch_counts() -> None:
    """Within 3 %: PyTorch does not count the critics' last layer, which is no matrix product."""
    actor = MLPActor(17, 6, MLPConfig(name="mlp", hidden_sizes=[64, 64], lr=1e-3))
    critic = Critics(17, 6, [64, 64])
    generator = torch.Generator().manual_seed(0)
    td3 = TD3(actor, critic, td3_config(), actor_lr=1e-3, generator=generator)
    rows = torch.randn(2 * 32, 42)
    obs, act, next_obs = rows[:, :17], rows[:, 17:23], rows[:, 23:40]
    batch = Batch(obs, act, rows[:, 40], next_obs, rows[:, 41] > 9, rows[:, 41])
    with FlopCounterMode(display=False) as counter:
        td3.run_updates(batch, 2)
    counted = counter.get_total_flops() / 64
    assert counted == pytest.approx(flops_per_row(actor, critic, 2), rel=0.03)


def test_rates_of_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """512^3 multiplications and as many additions, in 2 ms by PyTorch and in 1 ms by oneDNN."""
    seconds = iter([2e-3, 1e-3])
    monkeypatch.setattr(roofline, "_least_s", lambda call, device: (call(), next(seconds))[1])
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    rates = product_gflops(torch.device("cpu"))
    assert rates == pytest.approx({"PyTorch": 134.217728, "oneDNN": 268.435456})
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    seconds = iter([2e-3])
    assert product_gflops(torch.device("cpu")).keys() == {"PyTorch"}


def test_the_least_time_is_that_of_the_faster_library() -> None:
    lines = roofline_lines(
        {
            "product_gflops": {"PyTorch": 100.0, "oneDNN": 250.0},
            "copy_gb_s": 12.345,
            "update_gflop": {100: 0.5},
        }
    )
    assert lines == [
        "dense float32 products, GFLOP/s: PyTorch 100, oneDNN 250",
        "copies in memory, GB/s: 12.3",
        "an update of dense products, batch 100: 0.5 GFLOP, at least 2 ms",
    ]
