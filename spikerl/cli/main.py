"""The command line: picks the command, lets Hydra compose its config, turns errors into one line.

Hydra has no subcommands, so the first word is taken off here. Nothing heavy is imported before a
config is composed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from spikerl.cli.compose import commands, expand, explain, module_of, searchpath, usage
from spikerl.config.yaml_file import conf_folder
from spikerl.distributed import hosts, mpi
from spikerl.distributed.process_lifetime import die_if_spawned, die_with_launcher
from spikerl.errors import DONE, WRONG, BadRequest

die_if_spawned()

LONGEST = 1000  # characters of a refusal


def main() -> None:
    """The console script."""
    die_with_launcher()
    # Threads that spin while they wait make an update several times slower on a shared machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        status = run(sys.argv[1:])
    except BrokenPipeError:
        status = 1
    try:
        sys.stdout.flush()
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # a reader that went away is no error of ours
            print(f"spikerl: standard output: {error.strerror}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = status or 1
    sys.exit(status)


def run(args: Sequence[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage())
        return DONE if args else WRONG
    if args[0] == "--version":
        from importlib.metadata import version

        print(f"spikerl {version('spikerl')}")
        return 0
    command, *typed = args
    try:
        if command in ("-sc", "--shell-completion"):
            from spikerl.cli.completion import complete

            return complete(args)
        if command not in commands():
            import difflib

            near = difflib.get_close_matches(command, commands(), 1)
            hint = f"did you mean {near[0]}?" if near else f"commands: {', '.join(commands())}"
            return wrong(f"{command}: no such command; {hint}")
        return compose_and_call(command, expand(command, typed), typed)
    except BadRequest as error:
        return wrong(str(error))
    except KeyboardInterrupt:
        return 130


def compose_and_call(command: str, args: list[str], typed: list[str]) -> int:
    """Let Hydra compose the command's config and call it: once, or once per job of a sweep."""
    import hydra
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from spikerl.cli.sweep import Sweep

    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that Hydra raises instead of printing and exiting
    sweep = Sweep.of(command, args)
    own = [*searchpath(), *(sweep.hydra_args() if sweep else [])]
    sys.argv = ["spikerl", *own, *args]
    statuses: list[int] = []
    called = False

    def call(config: DictConfig) -> int:
        nonlocal called
        called = True
        data = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        main = import_module(module_of(command)).main
        return int(main(data, ["spikerl", command, *typed]))

    def job(config: DictConfig) -> float | None:
        if sweep:
            return sweep.job(config, call, explained)
        try:
            statuses.append(call(config))
        except (BadRequest, OmegaConfBaseException) as error:  # Hydra would print around it
            statuses.append(wrong(explained(error)))
        return None

    def explained(error: Exception) -> str:
        return explain(command, args, error)

    try:
        hydra.main(str(conf_folder()), command, version_base="1.3")(job)()
    except SystemExit as ended:  # Hydra's way out of --help, and of a --package that is not there
        statuses.append(WRONG if ended.code else DONE)
    except BrokenPipeError:
        raise
    except Exception as error:
        if sweep and sweep.noted():  # a launcher lost a job, or a sweeper gave up
            print(f"spikerl: {type(error).__name__}: {error}", file=sys.stderr)
        elif called:
            raise
        else:
            statuses.append(wrong(explained(error)))
    finally:
        if sweep and not sweep.noted():
            sweep.discard()
    return sweep.end() if sweep and not statuses else max(statuses, default=0)


def wrong(line: str) -> int:
    """One line of bounded length, whatever the text holds: some may be from a stranger's file."""
    shown = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in line[:LONGEST])
    shown += "..." * (len(line) > LONGEST)
    mpi.adopt()
    hosts.adopt()
    if os.environ.get("LOCAL_RANK", "0") == "0":  # the other workers of a machine would repeat it
        print(f"spikerl: {shown}", file=sys.stderr)
    return WRONG
