"""Damaged files of each kind are loaded or refused; scripts/fuzz tries many more of them."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
from pathlib import Path

import pytest
from fuzz_guard import bounded, outcome
from fuzz_run import fuzz
from fuzz_targets import TARGETS

from spikerl.commands import train
from spikerl.distributed import launch
from spikerl.errors import BadRequest

CASES = {"run to resume": 60, "checkpoint": 60, "dataset": 60, "config=FILE": 25, "overrides": 25}


@pytest.mark.parametrize("target", TARGETS)
def test_odd_files(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "run", train.run)  # restores what targets replace
    monkeypatch.setattr(launch, "launch", launch.launch)
    monkeypatch.chdir(tmp_path)
    number = CASES.get(target, 150)
    counts, findings = fuzz(target, range(number), 1, tmp_path)
    assert not findings
    assert sum(counts.values()) == number
    assert counts["refused"] > number / 4


def wrong_line() -> bool:
    raise BadRequest("key", "value", "remedy")


def swallowed() -> bool:
    try:
        pickle.loads(b"cos\nsystem\n(S'touch hit'\ntR.")
    except Exception:
        raise BadRequest("key", "value", "remedy") from None
    return True


def huge() -> bool:
    try:
        bytearray(1 << 40)
    except MemoryError:
        raise BadRequest("key", "value", "remedy") from None
    return True


def connected() -> bool:
    socket.socket().connect(("127.0.0.1", 9))
    return True


def removed() -> bool:
    os.remove("/tmp/spikerl-fuzz-hit")
    return True


def grown() -> bool:
    return bool(bytearray(b"x" * (400 << 20)))


ODD = {
    "refused": wrong_line,
    "code: os.system": swallowed,
    "code: subprocess.Popen": lambda: bool(subprocess.run(["true"])),
    "code: socket.connect": connected,
    "code: open": lambda: bool(Path("/tmp/spikerl-fuzz-hit").write_text("")),
    "code: os.remove": removed,
    "code: import": lambda: bool(__import__("antigravity")),
    "memory: MemoryError": huge,
    "memory: grew": grown,
    "exception: KeyError": lambda: {"a": True}["x"],
    "loaded": lambda: bool((Path.cwd() / "mine").write_text("x")),
}


@pytest.mark.parametrize("found", ODD)
def test_the_guard_notices(found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with bounded():
        assert outcome(ODD[found], tmp_path).startswith(found)
    assert not Path("/tmp/spikerl-fuzz-hit").exists()
    assert not (tmp_path / "hit").exists()


def test_a_case_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuzz_guard.SECONDS", 0.05)

    def forever() -> bool:
        while True:
            pass

    with bounded():
        assert outcome(forever, tmp_path).startswith("hang")
