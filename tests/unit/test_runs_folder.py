"""Run folders: how they are made, and the order in which their files are written and removed."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from shell import refusal

from spikerl.runs import folder as run_folder


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "log.txt", ".lock", "checkpoints", "replay", "tb"]
)
def test_a_resume_writes_through_no_link(name: str, tmp_path: Path) -> None:
    run, theirs = tmp_path / "run", tmp_path / "mine"
    run.mkdir()
    theirs.mkdir() if "." not in name else theirs.write_text("kept")
    run_folder.check_own(run)
    (run / name).symlink_to(theirs)
    assert f"its {name} is a link" in str(refusal(run_folder.check_own, run))
    (run / name).unlink()
    os.mkfifo(run / name)
    assert "neither file nor folder" in str(refusal(run_folder.check_own, run))


@pytest.mark.parametrize("name", ["x" * 250, f"{'x' * 300}/run", f"new/{'x' * 300}"])
def test_a_name_that_is_too_long(name: str, tmp_path: Path) -> None:
    """Longer than 255 bytes, also in the form `.NAME.PROCESS.12345678.partial` of a new folder."""
    target = str(tmp_path / name)
    line = str(refusal(run_folder.check_free, target, named=True))
    assert line == f"run_dir={target}: File name too long; give another run_dir"


def test_processes_of_one_number_that_begin_at_once(tmp_path: Path) -> None:
    """Processes in two containers may have one id: one is refused, the other's run is whole."""
    target = str(tmp_path / "run")

    def beside(partial: Path) -> None:
        run_folder.create(target, {}, {}, lambda folder: None, named=True)
        (partial / "mine").touch()

    refusal(run_folder.create, target, {"seed": 1}, {}, beside, named=True)
    assert (tmp_path / "run" / "config.yaml").read_text() == "{}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_policy_json_is_there_only_with_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """policy.json is written last and removed first."""
    seen: list[str] = []
    write, unlink = run_folder.write_atomic, Path.unlink

    def written(path: Path, content: bytes) -> str:
        seen.append(path.name)
        return write(path, content)

    def removed(path: Path, missing_ok: bool = False) -> None:
        if path.exists():
            seen.append(path.name)
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(run_folder, "write_atomic", written)
    run_folder.write_best(tmp_path, {"policy.json": b"{}", "policy.safetensors": b""})
    assert seen == ["policy.safetensors", "policy.json"]
    seen.clear()
    monkeypatch.setattr(Path, "unlink", removed)
    run_folder.remove_results(tmp_path)
    assert seen == ["policy.json", "policy.safetensors"]


def test_what_is_freed_is_said_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest says `freed` before files are removed: a run killed in between cannot go on."""
    for name in ("manifest.json", "policy.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "checkpoints").mkdir()

    def killed(path: Path) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        run_folder.free(tmp_path)
    assert "freed" in json.loads((tmp_path / "manifest.json").read_text())


def test_a_full_disk_can_be_freed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("manifest.json", "policy.json"):
        (tmp_path / name).write_text("{}")
    for name in ("replay", "checkpoints"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows").write_bytes(bytes(10))
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    write, raw_write = run_folder.write_json, os.write

    def only_with_room(path: Path, content: Any) -> None:
        if (tmp_path / "replay").exists():
            raise full
        write(path, content)

    def no_words(number: int, content: bytes) -> int:
        if content.startswith(b"process"):
            raise full
        return raw_write(number, content)

    monkeypatch.setattr(run_folder, "write_json", only_with_room)
    monkeypatch.setattr(os, "write", no_words)
    with run_folder.lock(tmp_path):
        assert run_folder.free(tmp_path) == 20
        assert "running it" in str(refusal(run_folder.lock, tmp_path))
    assert "freed" in json.loads((tmp_path / "manifest.json").read_text())
    assert not (tmp_path / "checkpoints").exists()


def test_a_full_disk_is_a_line(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target = str(tmp_path / "new" / "run")
    said = str(refusal(lambda: run_folder.create(target, {}, {}, fill, named=True)))
    assert said == f"run_dir={target}: No space left on device; nothing was kept"
    assert list(tmp_path.iterdir()) == []
