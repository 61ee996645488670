"""Modules that `plugins=[...]` may name."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import builders
import numpy as np
import pytest
from shell import refusal, spikerl
from torch import Tensor

from spikerl import plugins
from spikerl.config.yaml_file import conf_folder
from spikerl.energy import operations
from spikerl.export import support
from spikerl.models.actor import MLPActor, SpikingActor
from spikerl.models.actor_config import MLPConfig, PopSANConfig
from spikerl.models.networks import ACTORS, build_actor
from spikerl.reporting.cell_config import composed
from spikerl.runs.policies import load_policy
from spikerl.snn.neurons import NEURONS, CubaLIF, LIFConfig


def test_a_module_of_one_file_brings_no_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one_file_plugin.py").write_text("registered = True\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(plugins, "loaded", {})
    plugins.load(["one_file_plugin"])
    assert plugins.loaded["one_file_plugin"].registered
    assert plugins.conf_folders() == []


@pytest.mark.parametrize("names", [5, True, "os", {"os": 1}, [1]])
def test_a_file_names_no_list(names: Any) -> None:
    refused = refusal(plugins.check_typed, Path("c.yaml"), names, [])
    assert refused.args == ("plugins", names, "c.yaml has it; give a list of packages")


def test_a_tables_cell_has_a_plugins_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = tmp_path / "brings_groups" / "conf" / "neuron"
    options.mkdir(parents=True)
    (tmp_path / "brings_groups" / "__init__.py").touch()
    (options / "own.yaml").write_text("name: own\ngain: 2.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(plugins, "loaded", {})
    plugins.load(["brings_groups"])
    assert composed(("experiment=popsan/td3", "neuron=own"))["neuron.gain"] == "2.0"


def test_a_copied_table_has_a_name_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the old name it would overwrite the rendering of the original table."""
    folder = tmp_path / "brings_table" / "conf" / "table"
    folder.mkdir(parents=True)
    (tmp_path / "brings_table" / "__init__.py").touch()
    text = (conf_folder() / "table" / "discrete.yaml").read_text()
    (folder / "mine.yaml").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(plugins, "loaded", {})
    monkeypatch.chdir(tmp_path)
    typed = ["reproduce", "plugins=[brings_table]", "table=mine", "render=true", "out=r"]
    assert spikerl(*typed).line == "table.name=discrete: give the name of its file, mine"
    assert not (tmp_path / "r").exists()
    (folder / "mine.yaml").write_text(text.replace("name: discrete", "name: mine", 1))
    assert spikerl(*typed).status == 0
    assert [path.name for path in (tmp_path / "r").iterdir()] == ["mine"]


def test_a_policy_needs_the_plugin_that_has_only_a_config_of_its_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclass(kw_only=True)
    class StrictConfig(LIFConfig):
        """A config of spikerl's own neuron that may refuse more values."""

    StrictConfig.__module__ = "strict_parts.neurons"
    package = ModuleType("strict_parts")
    package.__version__ = "1.5"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "strict_parts", package)
    monkeypatch.setitem(NEURONS.options, "strict_lif", (StrictConfig, CubaLIF))
    neuron = StrictConfig(**asdict(builders.lif_config()) | {"name": "strict_lif"})
    parts = replace(builders.spiking(builders.POPULATION), neuron=neuron)
    builders.toy_policy(parts).save(tmp_path)
    assert load_policy(tmp_path).config.neuron == neuron
    monkeypatch.delitem(sys.modules, "strict_parts")
    monkeypatch.delitem(NEURONS.options, "strict_lif")
    assert refusal(load_policy, tmp_path).args[2] == (
        "it needs the plugin strict_parts, version 1.5; give plugins=[strict_parts],"
        " or import strict_parts before loading it"
    )


def test_a_policy_needs_the_plugin_that_has_only_the_name_of_its_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plugin registers spikerl's own neuron under another name."""
    monkeypatch.setattr(NEURONS, "options", dict(NEURONS.options))
    (tmp_path / "renames_parts.py").write_text(
        "from spikerl.snn.neurons import NEURONS\n"
        "NEURONS.register('slow_lif', *NEURONS.options['cuba_lif'])\n"
        "__version__ = '2.5'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(plugins, "loaded", {})
    plugins.load(["renames_parts"])
    own = builders.spiking(builders.POPULATION)
    assert own.neuron is not None
    builders.toy_policy(replace(own, neuron=replace(own.neuron, name="slow_lif"))).save(tmp_path)
    assert json.loads((tmp_path / "policy.json").read_text())["plugins"] == {"renames_parts": "2.5"}


class OwnSpiking(SpikingActor):
    def forward(self, *given: Any, **others: Any) -> Tensor:
        return 0.5 * super().forward(*given, **others)


class OwnDense(MLPActor):
    pass


def test_an_actor_is_of_the_class_that_was_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """spikerl's own actor with the same config class must not be built in its place."""
    monkeypatch.setitem(ACTORS.options, "own_spiking", (PopSANConfig, OwnSpiking))
    monkeypatch.setitem(ACTORS.options, "own_dense", (MLPConfig, OwnDense))
    spiking = builders.spiking(builders.POPULATION)
    spiking = replace(spiking, actor=replace(spiking.actor, name="own_spiking"))
    assert type(build_actor(spiking, 3, 1)) is OwnSpiking
    config = MLPConfig(name="own_dense", hidden_sizes=[2], lr=0.1)
    dense = replace(spiking, actor=config, encoder=None, neuron=None, decoder=None)
    assert type(build_actor(dense, 3, 1)) is OwnDense


def test_an_actor_of_another_class_decides_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fast paths, operations and exports, made for spikerl's own classes, are not applied to it."""
    monkeypatch.setitem(ACTORS.options, "own_spiking", (PopSANConfig, OwnSpiking))
    config = builders.spiking(builders.POPULATION)
    config = replace(config, actor=replace(config.actor, name="own_spiking"))
    builders.toy_policy(config).save(tmp_path)
    policy = load_policy(tmp_path)
    obs = np.linspace(1.0, 5.0, policy.task.obs_dim)
    assert policy(obs).tolist() == policy(obs[None])[0].tolist()
    said = refusal(operations.check, policy.actor)
    assert str(said) == "ops=true: the operations of OwnSpiking are not known; leave ops out"
    assert str(refusal(support.check, "c", policy.config)) == (
        "format=c: cannot hold actor=own_spiking: a plugin's equation is not known here"
    )
