"""Datasets: how they are read, and which files are refused before anything is used."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from builders import CARTPOLE, INVERTED_PENDULUM
from recorded import Fields, episode, task_for, write
from shell import refusal

from spikerl.envs.dataset import MAIN, METADATA, Dataset, Writer
from spikerl.errors import BadRequest
from spikerl.types import Task

h5py: Any = import_module("h5py")
MUCH = 1 << 30  # bytes


@pytest.fixture(scope="module")
def task() -> Task:
    return task_for(INVERTED_PENDULUM)


def reason(folder: Path, task: Task, most_bytes: int = MUCH) -> str:
    """The reason why the dataset is refused, when it is opened or checked."""
    error = refusal(lambda: Dataset.open(folder, task, most_bytes).check())
    assert error.args[:2] == ("dataset", folder)
    assert "\n" not in str(error)
    return str(error.args[2])


def test_what_is_read(task: Task, tmp_path: Path) -> None:
    episodes = [episode(3, 100.0), episode(5, 200.0, terminated=False)]
    found = Dataset.open(write(tmp_path / "d", episodes), task, MUCH)
    assert (found.lengths, found.transitions) == ((3, 5), 8)
    first, second = found.episodes()
    assert first.act.tolist() == [[-1.0], [0.0], [1.0]]  # scaled by the bounds -3 and 3
    assert second.act.tolist() == [[-1.0], [-0.5], [0.0], [0.5], [1.0]]
    steps = second.steps()
    assert steps.obs[:, 0].tolist() == [200.0, 204.0, 208.0, 212.0, 216.0]
    assert steps.next_obs[:, 0].tolist() == [204.0, 208.0, 212.0, 216.0, 220.0]
    assert steps.rew.tolist() == [200.0, 201.0, 202.0, 203.0, 204.0]
    assert not steps.terminated.any()
    assert steps.last.tolist() == [False] * 4 + [True]
    assert first.steps().terminated.tolist() == [False, False, True]


def test_an_episode_without_a_flag_ends_where_its_rows_do(task: Task, tmp_path: Path) -> None:
    fields = episode(3)
    fields["terminations"][-1] = False
    (one,) = Dataset.open(write(tmp_path / "d", [fields]), task, MUCH).episodes()
    assert one.steps().last.tolist() == [False, False, True]
    assert not one.steps().terminated.any()


def test_discrete_actions_are_read_one_hot(tmp_path: Path) -> None:
    numbered = task_for(CARTPOLE)
    fields = episode(3) | {"actions": np.array([1, 0, 1])}
    space = json.dumps({"type": "Discrete", "dtype": "int64", "start": 0, "n": 2})
    spec = json.dumps({"id": "CartPole-v1"})
    folder = write(tmp_path / "d", [fields], env_spec=spec, action_space=space)
    (one,) = Dataset.open(folder, numbered, MUCH).episodes()
    assert one.act.tolist() == [[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]
    beyond = fields | {"actions": np.array([1, 2, 1])}
    odd = write(tmp_path / "e", [beyond], env_spec=spec, action_space=space)
    assert reason(odd, numbered) == "/episode_0 has actions that are none of 2"


def test_bytes_are_bytes(task: Task, tmp_path: Path) -> None:
    """Observations of a task of bytes must be bytes, as the replay packs them."""
    pictures = replace(task, obs_bytes=True)
    whole = episode(3) | {"observations": np.arange(16.0).reshape(4, 4) * 17.0}
    as_bytes = whole | {"observations": whole["observations"].astype(np.uint8)}
    for name, fields in (("d", whole), ("u8", as_bytes)):
        (one,) = Dataset.open(write(tmp_path / name, [fields]), pictures, MUCH).episodes()
        assert one.obs.dtype == one.steps().next_obs.dtype == np.uint8
        assert one.obs.tolist() == whole["observations"].tolist()
    for value in (0.5, -1.0, 256.0):
        whole["observations"][1, 2] = value
        folder = write(tmp_path / f"d{value}", [whole])
        said = "/episode_0 has observations that are no whole numbers from 0 to 255"
        assert reason(folder, pictures) == said


def other(name: str, at: tuple[int, ...], value: float) -> Fields:
    fields = episode(3)
    fields[name][at] = value
    return fields


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        (other("rewards", (1,), np.nan), "has rewards that are NaN, infinite or beyond float32"),
        (other("observations", (3, 3), np.inf), "has observations that are NaN, infinite or"),
        (other("observations", (0, 0), 1e39), "has observations that are NaN, infinite or beyond"),
        (other("actions", (1, 0), 3.01), "has actions outside the bounds of InvertedPendulum-v5"),
        (other("actions", (1, 0), np.nan), "has actions outside the bounds of InvertedPendulum-v5"),
        (
            episode(3) | {"rewards": np.full(3, np.longdouble("1e400"))},
            "has rewards that are NaN, infinite or beyond float32",
        ),
        (other("terminations", (1,), True), "goes on after its end"),
        (other("truncations", (0,), True), "goes on after its end"),
        (episode(3) | {"actions": np.zeros((3, 2), np.float32)}, "has actions (3, 2); (3, 1) are"),
        (episode(3) | {"actions": np.zeros((4, 1), np.float32)}, "has actions (4, 1); (3, 1) are"),
        (episode(3) | {"observations": np.zeros((3, 4))}, "has observations (3, 4); (4, 4) are"),
        (episode(3) | {"observations": np.zeros((4, 5))}, "has observations (4, 5); (4, 4) are"),
        (episode(0), "has 0 rewards; 1 to 1000000 can be"),
        (episode(3) | {"rewards": np.array([b"x"] * 3)}, "has no rewards of numbers"),
        (episode(3) | {"terminations": np.zeros(3)}, "has no terminations of numbers"),
        (episode(3) | {"actions": np.zeros((3, 1), np.int64)}, "has no actions of numbers"),
    ],
)
def test_numbers_that_cannot_be(fields: Fields, line: str, task: Task, tmp_path: Path) -> None:
    folder = write(tmp_path / "d", [episode(2), fields])
    assert reason(folder, task).startswith(f"/episode_1 {line}")


def linked(link: Any) -> Callable[[Any], None]:
    def touch(file: Any) -> None:
        del file["episode_0/rewards"]
        file["episode_0/rewards"] = link

    return touch


def without(name: str) -> Callable[[Any], None]:
    return lambda file: file.__delitem__(name)


def elsewhere(file: Any) -> None:
    """Store the rewards as a link to another file of the machine."""
    del file["episode_0/rewards"]
    outside = [("/etc/passwd", 0, 24)]
    file["episode_0"].create_dataset("rewards", (3,), np.float64, external=outside)


def virtual(file: Any) -> None:
    layout = h5py.VirtualLayout((3,), np.float64)
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", (3,))
    del file["episode_0/rewards"]
    file["episode_0"].create_virtual_dataset("rewards", layout)


def claiming(steps: int) -> Callable[[Any], None]:
    """A change that makes a file of a few kB declare `steps` steps without any data."""

    def touch(file: Any) -> None:
        del file["episode_0"]
        shapes = {"observations": (steps + 1, 4), "actions": (steps, 1)}
        kinds = {"actions": np.float32, "terminations": bool, "truncations": bool}
        for name in ("observations", "actions", "rewards", "terminations", "truncations"):
            shape, kind = shapes.get(name, (steps,)), kinds.get(name, np.float64)
            chunk = (64,) if len(shape) == 1 else (64, shape[1])
            file.create_dataset(f"episode_0/{name}", shape, kind, chunks=chunk)

    return touch


def packed_by(*filters: int) -> Callable[[Any], None]:
    """A change that stores the rewards with these of HDF5's filters, in this order."""

    def touch(file: Any) -> None:
        del file["episode_0/rewards"]
        made = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        made.set_chunk((3,))
        for number in filters:
            made.set_filter(number, h5py.h5z.FLAG_OPTIONAL, (9,) if number == 1 else None)
        kind, space = h5py.h5t.NATIVE_DOUBLE, h5py.h5s.create_simple((3,))
        data = h5py.h5d.create(file["episode_0"].id, b"rewards", kind, space, made)
        h5py.Dataset(data)[...] = 0.0

    return touch


def chunked(file: Any) -> None:
    """Store three rewards in a chunk that takes 16 MiB when it is decompressed."""
    del file["episode_0/rewards"]
    settings = {"maxshape": (None,), "chunks": (1 << 21,), "compression": "gzip"}
    file["episode_0"].create_dataset("rewards", data=np.zeros(3), **settings)


@pytest.mark.parametrize(
    ("touch", "line"),
    [
        (
            linked(h5py.ExternalLink("/etc/passwd", "/x")),
            "episode_0 lacks rewards, or it is a link",
        ),
        (linked(h5py.SoftLink("/episode_1/rewards")), "episode_0 lacks rewards, or it is a link"),
        (without("episode_0/actions"), "episode_0 lacks actions, or it is a link"),
        (without("episode_1"), "it holds 1 episodes; metadata.json says 2"),
        (elsewhere, "/episode_0 has rewards that lie elsewhere, or in a code of others"),
        (virtual, "/episode_0 has rewards that lie elsewhere, or in a code of others"),
        (packed_by(1, 1), "/episode_0 has rewards that lie elsewhere, or in a code of others"),
        (packed_by(1, 2), "/episode_0 has rewards that lie elsewhere, or in a code of others"),
        (packed_by(32000), "/episode_0 has rewards that lie elsewhere, or in a code of others"),
        (claiming(2**60), "/episode_0 has 1152921504606846976 rewards; 1 to 1000000 can be"),
        (chunked, "/episode_0 has rewards that would take more memory than it has data"),
        (claiming(900), "/episode_0 has observations that would take more memory than it has data"),
    ],
)
def test_what_a_file_may_not_hold(
    touch: Callable[[Any], None], line: str, task: Task, tmp_path: Path
) -> None:
    folder = write(tmp_path / "d", [episode(3), episode(2)], touch)
    assert reason(folder, task).startswith(line)


def in_pieces(*pieces: bytes, mask: int = 0, **settings: Any) -> Callable[[Any], None]:
    """A change that stores twelve rewards in chunks of eight, with these bytes as the chunks."""

    def touch(file: Any) -> None:
        del file["episode_0/rewards"]
        made = file["episode_0"].create_dataset(
            "rewards", (12,), np.float64, chunks=(8,), **settings
        )
        for i, piece in enumerate(pieces):
            made.id.write_direct_chunk((8 * i,), piece, mask)

    return touch


def gzipped(count: int) -> bytes:
    return zlib.compress(np.arange(count, dtype=np.float64).tobytes())


PACKED: dict[str, Any] = {"compression": "gzip"}
TWICE: dict[str, Any] = {"compression": "gzip", "shuffle": True, "fletcher32": True}
PLAIN = bytes(64)


@pytest.mark.parametrize(
    "touch",
    [
        in_pieces(gzipped(8), gzipped(7), **PACKED),
        in_pieces(gzipped(9), gzipped(8), **PACKED),
        in_pieces(gzipped(8), zlib.compress(bytes(1 << 27)), **PACKED),
        in_pieces(gzipped(8)[:-9], gzipped(8), **PACKED),  # cut off
        in_pieces(PLAIN, PLAIN[:-8]),
        in_pieces(PLAIN, PLAIN[:-8], mask=1, **PACKED),
        in_pieces(PLAIN, PLAIN[:-1], shuffle=True),
        in_pieces(PLAIN, PLAIN, fletcher32=True),  # without the four bytes of a checksum
        in_pieces(PLAIN, PLAIN + bytes(8), mask=7, **TWICE),
    ],
)
def test_a_piece_of_another_size(touch: Callable[[Any], None], task: Task, tmp_path: Path) -> None:
    """HDF5 would read beyond the buffer of a short chunk, and decompress 128 MiB in place of 64
    bytes.
    """
    folder = write(tmp_path / "d", [episode(12)], touch)
    assert reason(folder, task) == "/episode_0/rewards has a piece that is not of 64 bytes"


def test_pieces_that_are_read(task: Task, tmp_path: Path) -> None:
    """Accepted chunks: those that no filter was applied to, and one that was never written."""
    values = np.arange(16.0).tobytes()
    cases = (
        (in_pieces(values[:64], values[64:], mask=7, **TWICE), list(range(12))),
        (in_pieces(gzipped(8), **PACKED), [*range(8), 0, 0, 0, 0]),
    )
    for i, (touch, rewards) in enumerate(cases):
        folder = write(tmp_path / f"d{i}", [episode(12)], touch)
        (one,) = Dataset.open(folder, task, MUCH).episodes()
        assert one.rew.tolist() == rewards


def test_packed_numbers_are_read(task: Task, tmp_path: Path) -> None:
    def packed(file: Any) -> None:
        values = file["episode_0/observations"][()]
        del file["episode_0/observations"]
        settings = {"compression": "gzip", "shuffle": True, "fletcher32": True}
        file["episode_0"].create_dataset("observations", data=values, **settings)

    folder = write(tmp_path / "d", [episode(300)], packed)
    (one,) = Dataset.open(folder, task, MUCH).episodes()
    assert one.obs[:, 0].tolist() == [4.0 * t for t in range(301)]


@pytest.mark.parametrize(
    ("metadata", "line"),
    [
        ({"env_spec": None}, "its metadata.json names no environment (env_spec)"),
        ({"env_spec": "{]"}, "Expecting"),
        (
            {"env_spec": json.dumps({"id": "Hopper-v5"})},
            "it was recorded on Hopper-v5, and this is InvertedPendulum-v5",
        ),
        (
            {"env_spec": json.dumps({"id": "InvertedPendulum-v5", "kwargs": {"x": 1}})},
            "it was recorded with env.kwargs={'x': 1}, and this is {}",
        ),
        ({"env_wrappers": ["ClipReward"]}, "it was recorded with env.wrappers=['ClipReward']"),
        (
            {"action_space": json.dumps({"type": "Box", "shape": [1], "low": [-1], "high": [1]})},
            "its actions have other bounds than those of InvertedPendulum-v5 here",
        ),
        ({"data_format": "arrow"}, "its metadata.json describes no HDF5 file"),
        ({"total_episodes": 10**9}, "it holds 2 episodes; metadata.json says 1000000000"),
        ({"total_episodes": "2"}, "it holds 2 episodes; metadata.json says 2"),
        ({"sha256": "0" * 64}, "its main_data.hdf5 is not the one that metadata.json names"),
    ],
)
def test_what_does_not_describe_it(
    metadata: dict[str, Any], line: str, task: Task, tmp_path: Path
) -> None:
    folder = write(tmp_path / "d", [episode(3), episode(2)], **metadata)
    assert reason(folder, task).startswith(line)


def test_no_dataset_and_half_of_one(task: Task, tmp_path: Path) -> None:
    line = "no dataset there; give a folder that holds data/main_data.hdf5"
    assert reason(tmp_path / "none", task) == line
    folder = write(tmp_path / "d", [episode(300)])
    whole = (folder / MAIN).read_bytes()
    for size in (0, 7, 100, 2000, len(whole) // 2, len(whole) - 1):
        (folder / MAIN).write_bytes(whole[:size])
        assert reason(folder, task).startswith("cannot be read: ")
    (folder / MAIN).write_bytes(whole)
    Dataset.open(folder, task, MUCH).check()
    (folder / METADATA).write_text("[1]")
    assert reason(folder, task) == "its metadata.json describes no HDF5 file"
    (folder / METADATA).unlink()
    assert reason(folder, task).startswith("cannot be read: ")


def test_memory_bounds_it(task: Task, tmp_path: Path) -> None:
    """A row takes 2 * 4 + 1 + 4 float32 numbers."""
    folder = write(tmp_path / "d", [episode(300)])
    Dataset.open(folder, task, 300 * 13 * 4)
    assert reason(folder, task, 300 * 13 * 4 - 1).startswith("300 transitions need ")


def test_changed_bytes_never_crash(task: Task, tmp_path: Path) -> None:
    """A file with random bytes changed is either read or refused."""
    folder = write(tmp_path / "d", [episode(3), episode(2)])
    whole = bytearray((folder / MAIN).read_bytes())
    draws = np.random.default_rng(0)
    refused = 0
    for _ in range(80):
        changed = bytearray(whole)
        for at in draws.integers(0, len(whole), 8):
            changed[at] = draws.integers(256)
        (folder / MAIN).write_bytes(changed)
        try:
            Dataset.open(folder, task, MUCH).check()
        except BadRequest:
            refused += 1
    assert refused > 10


def written(folder: Path, task: Task) -> None:
    folder.mkdir()
    writer = Writer(folder, task)
    for seed, (steps, terminated) in enumerate([(3, True), (5, False)]):
        fields = episode(steps, 100.0 * (seed + 1), terminated)
        obs, act, rew, terminations, truncations = fields.values()
        writer.add(seed, obs, act, rew, terminations, truncations, whole=terminated)
    writer.finish("pendulum-v0", {"noise": 0.5})


def test_a_disk_that_is_almost_full(task: Task, tmp_path: Path, monkeypatch: Any) -> None:
    """An OSError comes before HDF5 gets data that it cannot write; the file is closed properly."""
    room = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: room)
    with pytest.raises(OSError, match="No space left on device"):
        written(tmp_path / "d", task)
    with (tmp_path / "d" / MAIN).open("rb") as file:
        assert file.read(8) == b"\x89HDF\r\n\x1a\n"  # HDF5's signature


def test_written_and_read_again(task: Task, tmp_path: Path) -> None:
    written(tmp_path / "d", task)
    first, second = Dataset.open(tmp_path / "d", task, MUCH).episodes()
    assert (first.whole, second.whole) == (True, False)
    assert first.obs[:, 0].tolist() == [100.0, 104.0, 108.0, 112.0]
    assert second.act.tolist() == [[-1.0], [-0.5], [0.0], [0.5], [1.0]]
    facts = json.loads((tmp_path / "d" / METADATA).read_text())
    assert (facts["total_episodes"], facts["total_steps"]) == (2, 8)
    assert facts["recipe"] == {"noise": 0.5}
    stretched = replace(task, max_episode_steps=7)  # changes returns, not transitions
    Dataset.open(tmp_path / "d", stretched, MUCH)


def test_minari_reads_it(task: Task, tmp_path: Path) -> None:
    minari: Any = import_module("minari")
    written(tmp_path / "d", task)
    found = minari.MinariDataset(tmp_path / "d" / "data")
    assert (found.id, found.total_episodes, found.total_steps) == ("pendulum-v0", 2, 8)
    first, second = found.iterate_episodes()
    for one, fields in ((first, episode(3, 100.0)), (second, episode(5, 200.0, terminated=False))):
        for name, values in fields.items():
            np.testing.assert_array_equal(getattr(one, name), values)
    assert found.action_space.low.tolist() == [-3.0]
    env = found.recover_environment()
    assert (env.spec.id, env.spec.max_episode_steps) == ("InvertedPendulum-v5", 50)


def test_what_minari_writes(task: Task, tmp_path: Path) -> None:
    storage_of = import_module("minari.dataset.minari_storage").MinariStorage
    buffer_of = import_module("minari.data_collector").EpisodeBuffer
    (tmp_path / "d").mkdir()
    spec = gym.spec("InvertedPendulum-v5")
    storage = storage_of.new(tmp_path / "d" / "data", env_spec=spec)
    fields = [episode(3, 100.0), episode(5, 200.0, terminated=False)]
    buffers = [buffer_of(id=i, **{k: list(v) for k, v in f.items()})
               for i, f in enumerate(fields)]  # fmt: skip
    storage.update_episodes(buffers)
    first, second = Dataset.open(tmp_path / "d", task, MUCH).episodes()
    assert first.act.tolist() == [[-1.0], [0.0], [1.0]]
    assert second.rew.tolist() == [200.0, 201.0, 202.0, 203.0, 204.0]


def test_an_action_may_lie_outside_by_rounding(task: Task, tmp_path: Path) -> None:
    """An action outside by 3e-6 of half the range becomes the bound; by 3e-5 it is refused."""
    near = write(tmp_path / "near", [other("actions", (1, 0), 3.00001)])
    (found,) = Dataset.open(near, task, MUCH).episodes()
    assert found.act.tolist() == [[-1.0], [1.0], [1.0]]
    far = write(tmp_path / "far", [other("actions", (1, 0), 3.0001)])
    assert "has actions outside the bounds of InvertedPendulum-v5" in reason(far, task)
