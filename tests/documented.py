"""The commands that documentation pages show, as words, with values for their placeholders."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterator

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep

LAUNCHER = r"(?:(?:srun|mpiexec|torchrun)\b.*? )?"
COMMAND = re.compile(rf"(?:\$ )?(?:[A-Z]+=\S+ )?{LAUNCHER}(?:-m )?(?:scripts/)?spikerl ([a-z].*)")
SBATCH = re.compile(r"sbatch .*?scripts/slurm\.sbatch \S+ (.*)")
# Placeholders that pages write where the reader chooses a value, and a value for each.
PLACEHOLDERS = {
    "S": "0", "W": "2", "T": "25", "R": "hard", "K": "4.0", "ENV": "Hopper", "...": "c",
}  # fmt: skip


def lines(text: str) -> Iterator[tuple[str, str]]:
    """Each line with its kind: code, table or prose."""
    fenced = False
    before = "blank"
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
            kind = "code"
        elif fenced or (line.startswith("    ") and before in ("blank", "code")):
            kind = "code"
        elif not line.strip():
            kind = "blank"
        else:
            kind = "table" if line.startswith("|") else "prose"
        yield kind, line
        before = kind


def commands_in(text: str) -> list[str]:
    """The text after `spikerl` of every command in a block or a span of code."""
    code: list[str] = []
    rest: list[str] = []
    for kind, line in lines(text):
        (code if kind == "code" else rest).append(line)
    spans = re.findall(r"`([^`]+)`", "\n".join(rest))
    code = re.sub(r"\\\n\s*", "", "\n".join(code)).splitlines()
    written = [" ".join(text.split()) for text in [*code, *spans]]
    typed = [m[1] for text in written if (m := COMMAND.fullmatch(text))]
    return typed + [f"train {m[1]}" for text in written if (m := SBATCH.fullmatch(text))]


def variants(command: str) -> Iterator[list[str]]:
    """The words of a command, up to a pipe or a redirection; k=a|b are two commands."""
    words = shlex.split(command, comments=True)
    words = list(itertools.takewhile(lambda word: word not in (">", "|", "&&", ";"), words))
    choices = []
    for word in words:
        key, equals, value = word.partition("=")
        options = [PLACEHOLDERS.get(option, option) for option in value.split("|")]
        choices.append([f"{key}{equals}{option}" for option in options])
    for chosen in itertools.product(*choices):
        yield [word for word in chosen if word != "..."]


def jobs(overrides: list[str]) -> Iterator[tuple[str, ...]]:
    """Overrides of jobs in which every value of a sweep occurs; of an interval, only its start."""
    choices = []
    for override in OverridesParser.create().parse_overrides(overrides):
        key, value = override.get_key_element(), override.value()
        if isinstance(value, IntervalSweep):
            choices.append([f"{key}={value.start}"])
        elif override.is_sweep_override():
            choices.append([f"{key}={option}" for option in override.sweep_string_iterator()])
        else:
            choices.append([str(override.input_line)])
    for i in range(max(map(len, choices), default=1)):
        yield tuple(options[i % len(options)] for options in choices)
