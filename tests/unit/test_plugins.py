"""What `plugins=[...]` may name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from shell import refusal

from spikerl import plugins
from spikerl.reporting.cell_config import composed


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
