"""Which launcher started this process, if one did: torchrun, mpiexec or srun.

Each launcher sets a group of environment variables, which a shell started by it also passes on to
unrelated commands. A group counts only if it is complete, consistent, and of several processes.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable

from spikerl.errors import BadRequest

TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
MEETING = ("MASTER_ADDR", "MASTER_PORT")
# Variables of MPICH's and Open MPI's mpiexec: rank and number of processes, then the same on this
# machine; the latter two are not set by Slurm's own MPI launcher.
MPI = (
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
     "OMPI_COMM_WORLD_LOCAL_SIZE"),
)  # fmt: skip
SLURM = ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_JOB_ID",
         "SLURM_STEP_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE")  # fmt: skip


def ranked() -> bool:
    """Whether a launcher, which may be this program, has given this process a rank."""
    adopt()
    return "RANK" in os.environ


def several() -> bool:
    """Whether this process is one of several ranked ones."""
    return ranked() and int(os.environ["WORLD_SIZE"]) > 1


def is_first() -> bool:
    """Whether this is the first worker, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def adopt() -> None:
    """Reduce the environment to one complete set of torchrun's variables, or none.

    Variables of an incomplete set are removed with a message. An inconsistent set raises
    BadRequest.
    """
    env = os.environ
    _ignore((n for n in (*TORCH, *MEETING, *sum(MPI, ()), *SLURM) if env.get(n) == ""), "is empty")
    for names in (TORCH, *MPI):
        if lacking := [name for name in names[:2] if name not in env]:
            _ignore((name for name in names if name in env), f"comes without {lacking[0]}")
    if mpi := mpi_set():
        _check(*mpi)
        _check_agrees(mpi)
        for name, other in zip(TORCH, mpi, strict=True):
            if other in env:
                env.setdefault(name, env[other])
    elif "RANK" in env:
        _check(*TORCH[:2])
        if lacking := [name for name in MEETING if name not in env]:
            if env["WORLD_SIZE"] != "1":
                remedy = f"RANK and WORLD_SIZE={env['WORLD_SIZE']} are set; set it, or none of them"
                raise BadRequest(lacking[0], None, remedy)
            _ignore([name for name in TORCH if name in env], f"comes without {lacking[0]}")
    if step := _step():
        if "RANK" not in env:
            # Each step gets a port of its own, as steps of a job may run at the same time; it is
            # below the range of ports that systems assign.
            place = 37 * int(env["SLURM_JOB_ID"]) + int(env["SLURM_STEP_ID"])
            env.setdefault("MASTER_ADDR", first_host(env["SLURM_STEP_NODELIST"]))
            env.setdefault("MASTER_PORT", str(20000 + place % 10000))
            env |= {"RANK": env["SLURM_PROCID"], "WORLD_SIZE": str(step)}
        if "LOCAL_RANK" not in env:  # MPI under srun only sets rank and size
            counts = tasks_per_node(env["SLURM_STEP_TASKS_PER_NODE"])
            env["LOCAL_RANK"] = env["SLURM_LOCALID"]
            env["LOCAL_WORLD_SIZE"] = str(counts[int(env["SLURM_NODEID"])])
    if "RANK" in env:
        _check_local()
    if "MASTER_PORT" in env and not 1 <= _number("MASTER_PORT") <= 65535:
        raise BadRequest("MASTER_PORT", env["MASTER_PORT"], "give 1 to 65535")


def mpi_set() -> tuple[str, str, str, str] | None:
    """The names of mpiexec's variables, if it started this process as one of several.

    None if torchrun, running under mpiexec, started it with other ranks and a place to meet.
    """
    env = os.environ
    for names in MPI:
        rank, size = (env.get(name, "") for name in names[:2])
        if rank and size and size != "1":
            inner = all(name in env for name in (*TORCH[:2], *MEETING))
            same = (env.get("RANK"), env.get("WORLD_SIZE")) == (rank, size)
            return names if same or not inner else None
    return None


def _step() -> int | None:
    """Number of tasks of the Slurm step that this process is a task of; None unless several."""
    env = os.environ
    if env.get(SLURM[0], "1") == "1":
        return None
    if any(name.startswith("SLURM_PTY_") for name in env):
        _ignore(SLURM[:1], "is of a shell that srun --pty started")
        return None
    if lacking := [name for name in SLURM if name not in env]:
        _ignore(SLURM[:1], f"comes without {lacking[0]}")
        return None
    _check("SLURM_PROCID", SLURM[0])
    for name in ("SLURM_LOCALID", "SLURM_NODEID", "SLURM_JOB_ID", "SLURM_STEP_ID"):
        _number(name)
    nodes = len(tasks_per_node(env["SLURM_STEP_TASKS_PER_NODE"]))
    if _number("SLURM_NODEID") >= nodes:
        value = env["SLURM_NODEID"]
        raise BadRequest("SLURM_NODEID", value, f"SLURM_STEP_TASKS_PER_NODE has {nodes} nodes")
    return _number(SLURM[0])


def _check(rank: str, size: str, *_: str) -> None:
    if _number(rank) >= _number(size):
        wrong = f"{size}={os.environ[size]} has ranks from 0 up to that; set both, or neither"
        raise BadRequest(rank, os.environ[rank], wrong)


def _check_agrees(mpi: tuple[str, str, str, str]) -> None:
    for name, other in zip(TORCH[:2], mpi, strict=False):
        if os.environ.get(name, os.environ[other]) != os.environ[other]:
            wrong = f"mpiexec says {other}={os.environ[other]}; unset it"
            raise BadRequest(name, os.environ[name], wrong)


def _check_local() -> None:
    env = os.environ
    size = _number("WORLD_SIZE")
    here = _number("LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in env else size
    if not 1 <= here <= size:
        raise BadRequest("LOCAL_WORLD_SIZE", here, f"WORLD_SIZE={size} are all there are")
    if "LOCAL_RANK" in env and _number("LOCAL_RANK") >= here:
        raise BadRequest("LOCAL_RANK", env["LOCAL_RANK"], f"there are {here} on this machine")


def _number(name: str) -> int:
    value = os.environ[name]
    if not re.fullmatch(r"[0-9]{1,18}", value):
        raise BadRequest(name, value, "a launcher gives a whole number here; unset it")
    return int(value)


def _ignore(names: Iterable[str], why: str) -> None:
    """Remove variables from the environment, so that nothing reads them, with a message."""
    ignored = {name: os.environ.pop(name) for name in list(names)}
    if ignored:
        said = " ".join(f"{name}={value}" for name, value in ignored.items())
        print(f"spikerl: {said}: ignored, as it {why}", file=sys.stderr)


def first_host(nodes: str) -> str:
    """The first host in a list in Slurm's notation, such as node[07-12],gpu3."""
    match = re.match(r"([^\[,]+)(?:\[(\d+))?", nodes)
    if match is None:
        raise BadRequest("SLURM_STEP_NODELIST", nodes, "Slurm gives a list of nodes here; unset it")
    return match[1] + (match[2] or "")


def tasks_per_node(counts: str) -> list[int]:
    """Tasks on each node, from a list in Slurm's notation: 4(x2),3 is 4, 4, 3."""
    counts_and_times = re.findall(r"(\d+)(?:\(x(\d+)\))?", counts)
    return [int(count) for count, times in counts_and_times for _ in range(int(times or 1))]
