"""Overrides as they are typed, and as Hydra is to read them."""

from __future__ import annotations

import re

from spikerl.config.yaml_file import counted, quoted

# Keys of paths, which are taken literally: the folders of a sweep have '=' and ',' in their names.
PATHS = ("run_dir", "init_from", "resume", "config", "run", "popsan", "dense", "stats", "path",
         "energy.file", "file", "runs", "out", "dataset")  # fmt: skip


def for_hydra(arg: str, sweeps: bool = False) -> str:
    """The override with a path in quotes, brackets around loggers, and counts as whole numbers."""
    # Its keys are the environment's; as Hydra's config has none of them, they are added by `++`.
    arg = re.sub(r"^(?=env\.kwargs(\.|=\{))", "++", arg)
    return _whole_numbers(_literal(arg, sweeps))


def _literal(arg: str, sweeps: bool) -> str:
    """The override with quotes around a path, as Hydra would interpret many characters in it and
    read 1e3 as a number, or with brackets around a list of loggers.
    """
    key, _, value = arg.partition("=")
    if key == "logger" and not value.startswith("["):
        return f"logger=[{'' if value in ('null', 'none') else value}]"
    if key not in PATHS or value in ("", "null") or value[0] in "'\"":
        return arg
    several = sweeps and re.search(r"[,(]", value) and readable(arg)
    return arg if several else f"{key}={quoted(value)}"


def _whole_numbers(arg: str) -> str:
    """The override with counts such as 1M as whole numbers, also where a sweep lists several."""
    key, _, value = arg.partition("=")
    if not re.fullmatch(r"[\w.+,]+", value):
        return arg
    return f"{key}={','.join(str(counted(key, one)) for one in value.split(','))}"


def readable(override: str) -> bool:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    try:
        OverridesParser.create().parse_override(override)
    except Exception:  # the parser's, or of a number or a nesting that is too large for it
        return False
    return True
