"""Config files, which may come from others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from shell import refusal, spikerl

from spikerl.config.yaml_file import overrides_of


@pytest.mark.parametrize("key", ["init_from", "dataset", "energy.file"])
@pytest.mark.parametrize("path", ["/etc/x", "../x", "a/../../x"])
def test_a_config_leads_nowhere_else(key: str, path: str, tmp_path: Path) -> None:
    group, _, name = key.partition(".")
    data: dict[str, Any] = {group: {"name": "replay", name: path} if name else path}
    (tmp_path / "c.yaml").write_text(json.dumps(data))
    line = str(refusal(overrides_of, tmp_path / "c.yaml", []))
    assert line.startswith(f"{key}={path}: not accepted from ")
    assert not any(path in arg for arg in overrides_of(tmp_path / "c.yaml", [f"{key}={path}"]))
    resumed = overrides_of(tmp_path / "c.yaml", [], resumes=True)
    assert any(path in arg for arg in resumed) == (key == "energy.file")


@pytest.mark.parametrize(
    ("typed", "key", "value"),
    [
        (["energy_to={return: 5}"], "energy_to", {"return": 5}),
        (["env=ALE/Pong", "env.kwargs.difficulty=1"], "kwargs",
         {"obs_type": "ram", "difficulty": 1}),
        (["env=ALE/Pong", "~env.kwargs.obs_type"], "kwargs", {}),
        (["env=ALE/Pong", "env.kwargs=null"], "kwargs", None),
        (["env.kwargs={_x: {a-b: 1}}"], "kwargs", {"_x": {"a-b": 1}}),
    ],
)  # fmt: skip
def test_a_runs_config_composes_as_the_run_did(
    typed: list[str], key: str, value: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys that were added to an option's own, or removed from them, are kept."""
    monkeypatch.chdir(tmp_path)
    printed = spikerl("train", *typed, "--cfg", "job").out
    Path("c.yaml").write_text(printed)
    again = spikerl("train", "config=c.yaml", "--cfg", "job", "--resolve").out
    first, second = map(yaml.safe_load, (printed, again))
    assert first.get(key, first["env"]["kwargs"]) == value
    assert second.get(key, second["env"]["kwargs"]) == value


@pytest.mark.parametrize("value", ["{a: {1: x}}", "{a: [{b.c: 1}]}"])
def test_arguments_that_a_resume_could_not_give_back(value: str) -> None:
    line = spikerl("train", f"env.kwargs={value}").line
    assert line.startswith("env.kwargs={")
    assert ": not plain data, with keys of letters, digits, _ and -" in line
