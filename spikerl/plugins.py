"""Plugins: packages of users that register neurons, encoders or algorithms when imported.

A package that `plugins=[...]` names may bring a folder conf/, whose groups join those of spikerl.
Packages are imported by name, from where Python finds installed packages or from PYTHONPATH.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from spikerl.errors import BadRequest, Interrupted, first_line

NAME = r"[A-Za-z_]\w*"  # of a package

loaded: dict[str, ModuleType] = {}


def load(names: Sequence[str]) -> None:
    """Import packages that the user typed; that a file names them is not enough (`check_typed`)."""
    if not names:
        return
    from spikerl.isolation import UserCode  # imports torch, which takes a while

    for name in names:
        if name in loaded:
            continue
        if not re.fullmatch(NAME, name):
            raise BadRequest("plugins", name, "give the names of packages")
        try:
            with UserCode():
                loaded[name] = import_module(name)
        except Interrupted:
            raise
        except BaseException as error:  # the package may raise anything
            reason = first_line(error)
            remedy = f"cannot be imported ({reason}); install it, or name its folder in PYTHONPATH"
            raise BadRequest("plugins", name, remedy) from error


def check_typed(source: Path, names: Any, typed: Sequence[str]) -> None:
    """Refuse a file that names packages to import, unless the user typed the same names."""
    if names and not (isinstance(names, list) and all(isinstance(one, str) for one in names)):
        raise BadRequest("plugins", names, f"{source} has it; give a list of packages")
    if names and names != list(typed):
        written = ",".join(map(str, names))
        remedy = f"{source} names packages to import; confirm with plugins=[{written}]"
        raise BadRequest("plugins", f"[{','.join(typed)}]", remedy)


def conf_folders() -> list[Path]:
    """The conf/ folders of the imported packages; a module of one file has none."""
    packages = [module for module in loaded.values() if getattr(module, "__path__", None)]
    folders = (Path(package.__path__[0]) / "conf" for package in packages)
    return [folder for folder in folders if folder.is_dir()]


def versions_of(modules: Iterable[str]) -> dict[str, str]:
    """The packages, other than spikerl, that these modules belong to, with their versions."""
    packages = {module.partition(".")[0] for module in modules} - {__package__}
    return {package: _version(package) for package in sorted(packages)}


def check_there(key: str, value: object, needed: Mapping[str, str]) -> None:
    """Refuse what needs packages that have not been imported."""
    for package, version in needed.items():
        if package not in sys.modules:
            remedy = f"it needs the plugin {package}, version {version}; give plugins=[{package}]"
            raise BadRequest(key, value, f"{remedy}, or import {package} before loading it")


def _version(package: str) -> str:
    try:
        return metadata.version(metadata.packages_distributions()[package][0])
    except (KeyError, metadata.PackageNotFoundError):
        return str(getattr(sys.modules[package], "__version__", "unknown"))
