"""Both forms of spike-driven attention, by hand."""

from __future__ import annotations

import torch
from builders import fill
from torch import Tensor

from spikerl.snn.attention import PSSA, TSSA


def spikes(rows: list[list[list[int]]]) -> Tensor:
    """Lists (T, K, D) as the tensor of one context, (T, 1, K, D)."""
    return torch.tensor(rows, dtype=torch.float32).unsqueeze(1)


ALL = torch.ones(1, 3, dtype=torch.bool)
K = spikes([[[1, 0], [1, 1], [1, 1]]])
V = spikes([[[1, 1], [1, 1], [0, 1]]])  # products k v: (1, 0), (1, 1), (0, 1)
Q = spikes([[[1, 1], [1, 1], [0, 1]]])


def test_pssa_by_hand() -> None:
    """Place 2 does not see place 0, outside its window; the entries 99 must have no effect."""
    made = PSSA(3, 1, window=2)
    assert made.position_KK.tolist() == [[1.0] * 3] * 3
    fill(made, {"position_KK": [[1.0, 99.0, 99.0], [2.0, 3.0, 99.0], [99.0, 4.0, 5.0]]})
    # 1 (1, 0);  2 (1, 0) + 3 (1, 1);  4 (1, 1) + 5 (0, 1), masked by q = (0, 1)
    assert made(Q, K, V, ALL).tolist() == [[[[1.0, 0.0], [5.0, 3.0], [0.0, 9.0]]]]
    padded = torch.tensor([[False, True, True]])
    assert made(Q, K, V, padded).tolist() == [[[[0.0, 0.0], [3.0, 3.0], [0.0, 9.0]]]]


def test_pssa_keeps_spike_steps_apart() -> None:
    made = PSSA(3, 1, window=3)
    two = made(torch.cat([Q, 0 * Q]), torch.cat([K, K]), torch.cat([V, V]), ALL)
    assert torch.equal(two[:1], made(Q, K, V, ALL))
    assert not two[1].any()


def test_tssa_by_hand() -> None:
    """Two spike steps, two positions, one entry: q_0 = (1, 0), q_1 = (1, 1) over spike steps."""
    q, k, v = spikes([[[1], [1]], [[0], [1]]]), spikes([[[1], [0]], [[1], [1]]]), spikes(
        [[[1], [1]], [[0], [1]]]
    )  # fmt: skip
    both = torch.ones(1, 2, dtype=torch.bool)
    # q_0 k_0 = 1; q_1 k_0 = 2, q_1 k_1 = 1;  v_0 = (1, 0), v_1 = (1, 1)
    # x_0 = 1 (1, 0);  x_1 = 2 (1, 0) + 1 (1, 1)
    made = TSSA(2, 1, window=1)  # TSSA ignores the window
    assert made(q, k, v, both).tolist() == [[[[1.0], [3.0]]], [[[0.0], [1.0]]]]
    padded = torch.tensor([[False, True]])
    assert made(q, k, v, padded).tolist() == [[[[0.0], [1.0]]], [[[0.0], [1.0]]]]


def test_a_head_of_tssa_sees_its_own_entries() -> None:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.rand(2, 4, 3, 6, generator=draw).round() for _ in range(3))
    there = torch.ones(4, 3, dtype=torch.bool)
    halves = [TSSA(3, 1, 1)(q[..., s], k[..., s], v[..., s], there) for s in
              (slice(0, 3), slice(3, 6))]  # fmt: skip
    assert torch.equal(TSSA(3, 2, 1)(q, k, v, there), torch.cat(halves, -1))
    assert not torch.equal(TSSA(3, 1, 1)(q, k, v, there), torch.cat(halves, -1))
