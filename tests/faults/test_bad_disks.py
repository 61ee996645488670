"""Disks that are full, read-only, slow or gone: training goes on, and no file is damaged."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from builders import small_config
from disks import TINY, Failing, Undisturbed, attempt, before_each_call
from processes import record, rows
from shell import spikerl
from spawn import run_workers

from spikerl.distributed import launch
from spikerl.distributed.world import World
from spikerl.envs.make import make_env, task_of
from spikerl.errors import BadRequest, DiskError
from spikerl.files import Journal
from spikerl.runs import folder as run_folder
from spikerl.runs.checkpoint import save_checkpoint, verified
from spikerl.training.session import Session
from spikerl.training.state import shard_of
from spikerl.training.trainer import Trainer

ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("first", range(0, 54, 6))
def test_a_call_of_a_commit_that_fails(whole: Undisturbed, tmp_path: Path, first: int) -> None:
    """A sample of the calls that scripts/bad_disk lets fail."""
    act = Failing(ERRORS[first // 6 % 3], first, first + (first % 4 == 0) * 10**9)
    tried = attempt(whole, tmp_path / "run", act)
    assert act.reached
    assert tried.ended
    assert tried.resumed
    assert tried.clean


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small disk, and not everywhere")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk: Path) -> None:
    with (disk / "ballast").open("ab", buffering=0) as f, suppress(OSError):
        while f.write(b"x" * 4096):
            pass


def at_commits(monkeypatch: pytest.MonkeyPatch, *acts: Callable[[], object]) -> None:
    """Call the first of `acts` before the first commit, the second before the second, and so on."""
    commit, left = Session.commit, list(acts)

    def before(session: Session, run: Path) -> None:
        if left:
            left.pop(0)()
        commit(session, run)

    monkeypatch.setattr(Session, "commit", before)


def nothing() -> None: ...


def test_a_disk_that_is_full_for_a_while(
    whole: Undisturbed, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = small_disk / "run"
    at_commits(monkeypatch, lambda: fill(small_disk), (small_disk / "ballast").unlink)
    assert whole.train(run_dir=str(run)) == 0
    assert whole.equals(run)
    log = (run / "log.txt").read_text().splitlines()
    warnings = [line for line in log if "step 20 could not be saved (No space left" in line]
    assert len(warnings) == 1
    assert sum("step 40 is saved, with all that could not be before" in line for line in log) == 1
    assert record(run)["status"] == "done"


def test_a_disk_that_stays_full(
    whole: Undisturbed,
    small_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The run ends with one line; once there is room, a resume goes on from its last checkpoint."""
    run = small_disk / "run"
    at_commits(monkeypatch, nothing, lambda: fill(small_disk))
    assert whole.train(run_dir=str(run)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("spikerl: step 60 could not be saved: No space left on device")
    assert line.endswith(f"; spikerl train resume={run} goes on from step 20")
    assert verified(run, print).step == 20
    monkeypatch.undo()
    with pytest.raises(BadRequest, match="No space left on device"):
        whole.train(resume=str(run))
    assert verified(run, print).step == 20
    (small_disk / "ballast").unlink()
    assert whole.train(resume=str(run)) == 0
    assert whole.equals(run)


def test_a_full_disk_is_freed(whole: Undisturbed, small_disk: Path) -> None:
    """`runs clean=true` removes the checkpoints and the replay of a run that is done."""
    run = small_disk / "run"
    assert whole.train(run_dir=str(run)) == 0
    (run / ".lock").unlink()
    fill(small_disk)
    said = spikerl("runs", f"path={small_disk}", "clean=true")
    assert "replay and checkpoints of 1 finished run\n" in said.out
    assert "keeps its replay" not in said.out
    assert not (run / "checkpoints").exists()
    assert whole.equals(run)
    assert "was removed" in spikerl("train", f"resume={run}", "total_steps=80").line


WORKER = """
import os, sys
from pathlib import Path
from spikerl.distributed.launch import run_worker

def run(spec):
    with open(sys.argv[2], "ab", buffering=0) as file:
        try:
            while file.write(b"x" * 4096):
                pass
        except OSError:
            return 75

sys.exit(run_worker(Path(sys.argv[1]), os.getppid(), run))
"""


def test_a_temporary_folder_that_is_full_when_workers_end(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher still learns their exit status, 75."""
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))

    def run(shared_dir: Path, workers: launch.Workers) -> dict[int, int]:
        ballast = small_disk / "ballast"
        subprocess.run([sys.executable, "-c", WORKER, shared_dir, ballast], check=True)
        return {}

    monkeypatch.setattr(launch, "run_under_agent", run)
    workers = launch.Workers(size=2, threads=1, backend="gloo", timeout_s=5.0)
    assert launch.launch({}, workers) == 75


def test_a_temporary_folder_that_is_full_is_a_line(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert spikerl("train", *TINY, "total_steps=1", "run_dir=run").status == 0
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    fill(small_disk)
    two = ["train", *TINY, "num_envs=2", "world_size=2", "run_dir=two"]
    swept = ["eval", "-m", "run=run", "seed=0,1"]
    for command in (["export", "run=run", "format=loihi"], two, swept):
        said = spikerl(*command)
        assert (said.status, said.err) == (
            1, f"spikerl: No space left on device: perhaps {small_disk}, and TMPDIR=FOLDER names"
            " another\n",
        )  # fmt: skip
        assert [path.name for path in small_disk.iterdir()] == ["ballast"]
    assert not (tmp_path / "two").exists()
    root = small_disk / "s"
    line = spikerl("train", "-m", *TINY, "seed=0,1", f"run_dir={root}").line
    assert line == f"run_dir={root}: No space left on device; give another run_dir"
    assert [path.name for path in small_disk.iterdir()] == ["ballast"]


def test_a_folder_that_cannot_be_written_is_refused(
    whole: Undisturbed, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new run on a full disk, which leaves nothing, and a resume on a read-only one."""
    fill(small_disk)
    with pytest.raises(BadRequest, match=r"run_dir=.*No space left on device"):
        whole.train(run_dir=str(small_disk / "run"))
    assert [path.name for path in small_disk.iterdir()] == ["ballast"]
    (small_disk / "ballast").unlink()
    assert whole.train(run_dir=str(small_disk / "run")) == 0
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(BadRequest, match=r"resume=.*cannot be written to: Read-only file system"):
        whole.train(resume=str(small_disk / "run"), total_steps=80)
    assert whole.equals(small_disk / "run")


def test_a_folder_that_vanishes(
    whole: Undisturbed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No new folder is made in its place; when it is back, the run saves all that is pending."""
    run, aside = tmp_path / "run", tmp_path / "aside"
    at_commits(monkeypatch, lambda: run.rename(aside), lambda: aside.rename(run))
    assert whole.train(run_dir=str(run)) == 0
    assert whole.equals(run)
    assert [row["step"] for row in rows(run)] == [20, 40, 60]
    monkeypatch.undo()
    gone = tmp_path / "gone"
    at_commits(monkeypatch, lambda: gone.rename(aside))
    capsys.readouterr()
    assert whole.train(run_dir=str(gone)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("spikerl: step 60 could not be saved: No such file or directory: ")
    assert not gone.exists()
    assert whole.train(resume=str(aside)) == 0
    assert whole.equals(aside)


def test_views_stop_nothing(
    whole: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run ends well though log.txt, TensorBoard's files and standard output cannot be written."""
    run = tmp_path / "run"

    def spoil() -> None:
        for name in ("log.txt", "tb"):
            (run / name).rename(run / f"old-{name}")
        (run / "log.txt").mkdir()
        (run / "tb").write_text("")

    at_commits(monkeypatch, spoil)
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr("sys.stdout", full)
        assert whole.train(run_dir=str(run)) == 0
        with suppress(OSError):
            full.close()
    assert whole.equals(run)
    assert record(run)["status"] == "done"


def disk_of_one_refuses_or_is_slow(world: World, run: str) -> None:
    """Both raise the error of one, or wait while one is slow; the next commit succeeds."""

    def slow() -> int:
        time.sleep(5 * world.rank)  # longer than timeout_s, the limit of an exchange
        return world.rank

    def refused() -> None:
        if world.rank == 1:
            raise BadRequest("key", Path("value"), "remedy")

    assert world.run_on_all(slow) == [0, 1]
    with pytest.raises(BadRequest, match="key=value: remedy"):
        world.run_on_all(refused)
    training = small_config(num_envs=2, total_steps=80, steps_per_epoch=40, eval_episodes=2)
    trainer = Trainer(training, task_of(make_env(training.env)), world=world)
    epochs = trainer.epochs()
    for step in (40, 80):
        next(epochs)
        parts = trainer.learner_state(), {"step": step, "world_size": 2}, trainer.policy.files()
        for first in (0, 4) if step == 80 else ():
            act = Failing(errno.EIO, first) if world.rank == 1 else Failing(0, 10**9)
            with before_each_call(act), pytest.raises(DiskError, match=r"^worker 1: Input/output"):
                save_checkpoint(Path(run), world, shard_of(trainer), *parts)
            assert verified(Path(run), print).step == 40
        save_checkpoint(Path(run), world, shard_of(trainer), *parts)
        assert verified(Path(run), print).step == step
    trainer.close()


def test_workers_share_what_a_disk_does_to_one(tmp_path: Path) -> None:
    run_workers(partial(disk_of_one_refuses_or_is_slow, run=str(tmp_path)), 2, timeout_s=3.0)


def test_a_lock_of_the_dead_is_no_lock(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("process 1 on here")
    said = f"process {os.getpid()} on .* is running it"
    with run_folder.lock(tmp_path), pytest.raises(BadRequest, match=said):
        run_folder.lock(tmp_path)
    run_folder.lock(tmp_path).close()


def test_a_journal_writes_all_in_order_over_what_a_failure_left(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    journal = Journal(path)
    journal.add(b"one\n")
    journal.write(sync=True)
    journal.add(b"two\n")
    with before_each_call(Failing(errno.ENOSPC, 2)), pytest.raises(OSError, match="write"):
        journal.write(sync=True)  # its third call, the write, fails after half of the bytes
    path.write_bytes(path.read_bytes() + b"a long rest of an earlier attempt")
    journal.add(b"three\n")
    journal.write(sync=True)
    assert path.read_bytes() == b"one\ntwo\nthree\n"
    journal.add(b"four\n")
    path.write_bytes(b"one\n")
    with pytest.raises(OSError, match="lost what it held"):
        journal.write(sync=True)
    assert path.read_bytes() == b"one\n"
    path.unlink()
    with pytest.raises(FileNotFoundError):
        journal.write(sync=True)
    assert not path.exists()
