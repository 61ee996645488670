"""`--help` with what the keys mean: the comments of conf/, behind Hydra's list of defaults."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from spikerl.config.yaml_file import conf_folder

KEYS = "Keys and their defaults"  # what the list begins with, where groups come before it
COMMENTED = re.compile(r"^(\w+):[^#\n]*# (.+)$", re.MULTILINE)
# In lists of options: what config files share, and what `reproduce` alone reads.
NOT_CHOSEN = re.compile(r"^(?:base|table): \w+, .*\n", re.MULTILINE)


def with_meanings(text: str, command: str) -> str:
    """Hydra's text for a command, each key that a comment explains with that comment."""
    text = NOT_CHOSEN.sub("", text)
    head, mark, keys = text.partition(KEYS) if KEYS in text else ("", "", text)
    conf = conf_folder()
    top = _comments([conf / f"{command}.yaml"])
    group: dict[str, str] = {}
    lines = []
    for line in keys.split("\n"):
        match = re.match(r"( ?)\1(\w+):", line)
        if match and not match[1]:
            files = sorted((conf / match[2]).glob("*.yaml"))
            group = _comments([*files, conf / "base" / f"{match[2]}.yaml"])
        known = (group if match[1] else top) if match else {}
        meaning = known.get(match[2]) if match else None
        lines.append(f"{line}  # {meaning}" if meaning else line)
    return head + mark + "\n".join(lines)


def _comments(files: Iterable[Path]) -> dict[str, str]:
    texts = [path.read_text(encoding="utf-8") for path in files if path.is_file()]
    return {key: meaning for text in texts for key, meaning in COMMENTED.findall(text)}
