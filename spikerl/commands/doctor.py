"""`spikerl doctor`: what this machine has, and why other parts are missing."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed
from rich.table import Table
from rich.text import Text

from spikerl import kernels, machine
from spikerl.config.yaml_file import group_options, option_file, read_config
from spikerl.distributed import mpi
from spikerl.energy import meter as energy
from spikerl.envs import extras, video
from spikerl.envs.config import EnvConfig
from spikerl.envs.make import make_env
from spikerl.errors import DONE, FAILED, BadRequest
from spikerl.machine import git_state, versions
from spikerl.models.precision import DTYPES, PrecisionConfig, check_precision, why_slow
from spikerl.output import answer
from spikerl.runs.display import Screen
from spikerl.schema import parse


@dataclass(kw_only=True)
class DoctorRequest:
    json: bool


class Finding(NamedTuple):
    part: str
    name: str
    there: bool
    detail: str  # what it is, or why it is missing and what would bring it


def main(data: dict[str, Any], argv: Sequence[str]) -> int:
    """`spikerl doctor`: 0 if training can run here, 1 if not."""
    request = parse(DoctorRequest, data)
    findings = list(examine())
    usable = all(f.there for f in findings if f.part in ("environment", "output"))
    console = Screen(markup=False, emoji=False, highlight=False)
    if request.json:
        answer({"usable": usable, "findings": [f._asdict() for f in findings]})
        return DONE if usable else FAILED
    table = Table("part", "name", "", "detail", box=None, pad_edge=False)
    for f in findings:
        table.add_row(f.part, f.name, "yes" if f.there else "no", Text(f.detail, overflow="fold"))
    console.print(table)
    can = "can" if usable else "cannot"
    console.print(f"training {can} run here" + ("" if usable else ": see the rows above"))
    return DONE if usable else FAILED


def examine() -> Iterator[Finding]:
    for name, version in versions().items():
        yield Finding("version", name, version != "unknown", version)
    commit, dirty = git_state().values()
    changed = ", changed since" if dirty else ""
    detail = f"{str(commit)[:10]}{changed}" if commit else "not a git checkout"
    yield Finding("version", "git", commit is not None, detail)
    yield from devices()
    yield from backends()
    yield from kernel_findings()
    yield from meters()
    yield from environments()
    yield from renderers()
    yield outputs()


def kernel_findings() -> Iterator[Finding]:
    yield Finding("kernel", "reference", True, "plain PyTorch, on every device")
    device = machine.resolve_device("auto").choice
    for name, on in (("cpu", "cpu"), ("triton", device)):
        if name == "triton" and device == "cpu":
            yield Finding("kernel", name, False, "needs a CUDA device")
            continue
        try:
            kernel = kernels.resolve(kernels.KernelConfig(name=name, path=None), on)
        except BadRequest as error:
            yield Finding("kernel", name, False, error.args[2])
        else:
            better = kernel.reason.removeprefix("requested")  # why a better path was not built
            detail = f"{kernel.choice}{better}; spiking actors and critics"
            yield Finding("kernel", name, True, detail)


def devices() -> Iterator[Finding]:
    here = machine.describe()
    flags = " ".join(here["cpu_flags"]) or "no wide vectors"
    yield Finding("device", "cpu", True, f"{here['cpu']}, {here['cores']} cores, {flags}")
    for i, name in enumerate(here["gpus"]):
        yield Finding("device", f"cuda:{i}", True, name)
    if not here["gpus"]:
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        yield Finding("device", "cuda", False, f"torch sees no GPU; it is built {built}")
    device = torch.device(machine.resolve_device("auto").choice)
    for name in DTYPES:
        precision = PrecisionConfig(name=name, actor="fp32", critic=name)
        try:
            check_precision(precision, device)
        except BadRequest as error:
            yield Finding("precision", name, False, error.args[2])
        else:
            slow = why_slow(precision, str(device))
            yield Finding("precision", name, True, f"on {device}" + (f"; {slow}" if slow else ""))


def backends() -> Iterator[Finding]:
    d = torch.distributed
    yield Finding("backend", "gloo", d.is_gloo_available(), "for workers on the CPU")
    if not torch.cuda.is_available():
        yield Finding("backend", "nccl", False, "needs CUDA devices")
    elif not d.is_nccl_available():
        yield Finding("backend", "nccl", False, "this PyTorch is built without NCCL")
    else:
        yield Finding("backend", "nccl", True, "for a CUDA device per worker")
    missing = mpi.missing()
    if missing is None and (command := mpi.mpiexec(1)):
        yield Finding("backend", "mpi", True, f"{mpi.library()}; {command[0]}")
    else:
        yield Finding("backend", "mpi", False, missing or f"no mpiexec; {mpi.EXTRA}")


def meters() -> Iterator[Finding]:
    device = torch.device(machine.resolve_device("auto").choice)
    meter = energy.resolve(energy.EnergyConfig(name="auto", file=None), device=device)
    measured = meter.choice != "none"
    detail = meter.reason if measured else f"joules will be null: {meter.reason}"
    yield Finding("energy", meter.choice if measured else "zeus", measured, detail)


def environments() -> Iterator[Finding]:
    for option in (n for n in group_options("env") if n != "gym"):
        given = read_config(option_file("env", option))
        name, version = given["name"], given["version"]
        config = EnvConfig(
            name=name,
            version=version,
            id=str(given.get("id", f"{name}-{version}")).replace("${.version}", version),
            max_episode_steps=None,
            vectorizer="sync",
            kwargs=given.get("kwargs"),
            wrappers=given.get("wrappers"),
        )
        part = "extra" if extras.needs(config.id) else "environment"
        shown = f"{config.id} (env={option})" if config.wrappers else config.id
        try:
            env = make_env(config)
            env.reset(seed=0)
            env.close()
            yield Finding(part, shown, True, f"{env.size} observations")
        except Exception as error:  # any fault of an installation is to be reported
            detail = error.args[2] if isinstance(error, BadRequest) else str(error)
            yield Finding(part, shown, False, detail)


def renderers() -> Iterator[Finding]:
    for name, package in video.BACKENDS.items():
        reason = video.why_not(name)
        hint = f"{reason}; Debian's package is {package}"
        yield Finding("renderer", name, reason is None, hint if reason else "draws videos")


def outputs() -> Finding:
    folder = Path("outputs").absolute()
    while not folder.exists() and not folder.is_symlink():
        folder = folder.parent
    there = os.access(folder, os.W_OK | os.X_OK)
    return Finding("output", "outputs/", there, f"{folder} can{'' if there else 'not'} be written")
