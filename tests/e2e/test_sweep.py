"""Sweeps: a folder per job, bad jobs among good ones, and the table at the end."""

from __future__ import annotations

import errno
import json
import os
import signal
import statistics
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from shell import SHORT, Said, spikerl, tree

from spikerl.cli.jobs import varied_keys
from spikerl.cli.outcomes import best_first
from spikerl.cli.sweep import Sweep

FEW = [*SHORT, "total_steps=150"]


class Ends(gym.Env[np.ndarray, np.ndarray]):
    """Episodes of 10 steps; at step 60 it raises, or sends its process a signal, or neither."""

    observation_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float64)
    action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, how: str) -> None:
        self.how, self.steps = how, 0

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        return np.zeros(2), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        if self.steps == 60 and self.how == "RAISES":
            raise ValueError("[/b] the robot fell over")
        if self.steps == 60 and self.how != "NEVER":
            os.kill(os.getpid(), getattr(signal, self.how))
        return np.full(2, 0.5), 1.0, self.steps % 10 == 0, False, {}


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    names = ("RAISES", "SIGTERM", "SIGINT", "NEVER")
    made: Any = Ends
    for how in names:
        gym.register(f"{how}-v0", entry_point=made, kwargs={"how": how}, max_episode_steps=50)
    yield
    for how in names:
        del gym.registry[f"{how}-v0"]


def sweep(*args: str) -> Said:
    return spikerl("train", "-m", *FEW, *args)


def jobs(root: Path) -> list[tuple[str, int]]:
    noted = [json.loads(line) for line in (root / "jobs.jsonl").read_text().splitlines()]
    return [(job["name"], job["status"]) for job in noted if job["status"] is not None]


def test_all_good(tmp_path: Path) -> None:
    said = sweep("seed=0,1", "neuron.threshold=0.5,0.6", "run_dir=s")
    assert (said.status, said.err) == (0, "")
    root = tmp_path / "s"
    names = [f"seed={s},neuron.threshold={t}" for s in (0, 1) for t in (0.5, 0.6)]
    assert sorted(name for name, _ in jobs(root)) == names
    assert sorted(p.name for p in root.iterdir()) == [
        ".lock", "jobs.jsonl", "multirun.yaml", *names]  # fmt: skip
    for name in names:
        config = (root / name / "config.yaml").read_text()
        assert f"seed: {name[5]}\n" in config
        assert f"run_dir: {root / name}\n" in config
        assert json.loads((root / name / "manifest.json").read_text())["status"] == "done"
    assert said.out.rstrip().endswith("4 of 4 jobs done; s")  # relative to the working folder


def test_a_key_that_only_the_swept_options_have(tmp_path: Path) -> None:
    options = "experiment=proxy_target/lif,proxy_target/dn"
    said = sweep(options, "algo.proxy_steps=1", "total_steps=10", "run_dir=s")
    assert (said.status, said.err) == (0, "")
    for folder in (tmp_path / "s").glob("experiment=*"):
        assert "  proxy_steps: 1\n" in (folder / "config.yaml").read_text()
    said = sweep("neuron=alif,dynamic", "neuron.theta_v=0.5", "run_dir=t")
    assert said.line == "neuron.theta_v=0.5: no such key; it goes with neuron=dynamic"


def test_a_key_that_the_config_lacks_tells_jobs_apart(tmp_path: Path) -> None:
    said = sweep("env.kwargs.reset_noise_scale=0.01,0.02", "total_steps=10", "run_dir=s")
    assert (said.status, said.err) == (0, "")
    assert {name for name, _ in jobs(tmp_path / "s")} == {
        "env.kwargs.reset_noise_scale=0.01", "env.kwargs.reset_noise_scale=0.02"
    }  # fmt: skip


def test_the_best_job_is_first() -> None:
    noted: list[dict[str, Any]] = [{"task": "a", "return": ret} for ret in (-150.0, None, -90.0)]
    in_order = [job["return"] for job in sorted(noted, key=best_first)]
    assert in_order == [-90.0, -150.0, None]


@pytest.mark.slow
def test_a_jobs_folder_can_be_typed_as_it_is_shown(tmp_path: Path) -> None:
    said = sweep("seed=0,1", "actor.hidden_sizes=[4],[5,6]", "run_dir=s")
    folder = tmp_path / "s" / "actor.hidden_sizes=[5,6],seed=1"
    assert str(folder) in said.out
    for args in (
        ["eval", f"run={folder}", "episodes=1"],
        ["train", f"resume={folder}", "total_steps=200"],
        ["train", f"config={folder}/config.yaml", "run_dir=a"],
        ["train", *FEW, "actor.hidden_sizes=[5,6]", f"init_from={folder}", "run_dir=b"],
        ["train", "-m", *FEW, "actor.hidden_sizes=[5,6]", f"init_from={folder}", "seed=1,2",
         "run_dir=c"],
    ):  # fmt: skip
        said = spikerl(*args)
        assert (said.status, said.err) == (0, ""), args
    assert len(jobs(tmp_path / "c")) == 2


def test_a_bad_job_stops_no_other(tmp_path: Path) -> None:
    ids = "env.id=RAISES-v0,CartPole-v1,NEVER-v0"
    said = sweep("env=gym", ids, "run_dir=s")
    assert said.status == 1
    assert [status for _, status in jobs(tmp_path / "s")] == [1, 2, 0]
    assert "1 of 3 jobs done" in said.out
    rows = table(said)
    rows[1][3] = rows[1][3].partition(" (")[0]  # without the place of the error and the remedy
    assert rows == [
        ["env.id=NEVER-v0", "done", "10.0", "s/env.id=NEVER-v0"],
        ["env.id=RAISES-v0", "failed (1)", "-",
         "step 60: RAISES-v0 raised ValueError: [/b] the robot fell over"],
        ["env.id=CartPole-v1", "refused", "-",
         "algo=td3: the actions of CartPole-v1 are discrete; use algo=ppo or dqn"],
    ]  # fmt: skip
    assert "spikerl: algo=td3: the actions of CartPole-v1" in said.err
    failed = tmp_path / "s" / "env.id=RAISES-v0"
    assert json.loads((failed / "manifest.json").read_text())["status"] == "failed"
    assert not (tmp_path / "s" / "env.id=CartPole-v1").exists()


@pytest.mark.parametrize(
    ("number", "status", "word"), [("SIGTERM", 75, "preempted"), ("SIGINT", 130, "interrupted")]
)
def test_a_stopped_sweep_begins_no_other_job(
    number: str, status: int, word: str, tmp_path: Path
) -> None:
    said = sweep("env=gym", f"env.id=NEVER-v0,{number}-v0", "seed=0,1", "run_dir=s")
    assert said.status == status
    names = [f"env.id={how}-v0,seed={s}" for how in ("NEVER", number) for s in (0, 1)]
    assert jobs(tmp_path / "s") == list(zip(names, [0, 0, status, status], strict=True))
    stopped = json.loads((tmp_path / "s" / names[2] / "manifest.json").read_text())
    assert stopped["status"] == word
    assert not (tmp_path / "s" / names[3]).exists()
    assert said.out.count("not started: the sweep was stopped") == 1
    assert "2 of 4 jobs done" in said.out


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["env=Nope,Ant"], "env=Nope: no such option"),
        (["sedd=1,2"], "sedd=1,2: no such key; did you mean seed?"),
        (["hydra/launcher=nope"], "hydra/launcher=nope: no such option"),
        (["encoder=population,null"], "encoder=null: no such option"),
        (["seed=0,1,0"], "seed=0: it is there twice; leave one out"),
        (["init_from=a/b,a_b"], "init_from=a_b: another value's folder has its name; rename one"),
        (["seed=1,2", "run_dir=file/s"], "run_dir="),
        (["seed=1,2", "run_dir=/proc/spikerl/s"], "run_dir=/proc/spikerl/s: No such file"),
        (["seed=1,2", "--cfg", "job"], "config: Only one of"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_refused_sweep_leaves_nothing(args: list[str], line: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    assert sweep(*args).line.startswith(line)
    assert tree(tmp_path) == {"file": b"kept"}


@pytest.mark.parametrize("root", [[], ["run_dir=new/s"]])
def test_jobs_that_are_all_refused_leave_nothing(root: list[str], tmp_path: Path) -> None:
    said = sweep("seed=-1,-2", *root)
    assert said.status == 2
    assert said.err.splitlines() == [
        f"spikerl: seed={seed}: give 0 to 2^63 - 1" for seed in (-1, -2)
    ]
    assert tree(tmp_path) == {}


def test_help_for_a_sweep_leaves_nothing(tmp_path: Path) -> None:
    assert spikerl("train", "-m", "--help").status == 0
    assert tree(tmp_path) == {}


def table(said: Said) -> list[list[str]]:
    """The cells of the table that a sweep prints at its end."""
    shown = said.out[said.out.index("reason or folder") :]
    lines = [line.split("│")[1:-1] for line in shown.splitlines() if line.startswith("│")]
    rows: list[list[str]] = []
    for cells in ([cell.strip() for cell in line] for line in lines):
        if cells[0]:
            rows.append(cells)
        else:  # the rest of a cell that was too long for a line
            rows[-1] = [f"{a} {b}".rstrip() for a, b in zip(rows[-1], cells, strict=True)]
    return rows


@pytest.mark.slow
def test_the_same_sweep_again(tmp_path: Path) -> None:
    """Jobs that are done are skipped, though an earlier sweep ran them; new jobs run."""
    assert sweep("seed=0,1", "run_dir=s").status == 0
    before = tree(tmp_path / "s" / "seed=1")
    said = sweep("seed=1,2", "run_dir=s")
    assert (said.status, said.err) == (0, "")
    assert "2 of 2 jobs done" in said.out
    assert sorted(row[:2] for row in table(said)) == [
        ["seed=1", "done already"], ["seed=2", "done"]]  # fmt: skip
    assert tree(tmp_path / "s" / "seed=1") == before
    assert jobs(tmp_path / "s") == [(f"seed={seed}", 0) for seed in (0, 1, 1, 2)]


@pytest.mark.slow
def test_a_stopped_sweep_again(tmp_path: Path) -> None:
    """The stopped job is resumed with its own settings, and jobs that had not begun run."""
    stopping = ["env=gym", "env.id=SIGTERM-v0,NEVER-v0", "run_dir=s"]
    assert sweep(*stopping).status == 75
    gym.registry["SIGTERM-v0"].kwargs["how"] = "NEVER"
    said = sweep(*stopping)
    assert (said.status, said.err) == (0, "")
    assert [row[1] for row in table(said)] == ["done", "done"]
    assert "resumed at step" in said.out
    manifest = json.loads((tmp_path / "s" / "env.id=SIGTERM-v0" / "manifest.json").read_text())
    assert (manifest["status"], len(manifest["resumed"])) == ("done", 1)
    said = sweep(*stopping, "total_steps=160")
    assert (said.status, said.out.count("resumed at step 150 of 160")) == (0, 2)


@pytest.mark.slow
def test_a_damaged_file_of_a_job_ends_no_sweep(tmp_path: Path) -> None:
    """Damage to a summary does not matter; without a manifest, the state of a job is not known, and
    the job is refused.
    """
    assert sweep("seed=0,1,2", "run_dir=s").status == 0
    (tmp_path / "s/seed=0/summary.json").write_text("")
    (tmp_path / "s/seed=1/manifest.json").write_text('{"stat')
    with (tmp_path / "s/jobs.jsonl").open("a") as noted:
        noted.write('{"job": 0, "st\n')
    said = sweep("seed=0,1,2", "run_dir=s")
    assert said.status == 1
    assert said.err == (
        f"spikerl: run_dir={tmp_path}/s/seed=1: has no readable manifest.json; remove the folder,"
        " and the job begins anew\n"
    )
    words = [row[:2] for row in table(said)]
    assert sorted(words) == [
        ["seed=0", "done already"], ["seed=1", "refused"], ["seed=2", "done already"]]  # fmt: skip


@pytest.mark.slow
def test_another_sweep_in_the_same_root(tmp_path: Path) -> None:
    assert sweep("seed=0,1", "run_dir=s").status == 0
    before = tree(tmp_path)
    said = sweep("seed=0,1", "neuron.threshold=0.6", "run_dir=s")
    assert said.status == 2
    assert said.err.splitlines()[0] == (
        f"spikerl: neuron.threshold=0.6: {tmp_path}/s/seed=0 was made with 0.5;"
        " give another run_dir"
    )
    assert "0 of 2 jobs done" in said.out
    assert tree(tmp_path) == before


def test_a_dated_root(tmp_path: Path) -> None:
    assert sweep("seed=3", "run_dir=null").status == 0
    (root,) = (tmp_path / "outputs" / "sweeps").iterdir()
    assert jobs(root) == [("0", 0)]
    assert (root / "0" / "summary.json").is_file()


def test_other_commands_sweep_and_leave_no_folder(tmp_path: Path) -> None:
    assert spikerl("train", *FEW, "run_dir=a").status == 0
    typed = ["run=a", "episodes=2", "json=true"]
    means = {seed: json.loads(spikerl("eval", *typed, f"seed={seed}").out)["return_mean"]
             for seed in (0, 1)}  # fmt: skip
    assert means[0] != means[1]
    temporary = set(Path(tempfile.gettempdir()).glob("spikerl-sweep-*"))
    said = spikerl("eval", "-m", "run=a,b", "seed=0,1", "episodes=2")
    assert said.status == 1
    assert "┃ job          ┃ status  ┃ eval return ┃" in said.out
    best = sorted(means, key=lambda seed: -means[seed])
    assert [row[:3] for row in table(said)] == [
        *([f"run=a,seed={seed}", "done", f"{means[seed]:.1f}"] for seed in best),
        *([f"run=b,seed={seed}", "refused", "-"] for seed in (0, 1)),
    ]
    both = list(means.values())
    spread = f"{statistics.mean(both):.1f} +- {statistics.stdev(both):.1f} over 2 seeds"
    assert f"run=a: eval return {spread}\n2 of 4 jobs done\n" in said.out
    assert "spikerl: run=b: no policy there" in said.err
    asked = spikerl("eval", "-m", *typed, "seed=0,1")  # json=true: stdout has JSON objects only
    answers = [json.loads(line) for line in asked.out.splitlines()]
    assert {answer["seed"]: answer["return_mean"] for answer in answers} == means
    assert f"all: eval return {spread}\n2 of 2 jobs done\n" in asked.err
    assert set(Path(tempfile.gettempdir()).glob("spikerl-sweep-*")) == temporary
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.slow
def test_joblib(tmp_path: Path) -> None:
    """Hydra's joblib launcher runs the jobs, two processes at a time."""
    ids = ("CartPole-v1", "InvertedPendulum-v5", "Swimmer-v5")
    typed = ["env=gym", f"env.id={','.join(ids)}", "hydra/launcher=joblib"]
    said = sweep(*typed, "hydra.launcher.n_jobs=2", "run_dir=s")
    assert said.status == 1
    names = [f"env.id={one}" for one in ids]
    assert sorted(jobs(tmp_path / "s")) == list(zip(names, [2, 0, 0], strict=True))
    assert "2 of 3 jobs done" in said.out
    for env_id, name in zip(ids[1:], names[1:], strict=True):
        summary = json.loads((tmp_path / "s" / name / "summary.json").read_text())
        assert (summary["env_id"], summary["updates"]) == (env_id, 100)
    left = {thread.name for thread in threading.enumerate()}  # joblib's would delay the exit
    assert "ExecutorManagerThread" not in left


def test_a_launcher_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spikerl.cli.sweep.find_spec", lambda name: None)
    said = sweep("seed=0,1", "hydra/launcher=submitit_slurm")
    assert said.line.startswith("hydra/launcher=submitit_slurm: pip install 'spikerl[slurm]'")
    assert tree(tmp_path) == {}


def test_varied_keys() -> None:
    args = ["-m", "env=Ant,Hopper", "seed=range(0,3)", "algo.tau=0.1", "actor=choice(mlp,popsan)"]
    assert varied_keys(args) == ["env", "seed", "actor"]
    assert varied_keys(["actor.hidden_sizes=[4,5]", "run='a,b'"]) == []
    assert varied_keys(["seed=["]) == []


def test_only_multirun_makes_a_sweep(tmp_path: Path) -> None:
    assert Sweep.of("train", ["seed=0,1"]) is None
    assert tree(tmp_path) == {}


def test_jobs_that_cannot_be_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If jobs.jsonl cannot be written, as on a full disk, jobs run and the table shows them."""

    def full(file: Any, *, wait: bool) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("spikerl.cli.sweep.lock_file", full)
    said = sweep("seed=0,1", "run_dir=s")
    assert said.status == 0, said.err
    assert said.err.count("s/jobs.jsonl: No space left on device\n") == 4
    assert sorted(row[:2] for row in table(said)) == [["seed=0", "done"], ["seed=1", "done"]]
    assert (tmp_path / "s/seed=1/summary.json").exists()
