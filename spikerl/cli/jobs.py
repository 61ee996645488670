"""The jobs of a sweep before they run: which there are, what is wrong with them, their folders."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from spikerl.cli.words import split, unquoted
from spikerl.config.typed import PATHS
from spikerl.config.yaml_file import conf_folder, group_options, searchpath
from spikerl.errors import BadRequest

LONGEST_NAME = 200  # bytes; names may have 255, and a folder's is longer while it is being filled
MOST_COMPOSED = 64  # jobs; in a larger sweep each value is checked in one job only


def choices(args: Sequence[str]) -> list[list[str]] | None:
    """The values of each override; a job takes one of each. None where a sweeper chooses them, or
    Hydra will refuse an override.
    """
    overrides = [arg for arg in split(args)[0] if not arg.startswith("hydra")]
    if any(arg.startswith("hydra/sweeper=") for arg in args):
        return None
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
        return [_values(override) for override in parsed]
    except BadRequest:
        raise
    except Exception:  # also a number or a nesting that is too large for the parser
        return None  # Hydra will say what is wrong with it


def check_distinct(choices: Sequence[Sequence[str]], *, folders: bool) -> None:
    """Refuse two jobs that would be the same run, as they would pass for two results; and, if jobs
    keep `folders`, values such as a/b and a_b, whose folders would have the same name.
    """
    keys = [values[0].partition("=")[0] for values in choices]
    for place, values in enumerate(choices):
        for number, override in enumerate(values):
            key, _, value = override.partition("=")
            if len(values) > 1 and key in keys[place + 1 :]:  # the last alone would count
                raise BadRequest(key, value, "the key is there again; leave one out")
            if override in values[:number]:
                raise BadRequest(key, value, "it is there twice; leave one out")
            if folders and folder_name(override) in map(folder_name, values[:number]):
                raise BadRequest(key, value, "another value's folder has its name; rename one")


def check_pages(args: Sequence[str], varied: Sequence[str]) -> None:
    """Refuse a sweep of `report` whose jobs would write their files over each other's in `out`."""
    typed = [unquoted(arg.partition("=")[2]) for arg in args if arg.startswith("out=")]
    out = ["outputs/report", *typed][-1]
    others = [key for key in varied if key != "out"]
    if others and "${" not in out:
        remedy = f"each job would write over the last one's; give 'out={out}/${{{others[0]}}}'"
        raise BadRequest("out", out, remedy)


def _values(override: Any) -> list[str]:
    if not override.is_sweep_override():
        return [override.input_line]
    key, value = override.get_key_element(), override.input_line.partition("=")[2]
    if isinstance(override.value(), Glob):
        # Hydra's glob() does not look into subfolders.
        names = [name for name in group_options(key) if "/" not in name]
        found = override.value().filter(names)
        remedy = f"no option is named so; known: {', '.join(names)}"
    else:
        found = list(override.sweep_string_iterator())
        remedy = "it stands for no value; range(A,B) goes from A to below B"
    if not found:
        raise BadRequest(key, value, remedy)
    return [f"{key}={one}" for one in found]


def varied_keys(args: Sequence[str]) -> list[str]:
    """The keys of the overrides that give several values."""
    try:
        parsed = OverridesParser.create().parse_overrides(
            [a for a in args if "=" in a and a[0] != "-"]
        )
    except Exception:  # as in `choices`
        return []
    return [override.key_or_group for override in parsed if override.is_sweep_override()]


def count(choices: Sequence[Sequence[str]]) -> int:
    return math.prod(map(len, choices))


def combinations(choices: Sequence[Sequence[str]]) -> Iterator[tuple[str, ...]]:
    """All combinations, or, if they are over MOST_COMPOSED, enough of them to have each value."""
    if count(choices) <= MOST_COMPOSED:
        yield from product(*choices)
        return
    for i in range(max(map(len, choices))):
        yield tuple(values[min(i, len(values) - 1)] for values in choices)


def refusals(args: Sequence[str], explain: Callable[[Exception], str]) -> list[str]:
    """A line for each reason why jobs of train are wrong as typed, before any of them runs."""
    from spikerl.config.build import parse_groups

    if (values := choices(args)) is None:
        return []
    errors: list[Exception] = []
    seen: list[tuple[Any, Sequence[str]]] = []
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        for overrides in combinations(values):
            try:
                config = compose("train", overrides=[*searchpath(), *overrides])
                data: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
                parsed = parse_groups(data)
                for other, theirs in seen:
                    if parsed == other:  # seed=1,01 and the like
                        _refuse_same(overrides, theirs)
                seen.append((parsed, overrides))
            except (BadRequest, HydraException, OmegaConfBaseException) as error:
                errors.append(error)
    return list(dict.fromkeys(map(explain, errors)))


def _refuse_same(overrides: Sequence[str], others: Sequence[str]) -> None:
    mine, theirs = next(pair for pair in zip(overrides, others, strict=True) if pair[0] != pair[1])
    key, _, value = mine.partition("=")
    raise BadRequest(key, value, f"it is the same run as {theirs}; leave one out")


def alone(overrides: Sequence[str]) -> list[str]:
    """A job's overrides as they are typed without -m: paths without the quotes that Hydra needs."""
    pairs = [(override, *override.partition("=")[::2]) for override in overrides]
    return [f"{key}={unquoted(value)}" if key in PATHS else o for o, key, value in pairs]


def folder_name(name: str) -> str:
    """The folder name of a job; a name too long for a file system is cut and ends in its hash."""
    whole = name.replace("/", "_")
    if len(whole.encode()) <= LONGEST_NAME:
        return whole
    digest = hashlib.sha256(name.encode()).hexdigest()[:12]
    return f"{whole.encode()[: LONGEST_NAME - 15].decode(errors='ignore')}...{digest}"
