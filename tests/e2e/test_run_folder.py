"""The files of a run folder, after real trainings that take seconds, and after failures."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from spikerl import load_policy
from spikerl.cli import main as cli

SMALL = [
    "env=InvertedPendulum", "total_steps=300", "steps_per_epoch=100", "algo.random_steps=50",
    "algo.learning_starts=50", "algo.batch_size=10", "eval_episodes=2", "actor.hidden_sizes=[16]",
    "algo.critic_hidden_sizes=[16]", "threads=1", "device=cpu",
]  # fmt: skip
ROW = {
    "epoch", "step", "updates", "wall_s", "train_return", "eval_return", "eval_return_std",
    "eval_length", "critic_loss", "actor_loss", "q_mean", "firing_rate", "window_fraction",
    "env_steps_per_s", "updates_per_s", "energy_j", "energy_gpu_j", "energy_cpu_j",
    "energy_source", "power_w", "energy_train_j", "energy_eval_j", "layer_firing_rates",
    "layer_window_fractions", "layer_silent", "layer_saturated", "macs", "acs",
    "modelled_45nm_nj", "modelled_memory_nj", "cpu_s",
}  # fmt: skip


class Breaks(gym.Env[np.ndarray, np.ndarray]):
    """Fails at its 60th step as `how` says; only the instance that trains makes so many steps."""

    def __init__(self, how: str) -> None:
        self.how, self.steps = how, 0
        self.observation_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float64)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float64)

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        return np.zeros(2), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        wrong = self.steps == 60
        if wrong and self.how == "raise":
            raise OSError("the simulator went away")
        obs = np.full(2, np.nan if wrong and self.how == "nan_obs" else 0.5)
        rew = math.inf if wrong and self.how == "inf_rew" else 1.0
        return obs, rew, False, self.steps % 30 == 0, {}


def train(*args: str) -> int:
    GlobalHydra.instance().clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["spikerl"])
        patch.setenv("HYDRA_FULL_ERROR", "1")
        return cli.run(["train", *SMALL, *args])


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def data(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert train(f"run_dir={folder}", "energy=none") == 0
    return folder


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    for how in ("raise", "nan_obs", "inf_rew", "none"):
        gym.register(f"Breaks-{how}-v0", entry_point=partial(Breaks, how), max_episode_steps=30)
    yield
    for how in ("raise", "nan_obs", "inf_rew", "none"):
        del gym.registry[f"Breaks-{how}-v0"]


def test_files(run: Path) -> None:
    names = {p.name for p in run.iterdir() if not p.name.startswith(".")}
    assert names == {"config.yaml", "manifest.json", "metrics.jsonl", "checkpoints", "summary.json",
                     "policy.safetensors", "policy.json", "best", "tb", "log.txt",
                     "replay"}  # fmt: skip
    assert (run / "checkpoints" / "latest" / "policy.json").is_file()
    config = OmegaConf.load(run / "config.yaml")
    assert config.env.id == "InvertedPendulum-v5"
    assert config.algo.batch_size == 10
    assert "hydra" not in config


def test_manifest(run: Path) -> None:
    manifest = data(run / "manifest.json")
    assert manifest["status"] == "done"
    assert manifest["command"].startswith("spikerl train env=InvertedPendulum")
    assert manifest["world_size"] == 1
    assert {"commit", "dirty"} <= manifest["git"].keys()
    assert {"python", "torch", "mujoco", "gymnasium", "spikerl"} <= manifest["versions"].keys()
    assert {"cpu", "cores", "cpu_flags", "gpus"} <= manifest["hardware"].keys()
    assert {"kernel", "backend", "threads", "energy", "device"} <= manifest["resolved"].keys()
    assert all(r["choice"] and r["reason"] for r in manifest["resolved"].values())
    assert manifest["precision"] == "fp32"


def test_rows(run: Path) -> None:
    rows = rows_of(run)
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 100), (2, 200), (3, 300)]
    for row in rows:
        assert row.keys() >= ROW
        measured = [k for k in row if k.startswith("energy_") and k.endswith("_j")] + ["power_w"]
        assert all(row[key] is None for key in measured)
        assert row["energy_source"] == "none: requested"
        assert 0.0 <= row["firing_rate"] <= 1.0
    assert [row["updates"] for row in rows] == [100, 200, 300]
    assert rows[0]["wall_s"] < rows[1]["wall_s"] < rows[2]["wall_s"]


def test_layers_that_can_learn_no_more_are_named_once(tmp_path: Path) -> None:
    assert train("energy=none", "neuron.surrogate_window=1e-9", f"run_dir={tmp_path}/run") == 0
    log = (tmp_path / "run" / "log.txt").read_text().splitlines()
    warnings = [line.partition("warning: ")[2] for line in log if "warning: " in line]
    assert sorted(text.partition(":")[0] for text in warnings) == [
        f"spiking layer {layer} of 2 hardly learns any more" for layer in (1, 2)
    ]
    row = rows_of(tmp_path / "run")[-1]
    assert row["layer_window_fractions"] == [0.0, 0.0]
    assert len(row["layer_firing_rates"]) == 3  # the encoder's too
    assert len(row["layer_silent"]) == len(row["layer_saturated"]) == 2


SHOWN = {
    "rollout/ep_rew_mean": "train_return", "rollout/episodes": "train_episodes",
    "eval/mean_reward": "eval_return", "eval/std_reward": "eval_return_std",
    "eval/mean_ep_length": "eval_length", "train/critic_loss": "critic_loss",
    "train/actor_loss": "actor_loss", "train/q_mean": "q_mean", "train/n_updates": "updates",
    "train/firing_rate": "firing_rate", "train/window_fraction": "window_fraction",
    "time/fps": "env_steps_per_s", "time/updates_per_s": "updates_per_s",
    "time/time_elapsed": "wall_s", "time/cpu_seconds": "cpu_s", "time/epoch": "epoch",
    "time/total_timesteps": "step",
    "decision/macs": "macs", "decision/acs": "acs", "modelled/45nm_nj": "modelled_45nm_nj",
    "modelled/memory_nj": "modelled_memory_nj",
}  # fmt: skip
LAYERS = {
    "layers/firing_rate": ("layer_firing_rates", (0, 1, 2)),
    "layers/window_fraction": ("layer_window_fractions", (1, 2)),
    "layers/silent": ("layer_silent", (1, 2)),
    "layers/saturated": ("layer_saturated", (1, 2)),
}


def test_tensorboard_is_a_view(run: Path) -> None:
    events = EventAccumulator(str(run / "tb"))
    events.Reload()
    rows = rows_of(run)
    wanted = {tag: [(row["step"], row[key]) for row in rows] for tag, key in SHOWN.items()}
    for tag, (key, layers) in LAYERS.items():
        for place, layer in enumerate(layers):
            wanted[f"{tag}/{layer}"] = [(row["step"], row[key][place]) for row in rows]
    wanted = {tag: [(s, v) for s, v in points if v is not None] for tag, points in wanted.items()}
    assert set(events.Tags()["scalars"]) == set(wanted)
    for tag, points in wanted.items():
        shown = [(e.step, e.value) for e in events.Scalars(tag)]
        assert [s for s, _ in shown] == [s for s, _ in points]
        assert [v for _, v in shown] == pytest.approx([v for _, v in points], rel=1e-6)


def test_summary(run: Path) -> None:
    summary, rows = data(run / "summary.json"), rows_of(run)
    returns = [row["eval_return"] for row in rows]
    assert summary["last_eval_return"] == returns[-1]
    assert summary["best_eval_return"] == max(returns)
    assert summary["last_ten_mean_eval_return"] == pytest.approx(np.mean(returns[-10:]))
    assert summary["wall_s"] >= rows[-1]["wall_s"]
    assert (summary["steps"], summary["updates"]) == (300, rows[-1]["updates"])
    assert summary["energy_j"] is None
    assert summary["versions"] == data(run / "manifest.json")["versions"]


def test_eval(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["spikerl"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    before = sorted(run.rglob("*"))
    answers = []
    for _ in range(2):
        GlobalHydra.instance().clear()
        assert cli.run(["eval", f"run={run}", "episodes=3", "json=true"]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0] == answers[1]
    answer = answers[0]
    assert answer["env_id"] == "InvertedPendulum-v5"
    assert len(answer["returns"]) == len(answer["lengths"]) == answer["episodes"] == 3
    assert answer["return_mean"] == pytest.approx(np.mean(answer["returns"]))
    assert answer["return_std"] == pytest.approx(np.std(answer["returns"]))
    assert 0.0 <= answer["firing_rate"] <= 1.0
    assert sorted(run.rglob("*")) == before


def test_library(run: Path) -> None:
    policy = load_policy(run)
    obs = np.random.default_rng(0).normal(size=(5, 4))
    batch = policy(obs)
    assert batch.shape == (5, 1)
    assert policy(obs[0]).shape == (1,)
    assert np.allclose(policy(obs[0]), batch[0], atol=1e-6)
    assert (np.abs(batch) <= 3.0).all()


VARIANTS = [
    ["actor=mlp"],
    ["precision=bf16"],
    ["encoder=poisson"],
    ["env=Pendulum"],
    ["env=gym", "env.id=MountainCarContinuous-v0", "env.max_episode_steps=50"],
    ["num_envs=2", "algo.max_grad_norm=1.0", "deterministic=true"],
    ["algo=sac", "algo.learn_temperature=true", "precision=bf16"],
    ["actor=care_bn", "encoder=learned", "neuron=plif", "neuron.reset=soft", "decoder=learned"],
    ["neuron=alif", "neuron.surrogate=triangle", "neuron.surrogate_slope_end=5.0", "decoder=ilc"],
    ["algo=proxy_td3", "neuron=dynamic", "encoder=analog", "decoder=membrane"],
]


@pytest.mark.parametrize("overrides", VARIANTS, ids=" ".join)
def test_variants_learn(overrides: Sequence[str], tmp_path: Path) -> None:
    assert train("total_steps=150", "steps_per_epoch=150", "run_dir=run", *overrides) == 0
    last = rows_of(tmp_path / "run")[-1]
    assert last["updates"] > 0
    assert math.isfinite(last["critic_loss"])
    assert (last["firing_rate"] is None) == ("actor=mlp" in overrides)
    torch.use_deterministic_algorithms(False)


def test_init_from(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("total_steps=120", f"init_from={run}", "run_dir=run", "seed=1") == 0
    assert "actor weights and normaliser (300 observations)" in capsys.readouterr().out
    assert rows_of(tmp_path / "run")[-1]["updates"] > 0
    assert train(f"init_from={run}", "run_dir=other", "env=Pendulum") == 2
    assert train(f"init_from={run}", "run_dir=other", "actor.hidden_sizes=[8]") == 2
    assert not (tmp_path / "other").exists()


def test_init_from_a_policy_without_a_normaliser(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that normalises or clips observations otherwise is refused: the policy would act
    differently.
    """
    raw = "algo.norm_interval=null"
    assert train(raw, "total_steps=20", "run_dir=run") == 0
    capsys.readouterr()
    assert train("total_steps=20", "init_from=run", "run_dir=again") == 2
    line = "algo.norm_interval=50: the policy of run acts on raw observations; give null"
    assert line in capsys.readouterr().err
    assert not (tmp_path / "again").exists()
    assert train(raw, "total_steps=20", "init_from=run", "run_dir=again") == 0
    assert "run: actor weights, no normaliser\n" in capsys.readouterr().out
    unbounded = "algo.norm_clip=null"
    assert train(raw, unbounded, "total_steps=20", "run_dir=wide") == 0
    assert train(raw, "total_steps=20", "init_from=wide", "run_dir=other") == 2
    line = "algo.norm_clip=3.0: the policy of wide clips observations at another; give null"
    assert line in capsys.readouterr().err
    assert train(raw, unbounded, "total_steps=20", "init_from=wide", "run_dir=other") == 0


def test_init_from_a_policy_with_fewer_outputs(tmp_path: Path) -> None:
    """An actor of SAC that also outputs deviations is saved with the outputs of the means alone."""
    sac = ["algo=sac", "algo.log_std=shared"]
    assert train(*sac, "total_steps=100", "run_dir=run") == 0
    assert train(*sac, "total_steps=20", "init_from=run", "run_dir=again", "seed=1") == 0
    files = [tmp_path / name / "policy.safetensors" for name in ("run", "again")]
    first, second = ({k: v for k, v in load_file(f).items() if k[0] == "a"} for f in files)
    assert len(first) == 8
    assert all(torch.equal(first[k], second[k]) for k in first)


def outcome(call: Callable[[], int]) -> int:
    """The exit status; 1 for an exception, which would end the program."""
    try:
        return call()
    except Exception:
        return 1


@pytest.mark.parametrize("how", ["raise", "nan_obs", "inf_rew"])
def test_failing_environment(how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["env=gym", f"env.id=Breaks-{how}-v0", "run_dir=run"]
    assert outcome(lambda: train(*args)) == 1
    run = tmp_path / "run"
    assert data(run / "manifest.json")["status"] == "failed"
    error = (run / "error.txt").read_text()
    assert "the simulator went away" in error if how == "raise" else "step 60" in error
    said = capsys.readouterr().out
    assert "failed at step 59" in said
    assert not (run / "summary.json").exists()
    assert load_policy(run)(np.zeros(2)).shape == (1,)


def test_failure_before_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("spikerl.training.session.save_checkpoint", full)
    assert outcome(lambda: train("run_dir=below/run")) != 0
    assert not [p for p in tmp_path.rglob("*") if p.name != "below"]


def test_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = "env.id=Breaks-raise-v0,Breaks-none-v0"
    assert train("-m", "env=gym", ids, "seed=0,1", "run_dir=sweep", "total_steps=70") == 1
    table = capsys.readouterr().out
    assert "2 of 4 jobs done" in table
    assert "the simulator went away" in table
    folders = {p.name: p for p in (tmp_path / "sweep").iterdir() if p.is_dir()}
    assert len(folders) == 4
    for name, folder in folders.items():
        done = "none" in name
        assert data(folder / "manifest.json")["status"] == ("done" if done else "failed")
        assert (folder / "error.txt").exists() != done
