"""How many cores and threads there are for a run."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from spikerl import machine
from spikerl.children import set_variable
from spikerl.distributed import launch


def limits(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 4096),
        ("0::/\n", {}, 4096),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "300000 100000",
                       "cpu.max": "800000 100000"}, 3),
        # A container whose own group is mounted as the root, while the path is the host's.
        ("0::/docker/x\n", {"cpu.max": "200000 100000"}, 2),
        ("3:memory:/m\n1:cpu,cpuacct:/a\n", {
            "cpu,cpuacct/a/cpu.cfs_quota_us": "250000\n",
            "cpu,cpuacct/a/cpu.cfs_period_us": "100000\n",
            "cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
            "cpu,cpuacct/cpu.cfs_period_us": "100000\n"}, 2.5),
        ("0::/\n", {"cpu.max": "garbage\n"}, 4096),
    ],
)  # fmt: skip
def test_a_quota(groups: str, files: dict[str, str], quota: float, tmp_path: Path) -> None:
    (tmp_path / "groups").write_text(groups)
    root = limits(tmp_path / "root", files)
    assert machine.cpu_quota(tmp_path / "groups", root) == quota


def test_no_groups(tmp_path: Path) -> None:
    assert machine.cpu_quota(tmp_path / "none", tmp_path) == 4096


@pytest.mark.parametrize(("quota", "cores"), [(0.5, 1), (1.9, 1), (2.0, 2), (64.0, 3)])
def test_cores(quota: float, cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 5})
    monkeypatch.setattr(machine, "cpu_quota", lambda: quota)
    assert machine.cores() == cores


@pytest.mark.parametrize(
    ("given", "asked", "choice", "reason"),
    [
        (None, None, "3", "6 cores over 2 workers"),
        ("4", None, "4", "OMP_NUM_THREADS"),
        ("4,2", None, "4", "OMP_NUM_THREADS"),
        ("", None, "3", "6 cores over 2 workers"),
        ("0", None, "3", "6 cores over 2 workers"),
        ("many", None, "3", "6 cores over 2 workers"),
        ("4", 5, "5", "requested"),
    ],
)
def test_threads(
    given: str | None, asked: int | None, choice: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    monkeypatch.setattr(machine, "cores", lambda: 6)
    assert machine.resolve_threads(asked, 2) == (choice, reason)
    if choice == "3":  # only if neither is set
        small = ("1", "batches of 128 gain little from more")
        assert machine.resolve_threads(None, 2, 128) == small
        assert machine.resolve_threads(None, 2, 129) == (choice, reason)
        assert machine.resolve_threads(None, 6, 128) == ("1", "6 cores over 6 workers")
    else:
        assert machine.resolve_threads(asked, 2, 100) == (choice, reason)


@pytest.mark.parametrize("given", [None, "7"])
def test_what_workers_are_given_is_not_the_users_word(
    given: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OMP_NUM_THREADS is set for workers and restored, or a sweep's second job would take it for
    the user's.
    """
    monkeypatch.setenv("OMP_NUM_THREADS", "0")
    set_variable("OMP_NUM_THREADS", given)
    seen: list[Any] = []

    def start(shared_dir: Path, workers: launch.Workers) -> dict[int, int]:
        seen.append(os.environ["OMP_NUM_THREADS"])
        seen.append(json.loads((shared_dir / "spec.json").read_text())["OMP_NUM_THREADS"])
        (shared_dir / "result").write_text("0")
        return {}

    monkeypatch.setattr(launch, "run_under_agent", start)
    workers = launch.Workers(size=2, threads=3, backend="gloo", timeout_s=1)
    assert launch.launch({"raw": {}}, workers) == 0
    assert seen == ["3", given]
    assert os.environ.get("OMP_NUM_THREADS") == given


def test_code_is_a_commit_and_what_was_changed_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only changes of the program and its configs count; the same changes give the same name."""
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    (tmp_path / "spikerl").mkdir()
    for name in ("spikerl/a.py", "notes.md"):
        (tmp_path / name).write_text("1")

    def version() -> str | None:
        machine.code_version.cache_clear()
        return machine.code_version()

    assert version() is None
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "a"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    commit = version()
    assert commit is not None
    assert len(commit) == 12
    (tmp_path / "notes.md").write_text("2")
    assert version() == commit
    names = []
    for content in ("2", "3", "2"):
        (tmp_path / "spikerl/a.py").write_text(content)
        names.append(version())
    assert names[0] == names[2] != names[1]
    assert str(names[0]).startswith(f"{commit} with changes ")
    machine.code_version.cache_clear()
