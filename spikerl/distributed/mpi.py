"""How mpiexec is called, and how its workers part; nothing heavy is imported here."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

from spikerl.errors import first_line

EXTRA = "pip install 'spikerl[mpi]' brings mpi4py and MPICH"

# How mpiexecs begin to speak of a worker that failed; others may print such lines, too.
LAST_WORDS = re.compile(r"={20}|-{20}|Abort\(\d+\)|application called MPI_Abort")


def _mpi() -> ModuleType:
    """The library, which only workers initialise: an error of theirs ends the whole process."""
    import mpi4py

    mpi4py.rc.initialize = False
    from mpi4py import MPI

    return MPI


def missing() -> str | None:
    """Why there is no MPI here, if so, and what brings it."""
    try:
        _mpi()
    except ImportError:
        return f"mpi4py is not installed; {EXTRA}"
    except RuntimeError as error:
        return f"no MPI library can be loaded ({first_line(error)}); {EXTRA}"
    return None


def library() -> str:
    """The name and version of the MPI library; `missing` has said that there is one."""
    return " ".join(_mpi().Get_library_version().split("\n")[0].split())


def mpiexec(workers: int) -> list[str] | None:
    """The command that starts so many workers on this machine; None where there is none."""
    beside = Path(sys.executable).parent / "mpiexec"
    executable = str(beside) if beside.exists() else shutil.which("mpiexec")
    if executable is None:
        return None
    more = []
    # In a job of Slurm both would start them through srun, on all machines of the job.
    if library().startswith("MPICH"):
        more = ["-launcher", "fork", "-rmk", "user"]
    if library().startswith("Open MPI"):
        os.environ |= {"PRTE_MCA_plm": "^slurm", "PRTE_MCA_ras": "^slurm"}
        # It refuses more workers than cores, and to run as root, unless told.
        more = ["--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"]
        os.environ |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return [executable, "-n", str(workers), *more]


def joined() -> bool:
    """Whether this process met others over MPI."""
    mpi = getattr(sys.modules.get("mpi4py"), "MPI", None)
    return mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized()


def leave() -> None:
    """Leave the others, all together; mpiexec takes one that does not for a failed one."""
    if joined():
        _mpi().Finalize()


def abort() -> None:
    """End all workers, where they met over MPI: left alone, the others would wait for ever."""
    if joined():
        sys.stdout.flush()
        sys.stderr.flush()
        _mpi().COMM_WORLD.Abort(1)
