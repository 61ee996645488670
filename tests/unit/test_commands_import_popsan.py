"""Policies of the public PopSAN code act as its equations say; other files are refused.

Shape legend   T spike steps, B batch, O observation entries, P neurons of one population.
"""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from published import MODEL, STATS, needs_published_policy
from shell import SHORT, Said, spikerl, tree

from spikerl import load_policy
from spikerl.envs.config import EnvConfig
from spikerl.envs.make import make_env, task_of
from spikerl.models.foreign import POPSAN_OBSERVATIONS

Weights = dict[str, np.ndarray]


class Sizes(NamedTuple):
    obs: int
    act: int
    encoder: int
    decoder: int
    hidden: list[int]


PENDULUM = Sizes(3, 1, 4, 3, [8, 7])


def random_weights(sizes: Sizes, seed: int = 0) -> dict[str, torch.Tensor]:
    """A state dict as the public code saves it, with overlapping populations.

    Weights and biases are large enough that every layer fires often, though not always.
    """
    draw = np.random.default_rng(seed)
    widths = [sizes.obs * sizes.encoder, *sizes.hidden, sizes.act * sizes.decoder]
    names = [f"snn.hidden_layers.{i}" for i in range(len(sizes.hidden))] + ["snn.out_pop_layer"]
    weights: Weights = {
        "encoder.mean": draw.uniform(-3, 3, (1, sizes.obs, sizes.encoder)),
        "encoder.std": draw.uniform(0.3, 1.5, (1, sizes.obs, sizes.encoder)),
        "decoder.decoder.weight": draw.normal(size=(sizes.act, 1, sizes.decoder)),
        "decoder.decoder.bias": draw.normal(size=sizes.act) / 10,
    }
    for name, i, n in zip(names, widths[:-1], widths[1:], strict=True):
        weights[f"{name}.weight"] = draw.normal(size=(n, i)) / np.sqrt(i)
        weights[f"{name}.bias"] = draw.normal(size=n) / 5
    return {name: torch.from_numpy(w.astype(np.float32)) for name, w in weights.items()}


def popsan(
    weights: Weights, mean: np.ndarray, var: np.ndarray, obs: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """PopSAN in float64 (arXiv:2010.09635): actions in [-1, 1] and, for each row, the smallest
    distance of any membrane's voltage from its threshold.
    """
    s = np.clip((obs - mean) / np.sqrt(var + np.finfo(np.float32).eps), -3, 3)[:, :, None]
    drive = np.exp(-0.5 * (s - weights["encoder.mean"]) ** 2 / weights["encoder.std"] ** 2)
    drive = drive.reshape(len(obs), -1)
    hidden = sum(name.startswith("snn.hidden_layers") for name in weights) // 2
    names = [f"snn.hidden_layers.{i}" for i in range(hidden)] + ["snn.out_pop_layer"]
    state = {n: [np.zeros((len(obs), len(weights[f"{n}.bias"])))] * 3 for n in names}
    potential, fired = np.zeros_like(drive), np.zeros(())
    margin = np.full(len(obs), np.inf)
    for _ in range(5):
        potential = potential + drive
        margin = np.minimum(margin, np.abs(potential - 0.999).min(1))
        spikes = (potential > 0.999).astype(float)
        potential = potential - 0.999 * spikes
        for name in names:
            current, voltage, before = state[name]
            current = 0.5 * current + spikes @ weights[f"{name}.weight"].T
            current = current + weights[f"{name}.bias"]
            voltage = 0.75 * voltage * (1 - before) + current
            margin = np.minimum(margin, np.abs(voltage - 0.5).min(1))
            spikes = (voltage > 0.5).astype(float)
            state[name] = [current, voltage, spikes]
        fired = fired + spikes / 5
    weight = weights["decoder.decoder.weight"][:, 0]
    rates = fired.reshape(len(obs), *weight.shape)
    return np.tanh((rates * weight).sum(-1) + weights["decoder.decoder.bias"]), margin


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.save(random_weights(PENDULUM), "m.pt")
    Path("s.p").write_bytes(pickle.dumps([np.array([0.5, -0.5, 1.0]), np.array([0.4, 0.6, 9.0])]))
    return tmp_path


def bring(*args: str) -> Said:
    return spikerl("import", "popsan=m.pt", "stats=s.p", "env=Pendulum", *args)


def test_an_import_makes_a_run_folder(files: Path) -> None:
    said = bring("run_dir=run", "algo.norm_clip=2.0")
    assert (said.status, said.err) == (0, "")
    assert said.out == "Pendulum-v1: [8, 7] hidden, populations 4 and 3; run folder: run\n"
    names = {"config.yaml", "manifest.json", "metrics.jsonl", "policy.json", "policy.safetensors"}
    assert tree(files / "run").keys() == names
    config = OmegaConf.load("run/config.yaml")
    assert (config.encoder.pop_size, config.decoder.pop_size) == (4, 3)
    assert config.actor.hidden_sizes == [8, 7]
    assert "popsan" not in config
    manifest = json.loads(Path("run/manifest.json").read_text())
    assert manifest["status"] == "done"
    assert manifest["imported_from"] == ["m.pt", "s.p"]
    assert manifest["command"] == (
        "spikerl import popsan=m.pt stats=s.p env=Pendulum run_dir=run algo.norm_clip=2.0"
    )
    policy = load_policy("run")
    assert (policy.norm.count, policy.norm.clip) == (POPSAN_OBSERVATIONS, 2.0)


def agrees(run: Path, weights: Weights, mean: np.ndarray, var: np.ndarray, high: float) -> None:
    spread = 2.0 * np.sqrt(var)  # so that some entries are clipped
    obs = mean + spread * np.random.default_rng(3).normal(size=(2000, len(mean)))
    wanted, margin = popsan(weights, mean, var, obs)
    clear = margin > 1e-5
    assert clear.mean() > 0.9
    assert wanted[clear].std(0).min() > 0.01, "the test's policy should not be constant"
    got = load_policy(run)(obs)
    np.testing.assert_allclose(got[clear], high * wanted[clear], rtol=0, atol=1e-5 * high)


@pytest.mark.parametrize("seed", range(3))
def test_it_acts_as_the_equations_say(files: Path, seed: int) -> None:
    weights = random_weights(PENDULUM, seed)
    torch.save(weights, "m.pt")
    assert bring("run_dir=run").status == 0
    mean, var = pickle.loads(Path("s.p").read_bytes())
    agrees(files / "run", {k: w.double().numpy() for k, w in weights.items()}, mean, var, 2.0)


@needs_published_policy
def test_the_published_policy(tmp_path: Path) -> None:
    run = tmp_path / "run"
    args = [f"popsan={MODEL}", f"stats={STATS}", "env=HalfCheetah", f"run_dir={run}"]
    assert spikerl("import", *args).status == 0
    state = torch.load(MODEL, map_location="cpu", weights_only=True)
    mean, var = (np.asarray(a, np.float64) for a in pickle.loads(STATS.read_bytes()))
    agrees(run, {k: w.double().numpy() for k, w in state.items()}, mean, var, 1.0)


def test_eval_and_init_from_take_an_import(files: Path) -> None:
    assert bring("run_dir=run").status == 0
    said = spikerl("eval", "run=run", "episodes=2", "json=true")
    answer = json.loads(said.out)
    assert (answer["env_id"], answer["lengths"]) == ("Pendulum-v1", [200, 200])
    assert answer["firing_rate"] > 0
    same = ["encoder.pop_size=4", "decoder.pop_size=3", "actor.hidden_sizes=[8,7]", "env=Pendulum"]
    said = spikerl("train", *SHORT, *same, "total_steps=150", "init_from=run", "run_dir=on")
    assert said.status == 0, said.err
    assert "actor weights and normaliser (1000000 observations)" in said.out
    before, after = load_policy("run").actor.state_dict(), load_policy("on").actor.state_dict()
    first = load_policy("on/checkpoints/step_0000000000").actor.state_dict()
    assert all(torch.equal(before[k], first[k]) for k in before)
    assert not all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("model", ["m.pt", "../{here}/m.pt"])
def test_a_sweep_of_imports_again(files: Path, model: str) -> None:
    model = model.format(here=files.name)
    args = ["-m", "neuron.threshold=0.5,0.6", "run_dir=s", f"popsan={model}"]
    assert bring(*args).status == 0
    before = {path: content for path, content in tree(files).items() if "jobs" not in str(path)}
    command = json.loads(Path("s/neuron.threshold=0.6/manifest.json").read_text())["command"]
    folder = files / "s/neuron.threshold=0.6"
    typed = f"popsan={model} stats=s.p env=Pendulum neuron.threshold=0.6 run_dir={folder}"
    assert command == f"spikerl import {typed}"
    said = bring(*args)
    assert (said.status, said.out.count("done already")) == (0, 2)
    assert {path: tree(files)[path] for path in before} == before


def test_a_sweep_of_imports_with_other_files_or_settings(files: Path) -> None:
    args = ["-m", "seed=0,1", "run_dir=s"]
    assert bring(*args).status == 0
    (files / "other_m.pt").write_bytes((files / "m.pt").read_bytes())
    for key, other, made in (
        ("popsan", "popsan=other_m.pt", "imported from m.pt, s.p"),
        ("stats", "stats=none", "imported from m.pt, s.p"),
        ("neuron.threshold", "neuron.threshold=0.75", "made with 0.5"),
    ):
        said = bring(*args, other)
        assert said.status == 2
        value = other.partition("=")[2]
        expected = f"spikerl: {key}={value}: {files / 's' / 'seed=0'} was {made}; give another run"
        assert expected in said.err


# --- what is refused --------------------------------------------------------------------------

REFUSED = [
    (["env=Reacher"], "popsan=m.pt: the policy maps 3 observations to 1 actions, Reacher-v5 needs"),
    (["actor=mlp"], "actor=mlp: such a policy is actor=popsan"),
    (["resume=r"], "resume=r: has no effect on an import"),
    (["config=c.yaml"], "config=c.yaml: has no effect on an import"),
    (["init_from=r"], "init_from=r: has no effect on an import"),
    (["seed=-1"], "seed=-1: give 0"),
    (["encoder.pop_size=9"], "encoder.pop_size=9: the file has 4; leave it out"),
    (["++encoder.pop_size=9"], "encoder.pop_size=9: the file has 4; leave it out"),
    (["decoder.pop_size=9"], "decoder.pop_size=9: the file has 3; leave it out"),
    (["actor.hidden_sizes=[8,8]"], "actor.hidden_sizes=[8,8]: the file has [8, 7]; leave it out"),
    (["stats=none", "algo.norm_clip=5"], "algo.norm_clip=5: observations are not normalised"),
    (["neuron=plif"], "neuron=plif: the file has no neurons.0.decay_logit of it; give what the"),
    (["algo=dqn"], "algo=dqn: the actions of Pendulum-v1 are continuous"),
    (["env=Pendulun"], "env=Pendulun: no such option; did you mean Pendulum?"),
    (["popsan=none.pt"], "popsan=none.pt: no such file"),
    (["stats=none.p"], "stats=none.p: no such file"),
    (["popsan=" + "x" * 300], "popsan=" + "x" * 300 + ": no such file"),
    (["popsan=s.p"], "popsan=s.p: cannot be read as tensors"),
    (["stats=m.pt"], "stats=m.pt: cannot be read as two arrays"),
    (["popsan=m.pt/x"], "popsan=m.pt/x: no such file"),
    (["run_dir=taken"], "run_dir=taken: it exists already; give another run_dir, or leave it out"),
    (["run_dir=m.pt/below"], "run_dir=m.pt/below: "),
]  # fmt: skip


@pytest.mark.parametrize(("args", "line"), REFUSED, ids=[r[0][0][:20] for r in REFUSED])
def test_refused(files: Path, args: list[str], line: str) -> None:
    Path("taken").mkdir()
    before = tree(files)
    said = bring("run_dir=new/run", *args)
    assert said.line.startswith(line)
    assert tree(files) == before


@pytest.mark.parametrize(
    ("arrays", "line"),
    [
        ([np.zeros(2), np.ones(2)], "holds statistics of 2 entries; the policy has 3"),
        ([np.zeros(3), np.ones(2)], "holds no mean and variance of one length"),
        ([np.zeros(3), -np.ones(3)], "holds a negative variance"),
        ([np.zeros(3)], "cannot be read as two arrays"),
    ],
)
def test_refused_statistics(files: Path, arrays: list[np.ndarray], line: str) -> None:
    Path("s.p").write_bytes(pickle.dumps(arrays))
    assert bring().line.startswith(f"stats=s.p: {line}")
    assert tree(files).keys() == {"m.pt", "s.p"}


@pytest.mark.parametrize(
    "change",
    [
        {"snn.out_pop_layer.bias": torch.zeros(4)},
        {"decoder.decoder.weight": torch.zeros(1, 2, 3)},
        {"encoder.std": torch.ones(3, 4)},
        {"snn.hidden_layers.1.weight": torch.full((7, 8), torch.nan)},
        {"critic": torch.zeros(1)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_refused_weights(files: Path, change: dict[str, Any]) -> None:
    torch.save(random_weights(PENDULUM) | change, "m.pt")
    assert bring().line.startswith("popsan=m.pt: ")
    assert tree(files).keys() == {"m.pt", "s.p"}


def test_one_bound_for_all_actions(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PopSAN's code scales every entry by the first entry's bound; other tasks are refused."""
    config = EnvConfig(
        name="gym", version=None, id="Pendulum-v1", max_episode_steps=None, vectorizer="sync"
    )
    task = task_of(make_env(config))
    numbered = replace(task, choices=range(1), act_shape=())
    monkeypatch.setattr("spikerl.commands.import_popsan.task_of", lambda env: numbered)
    assert "env=Pendulum-v1: such code acts continuously" in bring().line
    for low, high in ((-1.0, 2.0), (0.0, 2.0)):
        odd = task.__class__(**{**vars(task), "act_low": np.array([low]),
                                "act_high": np.array([high])})  # fmt: skip
        monkeypatch.setattr("spikerl.commands.import_popsan.task_of", lambda env, odd=odd: odd)
        assert "one symmetric bound" in bring().line
