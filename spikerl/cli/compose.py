"""Turns the words that were typed into overrides and flags that Hydra accepts."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from spikerl import plugins
from spikerl.cli.refused import check_flags, check_overrides, check_read
from spikerl.cli.resumed import check_resume, chosen
from spikerl.cli.words import split, unquoted
from spikerl.config.typed import for_hydra
from spikerl.config.yaml_file import (
    EVERY_RUN,
    conf_folder,
    overrides_of,
    read_config,
    typed_plugins,
)
from spikerl.errors import BadRequest


@cache
def commands() -> dict[str, str]:
    """What each command does: the first line of its config, conf/WORD.yaml."""
    lines = {path.stem: _first_line(path) for path in conf_folder().glob("*.yaml")}
    return dict(sorted(lines.items(), key=lambda item: (item[0] != "train", item)))


def _first_line(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        return file.readline().removeprefix("# ").rstrip()


def module_of(command: str) -> str:
    """The module with a command's `main(data, argv)`: WORD.py, or command.py in a folder WORD."""
    name = "import_popsan" if command == "import" else command  # a keyword of Python
    folder = (Path(__file__).parents[1] / "commands" / name).is_dir()
    return f"spikerl.commands.{name}.command" if folder else f"spikerl.commands.{name}"


def usage() -> str:
    lines = [f"  {name:<9} {text}" for name, text in commands().items()]
    return "\n".join(
        [
            "spikerl COMMAND [group=option] [key=value] ...",
            "",
            *lines,
            "",
            "spikerl COMMAND --help lists its groups, options and keys.",
            "spikerl train env=HalfCheetah algo.random_steps=1000 total_steps=20000: a first run.",
        ]
    )


def expand(command: str, args: Sequence[str]) -> list[str]:
    """Refuse what must not reach Hydra; replace config=FILE by the overrides that it stands for."""
    # A top-level key exists already, so `++` before any, and `+` before these two, adds nothing.
    args = [re.sub(r"^\+(?=(config|resume)=)|^\+\+(?=\w+=)", "", arg) for arg in args]
    plugins.load(typed_plugins(args))
    overrides, flags = split(args)
    check_flags(command, flags)
    check_overrides(overrides)
    named = {a.partition("=")[0]: a for a in overrides if re.match(r"(config|resume)=(?!null$)", a)}
    sweeps = not {"-m", "--multirun"}.isdisjoint(flags)
    typed = [for_hydra(arg, sweeps) for arg in overrides]
    held: list[str] = []
    if command == "train" and named:
        source = named.get("resume") or named["config"]
        path = Path(os.path.expanduser(unquoted(source.partition("=")[2])))
        if "resume" in named:
            check_resume(overrides, sweeps, path)
            path = path / "config.yaml"
            typed += chosen(path.parent, typed)
        else:
            _check_experiment(path, overrides)
        typed = [arg for arg in typed if not arg.startswith("config=")]
        held = overrides_of(path, typed, resumes="resume" in named)
    check_read([*(arg.replace("'", "") for arg in held if arg.startswith("actor=")), *overrides])
    return [*held, *typed, *flags]


def _check_experiment(path: Path, args: Sequence[str]) -> None:
    """Refuse experiment= beside a config=FILE that sets every key an experiment could set."""
    experiments = [arg for arg in args if arg.startswith("experiment=")]
    if experiments and {*EVERY_RUN} <= read_config(path).keys():
        remedy = f"{path} sets all that an experiment does; leave one of them out"
        raise BadRequest("experiment", experiments[-1].partition("=")[2], remedy)


def deferred(args: Sequence[str]) -> list[str]:
    """The arguments of a sweep, with each key that may come from a swept option as choice(VALUE).

    Hydra then applies the key to each job only. It would otherwise not find the key in the config
    that it composes before the jobs, which has none of the swept options.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    overrides, flags = split(args)
    parsed = OverridesParser.create().parse_overrides(overrides)
    swept = {override.get_key_element() for override in parsed if override.is_sweep_override()}
    for i, override in enumerate(parsed):
        key = override.get_key_element()
        group = key.lstrip("+").rpartition(".")[0]
        single = not override.is_sweep_override() and not override.is_delete()
        if single and group and swept & {group, "experiment"}:
            overrides[i] = f"{key}=choice({overrides[i].partition('=')[2]})"
    return [*overrides, *flags]
