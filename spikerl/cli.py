"""The command line: picks the command, lets Hydra compose its config, turns errors into one line.

Hydra has no subcommands, so the first word is taken off here. Nothing heavy is imported before a
config is composed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from spikerl.compose import COMMANDS, conf_folder, expand, explain, usage
from spikerl.distributed.orphans import die_if_spawned
from spikerl.errors import BadRequest

die_if_spawned()

WRONG = 2


def main() -> None:
    """The console script."""
    # A reader that went away (spikerl ... | head) is no error of ours.
    try:
        status = run(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status)


def run(args: Sequence[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if args else WRONG
    if args[0] == "--version":
        from importlib.metadata import version

        print(f"spikerl {version('spikerl')}")
        return 0
    if args[0] in ("-sc", "--shell-completion") or args[0].startswith("--shell-completion="):
        from spikerl.completion import complete

        return complete(args)
    command, *rest = args
    if command not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(command, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"commands: {', '.join(COMMANDS)}"
        return wrong(f"{command}: no such command; {hint}")
    try:
        return compose_and_call(command, expand(command, rest))
    except BadRequest as error:
        return wrong(str(error))
    except KeyboardInterrupt:
        return 130


def compose_and_call(command: str, args: list[str]) -> int:
    """Let Hydra compose the command's config and call it: once, or once per job of a sweep."""
    import hydra
    from hydra.errors import HydraException
    from omegaconf import DictConfig
    from omegaconf.errors import OmegaConfBaseException

    from spikerl.sweep import Sweep

    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that Hydra raises instead of printing and exiting
    sweep = Sweep.of(command, args)
    sys.argv = ["spikerl", *(sweep.hydra_args() if sweep else []), *args]
    statuses: list[int] = []

    def call(config: DictConfig) -> int:
        from spikerl.commands import call_command

        return call_command(command, config, args)

    def job(config: DictConfig) -> None:
        if sweep:
            sweep.job(config, call)
            return
        try:
            statuses.append(call(config))
        except (BadRequest, OmegaConfBaseException) as error:  # Hydra would print around it
            statuses.append(wrong(explain(command, args, error)))

    try:
        hydra.main(str(conf_folder()), command, version_base="1.3")(job)()
    except (HydraException, OmegaConfBaseException) as error:
        return wrong(explain(command, args, error))
    return sweep.end() if sweep else max(statuses, default=0)


def wrong(line: str) -> int:
    print(f"spikerl: {line}", file=sys.stderr)
    return WRONG
