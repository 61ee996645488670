"""The wheel holds all that is needed and nothing else, and works from another folder."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from shell import SHORT, spikerl

import spikerl as package

ROOT = Path(package.__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(
    not (ROOT / "pyproject.toml").is_file(), reason="spikerl runs from an installation"
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, as from a fresh checkout."""
    sources = tmp_path_factory.mktemp("sources")
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, sources)
    for name in ("spikerl", "conf"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, sources / name, ignore=ignore)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(out), "."]
    done = subprocess.run(command, cwd=sources, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel unpacked, as pip does with a pure-Python one."""
    folder = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def installed(site: Path, home: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Run the unpacked program in the folder `home`; no other spikerl on the path is imported."""
    code = (
        "import sys, spikerl; from spikerl.cli.main import main\n"
        f"assert spikerl.__file__.startswith({str(site)!r}), spikerl.__file__\nmain()"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        cwd=home,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_what_is_in_it(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "spikerl").rglob("*.py")}
    options = {f"spikerl/{p.relative_to(ROOT)}" for p in (ROOT / "conf").rglob("*.yaml")}
    assert "spikerl/conf/experiment/popsan/td3.yaml" in options
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "spikerl" / "kernels" / "csrc").iterdir()}
    assert "spikerl/kernels/csrc/forward.cpp" in sources
    assert names == modules | options | sources | {"spikerl/reporting/page.html"}


def test_what_it_asks_for(site: Path) -> None:
    (info,) = site.glob("spikerl-*.dist-info")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    entry = (info / "entry_points.txt").read_text()
    assert entry.split() == ["[console_scripts]", "spikerl", "=", "spikerl.cli.main:main"]
    metadata = (info / "METADATA").read_text().splitlines()
    needed = [line.partition(": ")[2] for line in metadata if line.startswith("Requires-Dist")]
    always = {r for r in map(Requirement, needed) if not r.marker}
    assert always == set(map(Requirement, project["dependencies"]))


def test_every_import_is_asked_for() -> None:
    """By a requirement of its own, or because another requirement always brings it."""
    through = {"yaml": "omegaconf", "pynvml": "zeus", "triton": "torch", "PIL": "imageio"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    users = [line for name in extras.keys() - {"dev"} for line in extras[name]]
    asked = {Requirement(line).name for line in [*project["dependencies"], *users]}
    of_module = {
        module: {canonicalize_name(name) for name in names}
        for module, names in packages_distributions().items()
    }
    trees = [ast.parse(path.read_text()) for path in (ROOT / "spikerl").rglob("*.py")]
    for node in (node for tree in trees for node in ast.walk(tree)):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in {name.partition(".")[0] for name in names} - {"spikerl"}:
            if name not in sys.stdlib_module_names:
                assert asked & {through.get(name), *of_module[name]}, name


def test_it_composes_elsewhere(site: Path, tmp_path: Path) -> None:
    for args in (["--cfg", "job", "env=Ant", "experiment=popsan/td3"], ["--help"]):
        done = installed(site, tmp_path, "train", *args)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == spikerl("train", *args).out
    assert not list(tmp_path.iterdir())


def test_it_trains_elsewhere(site: Path, tmp_path: Path) -> None:
    done = installed(site, tmp_path, "train", *SHORT, "run_dir=run")
    assert (done.returncode, done.stderr) == (0, "")
    assert "done: 300 steps, 250 updates" in done.stdout
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"run"}
    done = installed(site, tmp_path, "eval", "run=run", "episodes=1")
    assert done.returncode == 0
    assert "InvertedPendulum-v5: return" in done.stdout


def test_a_wrong_request_elsewhere(site: Path, tmp_path: Path) -> None:
    done = installed(site, tmp_path, "train", "env=HalfCheeta")
    assert done.returncode == 2
    assert done.stderr == ("spikerl: env=HalfCheeta: no such option; did you mean HalfCheetah?\n")
    assert not list(tmp_path.iterdir())
