"""A sweep owns its folder, counts its own jobs, and knows them before they run."""

from __future__ import annotations

import json
import pickle
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from shell import SHORT, refusal, spikerl, tree

from spikerl.cli import done
from spikerl.cli import sweep as sweeps
from spikerl.cli.compose import expand
from spikerl.cli.jobs import LONGEST_NAME, choices, combinations, count, folder_name
from spikerl.cli.outcomes import over_seeds
from spikerl.cli.sweep import Sweep
from spikerl.output import duration


class Noon(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> Noon:
        return cls(2026, 11, 25, 12)


@pytest.fixture(autouse=True)
def at_noon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweeps, "datetime", Noon)


def begin(*args: str) -> Sweep:
    sweep = Sweep.of("train", ["-m", "seed=0,1", *args])
    assert sweep is not None
    return sweep


def test_two_sweeps_of_one_second(tmp_path: Path) -> None:
    first, second = begin(), begin()
    stamp = "outputs/sweeps/2026-11-25_12-00-00"
    assert (first.root, second.root) == (tmp_path / stamp, tmp_path / f"{stamp}_2")
    second.discard()
    assert first.root.is_dir()
    assert not second.root.exists()
    first.discard()
    assert tree(tmp_path) == {}


def test_a_folder_has_one_sweep_at_a_time(tmp_path: Path) -> None:
    first = begin("run_dir=s")
    line = str(refusal(begin, "run_dir=s"))
    assert line.startswith(f"run_dir={tmp_path}/s: process ")
    assert line.endswith(" sweeps there; give another run_dir, or wait")
    assert first.held is not None
    first.held.close()  # released as at the end of its process
    begin("run_dir=s")


def test_only_its_own_jobs_count(tmp_path: Path) -> None:
    """Jobs that the launcher of a killed sweep still runs in the same folder are not counted."""
    before = begin("run_dir=s")
    before.note({"job": 0, "status": 0})
    assert before.held is not None
    before.held.close()
    sweep = begin("run_dir=s")
    before.note({"job": 1, "status": 0})
    copy = pickle.loads(pickle.dumps(sweep))  # as a launcher copies it
    copy.note({"job": 0, "status": None})
    assert [(job["job"], job["status"]) for job in sweep.noted()] == [(0, None)]
    assert copy.held is None


def test_a_run_is_no_place_for_a_sweep(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "manifest.json").write_text("{}")
    before = tree(tmp_path)
    said = spikerl("train", "-m", *SHORT, "seed=0,1", "run_dir=r")
    assert said.line == "run_dir=r: is a run; a sweep needs a folder of its own"
    assert tree(tmp_path) == before


# --- the jobs before they run -------------------------------------------------------------------


def test_choices() -> None:
    args = ["-m", "seed=range(0,3)", "env=Ant,Hopper", "algo.tau=0.1", "hydra/launcher=joblib"]
    known = choices(args)
    assert known == [
        ["seed=0", "seed=1", "seed=2"], ["env=Ant", "env=Hopper"], ["algo.tau=0.1"]]  # fmt: skip
    assert count(known) == 6
    assert len(set(combinations(known))) == 6
    globbed = choices(["-m", "env='glob(H*,exclude=HumanoidStandup)'"])
    assert globbed == [["env='glob(H*,exclude=HumanoidStandup)'"]]
    assert choices(["-m", "env=glob(H*)"]) == [
        ["env=HalfCheetah", "env=Hopper", "env=Humanoid", "env=HumanoidStandup"]]  # fmt: skip
    assert choices(["-m", "hydra/sweeper=optuna", "seed=1"]) is None
    assert choices(["-m", "seed=["]) is None
    assert choices(["-m", "experiment=glob(*)"]) == [
        ["experiment=acsf", "experiment=best", "experiment=care_bn", "experiment=ilc_san",
         "experiment=mdc_san"]]  # fmt: skip


def test_of_many_jobs_each_value_is_tried_once() -> None:
    known = [[f"seed={i}" for i in range(100)], ["env=Ant", "env=Hopper"]]
    tried = list(combinations(known))
    assert len(tried) == 100
    assert {part for job in tried for part in job} == {part for one in known for part in one}


@pytest.mark.parametrize(
    ("typed", "lines"),
    [
        (["seed=1,a"], ["seed=a: expected "]),
        (["seed=1,-1", "neuron.threshold=0.5,x"],
         ["neuron.threshold=x: expected ", "seed=-1: give 0 to 2^63 - 1"]),
        (["algo=td3,ppo", "algo.policy_delay=2"], ["algo.policy_delay=2: no such key"]),
        (["algo=td3,ppo", "encoder=poisson"], ["encoder=poisson: ppo needs"]),
        (["seed=1,01", "env=Ant,Hopper"],
         ["seed=01: it is the same run as seed=1; leave one out"]),
        (["seed=0,1", "seed=2,3"], ["seed=0: the key is there again; leave one out"]),
        (["seed=0,1", "++seed=5"], ["seed=0: the key is there again; leave one out"]),
        (["env=Ant,Hopper", "seed=range(3,0)"],
         ["seed=range(3,0): it stands for no value; range(A,B) goes from A to below B"]),
        (["kernel=glob(x*)"], ["kernel=glob(x*): no option is named so; known: auto, cpu, "]),
        (["seed=1," + "9" * 5000], ["seed=1,999"]),
        (["seed=1," + "[" * 5000], ["seed=1,[[["]),
    ],
)  # fmt: skip
def test_no_job_runs_before_all_are_valid(
    typed: list[str], lines: list[str], tmp_path: Path
) -> None:
    said = spikerl("train", "-m", *typed, "run_dir=s")
    assert (said.status, said.out) == (2, "")
    shown = said.err.splitlines()
    assert len(shown) == len(lines)
    for given, line in zip(shown, lines, strict=True):
        assert given.startswith(f"spikerl: {line}")
    assert tree(tmp_path) == {}


def test_the_folder_of_a_long_name() -> None:
    assert folder_name("seed=1,env.id=a/b") == "seed=1,env.id=a_b"
    name = f"experiment=x,note={'ü' * 200}"
    folder, other = folder_name(name), folder_name(name + "1")
    assert len(folder.encode()) <= LONGEST_NAME
    assert folder.startswith("experiment=x,note=ü")
    assert folder != other
    assert folder == folder_name(name)


def test_a_sweep_over_long_names(tmp_path: Path) -> None:
    sizes = "actor.hidden_sizes=[" + ",".join(["4"] * 100) + "],[4]"
    said = spikerl("train", "-m", *SHORT, "total_steps=50", sizes, "run_dir=s")
    assert said.status == 0, said
    assert "2 of 2 jobs done" in said.out


# --- what a sweep says ---------------------------------------------------------------------------


def test_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = begin("algo.tau=0.1,0.2,0.3", "run_dir=s")
    assert sweep.progress() == "  (0 of 6 ended)"
    sweep.note({"job": 0, "status": 0, "note": "done already"})
    assert sweep.progress() == "  (1 of 6 ended)"
    sweep.note({"job": 1, "status": 0, "began": 1000.0})  # the first that ran
    sweep.note({"job": 2, "status": 1, "began": 1050.0})
    sweep.note({"job": 3, "status": None, "began": 1090.0})
    monkeypatch.setattr(time, "time", lambda: 1100.0)
    assert sweep.progress() == "  (3 of 6 ended, 1 failed, 1 running, about 2 min left)"


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 59, 60, 5399, 5400)] == ["0 s", "59 s", "1 min", "90 min",
                                                                "1.5 h"]  # fmt: skip


def test_over_seeds() -> None:
    values = [("A", 0, 1.0), ("A", 1, 4.0), ("B", 0, 5.0), ("A", 2, None)]
    jobs = [{"name": f"env={env},seed={seed}", "return": value, "status": 0}
            for env, seed, value in values]  # fmt: skip
    line = "env=A: return 2.5 +- 2.1 over 2 seeds"
    assert over_seeds(jobs, "return") == [line]
    stopped = {"name": "env=A,seed=3", "return": 9.0, "status": 75}  # made fewer steps
    assert over_seeds([*jobs, stopped], "return") == [line]
    assert over_seeds([*jobs, jobs[0], jobs[2]], "return") == [line]  # repeated jobs count once
    assert over_seeds([{"name": "algo.tau=1", "return": 1.0, "status": 0}] * 2, "return") == []


def test_the_table_keeps_tasks_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = begin("env=Ant,Hopper", "run_dir=s")
    returns = {"seed=0,env=Hopper": 9.0, "seed=0,env=Ant": 1.0, "seed=1,env=Ant": 3.0}
    for job, (name, value) in enumerate(returns.items()):
        folder = tmp_path / "s" / name
        folder.mkdir()
        summary = {"env_id": name.rpartition("=")[2], "best_eval_return": value}
        (folder / "summary.json").write_text(json.dumps(summary))
        sweep.note({"job": job, "name": name, "folder": str(folder), "status": 0})
    assert sweep.end() == 1  # the fourth was never begun
    said = capsys.readouterr().out
    places = [said.index(f"│ {name} ") for name in ("seed=1,env=Ant", "seed=0,env=Ant",
                                                    "seed=0,env=Hopper")]  # fmt: skip
    assert places == sorted(places)
    assert "env=Ant: best eval return 2.0 +- 1.4 over 2 seeds" in said
    assert "3 of 4 jobs done; s\n" in said
    assert "the same command with run_dir=s goes on" in said


def test_what_goes_on_with_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sweep of `reproduce` has no run_dir, and its jobs have no folder with a log."""
    sweep = Sweep.of("reproduce", ["-m", "table=ours", "rows=[a],[b]"])
    assert sweep is not None
    sweep.note({"job": 0, "name": "rows=[a]", "folder": str(sweep.root / "a"), "status": 1})
    assert sweep.end() == 1
    said = capsys.readouterr().out
    assert "\nthe same command goes on with what is not done\n" in said
    assert "│ rows=[a] │ failed (1) │ -                │ see what it printed │" in said


@pytest.mark.parametrize("path", ["it's", "a\\", 'say "x"'])
def test_the_folder_is_the_one_that_was_typed(path: str, tmp_path: Path) -> None:
    for prefix in ("", "++"):
        args = expand("train", ["-m", "seed=0,1", f"{prefix}run_dir={path}"])
        sweep = Sweep.of("train", args)
        assert sweep is not None
        assert sweep.root == tmp_path / path
        sweep.discard()


def test_a_job_goes_on_with_the_threads_that_are_typed(tmp_path: Path) -> None:
    """Without typed threads, the run's own are kept."""
    chosen = {"device": "cpu", "threads": "3", "kernel": "reference"}
    manifest = {"resolved": {key: {"choice": choice} for key, choice in chosen.items()},
                "world_size": 1, "num_envs": 1, "status": "preempted"}  # fmt: skip
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    had = {"device": "cpu", "threads": None, "world_size": None, "num_envs": None,
           "total_steps": 5, "kernel": {"name": "auto", "path": None}, "run_dir": None,
           "resume": None}  # fmt: skip
    (tmp_path / "config.yaml").write_text(json.dumps(had))
    for typed, left in ((None, 3), (2, 2)):
        config = OmegaConf.create({**had, "threads": typed})
        assert not done.trained(config, tmp_path, ended=False)
        assert (config.threads, config.num_envs, config.resume) == (left, 1, str(tmp_path))
