"""Refuses what Hydra would fail on or ignore, and settings by which it would run other code."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from spikerl.cli.keys import known_keys
from spikerl.cli.words import FLAGS, VALUED, unquoted
from spikerl.config.yaml_file import conf_folder, group_options
from spikerl.errors import BadRequest, nearest

# They would load somebody's Hydra settings, which can name code to run.
REFUSED_FLAGS = ("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn",
                 "--experimental-rerun")  # fmt: skip
# What is accepted of Hydra's settings; others can name code to run: callbacks, logging, the search
# path.
HYDRA = r"\+{0,2}hydra(/(launcher|sweeper)|\.(launcher|sweeper)(\.\w+)+)"
NO_NAME = r"[-+]?([0-9._]+(e[-+]?\d+)?|inf|nan)|null|true|false"  # what Hydra does not read as text
OPTIONAL = ("experiment", "table")  # groups whose unknown options Hydra ignores
# Pairs of patterns: actors, and overrides of groups that these actors do not have.
UNREAD = (
    (
        r"actor=(mlp|cnn|transformer)|experiment=(dense/[^,]*|proxy_target/ann)",
        r"\+*(encoder|neuron|decoder)[=.]",
    ),
    (r"actor=spikeformer|experiment=dsformer/[^,]*", r"\+*(encoder|decoder)[=.]"),
)


def check_flags(command: str, flags: Sequence[str]) -> None:
    """Refuse flags that do not exist or are not accepted."""
    for arg in flags:
        flag = arg.partition("=")[0]
        if arg.startswith("-") and flag not in (*FLAGS, *REFUSED_FLAGS):
            raise BadRequest(flag, "", f"no such flag; {_without_dashes(command, flag)}")
        if "=" in arg and flag in FLAGS and flag not in VALUED:
            own = flag.lstrip("-") in known_keys(command)  # such as `run` of some commands
            remedy = _without_dashes(command, flag) if own else "takes no value"
            raise BadRequest(flag, arg.partition("=")[2], remedy)
        if flag in REFUSED_FLAGS:
            raise BadRequest(flag, "", "not accepted; config=FILE starts from a run's config.yaml")


def check_overrides(overrides: Sequence[str]) -> None:
    """Refuse settings of Hydra's own that can name code, and options that do not exist."""
    for arg in overrides:
        key, _, value = arg.partition("=")
        if re.match(r"^[+~]*hydra\.searchpath", arg):
            raise BadRequest(key, value, "not accepted; conf/ is what is searched")
        if "hydra" in key and "_target_" in arg:
            raise BadRequest(key, value, "naming code to run is not accepted")
        if "hydra" in key and ("${" in arg or not re.fullmatch(HYDRA, key)):
            remedy = "not accepted; of Hydra, launcher and sweeper can be chosen and set"
            raise BadRequest(key, value, remedy)
        _check_choice(key, value)


def _check_choice(key: str, value: str) -> None:
    """Refuse a choice that Hydra would fail on, or ignore, as it does for an optional group."""
    if not key:
        raise BadRequest(key, value, "cannot be read; write key=value")
    if not os.path.isdir(conf_folder() / key) or "(" in value:  # choice(...), glob(...)
        return
    options = group_options(key)
    if value.startswith("[") or not value:
        raise BadRequest(key, value, f"takes one option; {nearest(value, options)}")
    for option in value.split(","):
        known = key not in OPTIONAL or unquoted(option) in options
        if not known or re.fullmatch(NO_NAME, option, re.IGNORECASE):
            raise BadRequest(key, option, f"no such option; {nearest(option, options)}")


def check_read(args: Sequence[str]) -> None:
    """Refuse overrides of groups that the chosen actor does not have."""
    chosen = [arg for arg in args if arg.startswith("actor=")]
    for actor in chosen or [arg for arg in args if arg.startswith("experiment=")]:
        for pattern, groups in UNREAD:
            if not re.fullmatch(pattern, actor):
                continue
            for arg in filter(re.compile(groups).match, args):
                key, _, value = arg.partition("=")
                raise BadRequest(key, value, f"has no effect with {actor}; leave it out")


def _without_dashes(command: str, flag: str) -> str:
    """The remedy for an unknown flag, such as --env X, which other programs have."""
    name = flag.lstrip("-").replace("-", "_")
    if name in ("help", "cfg", "multirun") or name not in known_keys(command):
        return nearest(flag, FLAGS)
    return f"write {name}=VALUE"
