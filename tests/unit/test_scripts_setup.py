"""scripts/setup: what it does with an existing .venv when the requirements have changed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PIP = '#!/bin/sh\necho "$PIP_CONSTRAINT $*" >>pip_calls\n'
# A stub of Python whose `-m venv` makes the files that setup checks, with the stub of pip.
PYTHON = f"""#!/bin/sh
[ "$1" = -m ] || exec {sys.executable} "$@"
mkdir -p .venv/bin
cp "$0" .venv/bin/python
cp pip .venv/bin/pip
"""


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with setup, its two files of requirements, and stubs of Python and pip."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "setup", tmp_path / "scripts")
    (tmp_path / "pyproject.toml").write_text("one")
    (tmp_path / "constraints.txt").write_text("two")
    program(tmp_path / "pip", PIP)
    program(tmp_path / "python", PYTHON)
    return tmp_path


def setup(checkout: Path) -> list[str]:
    """Run setup; the arguments of its calls of pip."""
    env = {**os.environ, "PYTHON": str(checkout / "python")}
    done = subprocess.run([checkout / "scripts" / "setup"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    calls = checkout / "pip_calls"
    lines = calls.read_text().splitlines() if calls.exists() else []
    calls.unlink(missing_ok=True)
    return lines


def test_it_installs_once_and_after_a_change(checkout: Path) -> None:
    install = f"{checkout}/constraints.txt install --quiet --disable-pip-version-check --editable"
    assert setup(checkout) == [f"{install} .[dev]"]
    assert setup(checkout) == []
    (checkout / "constraints.txt").write_text("three")
    assert setup(checkout) == [f"{install} .[dev]"]
    assert setup(checkout) == []


def test_a_change_leaves_the_files_of_running_programs(checkout: Path) -> None:
    setup(checkout)
    used = checkout / ".venv" / "in_use"
    used.touch()
    (checkout / "pyproject.toml").write_text("three")
    assert len(setup(checkout)) == 1
    assert used.exists()


@pytest.mark.parametrize("broken", ["pip", "python"])
def test_one_of_another_python_or_unfinished_is_made_anew(checkout: Path, broken: str) -> None:
    setup(checkout)
    stale = checkout / ".venv" / "stale"
    stale.touch()
    if broken == "pip":
        (checkout / ".venv" / "bin" / "pip").unlink()
    else:
        program(checkout / ".venv" / "bin" / "python", "#!/bin/sh\necho '(2, 7)'\n")
    (checkout / "pyproject.toml").write_text("three")
    assert len(setup(checkout)) == 1
    assert not stale.exists()


def test_a_failed_install_is_tried_again(checkout: Path) -> None:
    program(checkout / "pip", PIP + "[ -e fixed ]\n")
    env = {**os.environ, "PYTHON": str(checkout / "python")}
    done = subprocess.run([checkout / "scripts" / "setup"], env=env, capture_output=True)
    assert done.returncode != 0
    (checkout / "fixed").touch()
    assert len(setup(checkout)) == 2
