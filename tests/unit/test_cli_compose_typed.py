"""What people type, in the ways that they type it: numbers, paths, flags of other programs."""

from __future__ import annotations

from pathlib import Path

import pytest
from shell import spikerl

from spikerl.cli.completion import VALUES, complete
from spikerl.cli.compose import expand
from spikerl.config.yaml_file import counted
from spikerl.snn.surrogates import SURROGATES


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# --- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "number"),
    [("1e6", 1000000), ("1_000_000", 1000000), ("1M", 1000000), ("2.5M", 2500000), ("10k", 10000),
     ("1K", 1000), ("1.5e3", 1500), ("1G", 10**9), ("7", 7), (1e6, 1000000), (5, 5),
     ("1.5", "1.5"), ("1e-3", "1e-3"), ("-1e6", "-1e6"), ("M", "M"), ("1MB", "1MB"), (0.5, 0.5),
     ("0", 0), ("0.5k", 500), ("000", "000")],
)  # fmt: skip
def test_numbers_of_something(typed: str | float, number: object) -> None:
    assert counted("total_steps", typed) == number
    assert counted("algo.gamma", typed) == typed


def test_numbers_as_overrides() -> None:
    typed = ["total_steps=1M", "algo.replay_capacity=1e5,1_000", "algo.tau=1e-3", "run_dir=1e3"]
    assert expand("train", ["-m", *typed]) == [
        "total_steps=1000000", "algo.replay_capacity=100000,1000", "algo.tau=1e-3",
        "run_dir='1e3'", "-m"]  # fmt: skip
    own = ["env.kwargs.box_size=2.0", "++env.kwargs.n_steps=1k"]  # left as typed
    assert expand("train", own) == ["++env.kwargs.box_size=2.0", "++env.kwargs.n_steps=1k"]


def test_numbers_in_the_composed_config(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("total_steps: 1e6\nsteps_per_epoch: 20k\neval_episodes: 1e1\n")
    printed = spikerl("train", "config=c.yaml", "--cfg", "job").out.splitlines()
    for line in ("total_steps: 1000000", "steps_per_epoch: 20000", "eval_episodes: 10"):
        assert line in printed
    assert spikerl("train", "total_steps=1.5").line == "total_steps=1.5: expected int"
    assert spikerl("train", "num_envs=x").line == "num_envs=x: expected int, or null"


# --- a small config of one's own ----------------------------------------------------------------


def test_a_config_with_little_in_it(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("env: Hopper\nalgo: {gamma: 0.95}\nseed: 3\n")
    assert expand("train", ["config=own.yaml"]) == ["env='Hopper'", "algo.gamma=0.95", "seed=3"]
    printed = spikerl("train", "config=own.yaml", "--cfg", "job").out
    assert "name: Hopper" in printed
    assert "gamma: 0.95" in printed


# --- refusals that help -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        (["encoder=[population,poisson]"], "encoder=[population,poisson]: takes one option; "),
        (["env=HalfCheetah-v4"], "env=HalfCheetah-v4: no such option; write env=HalfCheetah"
         " env.version=v4"),
        (["env=HalfCheeta-v4"], "env=HalfCheeta-v4: no such option; did you mean HalfCheetah?"),
        (["env=ALE/Pong-v5"], "env=ALE/Pong-v5: no such option; write env=ALE/Pong env.version=v5"),
        (["env=Track-v0"], "env=Track-v0: no such option; a task that is not among them is"
         " env=gym env.id=Track-v0; known: ALE/Pong, "),
        (["env=gym"], "env.id: it has no default; give env.id=VALUE: as Gymnasium knows it: "),
        (["hydra/launcher=joblb", "-m"], "hydra/launcher=joblb: no such option; did you mean jobl"),
        (["--env", "Ant"], "--env=: no such flag; write env=VALUE"),
        (["--total-steps=10"], "--total-steps=: no such flag; write total_steps=VALUE"),
        (["--cgf", "job"], "--cgf=: no such flag; did you mean --cfg"),
        (["config=folder"], "config=folder: is a folder; give folder/config.yaml"),
        (["env=Humanoid", "encoder.pop_size=1000000"], "encoder.pop_size=1000000: the run ne"),
        (["env=Humanoid", "decoder.pop_size=1000000"], "decoder.pop_size=1000000: the run"),
    ],
)  # fmt: skip
def test_what_is_wrong_and_what_to_do(typed: list[str], line: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    assert spikerl("train", *typed).line.startswith(line)


# --- completion ---------------------------------------------------------------------------------


def offered(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> list[str]:
    monkeypatch.setenv("COMP_LINE", line)
    monkeypatch.setenv("COMP_POINT", str(len(line)))
    complete(["-sc", "query=bash"])
    return capsys.readouterr().out.split()


def test_completion_of_paths_and_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "outputs/Ant").mkdir(parents=True)
    (tmp_path / "outputs/Hopper").mkdir()
    (tmp_path / "outputs/x.yaml").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "outputs"))
    for line, offers in {
        "spikerl train resume=out": ["resume=outputs/"],
        "spikerl train resume=outputs/": [
            "resume=outputs/Ant/", "resume=outputs/Hopper/", "resume=outputs/x.yaml"],
        "spikerl train config=outputs/x": ["config=outputs/x.yaml"],
        "spikerl eval run=~/H": ["run=~/Hopper/"],
        "spikerl train scaling=": ["scaling=strong", "scaling=weak"],
        "spikerl train device=c": ["device=cpu", "device=cuda"],
        "spikerl train neuron.surrogate=s": ["neuron.surrogate=sigmoid"],
        "spikerl train neuron=a": ["neuron=alif"],
        "spikerl train env=AL": ["env=ALE/Pong", "env=ALE/Pong_pixels"],
        "spikerl train experiment=popsan/td3_": [
            "experiment=popsan/td3_poisson", "experiment=popsan/td3_sparse"],
    }.items():  # fmt: skip
        assert offered(line, monkeypatch, capsys) == offers


def test_the_values_that_are_offered_are_those_that_there_are() -> None:
    assert set(VALUES["neuron.surrogate"]) == set(SURROGATES)
