"""`spikerl` itself: what it imports, `--help`, completion and `doctor`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from shell import SHORT, spikerl

from spikerl.config.yaml_file import group_options


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_what_start_up_leaves_out() -> None:
    """torch's compiler, sympy and other modules that are slow to import: together they would take
    as long as all else.
    """
    heavy = ("torch._inductor", "torch._dynamo", "sympy", "tensorboard.summary", "zeus", "pandas")
    code = f"""
import sys
from spikerl.cli.main import run
assert run({["train", *SHORT, "total_steps=1", "steps_per_epoch=1", "run_dir=run"]}) == 0
print("imported:", [name for name in {heavy} if name in sys.modules])
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.splitlines()[-1] == "imported: []"


def test_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    said = spikerl("doctor", "json=true")
    answer = json.loads(said.out)
    assert (said.status, answer["usable"]) == (0, True)
    found = {(f["part"], f["name"]): f for f in answer["findings"]}
    versions = {"Pendulum": "v1", "CartPole": "v1", "Acrobot": "v1", "MountainCar": "v0"}
    extra = ("gym", "LunarLander")
    names = [n for n in group_options("env") if n not in extra and "/" not in n]
    ids = [f"{name}-{versions.get(name, 'v5')}" for name in names]
    assert all(found["environment", env_id]["there"] for env_id in ids)
    for part in ("version", "device", "precision", "backend", "energy", "renderer", "output"):
        assert any(kind == part for kind, _ in found), part
    assert all(f["detail"] for f in found.values())
    assert found["extra", "ALE/Pong-v5"]["detail"] == "128 observations"
    screen = found["extra", "ALE/Pong-v5 (env=ALE/Pong_pixels)"]
    assert screen["detail"] == "28224 observations"
    shown = spikerl("doctor").out
    assert "HalfCheetah-v5" in shown
    assert shown.rstrip().endswith("training can run here")


def test_doctor_where_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(config: Any) -> None:
        raise OSError(f"{config.id} [/is] broken")

    monkeypatch.setattr("spikerl.commands.doctor.make_env", breaks)
    said = spikerl("doctor")
    assert said.status == 1
    assert "Ant-v5 [/is] broken" in said.out
    assert said.out.rstrip().endswith("training cannot run here: see the rows above")
    assert json.loads(spikerl("doctor", "json=true").out)["usable"] is False


def process(*args: str) -> subprocess.CompletedProcess[str]:
    """Run the program in a process; the last line on stderr lists the heavy modules it imported."""
    code = (
        "import sys\nfrom spikerl.cli import main as cli\nsys.argv = ['spikerl', *sys.argv[1:]]\n"
        "try:\n    cli.main()\nfinally:\n    print([m for m in ('hydra', 'torch', 'gymnasium')"
        " if m in sys.modules], file=sys.stderr)"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    ("args", "status", "imported"),
    [
        (["--help"], 0, []),
        (["--version"], 0, []),
        (["fly"], 2, []),
        (["train", "config=nowhere"], 2, []),
        (["train", "--cfg", "job"], 0, ["hydra"]),
        (["train", "--help"], 0, ["hydra"]),
        (["-sc", "install=bash"], 0, ["hydra"]),
        (["train", "env=Nope"], 2, ["hydra"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_nothing_heavy_is_imported_to_answer(
    args: list[str], status: int, imported: list[str]
) -> None:
    done = process(*args)
    assert done.returncode == status
    assert done.stderr.splitlines()[-1] == str(imported)


@pytest.mark.parametrize(
    ("line", "offers"),
    [
        (
            "experiment=popsan/t",
            [f"experiment=popsan/td3{which}" for which in ("", "_poisson", "_sparse")],
        ),
        ("experiment=x", []),
        ("actor=m", ["actor=mlp"]),
    ],
)
def test_completion(line: str, offers: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMP_LINE", f"spikerl train env=Ant {line}")
    said = spikerl("-sc", "query=bash")
    assert (said.status, said.out.split()) == (0, offers)


def test_usage() -> None:
    assert spikerl().status == 2
    for word in ("--help", "-h", "help"):
        assert spikerl(word).out == spikerl().out
    assert spikerl("--version").out.startswith("spikerl ")


def test_a_reader_that_goes_away() -> None:
    command = f"{sys.executable} -m spikerl train --help | head -n 1"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        capture_output=True,
        text=True,
        env=os.environ,
    )
    assert done.stdout.startswith("spikerl train ")
    assert "Traceback" not in done.stderr
