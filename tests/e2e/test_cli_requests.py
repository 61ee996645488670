"""More requests that are refused: one line, status 2, and nothing changed on the disk."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from shell import SHORT, spikerl, tree

LONG = "x" * 300  # more characters than a file name may have
CHECKPOINTS = "checkpoints/step_0000000300"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run, a regular file, and a link to nowhere."""
    home = tmp_path_factory.mktemp("home")
    assert spikerl("train", *SHORT, f"run_dir={home / 'run'}").status == 0
    (home / "file").write_text("kept")
    (home / "dangling").symlink_to("nowhere")
    return home


@pytest.fixture(autouse=True)
def at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run the test in `home`, and assert that it changed nothing there."""
    monkeypatch.chdir(home)
    before = tree(home)
    yield
    assert tree(home) == before


REFUSED = [
    # flags
    ("train --cfg jobs", "--cfg=jobs: give job, hydra, all"),
    ("train --cfg", "--cfg=: give job, hydra, all"),
    ("train --info nothing", "--info=nothing: give all, config"),
    ("train --package", "--package=: give a group or a key"),
    ("train --resolve", "config: The --resolve flag"),
    ("train --cfg job --multirun", "config: Only one of --run, --multirun"),
    ("train --config-name=eval", "--config-name=: not accepted"),
    ("train hydra.searchpath=[conf]", "hydra.searchpath=[conf]: not accepted"),
    (
        "train +hydra.callbacks={x:{_target_:os.system}}",
        "+hydra.callbacks={x:{_target_:os.system}}",
    ),
    ("-sc", "-sc=: give install=SHELL"),
    ("-sc install=tcsh", "-sc=install=tcsh: give install=SHELL"),
    ("-sc query", "-sc=query: give install=SHELL"),
    ("--config-dir=.", "--config-dir=.: no such command"),
    # groups and keys
    ("train encoder=null", "encoder=null: no such option; known: analog, direct, learned"),
    ("train experiment=nothing", "experiment=nothing: no such option"),
    ("train run=run", "run=run: no such key; did you mean run_dir?"),
    ("train init_from=run/file", "init_from=run/file: no policy there"),
    ("train seed=${nowhere}", "config: Interpolation key 'nowhere' not found"),
    # folders
    ("train run_dir=run", "run_dir=run: it exists already"),
    ("train run_dir=run/", "run_dir=run/: it exists already"),
    ("train run_dir=.", "run_dir=.: it exists already"),
    ("train run_dir=file", "run_dir=file: it exists already"),
    ("train run_dir=dangling", "run_dir=dangling: it exists already"),
    ("train run_dir=dangling/x", "run_dir=dangling/x: "),
    ("train run_dir=file/x/y", "run_dir=file/x/y: "),
    ("train run_dir=/proc/spikerl/run", "run_dir=/proc/spikerl/run: "),
    (f"train run_dir={LONG}", f"run_dir={LONG}: File name too long"),
    (f"train run_dir=new/{LONG}", f"run_dir=new/{LONG}: File name too long"),
    (f"train resume={LONG}", f"resume={LONG}: no such folder"),
    (f"train config={LONG}", f"config={LONG}: cannot be read"),
    (f"train init_from={LONG}", f"init_from={LONG}: no policy there"),
    (f"eval run={LONG}", f"run={LONG}: no policy there"),
    # resume
    ("train resume=run seed=1", "seed=1: a resumed run keeps it"),
    ("train resume=run precision=bf16", "precision=bf16: a resumed run keeps it"),
    ("train resume=run ++seed=1", "seed=1: a resumed run keeps it"),
    ("train resume=run run_dir=other", "run_dir=other: a resumed run keeps it"),
    ("train resume=run config=run/config.yaml", "config=run/config.yaml: a resumed run keeps it"),
    ("train resume=run -m", "resume=run: one run at a time"),
    ("train resume=run total_steps=0", "total_steps=0: give at least 1"),
    ("train resume=run/checkpoints", "resume=run/checkpoints: is not a run folder"),
    # init_from
    ("train init_from=run env=Pendulum", "init_from=run: its policy maps (4,) to (1,)"),
    ("train init_from=run actor.hidden_sizes=[15]", "init_from=run: its actor is popsan [16]"),
    ("train init_from=run encoder.pop_size=9", "init_from=run: its actor is popsan [16]"),
    ("train init_from=run actor=mlp", "init_from=run: its actor is popsan [16]"),
    # eval
    ("eval run=run json=maybe", "json=maybe: expected bool"),
    ("eval run=run video=1.5", "video=1.5: give true, false or spikes"),
    ("eval run=run episodes=1.5", "episodes=1.5: expected int"),
    ("eval run=run episodes=null", "episodes=null: expected int"),
    ("eval run=run seed=9223372036854775808", "seed=9223372036854775808: give 0"),
    ("eval run=null", "run=null: expected str"),
    ("eval run=run device=tpu", "device=tpu: give auto, cpu"),
    ("eval run=run env_id=Pendulum-v1", "env_id=Pendulum-v1: its policy maps (4,) to (1,) (I"),
    ("eval run=run env_id=CartPole-v1", "env_id=CartPole-v1: its policy maps (4,) to (1,) (I"),
    ("eval run=run env_id=InvertedPendulum-v9", "env_id=InvertedPendulum-v9: "),
    ("eval run=run env_id=nomodule:X-v0", "env_id=nomodule:X-v0: "),
    ("eval run=run env=Ant", "env=Ant: no such key; did you mean env_id?"),
    # other commands
    ("convert run=run run_dir=new reset=sofft", "reset=sofft: give hard or soft"),
    ("reproduce table=discrete jobs=5000", "jobs=5000: give 1 to 4096, or null"),
    (
        "reproduce table=discrete table.protocol.seeds=1001 plan=true",
        "table.protocol.seeds=1001: give 1 to 1000",
    ),
    # doctor
    ("doctor json=maybe", "json=maybe: expected bool"),
    ("doctor run=run", "run=run: no such key"),
]


@pytest.mark.parametrize(("typed", "line"), REFUSED, ids=[r[0][:50] for r in REFUSED])
def test_refused(typed: str, line: str) -> None:
    words = typed.split()
    small = SHORT if words[0] == "train" and not typed.startswith("train resume") else []
    assert spikerl(words[0], *small, *words[1:]).line.startswith(line)


@pytest.mark.parametrize("key", ["algo", "seed", "eval_episodes"])
def test_a_config_that_was_cut(key: str, home: Path, tmp_path: Path) -> None:
    """It is refused: defaults must not take the place of the missing keys."""
    run = tmp_path / "run"
    copytree(home / "run", run, symlinks=True)
    lines = (run / "config.yaml").read_text().splitlines(keepends=True)
    kept = itertools.takewhile(lambda line: not line.startswith(f"{key}:"), lines)
    (run / "config.yaml").write_text("".join(kept))
    line = spikerl("train", f"resume={run}").line
    assert line.startswith(f"resume={run}: its config.yaml lacks ")
    assert line.endswith(", as one that was cut; put back a whole one")


@pytest.mark.parametrize("key", ["run_dir", "init_from"])
def test_an_empty_path(key: str) -> None:
    assert spikerl("train", *SHORT, f"{key}=").line.startswith(f"{key}=: ")


def test_a_package_that_is_not_there() -> None:
    said = spikerl("train", "--cfg", "job", "--package", "nothing")
    assert said.status == 2
    assert "nothing" in said.err


# --- policies that do not fit the request ------------------------------------------------------


def copy_of(run: Path, to: Path, **changes: Any) -> Path:
    to.mkdir()
    data = json.loads((run / "policy.json").read_text()) | changes
    (to / "policy.json").write_text(json.dumps(data))
    (to / "policy.safetensors").write_bytes((run / "policy.safetensors").read_bytes())
    return to


ENVIRONMENTS = {
    "Nowhere-v0": "Nowhere-v0 is not a registered environment",
    "CartPole-v1": "its policy maps (4,) to (1,) (CartPole-v1), but CartPole-v1 needs (4,) to one",
    "Pendulum-v1": "its policy maps (4,) to (1,) (Pendulum-v1), but Pendulum-v1 needs (3,) to (1,)",
    "os:X-v0": "its environment os:X-v0 names a module to import; confirm with env_id=os:X-v0",
    "X-v0\n\x1b[2J": "policy.json lacks or garbles env_id",
    "": "",
}


@pytest.mark.parametrize("env_id", ENVIRONMENTS)
def test_the_environment_that_a_policy_names(home: Path, tmp_path: Path, env_id: str) -> None:
    run = copy_of(home / "run", tmp_path / "run", env_id=env_id)
    line = spikerl("eval", f"run={run}").line
    assert line.startswith(f"run={run}: {ENVIRONMENTS[env_id]}")


def test_a_module_is_imported_only_when_it_is_typed(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "registers_toy.py").write_text(
        "import gymnasium as gym\n"
        "gym.register('Toy-v0', entry_point='gymnasium.envs.mujoco.inverted_pendulum_v5:"
        "InvertedPendulumEnv', max_episode_steps=9)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    run = copy_of(home / "run", tmp_path / "run", env_id="registers_toy:Toy-v0")
    spikerl("eval", f"run={run}").line  # noqa: B018
    assert "registers_toy" not in sys.modules
    plain = copy_of(home / "run", tmp_path / "plain", env_id="Toy-v0")
    assert "env_id=MODULE:NAME imports" in spikerl("eval", f"run={plain}").line
    try:
        said = spikerl("eval", f"run={run}", "env_id=registers_toy:Toy-v0", "episodes=1")
        assert said.status == 0
        assert "registers_toy" in sys.modules
    finally:
        gym.registry.pop("Toy-v0", None)
        sys.modules.pop("registers_toy", None)


def test_damaged_policies(home: Path, tmp_path: Path) -> None:
    """A few of the damages that the unit tests try, through the commands."""
    run = copy_of(home / "run", tmp_path / "run")
    tensors = load_file(run / "policy.safetensors")
    first = next(name for name in tensors if name.endswith("weight_IN"))
    for change in ({first: torch.full_like(tensors[first], torch.nan)}, {"norm.mean": None}):
        kept = {k: v for k, v in (tensors | change).items() if v is not None}
        save_file(kept, run / "policy.safetensors")
        for typed in (f"run={run}",):
            assert spikerl("eval", typed).line.startswith(f"run={run}: ")
        args = [*SHORT, f"init_from={run}", f"run_dir={tmp_path / 'new'}"]
        assert spikerl("train", *args).line.startswith(f"init_from={run}: ")
    (run / "policy.safetensors").write_bytes(b"\xff" * 50)
    assert spikerl("eval", f"run={run}").line.startswith(f"run={run}: its policy cannot be read")
    huge = {"actor": {"name": "popsan", "hidden_sizes": [10**6], "spike_steps": 5, "lr": 1.0}}
    run = copy_of(home / "run", tmp_path / "huge", **huge)
    assert "does not fit the shapes" in spikerl("eval", f"run={run}").line
    assert not (tmp_path / "new").exists()


# --- in a process of its own, whose stderr also gets what libraries write ----------------------


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("train env=Ant env.version=v3", "spikerl: env.version=v3: Ant-v3 cannot be made here"),
        ("import popsan=STATS stats=STATS", "spikerl: popsan=STATS: cannot be read as tensors"),
        pytest.param(
            "train env=Ant env.version=v4 init_from=no",
            "spikerl: init_from=no: no policy there",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "train -m env=Nope,Ant", "spikerl: env=Nope: no such option", marks=pytest.mark.slow
        ),
    ],
)
def test_no_library_adds_a_line(typed: str, line: str, tmp_path: Path) -> None:
    """Neither Gymnasium's advice on versions nor torch's on pickles; and no files from Hydra."""
    import pickle

    (tmp_path / "STATS").write_bytes(pickle.dumps([np.zeros(3), np.ones(3)], 4))
    done = subprocess.run(
        [sys.executable, "-m", "spikerl", *typed.split()],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, env={**os.environ},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert os.listdir(tmp_path) == ["STATS"]
