"""How the rows of an environment are cut into episodes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from spikerl.runs.replayed import cut, episodes
from spikerl.types import Task


def rows(*steps: tuple[float, float, bool]) -> np.ndarray:
    """Rows with one observation entry, no action: obs next_obs rew terminated last discount."""
    return np.array([[obs, following, 0.0, 0.0, last, 1.0] for obs, following, last in steps])


def test_behind_ends_and_where_a_row_does_not_follow() -> None:
    """Cuts are after an end, also at the end of a file, and at a reset, but not between files."""
    files = [
        rows((1, 2, False), (2, 3, True), (7, 8, False)),
        rows((8, 9, False), (20, 21, False), (21, 22, True)),
        rows((22, 23, True)),  # starts by chance where the last episode ended
    ]
    found = [piece[:, 0].tolist() for piece in cut(files, 1)]
    assert found == [[1, 2], [7, 8], [20, 21], [22]]


def test_nothing_gives_nothing() -> None:
    assert list(cut([], 1)) == []


@pytest.mark.parametrize(("first", "whole"), [(0, True), (7, False)])
def test_the_oldest_lacks_its_beginning_where_that_was_overwritten(first: int, whole: bool) -> None:
    """The oldest is whole only if row 0 is held; the second is whole; the third has no end."""

    class Held:
        def steps_of(self, *which: Any) -> Any:
            return first, [rows((1, 2, False), (2, 3, True), (7, 8, True), (20, 21, False))]

    held: Any = Held()
    task = Task("x", (1,), (0,), np.empty(0), np.empty(0), 9)
    assert [complete for _, complete in episodes(held, task, 1)] == [whole, True, False]
