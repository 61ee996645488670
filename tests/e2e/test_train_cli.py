"""Commands as a user types them, on real runs that take a second, and their results."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from omegaconf import OmegaConf
from shell import SHORT, spikerl, tree

from spikerl import load_policy
from spikerl.config.yaml_file import conf_folder
from spikerl.energy import operations
from spikerl.seeding import seed_for
from spikerl.training.evaluator import Evaluator
from spikerl.training.trainer import Trainer

TIMES = ("wall_s", "cpu_s", "env_steps_per_s", "updates_per_s")


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert spikerl("train", *SHORT, f"run_dir={folder}", "seed=3").status == 0
    return folder


def record(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def computed(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows(folder)]


def actor(folder: Path) -> dict[str, torch.Tensor]:
    return load_policy(folder).network.state_dict()


# --- where a run's folder is, and what it records ----------------------------------------------


def test_dated_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs started in the same second get folders of their own; a folder's path has the
    environment, the algorithm, the time and the seed.
    """

    class Noon(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Noon:
            return cls(2026, 1, 2, 12, 0, 5)

    monkeypatch.setattr("spikerl.training.start.datetime", Noon)
    few = [*SHORT, "total_steps=10", "steps_per_epoch=10", "seed=7"]
    for name in ("2026-01-02_12-00-05_seed7", "2026-01-02_12-00-05_seed7_2"):
        assert spikerl("train", *few).status == 0
        folder = tmp_path / "outputs" / "InvertedPendulum" / "td3" / name
        assert (folder / "summary.json").is_file()
    assert len(list(folder.parent.iterdir())) == 2
    assert spikerl("train", *few, "env=gym", "env.id=InvertedPendulum-v4").status == 0
    assert (tmp_path / "outputs" / "InvertedPendulum-v4" / "td3").is_dir()
    assert [p.name for p in tmp_path.iterdir()] == ["outputs"]


def test_the_command_is_recorded_as_it_was_typed(run: Path) -> None:
    typed = f"config={run}/config.yaml"
    assert spikerl("train", typed, "run_dir=a = b", "seed=4").status == 0
    assert record(Path("a = b/manifest.json"))["command"] == (
        f"spikerl train {typed} 'run_dir=a = b' seed=4"
    )
    assert spikerl("train", "resume=a = b", "total_steps=310").status == 0
    (event,) = record(Path("a = b/manifest.json"))["resumed"]
    assert event["command"] == "spikerl train 'resume=a = b' total_steps=310"


@pytest.mark.parametrize(
    "where", ["runs.folder.write_text", "training.session.save_checkpoint", "os.rename"]
)
def test_a_folder_that_cannot_be_made_is_not_there(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "runs").mkdir()
    monkeypatch.setattr(where if where == "os.rename" else f"spikerl.{where}", full)
    said = spikerl("train", *SHORT, "run_dir=runs/run")
    assert said.status in (1, 2)
    assert "No space left on device" in said.err
    assert tree(tmp_path) == {"runs": None}


def test_the_run_learned_something(run: Path) -> None:
    assert [(row["step"], row["updates"]) for row in rows(run)] == [(150, 100), (300, 250)]
    first, last = actor(run / "checkpoints" / "step_0000000000"), actor(run)
    for name, before in first.items():
        assert not torch.equal(before, last[name]), name


# --- a new run from another run's config --------------------------------------------------------


def test_config_makes_the_same_run(run: Path, tmp_path: Path) -> None:
    assert spikerl("train", f"config={run}/config.yaml", "run_dir=again").status == 0
    assert computed(tmp_path / "again") == computed(run)
    for file in ("policy.safetensors", "policy.json"):
        assert (tmp_path / "again" / file).read_bytes() == (run / file).read_bytes()
    theirs, ours = (OmegaConf.load(f / "config.yaml") for f in (run, Path("again")))
    ours.run_dir = theirs.run_dir
    assert ours == theirs


def test_config_with_overrides(run: Path) -> None:
    typed = ["seed=1", "precision=bf16", "env.version=v4", "total_steps=150", "actor=mlp"]
    assert spikerl("train", f"config={run}/config.yaml", "run_dir=new", *typed).status == 0
    wanted: Any = OmegaConf.load(run / "config.yaml")
    wanted.run_dir, wanted.seed, wanted.total_steps = "new", 1, 150
    wanted.env.version, wanted.env.id = "v4", "InvertedPendulum-v4"
    for group, option in (("precision", "bf16"), ("actor", "mlp")):
        wanted[group] = OmegaConf.load(conf_folder() / group / f"{option}.yaml")
    assert OmegaConf.load("new/config.yaml") == wanted
    assert load_policy("new").task.env_id == "InvertedPendulum-v4"
    assert rows(Path("new"))[-1]["updates"] == 100


# --- policies of runs -------------------------------------------------------------------------


def test_load_policy_is_evals_actor(run: Path) -> None:
    """An episode stepped by hand with load_policy has exactly the return that eval reports."""
    said = spikerl("eval", f"run={run}", "episodes=1", "seed=5", "json=true")
    answer = json.loads(said.out)
    assert answer.keys() == {
        "return_mean", "return_std", "returns", "lengths", "episodes", "env_id", "firing_rate",
        "spike_steps", "seed", "versions", "trained_with", "macs", "acs", "modelled_45nm_nj",
        "modelled_memory_nj", "operations", "modelled_energy", "modelled_memory",
    }  # fmt: skip
    policy, env = load_policy(run), gym.make("InvertedPendulum-v5", max_episode_steps=30)
    obs, _ = env.reset(seed=seed_for(5, "eval", 0, 0))
    total, length, over = 0.0, 0, False
    while not over:
        obs, reward, terminated, truncated, _ = env.step(policy(obs))
        total, length, over = total + float(reward), length + 1, terminated or truncated
    assert (answer["returns"], answer["lengths"]) == ([total], [length])
    assert answer["seed"] == 5


def test_eval_counts_operations(run: Path) -> None:
    said = spikerl("eval", f"run={run}", "episodes=2", "json=true", "ops=true")
    answer = json.loads(said.out)
    counted = answer["operations"]
    assert counted["observations"] == sum(answer["lengths"])
    assert counted["activation_sparsity"] == pytest.approx(1.0 - answer["firing_rate"])
    assert answer["modelled_energy"].keys() == {"45nm", "proxy_target", "loihi"}
    assert answer["modelled_memory"]["dense_twins"][1]["bits"] == 3  # 5 spike steps
    said = spikerl("eval", f"run={run}", "episodes=2", "ops=true")
    assert (said.status, said.err) == (0, "")
    fired = counted["parts"]["hidden 1"]["spikes"]
    assert re.search(rf"\nhidden 1 .* {fired:,.0f} +0\n", said.out)


def test_operations_that_are_not_known_are_refused_first(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations, "NEURON_UPDATES", {})
    monkeypatch.setattr(Evaluator, "run", None)
    said = spikerl("eval", f"run={run}", "ops=true")
    assert said.line == "ops=true: the operations of CubaLIF are not known; leave ops out"


def test_eval_in_words(run: Path) -> None:
    said = spikerl("eval", f"run={run}", "episodes=2", "env_id=InvertedPendulum-v4")
    assert (said.status, said.err) == (0, "")
    lines = said.out.splitlines()
    assert re.fullmatch(r"episode 1  return \d+\.0  length \d+", lines[1])
    assert re.fullmatch(r"InvertedPendulum-v4: return \S+ \+- \S+ over 2 episodes", lines[2])
    assert re.fullmatch(r"firing rate 0\.\d+ \(encoder and layers: [0-9., ]+\)", lines[3])
    assert " over 1 episode\n" in spikerl("eval", f"run={run}", "episodes=1").out


def test_eval_says_that_physics_have_changed(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run", symlinks=True)
    data = record(tmp_path / "run" / "policy.json")
    data["versions"]["mujoco"] = "3.1"
    (tmp_path / "run" / "policy.json").write_text(json.dumps(data))
    said = spikerl("eval", "run=run", "episodes=1")
    assert "note: trained with mujoco 3.1 (here " in said.out


def test_eval_changes_nothing(run: Path) -> None:
    before = tree(run)
    assert spikerl("eval", f"run={run}", "episodes=1").status == 0
    assert tree(run) == before


def test_a_resumed_runs_policy_is_not_its_old_one(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run that fails leaves no policy or summary of its earlier end behind."""
    shutil.copytree(run, tmp_path / "run", symlinks=True)
    (tmp_path / "run" / "error.txt").write_text("why it failed\n")

    def fails(trainer: Trainer, stop_signal: Any) -> None:
        raise OSError("the disk went away")

    monkeypatch.setattr(Trainer, "evaluate_epoch", fails)
    said = spikerl("train", "resume=run", "total_steps=450")
    assert said.status == 1
    assert "failed at step 450: OSError: the disk went away" in said.out
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert not names & {"policy.json", "policy.safetensors", "summary.json"}
    assert "the disk went away" in (tmp_path / "run" / "error.txt").read_text()
    assert "why it failed\n" in (tmp_path / "run" / "log.txt").read_text()
    assert actor(tmp_path / "run").keys() == actor(run).keys()
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert spikerl("train", "resume=run", "total_steps=450").status == 0
    assert not (tmp_path / "run" / "error.txt").exists()
    assert record(tmp_path / "run" / "summary.json")["steps"] == 450


@pytest.mark.slow
def test_killed_then_evaluated(tmp_path: Path) -> None:
    """After SIGKILL, eval uses the policy of the newest checkpoint."""
    command = [sys.executable, "-m", "spikerl", "train", *SHORT, "total_steps=1000000"]
    with subprocess.Popen([*command, "run_dir=run"], stdout=subprocess.DEVNULL) as process:
        newest = tmp_path / "run" / "checkpoints" / "step_0000000300"
        deadline = time.monotonic() + 100
        while not newest.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert record(tmp_path / "run" / "manifest.json")["status"] == "running"
    assert not (tmp_path / "run" / "policy.json").exists()
    said = spikerl("eval", "run=run", "episodes=1", "json=true")
    assert said.status == 0
    assert json.loads(said.out)["env_id"] == "InvertedPendulum-v5"
