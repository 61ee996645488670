"""A launcher's variables count if they are complete and consistent; else one line says why not."""

from __future__ import annotations

import os
from typing import Any

import pytest
from shell import refusal, spikerl

from spikerl.distributed import hosts, launchers
from spikerl.distributed.process_lifetime import die_with_launcher
from spikerl.distributed.world import BackendConfig, resolve_backend

MEETING = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
STEP = {
    "SLURM_JOB_ID": "407",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2",
    "SLURM_STEP_NODELIST": "vm",
    "SLURM_NODEID": "0",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
}


@pytest.fixture
def environ(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An environment without variables of a launcher."""
    monkeypatch.setattr(os, "environ", {"PATH": os.environ["PATH"]})
    return os.environ  # type: ignore[return-value]


IGNORED = [
    ({"PMI_RANK": "0"}, "PMI_RANK=0: ignored, as it comes without PMI_SIZE"),
    ({"RANK": "1"}, "RANK=1: ignored, as it comes without WORLD_SIZE"),
    ({"RANK": ""}, "RANK=: ignored, as it is empty"),
    ({"LOCAL_RANK": "1"}, "LOCAL_RANK=1: ignored, as it comes without RANK"),
    ({"WORLD_SIZE": "2", "LOCAL_RANK": "1"},
     "WORLD_SIZE=2 LOCAL_RANK=1: ignored, as it comes without RANK"),
    ({"RANK": "0", "WORLD_SIZE": "1"},
     "RANK=0 WORLD_SIZE=1: ignored, as it comes without MASTER_ADDR"),
    ({"OMPI_COMM_WORLD_LOCAL_RANK": "1"},
     "OMPI_COMM_WORLD_LOCAL_RANK=1: ignored, as it comes without OMPI_COMM_WORLD_RANK"),
    ({**STEP, "SLURM_PTY_PORT": "4000"},
     "SLURM_STEP_NUM_TASKS=2: ignored, as it is of a shell that srun --pty started"),
    ({"SLURM_STEP_NUM_TASKS": "2"},
     "SLURM_STEP_NUM_TASKS=2: ignored, as it comes without SLURM_PROCID"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "line"), IGNORED)
def test_what_is_ignored(
    given: dict[str, str], line: str, environ: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    environ |= given
    assert not launchers.ranked()
    assert capsys.readouterr().err == f"spikerl: {line}\n"
    assert not launchers.ranked()  # the line is printed once
    assert capsys.readouterr().err == ""
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & environ.keys()


WRONG = [
    ({"RANK": "2", "WORLD_SIZE": "2", **MEETING}, "RANK=2: WORLD_SIZE=2 has ranks from 0"),
    ({"RANK": "x", "WORLD_SIZE": "2", **MEETING}, "RANK=x: a launcher gives a whole number"),
    ({"RANK": "0", "WORLD_SIZE": "-1", **MEETING}, "WORLD_SIZE=-1: a launcher gives a whole"),
    ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR=null: RANK and WORLD_SIZE=2 are set"),
    ({"RANK": "0", "WORLD_SIZE": "2", **MEETING, "LOCAL_RANK": "2"}, "LOCAL_RANK=2: there are 2"),
    ({"RANK": "0", "WORLD_SIZE": "2", **MEETING, "LOCAL_WORLD_SIZE": "4"}, "LOCAL_WORLD_SIZE=4: "),
    ({"PMI_RANK": "3", "PMI_SIZE": "2"}, "PMI_RANK=3: PMI_SIZE=2 has ranks from 0"),
    ({"PMI_RANK": "1", "PMI_SIZE": "2", "RANK": "0", "WORLD_SIZE": "2"},
     "RANK=0: mpiexec says PMI_RANK=1; unset it"),
    ({"RANK": "0", "WORLD_SIZE": "2", **MEETING, "MASTER_PORT": "99999"}, "MASTER_PORT=99999: giv"),
    ({"RANK": "0", "WORLD_SIZE": "2", **MEETING, "MASTER_PORT": "x"}, "MASTER_PORT=x: a launcher"),
    ({**STEP, "SLURM_STEP_NODELIST": "[a"}, "SLURM_STEP_NODELIST=[a: Slurm gives a list of nodes"),
    ({**STEP, "SLURM_PROCID": "2"}, "SLURM_PROCID=2: SLURM_STEP_NUM_TASKS=2 has ranks"),
    ({**STEP, "SLURM_NODEID": "1"}, "SLURM_NODEID=1: SLURM_STEP_TASKS_PER_NODE has 1 nodes"),
    ({**STEP, "SLURM_STEP_ID": "batch"}, "SLURM_STEP_ID=batch: a launcher gives a whole number"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "line"), WRONG)
def test_what_contradicts_itself(given: dict[str, str], line: str, environ: dict[str, str]) -> None:
    environ |= given
    assert str(refusal(launchers.ranked)).startswith(line)


def test_an_mpi_of_one_process_is_no_launcher(
    environ: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """An interactive srun sets such variables, but workers are started from its shell."""
    environ |= {"PMI_RANK": "0", "PMI_SIZE": "1", "MPI_LOCALRANKID": "0"}
    assert not launchers.ranked()
    assert launchers.mpi_set() is None
    # A worker that torch's elastic agent started there.
    environ |= {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", **MEETING}
    assert launchers.ranked()
    assert resolve_backend(BackendConfig(name="auto"), "cpu", 2).choice == "gloo"
    assert capsys.readouterr().err == ""


def test_torchrun_inside_mpiexec(environ: dict[str, str]) -> None:
    environ |= {"PMI_RANK": "1", "PMI_SIZE": "2", "RANK": "4", "WORLD_SIZE": "8", **MEETING}
    assert launchers.ranked()
    assert (environ["RANK"], launchers.mpi_set()) == ("4", None)


def test_a_task_alone_shares_its_cores_among_its_workers(environ: dict[str, str]) -> None:
    environ |= {**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_CPUS_ON_NODE": "4096"}
    assert not hosts.has_own("cores")


def test_variables_that_are_left_over_end_no_process(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("spikerl.distributed.process_lifetime.die_with_parent", asked.append)
    environ |= {"TORCHELASTIC_RUN_ID": "x", "PMI_RANK": "0"}
    die_with_launcher()
    assert asked == []


@pytest.mark.parametrize("given", [{"LOCAL_RANK": "1"}, {"PMI_RANK": "1"}])
def test_a_refusal_is_seen_whatever_is_left_over(
    given: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    said = spikerl("train", "env=Nope")
    assert said.status == 2
    assert "spikerl: env=Nope: no such option" in said.err


def test_a_launcher_starts_no_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", **MEETING}.items():
        monkeypatch.setenv(name, value)
    said = spikerl("train", "-m", "seed=0,1")
    assert said.line.startswith("-m=2: a launcher started several workers")
