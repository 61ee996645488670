"""scripts/hardware_table.py reuses existing results of the given run."""

from __future__ import annotations

import json
from pathlib import Path
from runpy import run_path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "hardware_table.py"


@pytest.mark.parametrize("source", ["../run", "{}/run", "../here/../run/"])
def test_a_run_by_any_of_its_names(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    facts = {"run": str(tmp_path / "run"), "episodes": 3}  # as the commands write it
    Path("compressed.json").write_text(json.dumps(facts))
    made = run_path(str(SCRIPT))["made"]
    assert made(Path("compressed.json"), source.format(tmp_path), "3", "compress") == facts
    with pytest.raises(SystemExit, match="give another FOLDER"):
        made(Path("compressed.json"), "../another", "3", "compress")
