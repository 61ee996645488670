"""docs/extending.md: its listings form a package that can be installed, and its parts train."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from forkserver import command
from shell import Said

from spikerl.algos import ALGOS
from spikerl.config.yaml_file import conf_folder
from spikerl.distributed.world import BACKENDS
from spikerl.energy.meter import METERS
from spikerl.kernels import KERNELS
from spikerl.models.networks import ACTORS
from spikerl.models.precision import PRECISIONS
from spikerl.schema import Registry
from spikerl.snn.decoders import DECODERS
from spikerl.snn.encoders import ENCODERS
from spikerl.snn.neurons import NEURONS

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
SHORT = [
    "env=Pendulum", "env.max_episode_steps=20", "total_steps=120", "steps_per_epoch=60",
    "eval_episodes=1", "algo.learning_starts=40", "algo.random_steps=40",
    "algo.update_interval=10", "algo.batch_size=8", "threads=1", "actor.hidden_sizes=[8]",
    "algo.critic_hidden_sizes=[8]", "device=cpu", "energy=none", "plugins=[spiking_extras]",
]  # fmt: skip
Say = Callable[..., Said]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which the package that the page shows was installed."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    listings = re.findall(r"```\w+\n# (\S+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert len(listings) == 8
    for name, content in listings:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(content, encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    own = ["--no-deps", "--no-build-isolation", "--no-index", "--target", str(target), str(source)]
    subprocess.run([*pip, *own], check=True)
    return target


@pytest.fixture
def say(package: Path, tmp_path: Path) -> Say:
    path = os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")])
    return partial(command, tmp_path, PYTHONPATH=path)


def test_its_parts_train_and_a_policy_needs_them(say: Say, tmp_path: Path) -> None:
    parts = ["neuron=refractory_lif", "encoder=signed", "algo=clipped_ddpg"]
    done = say("train", *SHORT, *parts, "world_size=2", "num_envs=2", "run_dir=run")
    assert done.status == 0, done.err
    reason = "layer by layer because of encoder=signed, which gives currents"
    assert reason in done.out or "kernel=reference" in done.out
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["status"] == "done"
    data = json.loads((tmp_path / "run" / "policy.json").read_text())
    assert data["plugins"] == {"spiking_extras": "1.2"}

    refused = say("eval", "run=run", "episodes=1")
    assert (refused.status, refused.out) == (2, "")
    needs = "it needs the plugin spiking_extras, version 1.2; give plugins=[spiking_extras]"
    assert refused.err.startswith(f"spikerl: run=run: {needs}")
    assert say("eval", "run=run", "episodes=1", "plugins=[spiking_extras]").status == 0

    for request in ("resume=run", "config=run/config.yaml"):
        refused = say("train", request)
        assert refused.status == 2
        assert "names packages to import; confirm with plugins=[spiking_extras]" in refused.err
    again = say("train", "resume=run", "plugins=[spiking_extras]", "total_steps=180")
    assert again.status == 0, again.err
    assert "done: 180 steps" in again.out


def test_help_lists_its_options(say: Say) -> None:
    listed = say("train", "plugins=[spiking_extras]", "--help").out.splitlines()
    plain = say("train", "--help").out.splitlines()
    assert [line for line in listed if line not in plain] != []
    for group, option in (("neuron", "refractory_lif"), ("encoder", "signed"),
                          ("algo", "clipped_ddpg")):  # fmt: skip
        (line,) = (line for line in listed if line.startswith(f"{group}: "))
        assert option in line.removeprefix(f"{group}: ").split(", ")
    same = [line for line in plain if line.startswith(("actor: ", "env", "experiment"))]
    assert set(same) <= set(listed)


def test_a_plugin_that_is_not_there(say: Say) -> None:
    refused = say("train", "plugins=[nowhere]")
    line = "spikerl: plugins=nowhere: cannot be imported (No module named 'nowhere'); install it,"
    assert (refused.status, refused.err.startswith(line)) == (2, True)
    refused = say("train", "plugins=nowhere")
    assert refused.err == (
        "spikerl: plugins=nowhere: give a list of packages, such as [my_package]\n"
    )


@pytest.fixture
def imported(package: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Import the package in this process; afterwards, remove it and what it registered."""
    registries: list[Any] = [NEURONS, ENCODERS, ALGOS]
    before = [dict(registry.options) for registry in registries]
    monkeypatch.syspath_prepend(str(package))
    __import__("spiking_extras")
    yield
    for registry, options in zip(registries, before, strict=True):
        registry.options = options
    for name in [name for name in sys.modules if name.partition(".")[0] == "spiking_extras"]:
        del sys.modules[name]


@pytest.mark.usefixtures("imported")
def test_the_worked_neuron_by_hand() -> None:
    base = {"threshold": 0.5, "reset": "hard", "surrogate": "rect", "surrogate_window": 0.5,
            "surrogate_slope": 2.0, "surrogate_slope_end": None}  # fmt: skip
    own = {"name": "refractory_lif", "voltage_decay": 0.5, "refractory_steps": 2}
    config = NEURONS.parse(base | own)
    neuron = NEURONS.part(config)(config)
    drive = torch.ones(1, 1)
    state, spikes = neuron.initial(drive), []
    for _ in range(7):
        state = neuron.step(drive, state)
        spikes.append(int(state.spikes_BN.item()))
    assert spikes == [1, 0, 0, 1, 0, 0, 1]


@pytest.mark.parametrize(
    ("group", "registry"),
    [
        ("neuron", NEURONS), ("encoder", ENCODERS), ("decoder", DECODERS), ("actor", ACTORS),
        ("algo", ALGOS), ("precision", PRECISIONS), ("kernel", KERNELS), ("backend", BACKENDS),
        ("energy", METERS),
    ],
)  # fmt: skip
def test_a_registry_and_its_folder_have_the_same_options(
    group: str, registry: Registry[Any, Any]
) -> None:
    """A new part needs a line in a registry and a file in conf/; neither can be forgotten."""
    files = {path.stem: path for path in (conf_folder() / group).glob("*.yaml")}
    assert sorted(files) == sorted(registry.options)
    for name, path in files.items():
        assert yaml.safe_load(path.read_text(encoding="utf-8"))["name"] == name
