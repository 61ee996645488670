"""`--help` with what the keys mean: the comments of conf/, after Hydra's list of defaults."""

from __future__ import annotations

import re
from pathlib import Path

from spikerl.config.yaml_file import conf_folder, group_options, option_file

KEYS = "Keys and their defaults"  # heading of Hydra's list of keys, where groups come before it
COMMENTED = re.compile(r"^(\w+):[^#\n]*# (.+)$", re.MULTILINE)
DEFAULT = re.compile(r"^  - (\w+): (\w+)$", re.MULTILINE)
STARTS_FROM = re.compile(r"^  - (\w+)$", re.MULTILINE)  # a file that this one includes
CHOSEN = re.compile(r"^(\w+):\n(?:  .*\n)*?  name: (\w+)$", re.MULTILINE)
GROUP = re.compile(r"^(\w+): \w+(?:, \w+)*$", re.MULTILINE)
# Groups to leave out of help: what config files share, what `reproduce` alone reads, subfolders.
NOT_CHOSEN = re.compile(r"^(?:(?:base|table): \w+, |\w+/\w+: ).*\n", re.MULTILINE)


def with_meanings(text: str, command: str) -> str:
    """Hydra's help text for a command, with the comments of conf/ behind the keys."""
    text = NOT_CHOSEN.sub("", text)
    head, mark, keys = text.partition(KEYS) if KEYS in text else ("", "", text)
    # Hydra's list has neither the options of plugins nor those of subfolders as they are typed.
    head = GROUP.sub(lambda line: f"{line[1]}: {', '.join(group_options(line[1]))}", head)
    conf = conf_folder()
    of_command = (conf / f"{command}.yaml").read_text(encoding="utf-8")
    files = [*STARTS_FROM.findall(of_command), command]
    top = dict(pair for name in files for pair in comments(conf / f"{name}.yaml").items())
    first = dict(DEFAULT.findall(of_command))
    chosen = dict(CHOSEN.findall(keys))
    group: dict[str, str] = {}
    lines = []
    for line in keys.split("\n"):
        match = re.match(r"( ?)\1(\w+):", line)
        if match and not match[1]:  # an option's own comment, else its group's, else the default's
            name = match[2]
            group = comments_of(name, first.get(name, ""))
            group |= comments(conf / "base" / f"{name}.yaml")
            group |= comments_of(name, chosen.get(name, ""))
        known = (group if match[1] else top) if match else {}
        meaning = known.get(match[2]) if match else None
        line = re.sub(r": \?\?\?$", ": (required)", line)
        lines.append(f"{line}  # {meaning}" if meaning else line)
    return head + mark + "\n".join(lines)


def comments_of(group: str, option: str) -> dict[str, str]:
    """The comments by key of an option's file, also a plugin's, and of the options it includes."""
    if option not in group_options(group):
        return {}
    path = option_file(group, option)
    found: dict[str, str] = {}
    for name in STARTS_FROM.findall(path.read_text(encoding="utf-8")):
        found |= comments_of(group, name)
    return found | comments(path)


def comments(path: Path) -> dict[str, str]:
    return dict(COMMENTED.findall(path.read_text(encoding="utf-8"))) if path.is_file() else {}
