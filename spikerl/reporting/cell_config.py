"""The config that a table's cell asks for, and how a run's differs from it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from contextlib import nullcontext
from functools import cache
from typing import Any

from spikerl.config.typed import for_hydra
from spikerl.config.yaml_file import NOT_CARRIED, conf_folder, searchpath
from spikerl.errors import BadRequest, first_line
from spikerl.reporting.records import Run
from spikerl.reporting.table_file import Cell
from spikerl.schema import dotted

# Keys that may differ: where a run is kept and computed, how far it goes, and its plugins.
FREE = ("threads", "total_steps", "device", "world_size", "backend", "max_restarts", "plugins",
        *NOT_CARRIED)  # fmt: skip


def apart(cell: Cell, run: Run) -> list[str]:
    """The settings in which a run differs from its cell.

    Keys that only one of the two configs has come from another version of the program, and do not
    count as a difference.
    """
    if cell.command == "train":
        return differing(config_of(cell), run.settings)
    try:
        typed = shlex.split(str(run.manifest.get("command")))
    except ValueError:  # not a command that this program recorded
        typed = []
    return [override for override in cell.overrides if override not in typed]


def differing(asked: Mapping[str, str], had: Mapping[str, str]) -> list[str]:
    """The keys in which two configs differ, with both values."""
    keys = [key for key in asked if key in had and key.split(".")[0] not in FREE]
    return [f"{key}={had[key]} (here {asked[key]})" for key in keys if had[key] != asked[key]]


def config_of(cell: Cell) -> dict[str, str]:
    """The config that a training cell's run gets, by dotted keys."""
    *same, seed = cell.overrides  # composing takes long, and seeds differ in nothing else
    return {**composed(tuple(same)), "seed": seed.partition("=")[2]}


@cache
def composed(overrides: tuple[str, ...]) -> Mapping[str, str]:
    """A training's config with these overrides, by dotted keys; BadRequest if Hydra refuses."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        ours = GlobalHydra.instance().is_initialized()  # for the command that is running
        conf = str(conf_folder())
        with nullcontext() if ours else initialize_config_dir(conf, version_base="1.3"):
            typed = [for_hydra(override) for override in overrides]
            config = compose("train", [*searchpath(), *typed])
            plain: Any = OmegaConf.to_container(config, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        line = first_line(error)
        raise BadRequest("table", " ".join(overrides), f"cannot be composed: {line}") from None
    return {key: str(value) for key, value in dotted(plain)}
