"""Fixtures shared by the unit tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from spikerl.config.yaml_file import conf_folder


@pytest.fixture(scope="module")
def default() -> Iterator[dict[str, Any]]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        yield OmegaConf.to_container(compose("train"), resolve=True)  # type: ignore[misc]
