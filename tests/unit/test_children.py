"""No Python process that this program starts imports modules from its working folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.launcher.api as agent
from shell import SHORT, spikerl

import spikerl as package
from spikerl.children import PYTHON, safe_path
from spikerl.distributed import hosts, launch, mpi
from spikerl.distributed.world import join, leave

ROOT = Path(package.__file__).parents[1]
# Names of modules that are imported at every start.
NAMES = ("queue", "typing", "socket", "hydra_plugins", "selectors", "random", "own_tools")
ENVIRONMENT = """
import gymnasium as gym
gym.register("Own-v0", entry_point="gymnasium.envs.mujoco.inverted_pendulum_v5:InvertedPendulumEnv")
"""


@pytest.fixture
def poisoned(tmp_path: Path) -> Path:
    """A folder with modules that record their import and fail; beside it a users' library."""
    folder = tmp_path / "here"
    folder.mkdir()
    for name in NAMES:
        text = f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r})\n"
        (folder / f"{name}.py").write_text(text + "raise ImportError\n")
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "own.py").write_text(ENVIRONMENT)
    return folder


@pytest.mark.parametrize(
    "typed",
    [
        pytest.param(["env=gym", "env.id=own:Own-v0", "world_size=2"], marks=pytest.mark.slow),
        pytest.param(
            ["-m", "seed=0,1", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["workers", "joblib"],
)
def test_a_run_amid_modules_of_others(typed: list[str], poisoned: Path) -> None:
    paths = os.pathsep.join([str(ROOT), str(poisoned.parent / "lib")])
    done = subprocess.run(
        [sys.executable, "-m", "spikerl", "train", *SHORT, *typed, "run_dir=../r"],
        cwd=poisoned, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not (poisoned.parent / "ran").exists()


def test_processes_that_others_start(poisoned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(poisoned)
    asks = "import queue"
    with safe_path():
        assert subprocess.run([sys.executable, "-c", asks]).returncode == 0
        with safe_path(None):  # as around users' code
            assert subprocess.run([sys.executable, "-c", asks], capture_output=True).returncode
    assert subprocess.run([*PYTHON, "-c", asks]).returncode == 0
    assert "PYTHONSAFEPATH" not in os.environ
    assert (poisoned.parent / "ran").read_text() == "queue"


def test_a_sweeps_launcher_starts_safe_processes_and_a_job_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spikerl.cli import sweep
    from spikerl.commands import train

    seen: list[str | None] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep.Sweep, "note", lambda *_: seen.append(os.environ["PYTHONSAFEPATH"]))
    monkeypatch.setattr(train, "main", lambda *_: seen.append(os.environ.get("PYTHONSAFEPATH")))
    spikerl("train", "-m", "seed=0")
    assert seen == ["1", None, "1"]


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Records the commands that would start workers, and starts none."""
    calls: list[Any] = []

    def elastic_launch(config: Any, python: str) -> Any:
        calls.append(config)
        return lambda *args: calls.append([python, *args])

    def popen(command: list[str], **settings: Any) -> None:
        calls.append(command)
        raise InterruptedError

    monkeypatch.setattr(agent, "elastic_launch", elastic_launch)
    monkeypatch.setattr(mpi, "mpiexec", lambda workers: ["mpiexec"])
    monkeypatch.setattr(subprocess, "Popen", popen)
    return calls


def workers(nnodes: int = 1) -> launch.Workers:
    return launch.Workers(size=2, threads=1, backend="gloo", timeout_s=1, nnodes=nnodes)


def test_how_workers_are_started(started: list[Any], tmp_path: Path) -> None:
    launch.run_under_agent(tmp_path, workers())
    with pytest.raises(InterruptedError):
        launch.run_under_mpiexec(tmp_path, workers())
    for command in (started[1], started[2][1:]):
        assert command[:4] == [sys.executable, "-P", "-m", "spikerl.commands.worker"]


# --- a machine whose own name leads nowhere ---------------------------------------------------


def test_workers_of_one_machine_meet_on_the_loopback(
    started: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "meet", lambda *_: None)
    launch.run_under_agent(tmp_path, workers())
    launch.run_under_agent(tmp_path, workers(nnodes=2))
    assert [config.local_addr for config in started[::2]] == ["127.0.0.1", None]


@pytest.mark.parametrize(
    ("here", "asked"), [("2", "127.0.0.1"), ("1", "10.0.0.7"), (None, "10.0.0.7")]
)
def test_what_gloo_is_bound_to(
    here: str | None, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.7"}
    given |= {"LOCAL_WORLD_SIZE": here} if here else {}
    hosts_asked: list[str] = []
    monkeypatch.setattr(os, "environ", given)
    monkeypatch.setattr(hosts, "interface_to", hosts_asked.append)
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        join("gloo", torch.device("cpu"))
    leave()
    assert hosts_asked == [asked]


def in_a_place_of_its_own() -> bool:
    return subprocess.run(["unshare", "-u", "hostname", "x"], capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not in_a_place_of_its_own(), reason="needs root and unshare")
def test_a_run_on_such_a_machine(tmp_path: Path) -> None:
    typed = " ".join(["train", *SHORT, "world_size=2", "max_restarts=1", "run_dir=r"])
    script = f"hostname node-that-is-nowhere; exec {sys.executable} -m spikerl {typed}"
    done = subprocess.run(
        ["unshare", "-u", "bash", "-c", script],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


# --- an environment beside one's script --------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        (["env=gym", "env.id=beside:X-v0"], True),
        (["env=gym", "env.id=nowhere:X-v0"], False),
    ],
)
def test_a_module_in_this_folder(
    typed: list[str], hint: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "beside.py").touch()
    line = spikerl("train", *SHORT, *typed).line
    said = "; beside lies in this folder, from which nothing is imported: PYTHONPATH=. spikerl ..."
    assert line.endswith(said) == hint
