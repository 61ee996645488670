"""A bad request gets one line that names key, value and remedy, and status 2; no file changes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from spikerl.cli import main as cli
from spikerl.energy.counters import Measurable

Said = Callable[..., str]
NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")


class Odd(gym.Env[Any, Any]):
    """An environment with given spaces; those in ODD cannot be trained on."""

    def __init__(self, obs: gym.Space[Any] | None = None, act: gym.Space[Any] | None = None):
        box = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.observation_space, self.action_space = obs or box, act or box


ODD: dict[str, dict[str, gym.Space[Any]]] = {
    "TextObs-v0": {"obs": gym.spaces.Dict(a=gym.spaces.Text(3))},
    "OddAct-v0": {"act": gym.spaces.MultiBinary(3)},
    "UnboundedAct-v0": {"act": gym.spaces.Box(-np.inf, np.inf, (2,))},
}


@pytest.fixture(autouse=True)
def odd_environments() -> Iterator[None]:
    for env_id, spaces in ODD.items():
        gym.register(env_id, entry_point=partial(Odd, **spaces))
    yield
    for env_id in ODD:
        del gym.registry[env_id]


def tree(folder: Path) -> list[tuple[str, bytes | None]]:
    found = sorted(folder.rglob("*"))
    return [(str(p), p.read_bytes() if p.is_file() else None) for p in found]


@pytest.fixture
def said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Said:
    """A function that makes a request, asserts that it is refused, and returns its line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["spikerl"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # the program sets it too; the patch undoes that
    for started in ("run", "launch"):  # a request that is not refused must not start a training
        monkeypatch.setattr(f"spikerl.commands.train.{started}", lambda *args: 0)

    def ask(*args: str) -> str:
        before = tree(tmp_path)
        GlobalHydra.instance().clear()
        status = cli.run(args)
        out, err = capsys.readouterr()
        assert status == 2, out + err
        assert err.startswith("spikerl: "), err
        assert err.endswith("\n"), err
        assert err.count("\n") == 1, err
        assert out == ""
        assert tree(tmp_path) == before
        return err.removeprefix("spikerl: ").rstrip("\n")

    return ask


# What is typed after `train`, how the line begins, and a part of its remedy.
REFUSED = [
    ("env=HalfCheeta", "env=HalfCheeta: ", "HalfCheetah"),
    ("env=Hoper", "env=Hoper: ", "Hopper"),
    ("algo=td4", "algo=td4: ", "td3"),
    ("kernel=triton", "kernel=triton: ", "CUDA"),
    ("kernel.path=avx512", "kernel.path=avx512: ", "kernel=cpu"),
    ("kernel=triton kernel.path=avx512", "kernel.path=avx512: ", "graphs"),
    ("kernel=cpu kernel.path=graphs", "kernel.path=graphs: ", "this processor runs"),
    (
        "kernel=triton kernel.path=graphs algo=ppo",
        "algo=ppo: ",
        "graphs are of ddpg, td3, proxy_td3, sac;",
    ),
    ("kernel=triton kernel.path=graphs world_size=2", "world_size=2: ", "kernel=triton alone"),
    (
        "kernel=triton kernel.path=graphs algo.update_interval=2",
        "algo.update_interval=2: ",
        "give 3 updates or more at once",
    ),
    (
        "kernel=triton kernel.path=graphs neuron.surrogate=atan neuron.surrogate_slope_end=9",
        "neuron.surrogate_slope_end=9.0: ",
        "kernel=triton alone",
    ),
    (
        "neuron.surrogate_slope_end=9",
        "neuron.surrogate_slope_end=9.0: ",
        "surrogate=rect has no slope",
    ),
    ("neuron.surrogate_slope=5", "neuron.surrogate_slope=5: ", "surrogate=rect has none"),
    (
        "neuron.surrogate=atan neuron.surrogate_window=1",
        "neuron.surrogate_window=1: ",
        "surrogate=atan has none",
    ),
    (
        "encoder=poisson encoder.threshold=0.5",
        "encoder.threshold=0.5: ",
        "encoder=poisson has none",
    ),
    ("encoder=analog encoder.threshold=1", "encoder.threshold=1: ", "encoder=analog has none"),
    (
        "actor.spike_cost_warmup=9",
        "actor.spike_cost_warmup=9: ",
        "spikes cost nothing; set actor.spike_cost",
    ),
    (
        "actor.spike_cost=[0,0,0] actor.spike_cost_start=9",
        "actor.spike_cost_start=9: ",
        "spikes cost nothing",
    ),
    (
        "actor=care_bn actor.recalibration_interval=null actor.recalibration_batches=9",
        "actor.recalibration_batches=9: ",
        "set actor.recalibration_interval",
    ),
    ("experiment=dsformer/pssa dataset=d actor.heads=2", "actor.heads=2: ", "the same with any"),
    ("experiment=dsformer/tssa dataset=d actor.window=2", "actor.window=2: ", "sees all steps"),
    ("algo=sac algo.target_entropy=-1", "algo.target_entropy=-1.0: ", "set algo.learn_temperature"),
    ("algo=sac algo.temperature_lr=1", "algo.temperature_lr=1: ", "set algo.learn_temperature"),
    (
        "algo=sac algo.log_std=shared algo.log_std_lr=1",
        "algo.log_std_lr=1: ",
        "no network of its own",
    ),
    ("env=CartPole algo=ppo algo.log_std=0", "algo.log_std=0: ", "actions have no deviation"),
    (
        "env=CartPole algo=dqn env.action_bounds=each",
        "env.action_bounds=each: ",
        "discrete actions have no bounds; leave it out",
    ),
    ("algo=bc dataset=d algo.gamma=0.9", "algo.gamma=0.9: ", "nothing looks ahead"),
    (
        "experiment=dsformer/pssa dataset=d algo.gamma=0.9",
        "algo.gamma=0.9: ",
        "returns to go are undiscounted",
    ),
    (
        "algo=ppo algo.rollout_steps=64 algo.norm_interval=64 scaling=weak world_size=2",
        "algo.batch_size=64: ",
        "algo.rollout_steps=64 has no such batch for each worker",
    ),
    ("experiment=popsan/td4", "experiment=popsan/td4: ", "popsan/td3"),
    ("sedd=1", "sedd=1: no such key", "seed"),
    ("algo.batchsize=1", "algo.batchsize=1: no such key", "algo.batch_size"),
    ("gamma=0.9", "gamma=0.9: no such key", "algo.gamma"),
    ("algorithm=td3", "algorithm=td3: no such key", "algo"),
    ("+foo=1", "foo=1: no such key", "seed"),
    ("++foo=1", "foo=1: no such key", "--help lists"),
    ("+algo.foo=1", "algo.foo=1: no such key", "batch_size"),
    ("~algo", "algo=null: ", "lacks this group"),
    ("~algo.gamma", "algo.gamma=???: ", "give it a value"),
    ("seed", "seed: ", "write key=value"),
    ("init_policy=best", "init_policy=best: ", "belongs to init_from"),
    ("algo=bc dataset=d env.reward_scale=0.1", "env.reward_scale=0.1: ", "bc reads no reward"),
    ("algo.updates_per_step=1e308", "algo.updates_per_step=1e+308: ", "at most 1e6"),
    ("a b", "a b: ", "write key=value"),
    ("seed=[", "seed=[: ", "a list is written [A,B]"),
    ("=3", "=3: ", "write key=value"),
    ("seed=1,2", "seed=1,2: ", "-m"),
    ("seed=x", "seed=x: ", "expected int"),
    ("seed=1.5", "seed=1.5: ", "expected int"),
    ("seed=null", "seed=null: ", "expected int"),
    ("seed=[1]", "seed=[1]: ", "expected int"),
    ("deterministic=maybe", "deterministic=maybe: ", "expected bool"),
    ("algo=3", "algo=3: ", "td3"),
    ("algo.gamma=x", "algo.gamma=x: ", "expected float"),
    ("actor.hidden_sizes=256", "actor.hidden_sizes=256: ", "expected list[int]"),
    ("actor.hidden_sizes=[a]", "actor.hidden_sizes[0]=a: ", "expected list[int]"),
    ("env.id={a:1}", "env.id={'a': 1}: ", "expected str"),
    ("env=gym", "env.id: it has no default; ", "give env.id=VALUE"),
    ("env.id=Nowhere-v0", "env.id=Nowhere-v0: ", "not a registered environment"),
    ("env.id=Track-v0 env=gym", "env.id=Track-v0: ", "env.id=MODULE:Track-v0 imports the module"),
    ("algo.lr=0.1", "algo.lr=0.1: ", "did you mean actor.lr?"),
    ("env.version=v9", "env.version=v9: ", "HalfCheetah-v5"),
    ("env.vectorizer=both", "env.vectorizer=both: ", "sync or async"),
    ("env.action_bounds=one", "env.action_bounds=one: ", "each or first"),
    ("env.max_episode_steps=0", "env.max_episode_steps=0: ", "give 1 to 1000000"),
    ("scaling=huge", "scaling=huge: ", "strong or weak"),
    ("device=tpu", "device=tpu: ", "auto, cpu, cuda"),
    ("precision.actor=fp8", "precision.actor=fp8: ", "bf16"),
    ("precision=fp16 device=cpu", "precision=fp16: ", "precision=bf16"),
    ("precision=bf16 algo=dqn env=CartPole", "precision=bf16: ", "algo=dqn has no critics"),
    ("world_size=3 num_envs=4", "num_envs=4: ", "multiple of world_size=3"),
    ("world_size=4 algo.batch_size=3", "world_size=4: ", "fewer workers"),
    ("world_size=4 algo.replay_capacity=3", "algo.replay_capacity=3: ", "at least num_envs=4"),
    ("max_restarts=-1", "max_restarts=-1: ", "at least 0"),
    ("backend.timeout_s=0", "backend.timeout_s=0.0: ", "1 to 1e6 seconds"),
    ("node_rank=0", "node_rank=0: ", "set nnodes"),
    ("rdzv=host:1", "rdzv=host:1: ", "set nnodes"),
    ("nnodes=2", "world_size=null: ", "multiple of nnodes=2"),
    ("nnodes=2 world_size=3", "world_size=3: ", "multiple of nnodes=2"),
    ("nnodes=2 world_size=2", "node_rank=null: ", "0 to 1"),
    ("nnodes=2 world_size=2 node_rank=2", "node_rank=2: ", "0 to 1"),
    ("nnodes=2 world_size=2 node_rank=1", "rdzv=null: ", "host:29500"),
    ("nnodes=2 world_size=2 node_rank=1 rdzv=host", "rdzv=host: ", "host:29500"),
    ("nnodes=2 world_size=2 node_rank=1 rdzv=a:0", "rdzv=a:0: ", "host:29500"),
    ("nnodes=2 world_size=2 node_rank=1 rdzv=a:99999", "rdzv=a:99999: ", "host:29500"),
    ("nnodes=2 world_size=2 node_rank=1 rdzv=.a:1", "rdzv=.a:1: ", "host:29500"),
    ("nnodes=2 world_size=2 node_rank=1 rdzv=a:1 backend=mpi", "nnodes=2: ", "mpiexec"),
    ("energy=replay", "energy.file: it has no default; ", "give energy.file=VALUE"),
    ("energy=replay energy.file=none.csv", "energy.file=none.csv: ", "give a CSV"),
    ("energy=none energy.file=a.csv", "energy.file=a.csv: ", "energy=replay"),
    ("actor=mlp encoder=poisson", "encoder=poisson: ", "leave it out"),
    ("actor=cnn neuron=lif", "neuron=lif: ", "actor=cnn; leave it out"),
    ("experiment=dense/sac neuron.threshold=1", "neuron.threshold=1: ", "dense/sac; leave it out"),
    ("resume=nowhere", "resume=nowhere: ", "no such folder"),
    ("init_from=nowhere", "init_from=nowhere: ", "give a run folder"),
    ("--config-dir=.", "--config-dir=: ", "config=FILE"),
    ("--config-path .", "--config-path=: ", "config=FILE"),
    ("-cn other", "-cn=: ", "config=FILE"),
    ("--experimental-rerun=x", "--experimental-rerun=: ", "config=FILE"),
    ("seed=1 --cfg jop", "--cfg=jop: ", "job"),
    ("--mulitrun", "--mulitrun=: ", "--multirun"),
    ("hydra.searchpath=[file:///tmp]", "hydra.searchpath=[file:///tmp]: ", "not accepted"),
    ("+hydra.launcher._target_=os.system", "+hydra.launcher._target_=os.system: ", "code"),
    ("+algo._target_=os.system", "algo._target_=os.system: no such key", "batch_size"),
]


@pytest.mark.parametrize(("typed", "begins", "remedy"), REFUSED, ids=[r[0] for r in REFUSED])
def test_train(said: Said, typed: str, begins: str, remedy: str) -> None:
    words = [typed] if typed == "a b" else typed.split()
    line = said("train", *words)
    assert line.startswith(begins)
    assert remedy in line.removeprefix(begins) or remedy in begins


@pytest.mark.parametrize("typed", ["total_steps=0", "algo.gamma=1.5", "algo.critic_lr=nan"])
def test_out_of_range_typed(said: Said, typed: str) -> None:
    assert said("train", typed).startswith(f"{typed}: give ")


def test_more_digits_than_a_float_has(said: Said) -> None:
    assert said("train", f"algo.gamma={'9' * 400}") == (
        "algo=...: one of its numbers is too large; give less than 1e308"
    )


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["tarin"], "tarin: no such command; did you mean train?"),
        (["fly"], "fly: no such command; commands: train"),
        (["eval"], "run: it has no default; give run=VALUE: a run folder, or a file"),
        (
            ["export", "run=nowhere"],
            "format: it has no default; give format=VALUE: c, onnx, nir, l",
        ),
        (["eval", "run=nowhere"], "run=nowhere: no policy there; give a run folder"),
        (["eval", "run=nowhere", "video=maybe"], "video=maybe: give true, false or spikes"),
        (["eval", "run=nowhere", "episodes=0"], "episodes=0: give at least 1"),
        (["eval", "run=nowhere", "episodes=x"], "episodes=x: expected int"),
        (["eval", "run=nowhere", "seed=-1"], "seed=-1: give 0 to 2^63 - 1"),
        (["eval", "rum=nowhere"], "rum=nowhere: no such key; did you mean run?"),
        (["import", "popsan=a.pt", "stats=b.p"], "popsan=a.pt: no such file"),
        (
            ["import", "stats=a.p"],
            "popsan=null: give popsan=MODEL.pt or dense=MODEL.pt, one of them",
        ),
        (["doctor", "jsn=true"], "jsn=true: no such key; did you mean json?"),
    ],
    ids=" ".join,
)
def test_other_commands(said: Said, args: list[str], line: str) -> None:
    assert said(*args).startswith(line)


@NO_CUDA
@pytest.mark.parametrize(
    ("typed", "line"),
    [("backend=nccl", "backend=nccl: nccl needs CUDA"), ("device=cuda", "device=cuda: 0 CUDA")],
)
def test_without_cuda(said: Said, typed: str, line: str) -> None:
    assert said("train", typed).startswith(line)


def test_no_meter(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "spikerl.energy.meter.find", lambda device: Measurable({}, {}, {"gpu": "gpu: none"})
    )
    assert said("train", "energy=zeus") == (
        "energy=zeus: gpu: none; use energy=auto to run without joules"
    )


@pytest.mark.parametrize("env_id", ODD)
def test_unusable_environment(said: Said, env_id: str) -> None:
    assert said("train", "env=gym", f"env.id={env_id}").startswith(f"env.id={env_id}: its ")


def test_discrete_actions(said: Said) -> None:
    line = said("train", "env=gym", "env.id=CartPole-v1")
    assert line == "algo=td3: the actions of CartPole-v1 are discrete; use algo=ppo or dqn"


def test_run_dir(said: Said, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "file").write_text("kept")
    assert said("train", "run_dir=taken") == (
        "run_dir=taken: it exists already; give another run_dir, or leave it out for a dated one"
    )
    assert said("train", "run_dir=file").startswith("run_dir=file: it exists already; give")
    line = said("train", "run_dir=file/below/run")
    assert line.startswith("run_dir=file/below/run: ")
    assert "give another run_dir" in line


def test_resume_keeps_what_a_run_computes(said: Said, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    assert "not a run folder" in said("train", "resume=run")
    (run / "manifest.json").write_text("{}")
    assert said("train", "resume=run", "seed=1").startswith("seed=1: a resumed run keeps it")
    assert said("train", "resume=run", "env=Ant").startswith("env=Ant: a resumed run keeps it")
    assert said("train", "resume=run", "+x=1").startswith("+x=1: a resumed run keeps it")
    assert said("train", "resume=run", "-m").startswith("resume=run: one run at a time")
    assert said("train", "resume=run").startswith("config=run/config.yaml: cannot be read")


CONFIGS = {
    "hydra: {run: {dir: x}}": "the key hydra is not accepted",
    "hydra/launcher: joblib": "the key hydra/launcher is not accepted",
    "+seed: 1": "the key +seed is not accepted",
    "seed: 1\n_target_: os.system": "_target_",
    "algo: {name: td3, _target_: os.system}": "the key algo._target_ is not accepted",
    "run_dir: null\nseed: ${oc.env:HOME}": "on the command line",
    "env: {name: gym, id: 'os:x-v0'}": "on the command line",
    "seed: !!python/object/apply:os.system [touch hit]": "cannot be read",
    "seed: !!python/name:os.system": "cannot be read",
    "sedd: 1": "no such key; did you mean seed",
    "algo: {name: td3, gama: 0.9}": "no such key; did you mean algo.gamma",
    "algo: {name: '../td3'}": "no such option",
    "algo: td4": "no such option; did you mean td3",
    "algo: [td3]": "its group algo is neither option nor settings",
    "algo: null": "its group algo is neither option nor settings",
    "- 1\n- 2": "holds no mapping",
    "": "holds no mapping",
    "seed: [": "cannot be read",
    "seed: 2020-01-01": "not plain data",
    "seed: .inf": "expected int",
    "algo: {name: td3, gamma: .nan}": "algo.gamma",
    "1: 2": "the key 1 is not accepted",
    "[" * 3000: "cannot be read",
    "a: &a [x, x]\nb: &b [*a, *a]\nseed: [*b, *b]": "it holds an alias",
}


@pytest.mark.parametrize("text", CONFIGS, ids=lambda text: text[:40].replace("\n", "; "))
def test_config_file(said: Said, tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    assert CONFIGS[text] in said("train", "config=c.yaml")


def test_config_file_that_is_none(said: Said, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(b"\xff\x00\x01")
    for name in ("c.yaml", "missing.yaml"):
        assert said("train", f"config={name}").startswith(f"config={name}: cannot be read")
    assert said("train", "config=.").startswith("config=.: is a folder")


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["train", "env=HalfCheeta"], "env=HalfCheeta: no such option"),
        (["frain"], "frain: no such command"),
        pytest.param(
            ["train", "world_size=0"], "world_size=0: give 1 to 4096", marks=pytest.mark.slow
        ),
        pytest.param(
            ["train", "env=gym", "env.id=CartPole-v1"],
            "algo=td3: the actions of CartPole-v1",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_process(tmp_path: Path, args: list[str], line: str) -> None:
    command = [sys.executable, "-m", "spikerl", *args]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith(f"spikerl: {line}")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
