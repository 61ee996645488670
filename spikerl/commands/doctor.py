"""What this machine has, and why what is missing is missing."""

from __future__ import annotations

import ctypes.util
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed
from rich.console import Console
from rich.table import Table

from spikerl import kernels, machine
from spikerl.config.yaml_file import group_options
from spikerl.energy import meter as energy
from spikerl.envs.make import EnvConfig, make_env
from spikerl.errors import BadRequest
from spikerl.machine import git_state, versions
from spikerl.models.precision import DTYPES, PrecisionConfig, check_precision
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
    found = list(examine())
    usable = all(f.there for f in found if f.part in ("environment", "output"))
    if request.json:
        print(json.dumps({"usable": usable, "findings": [f._asdict() for f in found]}))
        return 0 if usable else 1
    table = Table("part", "name", "", "detail")
    for f in found:
        table.add_row(f.part, f.name, "yes" if f.there else "no", f.detail)
    Console(soft_wrap=True, markup=False, emoji=False).print(table)
    print("training can run here" if usable else "training cannot run here: see the rows above")
    return 0 if usable else 1


def examine() -> Iterator[Finding]:
    for name, version in versions().items():
        yield Finding("version", name, version != "unknown", version)
    commit, dirty = git_state().values()
    detail = f"{commit}{', changed since' if dirty else ''}" if commit else "not a git checkout"
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
    for name, device in (("cpu", "cpu"), ("triton", machine.resolve_device("auto").choice)):
        try:
            kernel = kernels.resolve(kernels.KernelConfig(name=name, path=None), device)
        except BadRequest as error:
            yield Finding("kernel", name, False, error.args[2])
        else:
            yield Finding("kernel", name, True, f"{kernel.choice}; spiking actors and critics")


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
        try:
            check_precision(PrecisionConfig(name=name, actor="fp32", critic=name), device)
            yield Finding("precision", name, True, f"on {device}")
        except BadRequest as error:
            yield Finding("precision", name, False, str(error))


def backends() -> Iterator[Finding]:
    d = torch.distributed
    yield Finding("backend", "gloo", d.is_gloo_available(), "for workers on the CPU")
    nccl = d.is_nccl_available() and torch.cuda.is_available()
    detail = "for a CUDA device per worker" if nccl else "needs CUDA devices"
    yield Finding("backend", "nccl", nccl, detail)
    yield Finding("backend", "mpi", False, "not supported by this version")


def meters() -> Iterator[Finding]:
    device = torch.device(machine.resolve_device("auto").choice)
    meter = energy.resolve(energy.EnergyConfig(name="auto", file=None), device=device)
    measured = meter.choice != "none"
    detail = meter.reason if measured else f"joules will be null: {meter.reason}"
    yield Finding("energy", meter.choice if measured else "zeus", measured, detail)


def environments() -> Iterator[Finding]:
    for name in (n for n in group_options("env") if n != "gym"):
        version = "v1" if name == "Pendulum" else "v5"
        config = EnvConfig(
            name=name,
            version=version,
            id=f"{name}-{version}",
            max_episode_steps=None,
            vectorizer="sync",
        )
        try:
            env = make_env(config)
            env.reset(seed=0)
            env.close()
            yield Finding("environment", config.id, True, f"{env.size} observations")
        except Exception as error:  # whatever is wrong with an installation is what we report
            yield Finding("environment", config.id, False, str(error))


def renderers() -> Iterator[Finding]:
    for name, library, package in (("egl", "EGL", "libegl1"), ("osmesa", "OSMesa", "libosmesa6")):
        path = ctypes.util.find_library(library)
        hint = f"lib{library} not found; Debian's package is {package}"
        yield Finding("renderer", name, path is not None, path or hint)


def outputs() -> Finding:
    folder = Path("outputs").absolute()
    while not folder.exists():
        folder = folder.parent
    there = os.access(folder, os.W_OK | os.X_OK)
    return Finding("output", "outputs/", there, f"{folder} can{'' if there else 'not'} be written")
