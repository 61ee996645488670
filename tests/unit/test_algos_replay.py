"""The replay's memory grows with its rows; a size that does not fit is refused in one line."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from shell import SHORT, refusal, spikerl

from spikerl import load_policy
from spikerl.algos.replay import Replay
from spikerl.config import memory
from spikerl.runs.checkpoint import verified

h5py = import_module("h5py")


def add(replay: Replay, first: int, count: int) -> None:
    """Add `count` rows whose reward is their number, from `first` on."""
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
    """The size counts only as many rows as the run has steps; no run folder is made."""
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


def filled(obs_dim: int, capacity: int, *, obs_bytes: bool) -> Replay:
    """Rows of two environments whose episodes end at random; bytes include those of a NaN."""
    rng = np.random.default_rng(0)
    replay = Replay(capacity, obs_dim, 2, width=2, obs_bytes=obs_bytes)
    obs = rng.integers(0, 256, (2, obs_dim)).astype(np.float64)
    for t in range(25):
        following = rng.integers(0, 256, (2, obs_dim)).astype(np.float64)
        following[0, :4] = [1, 0, 128, 127]  # a signalling NaN, if read as a float32
        last = rng.random(2) < 0.2
        replay.add(
            obs, rng.random((2, 2)), rng.random(2), following, last & (t % 2 == 0), last, 0.9
        )
        obs = np.where(last[:, None], rng.integers(0, 256, (2, obs_dim)), following)
    return replay


@pytest.mark.parametrize("obs_dim", [4, 7, 128])
def test_bytes_are_the_same_numbers_in_a_quarter_of_the_room(obs_dim: int) -> None:
    packed, plain = (filled(obs_dim, 30, obs_bytes=kind) for kind in (True, False))
    columns = {4: 1, 7: 2, 128: 32}[obs_dim]
    assert packed.rows.shape[1] == 2 * columns + 2 + 4
    assert plain.rows.shape[1] == 2 * obs_dim + 2 + 4
    drawn = [
        replay.sample(64, torch.Generator().manual_seed(1), lambda obs: obs / 255.0, n_step)
        for n_step in (1, 3)
        for replay in (packed, plain)
    ]
    for packed_batch, plain_batch in (drawn[:2], drawn[2:]):
        assert all(map(torch.equal, packed_batch, plain_batch))
    assert (drawn[2].discount != drawn[0].discount).any()
    every = [filled(obs_dim, 50, obs_bytes=kind) for kind in (True, False)]
    seen = [r.contexts(9, 3, torch.Generator().manual_seed(1), torch.neg) for r in every]
    assert all(map(torch.equal, *seen))
    assert packed.sound()
    packed.rows[3, packed.row.rew_column] = torch.nan
    assert not packed.sound()


def test_a_run_on_bytes_is_the_run_on_their_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Policies are the same to the bit, a resumed run's too, after the replay has wrapped."""
    monkeypatch.chdir(tmp_path)
    own = [word for word in SHORT if "critic" not in word and not word.startswith("env")]
    own += [
        "env=MinAtar/Breakout",
        "env.max_episode_steps=30",
        "algo=dqn",
        "actor=mlp",
        "logger=[]",
    ]
    own += ["algo.replay_capacity=150", "actor.hidden_sizes=[8]"]
    floats = "env.wrappers=[{name: DtypeObservation, dtype: float32}]"
    for more in (["run_dir=a"], ["run_dir=b", floats], ["run_dir=c", "total_steps=150"]):
        said = spikerl("train", *own, *more)
        assert said.status == 0, said.err
    total = next(word for word in own if word.startswith("total_steps"))
    assert spikerl("train", "resume=c", total).status == 0
    policies = [Path(run, "policy.safetensors").read_bytes() for run in "abc"]
    assert policies[0] == policies[1] == policies[2]
    size = {run: sum(p.stat().st_size for p in Path(run).glob("replay/*/*")) for run in "ab"}
    assert size["a"] * (2 * 400 + 3 + 4) == size["b"] * (2 * 100 + 3 + 4)
    columns = [json.loads(Path(run, "policy.json").read_text()).get("obs_bytes") for run in "ab"]
    assert columns == [True, None]
    odd = Path("c/policy.json")
    odd.write_text(odd.read_text().replace('"obs_bytes": true', '"obs_bytes": 1'))
    assert "obs_bytes" in str(refusal(load_policy, "c"))
    for kind in ("policy=replay", "steps=40"):
        played = []
        for run, dtype in (("a", "uint8"), ("b", "float64")):
            folder = Path(f"{run}-{kind}")
            said = spikerl("collect", f"run={run}", f"dataset='{folder}'", kind)
            assert said.status == 0, said.err
            with h5py.File(folder / "data/main_data.hdf5") as file:
                played.append({name: file[name]["observations"][()] for name in file})
            assert {str(obs.dtype) for obs in played[-1].values()} == {dtype}
            space = json.loads((folder / "data/metadata.json").read_text())["observation_space"]
            assert json.loads(space)["dtype"] == dtype
        assert played[0].keys() == played[1].keys()
        assert all((played[0][name] == played[1][name]).all() for name in played[0])
    checkpoint = verified(Path("a").absolute(), print)
    held = Replay(150, 400, 3, obs_bytes=True)
    checkpoint.fill_replay(0, 1, held)
    with pytest.raises(ValueError, match="other observations or actions"):
        checkpoint.fill_replay(0, 1, Replay(150, 400, 3))
    before = Replay(150, 400, 3, obs_bytes=True)  # b stored float32: its rows are packed into bytes
    verified(Path("b").absolute(), print).fill_replay(0, 1, before)
    assert held.added == before.added
    assert held.rows.view(torch.int32).equal(before.rows.view(torch.int32))
    with pytest.raises(ValueError, match="other observations or actions"):
        checkpoint.fill_replay(0, 1, Replay(150, 400, 4, obs_bytes=True))


STEP = np.array([1.0, 0.0], np.float32)  # from one observation to the next
Step = tuple[list[float], list[bool], list[bool]]


def stored(width: int, capacity: int, steps: list[Step]) -> Replay:
    """A replay with these rewards, `terminated` and `last` flags of each step; the discount is 0.5.

    Observations are [step, environment]; a row after a reset does not follow the one before.
    """
    replay = Replay(capacity, 2, 1, width=width)
    for t, (rew, terminated, last) in enumerate(steps):
        obs = np.array([[t, n] for n in range(width)], np.float32)
        flags = np.array(terminated), np.array(last)
        replay.add(obs, np.zeros((width, 1)), np.array(rew), obs + STEP, *flags, discount=0.5)
    return replay


def over(replay: Replay, place: int, n_step: int) -> tuple[float, float, float, bool]:
    """The n-step row at `place`: reward, discount, step number of the successor, terminated."""
    (row,) = replay._over(torch.tensor([place]), n_step)
    return float(row[5]), float(row[8]), float(row[2]), bool(row[6])


NO = [False, False]


def test_rows_of_several_steps_by_hand() -> None:
    """Rows of two environments alternate; the second one's first episode is truncated at step 1."""
    steps = [
        ([1.0, 10.0], NO, NO),
        ([2.0, 20.0], NO, [False, True]),
        ([4.0, 40.0], [True, False], [True, False]),
        ([8.0, 80.0], NO, NO),
    ]
    replay = stored(2, 8, steps)
    assert over(replay, 0, 1) == (1.0, 0.5, 1.0, False)
    assert over(replay, 0, 2) == (1.0 + 0.5 * 2.0, 0.25, 2.0, False)
    assert over(replay, 0, 3) == (1.0 + 0.5 * 2.0 + 0.25 * 4.0, 0.125, 3.0, True)
    assert over(replay, 0, 9) == over(replay, 0, 3)  # nothing beyond the end
    assert over(replay, 1, 3) == (10.0 + 0.5 * 20.0, 0.25, 2.0, False)  # truncated: not terminated
    assert over(replay, 5, 3) == (40.0 + 0.5 * 80.0, 0.25, 4.0, False)  # the newest is the last


def test_rows_of_several_steps_where_the_ring_wraps() -> None:
    replay = stored(1, 4, [([float(2**t)], [False], [False]) for t in range(6)])
    # Places 0 to 3 hold steps 4, 5, 2, 3.
    assert over(replay, 2, 3) == (4.0 + 0.5 * 8.0 + 0.25 * 16.0, 0.125, 5.0, False)
    assert over(replay, 1, 3) == (32.0, 0.5, 6.0, False)


def test_rows_of_several_steps_end_where_environments_were_reset_amid_an_episode() -> None:
    replay = stored(1, 8, [([1.0], [False], [False])] * 2)
    reset = np.array([[7.0, 0.0]], np.float32)
    flags = np.zeros(1, bool), np.zeros(1, bool)
    replay.add(reset, np.zeros((1, 1)), np.ones(1), reset + STEP, *flags, discount=0.5)
    assert over(replay, 0, 5) == (1.5, 0.25, 2.0, False)
    assert over(replay, 2, 5) == (1.0, 0.5, 8.0, False)


def sequences(width: int = 1) -> Replay:
    """Two episodes of 3 and 2 steps whose returns to go, in the rewards' place, are 10, 11, 12 and
    50, 51.
    """
    replay = Replay(1 << 40, 2, 1, width=width)
    for first, length in ((10, 3), (50, 2)):
        numbers = np.arange(first, first + length, dtype=np.float32)
        obs = np.stack([numbers, -numbers], 1)
        last = np.arange(length) == length - 1
        replay.add(obs, numbers[:, None], numbers, obs, last, last, discount=np.arange(length))
    return replay


def test_contexts_by_hand() -> None:
    """Contexts stop at the episode's end, with padding in front; every first step is drawn."""
    replay = sequences()
    found = replay.contexts(200, 3, torch.Generator().manual_seed(0), lambda obs: obs + 1.0)
    expected = {
        (10.0, 11.0, 12.0): (True, True, True),
        (0.0, 11.0, 12.0): (False, True, True),
        (0.0, 0.0, 12.0): (False, False, True),
        (0.0, 50.0, 51.0): (False, True, True),
        (0.0, 0.0, 51.0): (False, False, True),
    }
    seen = {tuple(row) for row in found.togo.tolist()}
    assert seen == expected.keys()
    for i, row in enumerate(found.togo.tolist()):
        there = found.there[i]
        assert tuple(there.tolist()) == expected[tuple(row)]
        assert torch.equal(found.act[i, :, 0], found.togo[i])
        assert torch.equal(found.obs[i, :, 0], torch.where(there, found.togo[i] + 1.0, 0.0))
        start = 50.0 if max(row) > 20 else 10.0
        assert torch.equal(found.time[i], torch.where(there, found.togo[i] - start, 0.0).long())
    assert found.time.dtype == torch.int64


def test_contexts_of_several_environments() -> None:
    """Rows that were added one environment after the other are interleaved into steps of both."""
    replay = Replay(1 << 40, 2, 1, width=2)
    for first in (10, 50):
        add_ended(replay, first, 3)
    assert rewards(replay, 0, 6) == [10, 11, 12, 50, 51, 52]
    replay.interleave()
    assert rewards(replay, 0, 6) == [10, 50, 11, 51, 12, 52]
    found = replay.contexts(100, 2, torch.Generator().manual_seed(0), lambda obs: obs)
    assert {tuple(row) for row in found.togo.tolist()} == {
        (10.0, 11.0), (11.0, 12.0), (0.0, 12.0), (50.0, 51.0), (51.0, 52.0), (0.0, 52.0),
    }  # fmt: skip


def add_ended(replay: Replay, first: int, count: int) -> None:
    """Add rows of one episode, without an end, after those of the replay."""
    numbers = np.arange(first, first + count, dtype=np.float32)
    obs, none = np.stack([numbers, -numbers], 1), np.zeros(count, bool)
    replay.add(obs, numbers[:, None], numbers, obs, none, none, discount=np.arange(count))
