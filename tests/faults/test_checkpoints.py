"""A checkpoint is complete or absent, whatever happens to the disk while it is written."""

from __future__ import annotations

import errno
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from builders import small_config
from disks import Failing, before_each_call

from spikerl.distributed.world import ALONE
from spikerl.envs.make import make_env, task_of
from spikerl.errors import BadRequest, DiskError
from spikerl.files import make_folder
from spikerl.runs import checkpoint
from spikerl.runs.checkpoint import KEEP, remove_newer, save_checkpoint, verified
from spikerl.runs.policies import find_policy
from spikerl.training.state import load_checkpoint, shard_of
from spikerl.training.trainer import Trainer

CAPACITY = 70  # each checkpoint adds 50 rows: the ring wraps around in every second one
EPOCH = 50


def make_trainer() -> Trainer:
    training = small_config(
        total_steps=20 * EPOCH, steps_per_epoch=EPOCH, eval_episodes=1, replay_capacity=CAPACITY
    )
    return Trainer(training, task_of(make_env(training.env)))


def save(trainer: Trainer, run: Path, **facts: int) -> None:
    run.mkdir(exist_ok=True)
    save_into(trainer, run, **facts)


def save_into(trainer: Trainer, run: Path, **facts: int) -> None:
    facts |= {"step": trainer.step, "epoch": trainer.progress.epoch, "world_size": 1}
    learner = trainer.learner_state()
    save_checkpoint(run, ALONE, shard_of(trainer), learner, facts, trainer.policy.files())


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """All that training goes on from; the rows of the replay in the order of their numbers."""
    replay = trainer.replay
    held = replay.between(replay.added - replay.size, replay.added)
    shard = shard_of(trainer).tensors
    return {k: t.clone() for k, t in {**trainer.learner_state(), **shard, "rows": held}.items()}


def assert_same(trainer: Trainer, expected: dict[str, torch.Tensor]) -> None:
    found = state_of(trainer)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


class Saved:
    """A run of five checkpoints, a trainer one epoch further, and the state at each step."""

    def __init__(self, run: Path) -> None:
        self.run, self.trainer, self.other = run, make_trainer(), make_trainer()
        self.states = {}
        self.epochs = self.trainer.epochs()
        for _ in range(5):
            next(self.epochs)
            self.states[self.trainer.step] = state_of(self.trainer)
            save(self.trainer, run)
        self.last = self.trainer.step
        self.saved = self.trainer.replay.saved
        next(self.epochs)
        self.states[self.trainer.step] = state_of(self.trainer)

    def copy(self, to: Path) -> Path:
        self.trainer.replay.saved = self.saved
        return Path(shutil.copytree(self.run, to, symlinks=True))

    def check(self, run: Path, *steps: int) -> int:
        """Assert that `run` restores exactly the state at one of `steps`; return that step."""
        reports: list[str] = []
        found = verified(run, reports.append)
        assert found.step in steps, reports
        self.other.replay.rows.fill_(float("nan"))
        assert load_checkpoint(self.other, found) == []
        assert_same(self.other, self.states[found.step])
        return found.step


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Saved]:
    saved = Saved(tmp_path_factory.mktemp("saved") / "run")
    yield saved
    saved.trainer.close()
    saved.other.close()


@pytest.mark.parametrize(
    ("number", "more"),
    [
        (errno.ENOSPC, 0),
        pytest.param(errno.EIO, 0, marks=pytest.mark.slow),
        pytest.param(errno.EACCES, 0, marks=pytest.mark.slow),
        pytest.param(errno.ENOSPC, 10**9, marks=pytest.mark.slow),
    ],
    ids=["ENOSPC", "EIO", "EACCES", "ENOSPC from it on"],
)
def test_a_disk_that_refuses_any_call(saved: Saved, tmp_path: Path, number: int, more: int) -> None:
    """The checkpoint before stays complete, and so is the next one, once calls succeed again."""
    new = saved.trainer.step
    outcomes = []
    for first in range(1000):
        run, failing = saved.copy(tmp_path / f"{first}"), Failing(number, first, first + more)
        try:
            with before_each_call(failing):
                save(saved.trainer, run)
        except DiskError:
            outcomes.append(saved.check(run, saved.last, new))
        else:  # the failed call was not needed for the checkpoint
            assert saved.check(run, new) == new
        if not failing.reached:
            break
        save(saved.trainer, run)
        assert saved.check(run, new) == new
        assert not list(run.rglob(".*.partial"))
        shutil.rmtree(run)
    assert first > 45
    assert outcomes[0] == saved.last
    assert outcomes == sorted(outcomes)  # calls after the commit leave the new checkpoint valid


def test_killed_before_any_call(saved: Saved, tmp_path: Path) -> None:
    """A copy of the disk before each call is what a run killed then would leave."""
    run = saved.copy(tmp_path / "run")
    left: list[Path] = []

    def look(name: str) -> None:
        left.append(tmp_path / f"{len(left)}")
        shutil.copytree(run, left[-1], symlinks=True)

    with before_each_call(look):
        save(saved.trainer, run)
    assert len(left) > 40
    steps = [saved.check(place, saved.last, saved.trainer.step) for place in left]
    assert steps == sorted(steps)
    assert {*steps} == {saved.last, saved.trainer.step}
    for place in left[:: len(left) // 8]:  # such a run goes on, and leaves no extra files
        found = verified(place, print)
        remove_newer(found)
        load_checkpoint(saved.other, found)
        if found.step == saved.last:
            next(saved.other.epochs())
            assert_same(saved.other, saved.states[saved.trainer.step])
        save(saved.other, place)
        assert len(files_of(place)) <= len(files_of(run))


def files_of(run: Path) -> list[str]:
    return sorted(str(path.relative_to(run)) for path in run.rglob("*"))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
def test_damage_is_found_and_named(
    saved: Saved, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    inside = [p.name for p in (saved.run / "checkpoints" / "latest").iterdir()]
    assert {"learner.safetensors", "policy.safetensors", "worker_0.json"} < {*inside}
    for name in inside:
        run = saved.copy(tmp_path / name)
        damage(run / "checkpoints" / f"step_{saved.last:010d}" / name)
        reports: list[str] = []
        found = verified(run, reports.append)
        assert found.step == saved.last - EPOCH
        assert len(reports) == 1
        assert f"step_{saved.last:010d}" in reports[0]
        assert name in reports[0]
        saved.check(run, found.step)


def test_every_bit_of_the_manifest_counts(saved: Saved, tmp_path: Path) -> None:
    run = saved.copy(tmp_path / "run")
    path = run / "checkpoints" / "latest" / "manifest.json"
    whole = path.read_bytes()
    intact = verified(run, print).manifest
    for place in range(0, len(whole), 5):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 7
        path.write_bytes(flipped)
        found = verified(run, lambda text: None)
        assert found.step == saved.last - EPOCH or found.manifest.items() >= intact.items()


def test_damaged_replay_reaches_back(saved: Saved, tmp_path: Path) -> None:
    """Damage to a segment that several checkpoints share makes them all invalid; if no checkpoint
    is left, the run is refused.
    """
    run = saved.copy(tmp_path / "run")
    shared = f"rows_{saved.last - 2 * EPOCH:012d}_{saved.last - EPOCH:012d}.f32"
    flip(run / "replay" / "worker_0_of_1" / shared)
    reports: list[str] = []
    saved.check(run, saved.last - 2 * EPOCH)
    verified(run, reports.append)
    assert len(reports) == 2
    assert all(f"{shared} has changed" in report for report in reports)
    shutil.rmtree(run / "replay")
    with pytest.raises(BadRequest, match="holds no complete checkpoint"):
        verified(run, reports.append)


def test_segments_are_shared_and_pruned(saved: Saved) -> None:
    """Each segment is written once, and kept while a kept checkpoint needs its rows."""
    kept = sorted(int(p.name[5:]) for p in (saved.run / "checkpoints").glob("step_*"))
    assert kept == [saved.last - EPOCH * k for k in reversed(range(KEEP))]
    segments = sorted(p.name for p in saved.run.glob("replay/worker_0_of_1/*"))
    first = kept[0] - CAPACITY - (kept[0] - CAPACITY) % EPOCH
    expected = range(first, saved.last, EPOCH)
    assert segments == [f"rows_{a:012d}_{a + EPOCH:012d}.f32" for a in expected]
    found = verified(saved.run, lambda text: None)
    assert found is not None
    assert len(found.manifest["segments"]) == 2


def test_a_ring_that_turned_over_between_checkpoints(saved: Saved, tmp_path: Path) -> None:
    """Between checkpoints come more rows than it holds; a checkpoint has just those it holds."""
    trainer = make_trainer()
    epochs = trainer.epochs()
    for wait in (1, 2, 3, 1):
        for _ in range(wait):
            next(epochs)
        save(trainer, tmp_path)
        found = verified(tmp_path, print)
        load_checkpoint(saved.other, found)
        assert_same(saved.other, state_of(trainer))
    assert trainer.replay.added == 7 * EPOCH > 4 * CAPACITY
    trainer.close()


def test_another_version_is_refused(saved: Saved, tmp_path: Path) -> None:
    run = tmp_path / "run"
    now = checkpoint.SCHEMA
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "SCHEMA", now + 1)
        trainer = make_trainer()
        save(trainer, run)
        trainer.close()
    with pytest.raises(BadRequest, match=f"schema {now + 1}, this version reads {now}"):
        verified(run, print)


def test_nothing_is_unpickled(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("something was unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    saved.check(saved.run, saved.last)
    kinds = {path.suffix for path in saved.run.rglob("*") if path.is_file()}
    assert kinds == {".json", ".safetensors", ".f32"}


def test_what_went_missing_is_written_again(saved: Saved, tmp_path: Path) -> None:
    """A segment, the newest checkpoint or all checkpoints were removed while the run went on."""
    new, segment = saved.trainer.step, f"rows_{saved.last - EPOCH:012d}_{saved.last:012d}.f32"
    run = saved.copy(tmp_path / "segment")
    (run / "replay" / "worker_0_of_1" / segment).unlink()
    save(saved.trainer, run)
    assert saved.check(run, new) == new
    run = saved.copy(tmp_path / "newest")
    shutil.rmtree(run / f"checkpoints/step_{saved.last:010d}")
    save(saved.trainer, run)
    assert saved.check(run, new) == new
    run = saved.copy(tmp_path / "checkpoints")
    shutil.rmtree(run / "checkpoints")
    save(saved.trainer, run)
    assert saved.check(run, new) == new


def test_a_checkpoint_that_cannot_be_read_now_stays(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a file cannot be read for now, as on a network disk, no older checkpoint is used."""
    run = saved.copy(tmp_path / "run")

    def away(path: Path, most: int) -> bytes:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(checkpoint, "read_json", away)
    with pytest.raises(OSError, match="Input/output error"):
        verified(run, print)
    monkeypatch.undo()
    assert saved.check(run, saved.last) == saved.last


def test_a_run_that_went_away_is_not_begun_anew(saved: Saved, tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="No such file or directory"):
        save_into(saved.trainer, tmp_path / "gone")
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (b'{"a": 1}\n', "metrics.jsonl is shorter than it says"),
        (b'{"a": 1}\n{"a"; 2}\n', "metrics.jsonl has changed in line 2"),
    ],
)
def test_rows_that_a_checkpoint_counts(tmp_path: Path, rows: bytes, said: str) -> None:
    """If they are damaged or missing, the checkpoint before, which counts fewer rows, is used."""
    trainer = make_trainer()
    for i, _ in zip(range(2), trainer.epochs(), strict=False):
        save(trainer, tmp_path, metrics_bytes=9 * (i + 1))
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_bytes(b'{"a": 1}\n{"a": 2}\n')
    assert verified(tmp_path, print).step == 2 * EPOCH
    metrics.write_bytes(rows)
    reports: list[str] = []
    assert verified(tmp_path, reports.append).step == EPOCH
    assert reports == [
        f"checkpoint step_{2 * EPOCH:010d} is damaged ({said}); trying the one before"
    ]
    metrics.unlink()
    with pytest.raises(BadRequest, match="no complete checkpoint; checkpoint step_"):
        verified(tmp_path, print)
    trainer.close()


def test_a_policy_without_its_link(saved: Saved, tmp_path: Path) -> None:
    """Without a valid link `latest`, the newest checkpoint is found by the names of the folders."""
    run = saved.copy(tmp_path / "run")
    newest_one = run / "checkpoints" / f"step_{saved.last:010d}"
    assert find_policy(run, key="run") == newest_one
    link = run / "checkpoints" / "latest"
    for target in ("step_99", "latest"):
        link.unlink()
        link.symlink_to(target)
        assert find_policy(run, key="run") == newest_one
    link.unlink()
    assert find_policy(run, key="run") == newest_one


def test_workers_make_a_folder_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another worker makes the folder after this one saw that it did not exist."""
    is_dir = Path.is_dir

    def look(path: Path) -> bool:
        found = is_dir(path)
        if not found:
            path.mkdir()
        return found

    monkeypatch.setattr(Path, "is_dir", look)
    make_folder(tmp_path / "replay")
    assert is_dir(tmp_path / "replay")
