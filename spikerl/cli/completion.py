"""Shell completion: Hydra's, with the command word taken out of the line it sees."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from glob import escape, glob

from spikerl.cli.compose import commands
from spikerl.config.typed import PATHS
from spikerl.config.yaml_file import NAME, conf_folder, group_options
from spikerl.errors import DONE, BadRequest

SHELLS = ("bash", "fish", "zsh")


# Keys that take one of a few values.
VALUES = {
    "scaling": ("strong", "weak"),
    "device": ("auto", "cpu", "cuda"),
    "logger": ("csv", "mlflow", "prometheus", "tensorboard", "wandb"),
    "neuron.surrogate": ("atan", "rect", "sigmoid", "triangle"),
    "neuron.reset": ("hard", "soft"),
    "env.vectorizer": ("sync", "async"),
    "env.action_bounds": ("each", "first"),
}


def offers_for(word: str) -> list[str] | None:
    """Completions of a word `key=...` whose key takes a path, one of a few values, or a group's
    option (Hydra itself finds no options in subfolders); None for any other word.
    """
    key, equals, value = word.partition("=")
    if not equals:
        return None
    if key in PATHS:
        start = os.path.expanduser(value)
        paths = sorted(glob(f"{escape(start)}*"))
        typed = (value + path[len(start) :] for path in paths)
        ends = ("/" if os.path.isdir(path) else "" for path in paths)
        return [f"{key}={place}{end}" for place, end in zip(typed, ends, strict=True)]
    options = VALUES.get(key) or (group_options(key) if re.fullmatch(NAME, key) else [])
    return [f"{key}={one}" for one in options] or None


def complete(args: Sequence[str]) -> int:
    """Answer `spikerl -sc install=SHELL` and, for the shell, `spikerl -sc query=SHELL`."""
    import hydra

    asked = args[1].partition("=") if len(args) == 2 else ("", "", "")
    if asked[0] not in ("install", "uninstall", "query") or asked[2] not in SHELLS:
        remedy = f"give install=SHELL, with SHELL one of {', '.join(SHELLS)}"
        raise BadRequest(args[0], " ".join(args[1:]), remedy)
    line = os.environ.get("COMP_LINE", "")
    words = line.split()
    command = words[1] if len(words) > 1 else ""
    query = any(arg.startswith("query=") for arg in args)
    if query and (len(words) < 2 or (len(words) == 2 and not line.endswith(" "))):
        print("\n".join(name for name in commands() if name.startswith(command)))
        return DONE
    if query and command not in commands():
        return DONE
    word = line.rpartition(" ")[2]
    if query and (known := offers_for(word)) is not None:
        print("\n".join(offer for offer in known if offer.startswith(word)))
        return DONE
    if query:
        start = line.index(command, len(words[0]))
        shorter = line[:start] + line[start + len(command) :].lstrip()
        point = int(os.environ.get("COMP_POINT", len(line)))
        os.environ["COMP_LINE"] = shorter
        os.environ["COMP_POINT"] = str(point - (len(line) - len(shorter)))
    sys.argv = ["spikerl", *args]
    hydra.main(str(conf_folder()), command or "train", version_base="1.3")(lambda config: None)()
    return DONE
