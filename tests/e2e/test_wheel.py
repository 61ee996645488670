"""The built wheel carries conf/ and works from any directory."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_wheel(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(tmp_path), str(ROOT)], check=True, timeout=100)
    (wheel,) = tmp_path.glob("spikerl-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    expected = {f"spikerl/{p.relative_to(ROOT)}" for p in (ROOT / "conf").rglob("*.yaml")}
    assert expected
    assert expected <= names
    assert not any(name.startswith(("tests/", "conf/")) for name in names)

    home = tmp_path / "home"
    home.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    run = [sys.executable, "-m", "spikerl", "train", "env=Hopper", "--cfg", "job"]
    done = subprocess.run(
        run, cwd=home, env=environment, capture_output=True, text=True, check=True, timeout=100
    )
    assert done.stdout.startswith("env:\n  name: Hopper\n")
    where = [sys.executable, "-c", "import spikerl.compose as c; print(c.conf_folder())"]
    found = subprocess.run(
        where, cwd=home, env=environment, capture_output=True, text=True, check=True, timeout=100
    )
    assert Path(found.stdout.strip()) == tmp_path / "site" / "spikerl" / "conf"
    assert not list(home.iterdir())
