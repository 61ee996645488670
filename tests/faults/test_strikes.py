"""Three of the kills that scripts/kill_matrix tries."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import train
from striking import Strike
from test_lost_workers import TWO

SHORTER = [*TWO, "total_steps=200"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("whole") / "home"
    run = train(home, *SHORTER)
    assert run.wait() == 0, run.said()
    return home / "run"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strike", "restarts"),
    [
        (Strike("1", "collective", 101, behind=False), 1),
        (Strike("0", "checkpoint", 2, behind=True), 0),
        (Strike("parent", "evaluation", 1, behind=False), 1),
    ],
)
def test_a_kill_amid(strike: Strike, restarts: int, whole: Path, tmp_path: Path) -> None:
    strike.check(tmp_path / "home", whole, restarts, *SHORTER)
