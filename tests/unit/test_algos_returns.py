"""Advantages by hand.

Shape legend   T steps, N environments.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from spikerl.algos.returns import gae, returns_to_go

# In the first environment one episode terminates, the next is truncated, the third is unfinished;
# the second environment's never ends. After a termination nothing counts: the 99 must be ignored.
REW_TN = torch.tensor([[1.0, 1.0], [4.0, 1.0], [3.0, 1.0], [4.0, 1.0], [5.0, 1.0]])
VALUE_TN = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [4.0, 0.0], [5.0, 0.0]])
NEXT_TN = torch.tensor([[2.0, 0.0], [99.0, 0.0], [4.0, 0.0], [10.0, 0.0], [6.0, 0.0]])
TERMINATED_TN = torch.zeros(5, 2, dtype=torch.bool)
LAST_TN = torch.zeros(5, 2, dtype=torch.bool)
TERMINATED_TN[1, 0] = LAST_TN[1, 0] = LAST_TN[3, 0] = True


def advantages(discount: float, trace: float) -> Tensor:
    return gae(REW_TN, VALUE_TN, NEXT_TN, TERMINATED_TN, LAST_TN, gamma=discount, gae_lambda=trace)


def test_a_termination_a_truncation_and_an_unfinished_end() -> None:
    """TD errors 1 + 2/2 - 1, 4 - 2, 3 + 4/2 - 3, 4 + 10/2 - 4, 5 + 6/2 - 5; the factor is 1/4."""
    ended, endless = advantages(0.5, 0.5).T.tolist()
    assert ended == [1.0 + 0.25 * 2.0, 2.0, 2.0 + 0.25 * 5.0, 5.0, 3.0]
    assert endless == [1.33203125, 1.328125, 1.3125, 1.25, 1.0]  # 1 + x / 4


def test_discounts_have_the_precision_of_the_rows() -> None:
    rew, value, following = (rows.double() for rows in (REW_TN, VALUE_TN, NEXT_TN))
    found = gae(rew, value, following, TERMINATED_TN, LAST_TN, gamma=0.99, gae_lambda=0.0)
    assert float(found[0, 0]) == 1.0 + 0.99 * 2.0 - 1.0


@pytest.mark.parametrize(
    ("trace", "expected"),
    [
        (0.0, [1.0, 2.0, 2.0, 5.0, 3.0]),  # the TD errors themselves
        # Discounted rewards plus the value of the last observation, minus the value:
        # 1 + 4/2 - 1, 4 - 2, 3 + 4/2 + 10/4 - 3, 4 + 10/2 - 4, 5 + 6/2 - 5.
        (1.0, [2.0, 2.0, 4.5, 5.0, 3.0]),
    ],
)
def test_the_ends_of_the_trace(trace: float, expected: list[float]) -> None:
    assert advantages(0.5, trace)[:, 0].tolist() == expected


def test_returns_to_go_by_hand() -> None:
    """Returns are float64, although the rewards are float32."""
    rew = np.array([1.0, -2.0, 4.0, 0.5], np.float32)
    assert returns_to_go(rew).tolist() == [3.5, 2.5, 4.5, 0.5]
    assert returns_to_go(np.full(3, 1e8, np.float32) + 8).dtype == np.float64
