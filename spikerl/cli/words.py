"""The words of a command line: flags with their values, and overrides."""

from __future__ import annotations

import re
from collections.abc import Sequence

from spikerl.errors import BadRequest

FLAGS = ("--help", "-h", "--cfg", "-c", "--resolve", "--package", "-p", "--multirun", "-m",
         "--info", "-i", "--hydra-help", "--run", "-r")  # fmt: skip
CFG = ("job", "hydra", "all")
INFO = ("", "all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
FLAG_VALUES = {"--cfg": CFG, "-c": CFG, "--info": INFO, "-i": INFO}
VALUED = (*FLAG_VALUES, "--package", "-p")


def split(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides, and flags with their values; Hydra wants them apart."""
    overrides: list[str] = []
    flags: list[str] = []
    for before, arg in zip(["", *args], args, strict=False):
        takes = before in VALUED and "=" not in arg
        (flags if arg.startswith("-") or takes else overrides).append(arg)
    for i, flag in enumerate(flags):
        name, _, given = flag.partition("=")
        value = given or "".join(flags[i + 1 : i + 2])
        allowed = FLAG_VALUES.get(name, ())
        if allowed and value not in allowed:
            raise BadRequest(name, value, f"give {', '.join(filter(None, allowed))}")
        if name in ("--package", "-p") and not value:
            raise BadRequest(name, value, "give a group or a key")
    return overrides, flags


def unquoted(value: str) -> str:
    """A quoted value as Hydra reads it: backslashes escape only before a quote or at the end."""
    if not re.fullmatch(r"(['\"]).*\1", value):
        return value
    escaped = rf"(\\+)({value[0]}|\Z)"
    return re.sub(escaped, lambda m: m[1][: len(m[1]) // 2] + m[2], value[1:-1])
