"""The replay's memory grows with what it holds; what it cannot have is one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from shell import SHORT, spikerl

from spikerl.algos.replay import Replay
from spikerl.config import memory


def add(replay: Replay, first: int, count: int) -> None:
    """Rows whose reward is their number."""
    numbers = np.arange(first, first + count, dtype=np.float32)
    obs = np.stack([numbers, -numbers], 1)
    flags = np.zeros(count, bool)
    replay.add(obs, numbers[:, None], numbers, obs + 0.5, flags, flags, discount=0.99)


def rewards(replay: Replay, start: int, stop: int) -> list[float]:
    return replay.between(start, stop)[:, 5].tolist()


def test_room_doubles_up_to_the_capacity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Replay, "FIRST", 4)
    replay = Replay(21, 2, 1)
    rooms = []
    for first in range(0, 40, 2):
        add(replay, first, 2)
        rooms.append(len(replay.rows))
        held = range(max(0, first + 2 - 21), first + 2)
        assert rewards(replay, held.start, held.stop) == list(held)
    assert rooms == [4, 4, 8, 8] + [16] * 4 + [21] * 12


def test_sampling_does_not_see_the_room(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    for first in (4, 1 << 14):
        monkeypatch.setattr(Replay, "FIRST", first)
        replay = Replay(1000, 2, 1)
        add(replay, 0, 3)
        add(replay, 3, 97)
        generator = torch.Generator().manual_seed(0)
        drawn.append(replay.sample(50, generator, lambda obs: obs).rew)
    assert torch.equal(*drawn)
    assert set(drawn[0].tolist()) <= set(range(100))


def test_a_capacity_that_is_never_used_costs_nothing() -> None:
    replay = Replay(1 << 60, 2, 1)
    add(replay, 0, 10)
    assert replay.rows.nbytes == 4 * (2 * 2 + 1 + 4) * (1 << 14)


def test_what_cannot_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Replay, "FIRST", 4)
    replay = Replay(1 << 60, 2, 1)
    add(replay, 0, 4)
    with pytest.raises(MemoryError, match=r"^no .* GiB for \d+ transitions of algo\.replay_cap"):
        replay.reserve(1 << 58)
    assert rewards(replay, 0, 4) == [0.0, 1.0, 2.0, 3.0]


def test_a_large_capacity_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = spikerl("train", *SHORT, "algo.replay_capacity=10000000000000", "run_dir=r")
    assert said.status == 0, said.err
    said = spikerl("train", "resume=r", "total_steps=450")
    assert said.status == 0, said.err


@pytest.mark.parametrize("limit", ["machine", "container", "ulimit"])
def test_what_will_not_fit_is_refused(
    limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the steps of the run, before anything is there."""
    monkeypatch.chdir(tmp_path)
    Path("groups").write_text("0::/a/b\n")
    monkeypatch.setattr(memory.memory, "__defaults__", (Path("groups"), tmp_path))
    Path("a").mkdir()
    Path("a/memory.max").write_text("max\n")
    bound = 8 << 20
    if limit == "machine":
        monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": bound}.get)
    elif limit == "container":
        Path("a/memory.max").write_text(f"{bound}\n")
    else:
        monkeypatch.setattr("resource.getrlimit", lambda kind: (bound, -1))
    args = [arg for arg in SHORT if not arg.startswith("total_steps")]
    large = ["total_steps=1000000", "algo.replay_capacity=10000000"]
    said = spikerl("train", *args, *large, "run_dir=r")
    assert said.line == (  # a million rows of 13 numbers, and some weights
        "algo.replay_capacity=10000000: the run needs 0.0485 GiB at the least, most of it for"
        " this; this machine has 0.00781"
    )
    assert not Path("r").exists()
