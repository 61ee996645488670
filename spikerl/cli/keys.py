"""A command's default config, and its keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from spikerl.config.yaml_file import conf_folder


def default_config(command: str) -> Any:
    """The command's config as Hydra composes it without overrides."""
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return compose(command)


def known_keys(command: str) -> list[str]:
    """Every key that the command's default config has, and every group."""
    from omegaconf import DictConfig, OmegaConf

    def walk(node: Mapping[Any, Any], prefix: str) -> Iterator[str]:
        for key in node:
            yield f"{prefix}{key}"
            if not OmegaConf.is_missing(node, key) and isinstance(node.get(key), DictConfig):
                yield from walk(node[key], f"{prefix}{key}.")

    return [*walk(default_config(command), ""), *(["experiment"] if command == "train" else [])]
