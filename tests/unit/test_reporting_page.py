"""The page of a report, and its cards of runs."""

from __future__ import annotations

import errno
import json
import shlex
from pathlib import Path

import pytest
from shell import spikerl
from table_runs import write_run

from spikerl.config.typed import for_hydra
from spikerl.config.yaml_file import overrides_of
from spikerl.reporting.page import Card, command_of, significant
from spikerl.reporting.records import Run


def test_what_repeats_a_run(tmp_path: Path) -> None:
    swept = "spikerl compress -m run=r bits=4,8"  # no `train` command repeats it
    typed = ("spikerl train seed=0", "spikerl train -m seed=0,1", swept)
    for name, command in zip("abc", typed, strict=True):
        write_run(tmp_path / name, command=command)
    cards = [Card.of(name, 0, Run.read(tmp_path / name)) for name in "abc"]
    of_a_job = f"spikerl train config={tmp_path}/b/config.yaml"
    assert [card.command for card in cards] == ["spikerl train seed=0", of_a_job, swept]


def test_what_repeats_a_job_of_a_sweep_is_typed_again(tmp_path: Path) -> None:
    """The command types what a config file may not set by itself; a `resumed` entry that is no
    mapping is ignored.
    """
    run = Run.read(write_run(tmp_path / "a[1]", command="spikerl train -m x=1,2", resumed=["x"]))
    run.config.update(
        dataset="../d 0",
        init_from=None,
        env={"name": "gym", "id": "mine:Own-v0", "kwargs": {"path": "/it's", "speed": 2.0}},
        energy={"name": "replay", "file": "/t.csv"},
        plugins=["mine"],
    )
    (run.folder / "config.yaml").write_text(json.dumps(run.config))
    typed = ["plugins=[mine]", "dataset=../d 0", "energy.file=/t.csv", "env.id=mine:Own-v0",
             r"env.kwargs.path='/it\'s'"]  # fmt: skip
    words = ["spikerl", "train", f"config={tmp_path}/a[1]/config.yaml", *typed]
    assert command_of(run) == shlex.join(words)
    held = overrides_of(run.folder / "config.yaml", [for_hydra(one) for one in typed])
    assert [one for one in held if one.startswith("env.kwargs")] == [
        "env.kwargs=null", "env.kwargs={speed:2.0}"
    ]  # fmt: skip


def test_small_losses_keep_their_digits() -> None:
    found = [significant(x) for x in (0.04681, -3.456, 648.8, None)]
    assert found == ["0.0468", "-3.46", "649", "-"]


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a")
    monkeypatch.setattr("spikerl.reporting.side_by_side.write_text", full)
    line = spikerl("report", "runs=a", "out=there").line
    assert line == "out=there: No space left on device; give another folder"
