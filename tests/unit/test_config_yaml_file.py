"""Config files of others: what they may not lead to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from shell import refusal

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
