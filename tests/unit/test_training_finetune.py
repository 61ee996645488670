"""Fine-tuning by hand: one step of Adam, the grid, and pruned weights."""

from __future__ import annotations

import pytest
import torch
from builders import fill, popsan
from hand_worked import dense
from torch import Tensor

from spikerl.kernels import build as native
from spikerl.models.actor import connections
from spikerl.models.compression import Compression, bits_of, nonzero, prune, quantise
from spikerl.training.finetune import finetune


def test_a_step_by_hand() -> None:
    """Adam's first step is 0.003, the rate, against the gradient's sign, whatever its size.

    The actor gives tanh(0.5 * 0.5 + 0) for (1, 1): its first neuron has 0.5, its second is silent.
    The goal 0.9 is larger, so biases grow, while weights are rounded back to the grid of 0.5.
    """
    actor = dense()
    fill(actor, {"layers.0.weight_IN": [[0.5, -0.5], [0.0, -0.5]], "layers.0.bias_N": [0.0, 0.0]})
    fill(actor, {"layers.1.weight_IN": [[0.5], [0.5]], "layers.1.bias_N": [0.0]})
    names = list(connections(actor))
    done = Compression(
        prune=0.25, bits=dict.fromkeys(names, 4), scales=dict.fromkeys(names, 0.5), early_exit=None
    )
    kept = torch.ones(9)
    kept[2] = 0.0  # the first layer's weight from input 2 to neuron 1
    asked: list[int] = []

    def observe(number: int) -> Tensor:
        asked.append(number)
        return torch.ones(1, 2)

    def tuned() -> list[float]:
        def goal(obs_MO: Tensor) -> Tensor:
            return torch.full((1, 1), 0.9)

        return finetune(actor, observe, goal, 1, done, kept, torch.Generator())

    losses = tuned()
    assert losses == pytest.approx([(0.9 - 0.2449187) ** 2], rel=1e-5)
    assert actor.layers[0].weight_IN.tolist() == [[0.5, -0.5], [0.0, -0.5]]
    assert actor.layers[1].weight_IN.tolist() == [[0.5], [0.5]]
    assert actor.layers[0].bias_N.tolist() == pytest.approx([0.003, 0.0], rel=1e-4)
    assert actor.layers[1].bias_N.tolist() == pytest.approx([0.003], rel=1e-4)
    done.bits = {}
    fill(actor, {"layers.0.bias_N": [0.0, 0.0], "layers.1.bias_N": [0.0]})
    tuned()
    assert asked == [0, 0]
    moved = [0.503, -0.5, 0.0, -0.5]
    assert actor.layers[0].weight_IN.flatten().tolist() == pytest.approx(moved, rel=1e-5)
    assert actor.layers[1].weight_IN.flatten().tolist() == pytest.approx([0.503, 0.5], rel=1e-5)


@pytest.mark.parametrize("kernel", ["reference", "cpu"])
def test_numbers_move_below_the_grid(kernel: str) -> None:
    """Weights reach other points of the grid, although each step is smaller than its spacing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        actor, goal = popsan(3, 2, [8]), popsan(3, 2, [8]).requires_grad_(False)
    if kernel == "cpu":
        actor.kernel = f"cpu/{native.supported_paths()[0]}"
    asked: list[int] = []

    def observe(number: int) -> Tensor:
        asked.append(number)
        return torch.randn(64, 3, generator=torch.Generator().manual_seed(number))

    prune(actor, 0.5)
    kept = nonzero(actor)
    done = Compression(prune=0.5, bits=bits_of(actor, 4), scales={}, early_exit=None)
    done.scales = quantise(actor, done.bits)
    before = {name: w.clone() for name, w in connections(actor).items()}
    draw = torch.Generator().manual_seed(2)
    losses = finetune(actor, observe, goal, 201, done, kept, draw)
    assert asked == [0, 1, 2, 3]
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])
    for name, w in connections(actor).items():
        integers = w.double() / done.scales[name]
        torch.testing.assert_close(integers, integers.round(), rtol=0, atol=1e-5)
        assert integers.abs().max() < 7.5
        if name != "decoder.weight_AP":
            zero = before[name] == 0
            assert int((w == 0).sum()) >= w.numel() // 2
            assert (w != before[name])[~zero].any()
    assert all((p.flatten()[k == 0] == 0).all() for p, k in zip(
        actor.parameters(), kept.split([p.numel() for p in actor.parameters()]), strict=True
    ))  # fmt: skip


def test_the_rate_falls_evenly() -> None:
    """Two steps are 0.003 and half of it: the gradient changes by 2 %, Adam's step by less."""
    actor = dense()
    fill(actor, {"layers.0.weight_IN": [[0.5, -0.5], [0.0, -0.5]], "layers.0.bias_N": [0.0, 0.0]})
    fill(actor, {"layers.1.weight_IN": [[0.5], [0.5]], "layers.1.bias_N": [0.0]})
    done = Compression(prune=None, bits={}, scales={}, early_exit=None)

    def goal(obs_MO: Tensor) -> Tensor:
        return torch.full((len(obs_MO), 1), 0.9)

    finetune(actor, lambda n: torch.ones(1, 2), goal, 2, done, None, torch.Generator())
    assert actor.layers[1].bias_N.tolist() == pytest.approx([0.0045], rel=2e-3)
