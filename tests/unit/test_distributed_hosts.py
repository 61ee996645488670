"""What srun tells a process in its environment, and how machines reach each other."""

from __future__ import annotations

import os
import socket
import time

import pytest
import torch

from spikerl.distributed import hosts, launchers
from spikerl.distributed.launchers import ranked
from spikerl.distributed.world import (
    BackendConfig,
    join,
    resolve_backend,
    resolve_world_size,
)
from spikerl.errors import BY_DESIGN, RendezvousFailed
from spikerl.machine import cores
from spikerl.training.start import own_device

# The environment of task 4 of 5, the second one on the second of two nodes, as in Slurm 22.05.
STEP = {
    "SLURM_JOB_ID": "407",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "3,2",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "1",
    "SLURM_CPUS_ON_NODE": "1",
}
RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environ(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An environment without variables of a launcher."""
    monkeypatch.setattr(os, "environ", {"PATH": os.environ["PATH"]})
    return os.environ  # type: ignore[return-value]


def adopted(environ: dict[str, str]) -> list[str | None]:
    launchers.adopt()
    return [environ.get(name) for name in RANK]


def test_a_task_of_a_step(environ: dict[str, str]) -> None:
    environ |= STEP
    port = "25061"  # 20000 + 37 * 407 % 10000 + 2
    assert adopted(environ) == ["4", "5", "1", "2", "node07", port]
    assert resolve_world_size(None) == 5
    assert (hosts.workers_here(5), hosts.workers_here(8, 2)) == (2, 2)
    environ["SLURM_PROCID"] = "0"
    assert adopted(environ)[0] == "4"  # once adopted, it stays


def test_workers_that_do_not_meet(environ: dict[str, str]) -> None:
    """The error is one line without a traceback."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
        environ |= dict(zip(RANK, ["1", "2", "1", "2", "127.0.0.1", port], strict=True))
        said = f"^worker 1 of 2 did not meet the others at 127.0.0.1:{port}: .*$"
        with pytest.raises(RendezvousFailed, match=said) as apart:
            join("gloo", torch.device("cpu"), 1.0)
    assert "\n" not in str(apart.value)
    assert isinstance(apart.value, BY_DESIGN)


def test_an_address_that_the_user_gave_stays(environ: dict[str, str]) -> None:
    environ |= {**STEP, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert adopted(environ)[4:] == ["10.0.0.1", "29500"]


@pytest.mark.parametrize("tasks", ["1", None])
def test_no_rank(environ: dict[str, str], tasks: str | None) -> None:
    """No rank in a step of one task, as in submitit's jobs, nor in a batch script (no step)."""
    environ |= STEP | ({"SLURM_STEP_NUM_TASKS": tasks} if tasks else {})
    if tasks is None:
        del environ["SLURM_STEP_NUM_TASKS"]
        environ["SLURM_NTASKS"] = "5"
    assert adopted(environ) == [None] * 6
    assert not ranked()
    assert (resolve_world_size(None), resolve_world_size(8)) == (1, 8)
    assert (hosts.workers_here(8), hosts.workers_here(8, 2)) == (8, 4)


def test_torchrun_inside_srun_and_an_mpi_under_it(environ: dict[str, str]) -> None:
    agents = ["6", "8", "2", "4", "node07", "29500"]
    environ |= STEP | dict(zip(RANK, agents, strict=True))
    assert adopted(environ) == agents
    for name in RANK:
        del environ[name]
    environ |= {"PMI_RANK": "4", "PMI_SIZE": "5"}
    assert adopted(environ) == ["4", "5", "1", "2", None, None]


def test_first_host() -> None:
    lists = ("vm", "a,b", "node[07-12],gpu3", "node[7,9]", "rack-2-node[003]", "gpu3,node[07-12]")
    assert [launchers.first_host(nodes) for nodes in lists] == [
        "vm", "a", "node07", "node7", "rack-2-node003", "gpu3"]  # fmt: skip


def test_tasks_per_node() -> None:
    assert launchers.tasks_per_node("2") == [2]
    assert launchers.tasks_per_node("16(x3),4,1(x2)") == [16, 16, 16, 4, 1, 1]


def test_own_cores_and_gpus(environ: dict[str, str]) -> None:
    environ["SLURM_CPUS_ON_NODE"] = str(cores() + 1)  # more than this process may use
    assert not hosts.has_own("cores")
    environ |= STEP | {"SLURM_CPUS_ON_NODE": str(cores())}
    assert not hosts.has_own("cores")
    environ["SLURM_CPUS_ON_NODE"] = str(cores() + 1)
    assert (hosts.has_own("cores"), hosts.has_own("gpus")) == (True, False)
    environ["SLURM_GPUS_PER_TASK"] = "1"
    assert hosts.has_own("gpus")


def test_workers_of_torchrun_in_a_task_share_its_cores_and_gpus(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`srun torchrun` with one task on each of two machines and four workers in each task."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    cores_here = {"SLURM_CPUS_ON_NODE": "4096", "SLURM_GPUS_PER_TASK": "2"}
    environ |= STEP | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", **cores_here}
    environ |= dict(zip(RANK, ["6", "8", "2", "4", "node07", "29500"], strict=True))
    assert adopted(environ)[:4] == ["6", "8", "2", "4"]
    assert not hosts.has_own("cores")
    assert resolve_backend(BackendConfig(name="auto"), "cuda:0", 8).choice == "gloo"


def test_a_device_for_each_worker_of_a_machine(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """nccl is chosen if this machine has a GPU for each of its own workers."""
    seen = 4
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)

    def choice(*asked: int, name: str = "auto") -> str:
        return resolve_backend(BackendConfig(name=name), "cuda:0", *asked).choice

    assert (choice(8), choice(8, 2), choice(8, 2, name="nccl")) == ("gloo", "nccl", "nccl")
    environ["LOCAL_WORLD_SIZE"] = "4"
    assert choice(8) == "nccl"
    seen = 1
    assert choice(8) == "gloo"
    environ |= STEP | {"SLURM_GPUS_PER_TASK": "1"}
    assert choice(8) == "nccl"


def test_a_worker_alone_has_the_device_that_was_asked_for(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a launcher, too; several workers take the devices in turn."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    environ |= dict(zip(RANK, ["0", "1", "0", "1", "127.0.0.1", "29500"], strict=True))
    assert str(own_device("cuda:1")) == "cuda:1"
    environ |= {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4"}
    assert str(own_device("cuda:1")) == "cuda:0"
    assert str(own_device("cpu")) == "cpu"


def test_mpiexec_says_how_many_are_on_this_machine(environ: dict[str, str]) -> None:
    said = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
    environ |= said
    assert adopted(environ)[:4] == ["5", "8", "1", "4"]
    assert hosts.workers_here(8) == 4


def test_listening() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert hosts.cannot_reach("127.0.0.1", port, 5) is None
        taken = hosts.cannot_listen("127.0.0.1", port)
    assert taken == "Address already in use; give an address of machine 0 and a free port there"
    assert hosts.cannot_listen("127.0.0.1", port) is None
    begun = time.monotonic()
    nobody = hosts.cannot_reach("127.0.0.1", port, 0.5)
    assert nobody == "nobody answered within 0.5 s (Connection refused)"
    assert 0.5 <= time.monotonic() - begun < 2
    assert hosts.cannot_listen("nowhere.invalid", port)


def test_the_interface_to_a_host() -> None:
    assert hosts.interface_to("127.0.0.1") == "lo"
    assert hosts.interface_to("nowhere.invalid") is None
