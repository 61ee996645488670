"""Imports go to lower levels only; modules that compute use no file, clock, Hydra or process
group.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import spikerl

ROOT = Path(spikerl.__file__).parent
# Folders and top-level modules, from the lowest level to the highest.
LEVELS = [
    "types errors seeding schema files children signals output machine isolation plugins",
    "snn",
    "kernels",
    "models energy distributed",
    "envs",
    "algos",
    "runs",
    "config",
    "training",
    "reporting",
    "export",
    "commands",
    "cli",
    "__main__ __init__",
]
LEVEL = {name: i for i, names in enumerate(LEVELS) for name in names.split()}
# Modules that code which computes must not import.
OUTSIDE = {"os", "pathlib", "time", "hydra", "torch.distributed"}
COMPUTES = ("snn", "kernels", "algos")
BUILDS = "spikerl.kernels.build"  # exempt: a compiler writes files


def modules() -> dict[str, Path]:
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1] == "__init__" and len(parts) > 1:
            parts = parts[:-1]
        found[".".join(("spikerl", *parts))] = path
    return found


MODULES = modules()


def statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Every import below `node`, in functions too, except those for the type checker only."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield from statements(other)
        elif isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        else:
            yield from statements(child)


def imported(source: str) -> Iterator[str]:
    """Full names of imported modules; `from spikerl import x` imports the module spikerl.x."""
    for statement in statements(ast.parse(source)):
        if isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names)
            continue
        assert not statement.level, "imports are absolute"
        base = statement.module or ""
        for alias in statement.names:
            inner = f"{base}.{alias.name}"
            yield inner if inner in MODULES or inner in OUTSIDE else base


def folder(module: str) -> str:
    """The first name below the package, which has a level."""
    return module.split(".")[1] if "." in module else "__init__"


def test_every_folder_has_a_level() -> None:
    assert {folder(name) for name in MODULES} == set(LEVEL)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_downward(name: str) -> None:
    for other in imported(MODULES[name].read_text(encoding="utf-8")):
        if other.partition(".")[0] == "spikerl" and other != "spikerl":
            assert LEVEL[folder(other)] <= LEVEL[folder(name)], f"{name} imports {other} above it"


@pytest.mark.parametrize("name", [n for n in MODULES if folder(n) in COMPUTES and n != BUILDS])
def test_what_computes_stays_inside(name: str) -> None:
    for other in imported(MODULES[name].read_text(encoding="utf-8")):
        parts = other.split(".")
        assert not OUTSIDE & {".".join(parts[: i + 1]) for i in range(len(parts))}, other


def test_the_checks_see_what_they_should() -> None:
    source = (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from spikerl import cli\n"
        "def f():\n    from spikerl.commands import train\n    import torch.distributed as d\n"
        "from torch import distributed\nfrom os.path import join\n"
    )
    seen = list(imported(source))
    module = "torch.distributed"
    assert seen == ["typing", "spikerl.commands.train", module, module, "os.path"]


# Unit tests of things that are not modules of the package.
OF_OTHERS = ("conf", "docs", "module_levels", "scripts")


@pytest.mark.parametrize("name", sorted(p.stem for p in Path(__file__).parent.glob("test_*.py")))
def test_unit_tests_are_named_after_the_module_that_they_test(name: str) -> None:
    """Names are test_FOLDER_MODULE.py, with a word more if a module has several such files."""
    words = [module.replace(".", "_").removeprefix("spikerl_") for module in MODULES]
    words += [word.removesuffix("_command") for word in words]  # commands/bench/command.py
    folders = {folder(module) for module in MODULES if module.count(".") > 1}
    assert any(
        f"{name}_".startswith(f"test_{word}_")
        for word in (*words, *OF_OTHERS)
        if word not in folders
    )
