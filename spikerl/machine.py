"""The machine's device and cores, how much of them a run uses, and the versions of software."""

from __future__ import annotations

import hashlib
import math
import os
import platform
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from spikerl.errors import BadRequest
from spikerl.types import Resolved

ROOT = Path(__file__).resolve().parent.parent  # of a checkout
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")

GROUPS, CGROUP = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def cores() -> int:
    """Cores that this process may run on, at most as many as a container's quota allows."""
    known = hasattr(os, "sched_getaffinity")
    here = len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
    return max(min(here, int(cpu_quota())), 1)


def cpu_quota(groups: Path = GROUPS, root: Path = CGROUP) -> float:
    """Processor seconds per second that the control groups of this process may use, at most 4096.

    cgroup v2 says so in cpu.max, v1 in two files.
    """
    names = ("cpu", "cpu,cpuacct", "cpuacct,cpu")
    return min([4096.0, *map(_quota_of, control_groups(names, groups, root))])


def control_groups(names: Sequence[str], groups: Path, root: Path) -> Iterator[Path]:
    """The folders of this process's control groups, and of their parents, which limit it too; of
    cgroup v1, only those of the controllers with these `names`.
    """
    with suppress(OSError):
        for line in groups.read_text().splitlines():
            _, name, path = line.split(":", 2)
            if name not in ("", *names):
                continue
            top = root / name
            folder = top / path.lstrip("/")
            yield from (p for p in (folder, *folder.parents) if p.is_relative_to(top))


def _quota_of(group: Path) -> float:
    """The quota of one control group; infinite where it sets none."""
    try:
        limit = group / "cpu.max"
        names = [] if limit.exists() else ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        words = [(group / name).read_text() for name in names] or limit.read_text().split()
        quota, period = map(float, words)
    except (OSError, ValueError):  # also for the word max
        return math.inf
    return quota / period if quota > 0 and period > 0 else math.inf


def resolve_device(asked: str) -> Resolved:
    """Resolve `auto`, `cpu`, `cuda` or `cuda:N` to a device that exists here."""
    if asked == "auto":
        if torch.cuda.is_available():
            return Resolved("cuda:0", "a CUDA device is there")
        return Resolved("cpu", "no CUDA device")
    kind, _, index = asked.partition(":")
    if kind == "cpu" and not index:
        return Resolved("cpu", "requested")
    if kind != "cuda" or not (index.isdecimal() or not index):
        raise BadRequest("device", asked, "give auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(index or 0) >= count:
        raise BadRequest("device", asked, f"{count} CUDA devices are visible here; use device=cpu")
    return Resolved(f"cuda:{int(index or 0)}", "requested")


def current_device(choice: str) -> torch.device:
    """The device of this name; a GPU also becomes the current one, on which graphs are recorded."""
    device = torch.device(choice)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


# Rows of a batch up to which a second thread in calls of the C++ library gains at most a fifth on
# idle cores, and loses a tenth on busy ones: measured at 100 (docs/NEGATIVE.md).
ONE_THREAD_ROWS = 128


def resolve_threads(asked: int | None, workers: int, rows: int | None = None) -> Resolved:
    """Threads of each of the `workers` that share this process's cores: by default an equal share,
    or one where an update is a call of the C++ library on few `rows` (None: it is not).
    """
    if asked is not None:
        return Resolved(str(asked), "requested")
    given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if given.isdecimal() and 0 < int(given) <= 4096:
        return Resolved(str(int(given)), "OMP_NUM_THREADS")
    if rows is not None and rows <= ONE_THREAD_ROWS and cores() > workers:
        return Resolved("1", f"batches of {rows} gain little from more")
    sharers = f"{workers} worker{'s' if workers > 1 else ''}"
    return Resolved(str(max(cores() // workers, 1)), f"{cores()} cores over {sharers}")


def describe() -> dict[str, Any]:
    """Hardware facts that a result is recorded with."""
    flags: list[str] = []
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        text = cpuinfo.read_text()
        fields = dict(
            (name.strip(), value.strip())
            for name, _, value in (line.partition(":") for line in text.splitlines())
            if name.strip()
        )
        model = fields.get("model name", model)
        present = set(fields.get("flags", fields.get("Features", "")).split())
        flags = [flag for flag in FLAGS if flag in present]
    return {"cpu": model, "cores": cores(), "cpu_flags": flags, "gpus": gpus(),
            "platform": platform.platform()}  # fmt: skip


def gpus() -> list[str]:
    """The names of the GPUs that are visible."""
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


PACKAGES = ("torch", "numpy", "gymnasium", "mujoco", "hydra-core", "omegaconf")


@cache
def versions() -> dict[str, str]:
    """Versions of python, spikerl and of every package that numbers depend on, read once."""
    installed = {"python": platform.python_version()}
    for package in ("spikerl", *PACKAGES):
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            installed[package] = "unknown"
    return installed


def git_state() -> dict[str, str | bool | None]:
    """Commit and dirty flag of spikerl's own checkout; null where it is installed without one."""
    if not (ROOT / ".git").exists():
        return {"commit": None, "dirty": None}
    try:
        commit = _git(ROOT, "rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_git(ROOT, "status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}


@cache
def code_version() -> str | None:
    """The commit, and a checksum of uncommitted changes; None where no commit is known."""
    if (commit := git_state()["commit"]) is None:
        return None
    changes = _git(ROOT, "diff", "HEAD", "--", "spikerl", "conf")
    known = f" with changes {hashlib.sha256(changes.encode()).hexdigest()[:12]}"
    return f"{str(commit)[:12]}{known if changes else ''}"


def _git(root: Path, *args: str) -> str:
    command = ["git", "-C", str(root), *args]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()
