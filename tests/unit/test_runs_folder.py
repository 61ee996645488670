"""A run folder that a resume may write into."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from shell import refusal

from spikerl.runs import folder as run_folder


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "log.txt", ".lock", "checkpoints", "replay", "tb"]
)
def test_a_resume_writes_through_no_link(name: str, tmp_path: Path) -> None:
    run, theirs = tmp_path / "run", tmp_path / "mine"
    run.mkdir()
    theirs.mkdir() if "." not in name else theirs.write_text("kept")
    run_folder.check_own(run)
    (run / name).symlink_to(theirs)
    assert f"its {name} is a link" in str(refusal(run_folder.check_own, run))
    (run / name).unlink()
    os.mkfifo(run / name)
    assert "neither file nor folder" in str(refusal(run_folder.check_own, run))


def test_processes_of_one_number_that_begin_at_once(tmp_path: Path) -> None:
    """As in two containers: one is refused, and the other's run is whole."""
    target = str(tmp_path / "run")

    def beside(partial: Path) -> None:
        run_folder.create(target, {}, {}, lambda folder: None, named=True)
        (partial / "mine").touch()

    refusal(run_folder.create, target, {"seed": 1}, {}, beside, named=True)
    assert (tmp_path / "run" / "config.yaml").read_text() == "{}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
