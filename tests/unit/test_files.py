"""File systems that lack a call: a lock that is held differs from locks not being supported."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from shell import SHORT, spikerl

from spikerl import files
from spikerl.files import parse_json, read_bytes, read_json, there, write_text
from spikerl.kernels import build
from spikerl.runs import folder as run_folder


@pytest.fixture(autouse=True)
def nothing_said() -> Iterator[None]:
    files.warn_once.cache_clear()
    yield
    files.warn_once.cache_clear()


def refuses(number: int) -> Any:
    def call(*args: Any, **kwargs: Any) -> NoReturn:
        raise OSError(number, os.strerror(number))

    return call


def syncs_no_folder(number: int) -> Any:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    return fsync


def test_writers_of_one_number_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes with the same id, on machines that share a disk, write the same file."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    path, written = tmp_path / "f", files.write_synced

    def meanwhile(partial: Path, content: bytes) -> str:
        digest = written(partial, content)
        if content == b"first":
            files.write_atomic(path, b"second")
        return digest

    monkeypatch.setattr(files, "write_synced", meanwhile)
    files.write_atomic(path, b"first")
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_lock_is_held_by_one(tmp_path: Path) -> None:
    with (tmp_path / "a").open("w") as mine, (tmp_path / "a").open("w") as theirs:
        assert files.lock_file(mine)
        assert not files.lock_file(theirs)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL])
def test_a_lock_that_is_not_supported(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fcntl, "flock", refuses(number))
    for _ in range(2):
        run_folder.lock(tmp_path).close()
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("spikerl: warning: files cannot be locked here")


def test_a_lock_on_a_bad_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", refuses(errno.EIO))
    with (tmp_path / "a").open("w") as file, pytest.raises(OSError, match="Input/output"):
        files.lock_file(file)


def test_folders_that_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", syncs_no_folder(errno.EINVAL))
    files.write_text(tmp_path / "a", "whole")
    assert (tmp_path / "a").read_text() == "whole"
    monkeypatch.setattr(os, "fsync", syncs_no_folder(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        files.sync_folder(tmp_path)


def test_a_link_or_a_file_that_holds_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.link_to(tmp_path / "latest", "a")
    assert os.readlink(tmp_path / "latest") == "a"
    with monkeypatch.context() as patch:
        patch.setattr(os, "symlink", refuses(errno.EPERM))
        files.link_to(tmp_path / "latest", "b")
        assert not (tmp_path / "latest").is_symlink()
        assert (tmp_path / "latest").read_text() == "b"
        patch.setattr(os, "symlink", refuses(errno.ENOSPC))
        with pytest.raises(OSError, match="No space"):
            files.link_to(tmp_path / "latest", "c")
    files.link_to(tmp_path / "latest", "c")
    assert os.readlink(tmp_path / "latest") == "c"
    (tmp_path / "latest").unlink()
    (tmp_path / "latest" / "best").mkdir(parents=True)  # as scp -r copies a run
    files.link_to(tmp_path / "latest", "d")
    assert os.readlink(tmp_path / "latest") == "d"
    assert os.listdir(tmp_path) == ["latest"]


def test_a_run_where_all_of_them_are_lacking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fcntl, "flock", refuses(errno.ENOSYS))
    monkeypatch.setattr(os, "fsync", syncs_no_folder(errno.EINVAL))
    monkeypatch.setattr(os, "symlink", refuses(errno.EPERM))
    said = spikerl("train", *SHORT, "run_dir=r", "total_steps=150")
    assert (said.status, said.err.count("spikerl: warning: ")) == (0, 3), said
    assert (tmp_path / "r/checkpoints/latest").read_text() == "step_0000000150"
    for name in ("policy.json", "policy.safetensors"):  # so that the newest checkpoint's are used
        (tmp_path / "r" / name).unlink()
    assert spikerl("eval", "run=r", "episodes=1").status == 0
    said = spikerl("train", "resume=r", "total_steps=300")
    assert (said.status, said.err) == (0, ""), said
    assert "resumed at step 150 of 300" in said.out


@pytest.fixture
def unbuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder without a kernel, and a build that takes no time."""
    monkeypatch.setenv("SPIKERL_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "_build", lambda command, built: built.write_bytes(b""))
    monkeypatch.setattr(build, "_declare", lambda lib: None)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: name)
    build.library.cache_clear()
    yield tmp_path
    build.library.cache_clear()


def test_kernels_are_built_where_there_are_no_locks(
    unbuilt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", refuses(errno.ENOSYS))
    assert str(build.library("portable")).startswith(str(unbuilt / "spikerl/spiking-portable-"))


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_cache_that_cannot_be_used_is_no_traceback(
    number: int, unbuilt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_build", refuses(number))
    with pytest.raises(build.Unbuilt, match=os.strerror(number)):
        build.library("portable")


@pytest.mark.parametrize("locks", [True, False])
def test_what_a_killed_build_left_is_removed(
    locks: bool, unbuilt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next build removes it, but only if a lock shows that no other build is running."""
    compiler = unbuilt / "cxx"
    compiler.write_text("#!/bin/sh\n[ $1 = --version ] || exec sleep 2\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    code = f"import runpy; runpy.run_path({build.__file__!r})['library']('portable')"
    with subprocess.Popen([sys.executable, "-c", code]) as killed:
        while not (left := [path for path in unbuilt.glob("spikerl/*") if path.is_dir()]):
            assert killed.poll() is None
            time.sleep(0.01)
        killed.kill()
    if not locks:
        monkeypatch.setattr(fcntl, "flock", refuses(errno.ENOSYS))
    build.library("portable")
    assert left[0].exists() != locks


def test_a_compiler_that_takes_too_long(unbuilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = unbuilt / "cxx"
    compiler.write_text("#!/bin/sh\nexec sleep 2\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(build, "LIMIT_S", 0.1)
    with pytest.raises(build.Unbuilt) as caught:
        build.library("portable")
    assert str(caught.value) == f"{compiler} took more than 0.1 s; try again on a less busy machine"


def test_a_library_in_a_cache_that_cannot_be_written_to(
    unbuilt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container's image: a library that exists is used; else the error has a remedy."""
    name = build.library("portable")
    build.library.cache_clear()
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and real(path, mode))
    monkeypatch.setattr(build, "_lock", refuses(errno.EROFS))
    assert build.library("portable") == name
    said = "cannot be used: Read-only file system; name another with SPIKERL_CACHE=FOLDER"
    with pytest.raises(build.Unbuilt, match=said):
        build.library("avx2")


def test_a_processors_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    """The flags distinguish machines on which -march=native differs; Arm calls them Features."""
    for word in ("flags", "Features"):
        text = f"processor\t: 0\n{word}\t: fp asimd\n"
        monkeypatch.setattr(Path, "read_text", lambda path, text=text: text)
        assert build._processor_flags() == {"fp", "asimd"}


def test_a_user_without_a_home(unbuilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SPIKERL_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", refuses_home)
    with pytest.raises(build.Unbuilt, match="name one with SPIKERL_CACHE=FOLDER"):
        build.library("portable")


def refuses_home() -> NoReturn:
    raise RuntimeError("Could not determine home directory.")


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "sparse").open("wb") as f:
        f.truncate(1 << 40)
    for path in (tmp_path / "pipe", tmp_path / "sparse", Path("/dev/zero"), tmp_path):
        with pytest.raises(OSError, match=r"regular|larger|directory"):
            read_bytes(path, 100)
    (tmp_path / "small").write_bytes(b"x")
    assert read_bytes(tmp_path / "small", 1 << 50) == b"x"  # reserves no such memory


def test_what_cannot_be_seen_may_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    names = ("file", "none", "file/below")
    assert [there(tmp_path / name) for name in names] == [True, False, False]

    def stat(self: Path) -> NoReturn:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "stat", stat)
    assert there(tmp_path / "none")


def test_text_that_is_no_unicode(tmp_path: Path) -> None:
    name = os.fsdecode(b"n\xffme")
    write_text(tmp_path / "a", f"run {name}")
    assert (tmp_path / "a").read_bytes() == b"run n\\udcffme"
    for half in (r'"\ud800"', r'["\uDFFF"]'):
        with pytest.raises(ValueError, match="surrogates"):
            parse_json(half.encode())
    assert parse_json(rb'"\ud83d\ude00"') == "\U0001f600"


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", "-1e999", "[" * 100_000, "9" * 5000, "{"])
def test_json_that_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r".+"):
        read_json(tmp_path / "x.json", 1 << 20)
