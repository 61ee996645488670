"""Whatever is wrong with a typed command, the message is one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from shell import spikerl

from spikerl.cli.explain import explain


@pytest.mark.parametrize(
    "error", [ValueError("first\nsecond"), ValueError(""), KeyError("x"), OSError(2, "none")]
)
def test_whatever_hydra_raises_is_one_line(error: Exception) -> None:
    line = explain("train", ["seed=1"], error)
    assert line.startswith("config: ")
    assert "\n" not in line


def test_what_an_experiment_sets_and_the_option_beside_it_lacks() -> None:
    assert spikerl("train", "experiment=popsan/td3_sparse", "actor=mlp").line == (
        "actor.spike_cost=6.0: experiment=popsan/td3_sparse sets it, actor=mlp has no such key;"
        " leave it out by ~actor.spike_cost"
    )
    typed = spikerl("train", "experiment=popsan/td3", "algo=ddpg", "+algo.target_noise=0.3").line
    assert typed.startswith("algo.target_noise=0.3: no such key; known: name, batch_size, ")


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        (["--cfg"], "--cfg=: give job, hydra, all"),
        (["--cfg", "foo"], "--cfg=foo: give job, hydra, all"),
        (["-m", "foo"], "foo: cannot be read; write key=value"),
        (["Hopper"], "Hopper: cannot be read; did you mean env=Hopper?"),
        (["sac"], "sac: cannot be read; did you mean algo=sac?"),
        (["-m", "seed=range(0"], "seed=range(0: cannot be read; write key=value"),
        (["actor.hidden_sizes=(64,64)"], "actor.hidden_sizes=(64,64): cannot be read; a list is"
         " written [A,B], and in quotes if it has spaces: 'actor.hidden_sizes=[A, B]'"),
        (["actor.hidden_sizes=[64,", "64]"], "actor.hidden_sizes=[64,: cannot be read; a list is"),
        (["actor.hidden_sizes=64,64"], "actor.hidden_sizes=64,64: several values; a list is"
         " written actor.hidden_sizes=[64,64]"),
        (["total_steps=1,000"], "total_steps=1,000: several values; a number has no comma:"
         " total_steps=1000; -m sweeps over several"),
        (["seed=1,2"], "seed=1,2: several values; sweep over them with -m"),
        (["report", "runs=r", "hours=0.5,1"], "hours=0.5,1: several values; a list is written"
         " hours=[0.5,1]"),
        (["report", "runs=r", "group_by=seed,algo.name"], "group_by=seed,algo.name: several"
         " values; sweep over them with -m, or write group_by=[seed,algo.name] where it takes a"
         " list"),
        (["--run=RUN"], "--run=RUN: takes no value"),
        (["env="], "env=: takes one option; known: "),
        (["resume=nosuch"], "resume=nosuch: no such folder"),
        (["collect", "run=r", "dataset=d", "policy=foo"],
         "policy=foo: give last, best, random or replay"),
        (["eval", "--run=RUN"], "--run=RUN: write run=VALUE"),
    ],
)  # fmt: skip
def test_what_cannot_be_done(typed: list[str], line: str) -> None:
    command = [] if typed[0] in ("eval", "collect", "report") else ["train"]
    assert spikerl(*command, *typed).line.startswith(line)


def test_a_run_folder_without_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r").mkdir()
    Path("r/manifest.json").write_text("{}")
    for command, key in (("train", "resume"), ("eval", "run")):
        assert spikerl(command, "r").line == f"r: cannot be read; did you mean {key}=r?"


def test_a_line_stays_one_whatever_it_quotes() -> None:
    assert spikerl("train", "run_dir=a", "seed=x\ny\x1b[2J").line == (
        r"seed=x\x0ay\x1b[2J: cannot be read; write key=value"
    )
