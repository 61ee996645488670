"""The mpiexec command, and how MPI workers end; mpi4py is imported only on use."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

from spikerl.errors import first_line

EXTRA = "pip install 'spikerl[mpi]' brings mpi4py and MPICH"

# Beginnings of mpiexec's reports of a failed worker; other programs may print such lines too.
LAST_WORDS = re.compile(r"={20}|-{20}|Abort\(\d+\)|application called MPI_Abort")


def _mpi() -> ModuleType:
    """mpi4py's MPI module, not initialised: only workers do that, as MPI errors end a process."""
    import mpi4py

    mpi4py.rc.initialize = False
    from mpi4py import MPI

    return MPI


def missing() -> str | None:
    """Why MPI is not usable here and how to install it; None if it is usable."""
    try:
        _mpi()
    except ImportError:
        return f"mpi4py is not installed; {EXTRA}"
    except RuntimeError as error:
        return f"no MPI library can be loaded ({first_line(error)}); {EXTRA}"
    return None


def library() -> str:
    """The name and version of the MPI library; only call it if `missing` returned None."""
    return " ".join(_mpi().Get_library_version().split("\n")[0].split())


def mpiexec(workers: int) -> list[str] | None:
    """The command that starts `workers` processes on this machine; None without an mpiexec."""
    beside = Path(sys.executable).parent / "mpiexec"
    executable = str(beside) if beside.exists() else shutil.which("mpiexec")
    if executable is None:
        return None
    more = []
    # Within a Slurm job both would otherwise use srun, and start workers on all its machines.
    if library().startswith("MPICH"):
        more = ["-launcher", "fork", "-rmk", "user"]
    if library().startswith("Open MPI"):
        os.environ |= {"PRTE_MCA_plm": "^slurm", "PRTE_MCA_ras": "^slurm"}
        # By default it refuses more workers than cores, and to run as root.
        more = ["--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"]
        os.environ |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return [executable, "-n", str(workers), *more]


def joined() -> bool:
    """Whether this process has joined others over MPI and not left them."""
    mpi = getattr(sys.modules.get("mpi4py"), "MPI", None)
    return mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized()


def leave() -> None:
    """Leave the others, a collective call; mpiexec treats a worker that does not as failed."""
    if joined():
        _mpi().Finalize()


def abort() -> None:
    """End all workers if they joined over MPI; otherwise the others would wait forever."""
    if joined():
        sys.stdout.flush()
        sys.stderr.flush()
        _mpi().COMM_WORLD.Abort(1)
