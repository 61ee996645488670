"""What `spikerl doctor` reports of parts that are present or missing, and to a closed pipe."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from spikerl.commands import doctor
from spikerl.commands.doctor import Finding
from spikerl.distributed import mpi
from spikerl.envs import video
from spikerl.kernels import build


def row(findings: Iterator[Finding], name: str) -> tuple[bool, str]:
    return next((f.there, f.detail) for f in findings if f.name == name)


def test_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpi, "missing", lambda: None)
    monkeypatch.setattr(mpi, "library", lambda: "Some MPI 1.2")
    monkeypatch.setattr(mpi, "mpiexec", lambda workers: ["/bin/mpiexec", "-n", "1"])
    assert row(doctor.backends(), "mpi") == (True, "Some MPI 1.2; /bin/mpiexec")
    monkeypatch.setattr(mpi, "mpiexec", lambda workers: None)
    there, detail = row(doctor.backends(), "mpi")
    assert (there, detail.startswith("no mpiexec; pip install")) == (False, True)
    monkeypatch.setattr(mpi, "missing", lambda: "mpi4py is not installed")
    assert row(doctor.backends(), "mpi") == (False, "mpi4py is not installed")


@pytest.mark.parametrize(("paths", "slow"), [(["avx512"], True), (["amx", "avx512"], False)])
def test_bf16(monkeypatch: pytest.MonkeyPatch, paths: list[str], slow: bool) -> None:
    monkeypatch.setattr("spikerl.machine.resolve_device", lambda asked: Cpu)
    monkeypatch.setattr("spikerl.models.precision.supported_paths", lambda: paths)
    there, detail = row(doctor.devices(), "bf16")
    assert (there, "slower than fp32" in detail) == (True, slow)
    assert row(doctor.devices(), "fp32") == (True, "on cpu")


class Cpu:
    choice = "cpu"


def test_renderers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "why_not", {"egl": None, "osmesa": "no display"}.get)
    assert row(doctor.renderers(), "egl") == (True, "draws videos")
    expected = (False, "no display; Debian's package is libosmesa6")
    assert row(doctor.renderers(), "osmesa") == expected


def test_a_cache_without_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    @contextmanager
    def full(path: Path) -> Iterator[None]:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))
        yield

    monkeypatch.setenv("SPIKERL_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "_lock", full)
    monkeypatch.setattr(build, "library", build.library.__wrapped__)
    there, detail = row(doctor.kernel_findings(), "cpu")
    assert not there
    remedy = "name another with SPIKERL_CACHE=FOLDER; use kernel=auto"
    expected = f"{tmp_path}/spikerl cannot be used: No space left on device; {remedy}"
    assert detail in (expected, f"no C++ compiler (g++, clang++ or c++); {expected}")


def test_outputs_that_lead_nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`outputs` may be a link to a disk that is not mounted: no run folder can be made there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").symlink_to(tmp_path / "disk")
    assert doctor.outputs()[2:] == (False, f"{tmp_path}/outputs cannot be written")
    (tmp_path / "disk").mkdir()
    assert doctor.outputs()[2:] == (True, f"{tmp_path}/outputs can be written")


@pytest.mark.parametrize("as_json", [False, True])
def test_a_reader_that_goes_away(monkeypatch: pytest.MonkeyPatch, as_json: bool) -> None:
    """A reader such as `head` closes the pipe early; the exit status is the same."""
    findings = [Finding("output", "outputs/", True, "x" * 100_000)]
    monkeypatch.setattr(doctor, "examine", lambda: iter(findings))
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", buffering=1) as out, redirect_stdout(out):
        assert doctor.main({"json": as_json}, []) == 0


def test_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    findings = [Finding("version", "git", False, "[b]no[/b] :smile: " + "x" * 200)]
    monkeypatch.setattr(doctor, "examine", lambda: iter(findings))
    assert doctor.main({"json": True}, []) == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert answer == {"usable": True, "findings": [findings[0]._asdict()]}
