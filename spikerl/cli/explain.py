"""Errors of Hydra and of this program as one line with key, value and remedy."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence

from omegaconf import ListConfig, OmegaConf

from spikerl.cli.help import comments
from spikerl.cli.keys import default_config, known_keys
from spikerl.cli.words import split, unquoted
from spikerl.config.typed import PATHS, readable
from spikerl.config.yaml_file import NAME, conf_folder, group_options, option_file
from spikerl.errors import WRONG, BadRequest, nearest
from spikerl.files import absolute

LONGEST = 1000  # characters that are printed of a message
HYDRAS = {
    "hydra/launcher": ["basic", "joblib", "submitit_local", "submitit_slurm"],
    "hydra/sweeper": ["basic", "optuna"],
}


def explain(command: str, args: Sequence[str], error: Exception) -> str:
    """An error of Hydra, OmegaConf or this program as one line with key, value and remedy."""
    text = str(error)
    if isinstance(error, BadRequest):
        return str(_of_experiment(error, args) or _as_typed(error, args))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if match := re.search(r"Could not find '([^']+)/([^'/]+)'", text):
        group, option = match.groups()
        if group not in HYDRAS:  # an option may lie in a subfolder
            group, option = f"{group}/{option}".split("/", 1)
        options = HYDRAS.get(group) or group_options(group)
        name, version = option, None
        if group == "env" and (match := re.fullmatch(r"(.+)-(v\d+)", option)):
            name, version = match.groups()
        remedy = nearest(name, options)
        if version and name in options:
            remedy = f"write env={name} env.version={version}"
        elif version and remedy.startswith("known: "):
            remedy = f"a task that is not among them is env=gym env.id={option}; {remedy}"
        return f"{group}={option}: no such option; {remedy}"
    if match := re.search(r"Could not override '([^']+)'", text):
        key = match[1]
        value = next((unquoted(a.partition("=")[2]) for a in args if a.startswith(f"{key}=")), "")
        return f"{key}={value}: no such key; {_having(key) or nearest(key, known_keys(command))}"
    if "issing mandatory value" in text:
        key = getattr(error, "full_key", None) or text.rpartition(" ")[2]
        meaning = _meaning(command, args, key)
        return f"{key}: it has no default; give {key}=VALUE{f': {meaning}' if meaning else ''}"
    if match := re.search(r"Ambiguous value for argument '(.*?)'\n", text):
        return f"{match[1]}: several values; {_each_or_all(command, match[1])}"
    unread = [arg for arg in split(args)[0] if not readable(arg)]
    if unread:
        return f"{unread[0]}: cannot be read; {_meant(command, unread[0])}"
    return f"config: {lines[0] if lines else type(error).__name__}"


def beside(error: BaseException | None) -> str:
    """A hint, if a module that could not be imported lies in the current folder; else empty."""
    while error and not (isinstance(error, ModuleNotFoundError) and error.name):
        error = error.__cause__
    name = getattr(error, "name", None) or ""
    top = name.partition(".")[0]
    if not top or not (os.path.isfile(f"{top}.py") or os.path.isdir(top)):
        return ""
    return f"; {top} lies in this folder, from which nothing is imported: PYTHONPATH=. spikerl ..."


def _meaning(command: str, args: Sequence[str], key: str) -> str | None:
    """The comment on `key` in the config file that has it; None where there is none."""
    group, _, name = key.rpartition(".")
    chosen = {word.partition("=")[0]: unquoted(word.partition("=")[2]) for word in args}
    options = group_options(group) if re.fullmatch(NAME, group) else []
    if not group:
        return comments(conf_folder() / f"{command}.yaml").get(name)
    if chosen.get(group) not in options:
        return None
    return comments(option_file(group, chosen[group])).get(name)


def _each_or_all(command: str, override: str) -> str:
    """The remedy for values with commas between them: a job for each, or a list of all."""
    key, _, value = override.partition("=")
    default = OmegaConf.select(default_config(command), key, default=None)
    if isinstance(default, ListConfig):
        return f"a list is written {key}=[{value}]"
    if isinstance(default, int) and re.fullmatch(r"\d{1,3}(,\d{3})+", value):
        return f"a number has no comma: {key}={value.replace(',', '')}; -m sweeps over several"
    also = "" if default is not None else f", or write {key}=[{value}] where it takes a list"
    return f"sweep over them with -m{also}"


def _meant(command: str, word: str) -> str:
    """The remedy for a word that cannot be read: what may have been meant."""
    key, equals, value = word.partition("=")
    if equals and value[:1] in ("[", "(", "{"):
        return f"a list is written [A,B], and in quotes if it has spaces: '{key}=[A, B]'"
    if word and os.path.exists(os.path.join(word, "manifest.json")):
        return f"did you mean {'resume' if command == 'train' else 'run'}={word}?"
    groups = sorted(each.name for each in conf_folder().iterdir() if each.is_dir())
    options = [f"{group}={word}" for group in groups if word in group_options(group)]
    return f"did you mean {' or '.join(options)}?" if options else "write key=value"


def _of_experiment(error: BadRequest, args: Sequence[str]) -> BadRequest | None:
    """The refusal of a key that an experiment sets but the option chosen with it lacks; or None."""
    key, value, remedy = error.args
    typed = dict(arg.lstrip("+").partition("=")[::2] for arg in args)
    group = str(key).partition(".")[0]
    if (
        not remedy.startswith("no such key")
        or key in typed
        or not {"experiment", group} <= {*typed}
    ):
        return None
    sets = f"experiment={typed['experiment']} sets it, {group}={typed[group]} has no such key"
    return BadRequest(key, value, f"{sets}; leave it out by ~{key}")


def _as_typed(error: BadRequest, args: Sequence[str]) -> BadRequest:
    """The error with its path as the user wrote it; inside the program all paths are absolute."""
    key, value, remedy = error.args
    for arg in args:
        name, _, given = arg.partition("=")
        if name != key or key not in PATHS or not value:
            continue
        for one in (unquoted(given), *given.split(",")):  # each value of a sweep
            if str(absolute(one)) == str(value):
                return BadRequest(key, one, remedy)
    return error


def _having(key: str) -> str:
    """Name the options of the key's group that have it, unlike the chosen one; empty if none."""
    group, _, name = key.rpartition(".")
    line = re.compile(rf"^{re.escape(name)}:", re.MULTILINE)
    options = [
        option
        for option in (group_options(group) if re.fullmatch(NAME, group) else [])
        if line.search(option_file(group, option).read_text(encoding="utf-8"))
    ]
    return f"it goes with {group}={', '.join(options)}" if options else ""


def escaped(character: str) -> str:
    code = ord(character)
    # U+DC80 to U+DCFF are how Python holds bytes that are not UTF-8.
    return f"\\x{code - 0xDC00 if 0xDC80 <= code <= 0xDCFF else code:02x}"


def say(line: str) -> None:
    """Print one line of bounded length, escaped: parts of it may come from an untrusted file."""
    shown = "".join(c if c.isprintable() else escaped(c) for c in line[:LONGEST])
    shown += "..." * (len(line) > LONGEST)
    print(f"spikerl: {shown}", file=sys.stderr)


def wrong(line: str) -> int:
    if os.environ.get("LOCAL_RANK", "0") == "0":  # the other workers of a machine would repeat it
        say(line)
    return WRONG
