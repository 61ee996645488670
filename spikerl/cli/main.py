"""The command line: picks the command and calls it; a wrong request is answered by one line.

Hydra has no subcommands, so the first word is taken off here. Nothing heavy is imported before a
config is composed.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from spikerl import output
from spikerl.cli.compose import commands, expand, usage
from spikerl.cli.explain import explain, say, wrong
from spikerl.distributed.launchers import adopt
from spikerl.distributed.process_lifetime import (
    die_if_spawned,
    die_with_launcher,
    end_despite_threads,
)
from spikerl.errors import DONE, FAILED, INTERRUPTED, WRONG, BadRequest, Interrupted, stop_status
from spikerl.signals import handled, listened_to

die_if_spawned()


def main() -> None:
    """The console script."""
    die_with_launcher()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    # Threads that spin while they wait make an update several times slower on a shared machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    output.prepare()
    status = FAILED
    try:
        status = output.finish(run(sys.argv[1:]))
    finally:
        end_despite_threads(status)
    sys.exit(status)


def run(args: Sequence[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage())
        return DONE if args else WRONG
    if args[0] == "--version":
        from importlib.metadata import version

        print(f"spikerl {version('spikerl')}")
        return DONE
    command, *typed = args
    try:
        adopt()
        check_text(args)
        if command in ("-sc", "--shell-completion"):
            from spikerl.cli.completion import complete

            return complete(args)
        if command not in commands():
            import difflib

            near = difflib.get_close_matches(command, commands(), 1)
            hint = f"did you mean {near[0]}?" if near else f"commands: {', '.join(commands())}"
            return wrong(f"{command}: no such command; {hint}")
        expanded = expand(command, typed)
        from spikerl.cli.call import compose_and_call  # imports Hydra, which takes a while

        # A training sets its own handlers; until then it may wait in C++, where Python runs none.
        numbers = [n for n in listened_to() if n != signal.SIGINT and command != "train"]
        with handled(_interrupt, numbers):
            return compose_and_call(command, expanded, typed)
    except BadRequest as error:
        return wrong(explain(command, typed, error))
    except output.Unwritten as error:
        return output.unwritten(error)
    except Interrupted as error:
        say(str(error))
        return stop_status(error.number)
    except KeyboardInterrupt:
        return INTERRUPTED


def check_text(args: Sequence[str]) -> None:
    """Refuse words or a current folder that are not UTF-8, as no config or record can hold them."""
    try:
        here = os.getcwd()
    except OSError:
        raise BadRequest("the current folder", "", "it was removed; work in another") from None
    for text in (*args, here):
        try:
            text.encode()
        except UnicodeEncodeError:
            key, _, value = text.partition("=")
            remedy = "its name is not UTF-8; give another"
            raise BadRequest(key, value, remedy) from None


def _interrupt(number: int, frame: object) -> None:
    """Raise Interrupted, to tell it from a KeyboardInterrupt that an environment raises."""
    raise Interrupted(number)
