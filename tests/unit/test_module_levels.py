"""Imports go downward only, and the lower layers touch no file, clock, Hydra or process group."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import spikerl

ROOT = Path(spikerl.__file__).parent
LEVELS = [
    "types errors seeding schema",
    "linear gradient snn snn.surrogates snn.neurons snn.encoders snn.decoders snn.batchnorm"
    " snn.kernels snn.kernels.reference snn.kernels.native snn.kernels.prepared snn.kernels.cpu"
    " snn.kernels.triton",
    "networks normalize buffers returns",
    "envs snapshots distributed distributed.launch distributed.orphans distributed.mpi"
    " distributed.mpi_group distributed.hosts distributed.sums distributed.world"
    " precision hardware energy counters files versions checkpoint resize runlog view",
    "algos algos.base algos.graphs algos.offpolicy algos.ddpg algos.td3 algos.proxy_td3 algos.sac"
    " algos.ppo",
    "policy evaluate trainer baselines timing roofline",
    "config runfolder session runs importers convert doctor sweep compose completion"
    " bench bench_workers subject configfile footprint pickles",
    "commands worker cli __main__ __init__",
]
LEVEL = {f"spikerl.{name}": i for i, names in enumerate(LEVELS) for name in names.split()}
# What a library that computes has no business with.
OUTSIDE = {"os", "pathlib", "time", "hydra", "torch.distributed"}


def modules() -> dict[str, Path]:
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1] == "__init__" and len(parts) > 1:
            parts = parts[:-1]
        found[".".join(("spikerl", *parts))] = path
    return found


def statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Every import below `node`, inside functions too, but none for the type checker alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield from statements(other)
        elif isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        else:
            yield from statements(child)


def imported(source: str) -> Iterator[str]:
    """Full names; `from spikerl import x` and `from spikerl.x import y` name the module x."""
    for statement in statements(ast.parse(source)):
        if isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names)
            continue
        assert not statement.level, "imports are absolute"
        base = statement.module or ""
        for alias in statement.names:
            inner = f"{base}.{alias.name}"
            yield inner if inner in MODULES or inner in OUTSIDE else base


MODULES = modules()


def test_every_module_has_a_level() -> None:
    assert sorted(LEVEL) == sorted(MODULES)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_downward(name: str) -> None:
    for other in imported(MODULES[name].read_text(encoding="utf-8")):
        if other.partition(".")[0] == "spikerl":
            assert LEVEL[other] <= LEVEL[name], f"{name} imports {other}, which is above it"


BUILDS = "spikerl.snn.kernels.native"  # a compiler's output lies in a file


@pytest.mark.parametrize("name", [n for n in MODULES if LEVEL[n] in (0, 1, 2, 4) and n != BUILDS])
def test_lower_layers_stay_inside(name: str) -> None:
    for other in imported(MODULES[name].read_text(encoding="utf-8")):
        parts = other.split(".")
        assert not OUTSIDE & {".".join(parts[: i + 1]) for i in range(len(parts))}, other


def test_the_checks_see_what_they_should() -> None:
    source = (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from spikerl import cli\n"
        "def f():\n    from spikerl import runs\n    import torch.distributed as d\n"
        "from torch import distributed\nfrom os.path import join\n"
    )
    names = list(imported(source))
    assert names == ["typing", "spikerl.runs", "torch.distributed", "torch.distributed", "os.path"]
