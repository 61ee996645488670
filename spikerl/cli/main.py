"""The command line: picks the command, lets Hydra compose its config, turns errors into one line.

Hydra has no subcommands, so the first word is taken off here. Nothing heavy is imported before a
config is composed.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from importlib import import_module

from spikerl import output
from spikerl.children import safe_path
from spikerl.cli.compose import (
    PATHS,
    commands,
    deferred,
    expand,
    module_of,
    searchpath,
    split,
    usage,
)
from spikerl.cli.explain import explain
from spikerl.cli.help import with_meanings
from spikerl.config.yaml_file import conf_folder
from spikerl.distributed.launchers import adopt
from spikerl.distributed.process_lifetime import (
    die_if_spawned,
    die_with_launcher,
    end_despite_threads,
)
from spikerl.errors import (
    BY_DESIGN,
    DONE,
    FAILED,
    WRONG,
    BadRequest,
    Interrupted,
    with_notes,
)
from spikerl.files import absolute

die_if_spawned()

LONGEST = 1000  # characters of a refusal


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
        return 0
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
        return compose_and_call(command, expand(command, typed), typed)
    except BadRequest as error:
        return wrong(explain(command, typed, error))
    except output.Unwritten as error:
        return output.unwritten(error)
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
    try:
        sys.argv = ["spikerl", *own, *(deferred(args) if sweep else args)]
    except Exception as error:  # Hydra's, of what it cannot read
        return wrong(explain(command, args, error))
    statuses: list[int] = []
    failures: list[Exception] = []
    called = False

    def explained(error: Exception) -> str:
        return explain(command, args, error) + beside(error)

    if sweep and command == "train" and (refused := sweep.refusals(args, explained)):
        sweep.discard()
        return max(map(wrong, refused))

    def call(config: DictConfig) -> int:
        nonlocal called
        called = True
        data = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        assert isinstance(data, dict)
        if command != "train":  # whose config is recorded as it was typed
            given = {key: data.get(key) for key in PATHS}
            words = ("", "none")  # stats=none is an answer, not a file
            paths = {key: v for key, v in given.items() if isinstance(v, str) and v not in words}
            data |= {key: str(absolute(path)) for key, path in paths.items()}
        main = import_module(module_of(command)).main
        with output.only_answers() if data.get("json") is True else nullcontext():
            return int(main(data, ["spikerl", command, *typed]))

    def job(config: DictConfig) -> float | None:
        if sweep:
            return sweep.job(config, call, explained)
        try:
            statuses.append(call(config))
        except (BadRequest, OmegaConfBaseException) as error:  # Hydra would print around it
            statuses.append(wrong(explained(error)))
        except BY_DESIGN as error:  # no fault of this program's code
            say(with_notes(error))
            statuses.append(FAILED)
        except Exception as error:
            failures.append(error)
        return None

    helps, text = not {"--help", "-h"}.isdisjoint(args), io.StringIO()
    try:
        # The first for the processes of Hydra's launchers.
        with (
            safe_path() if sweep else nullcontext(),
            redirect_stdout(text) if helps else nullcontext(),
        ):
            if sweep or split(args)[1]:
                hydra.main(str(conf_folder()), command, version_base="1.3")(job)()
            else:  # hydra.main would compose twice, to find out that this is not a sweep
                with hydra.initialize_config_dir(str(conf_folder()), version_base="1.3"):
                    job(hydra.compose(command, [*own, *args]))
    except SystemExit as ended:
        if called:  # somebody's code has no say in how the program ends
            statuses.append(FAILED)
        else:  # Hydra's way out of --help, and of a --package that is not there
            statuses.append(WRONG if ended.code else DONE)
    except Exception as error:
        if sweep and sweep.noted():  # a launcher lost a job, or a sweeper gave up
            print(f"spikerl: {type(error).__name__}: {error}", file=sys.stderr)
        else:
            statuses.append(wrong(explained(error)))
    finally:
        if sweep and not sweep.noted():
            sweep.discard()
    if helps:
        print(with_meanings(text.getvalue(), command), end="")
    if failures:
        raise failures[0]
    return sweep.end() if sweep and not statuses else max(statuses, default=0)


def beside(error: BaseException | None) -> str:
    """A hint, if what could not be imported lies in the current folder."""
    while error and not (isinstance(error, ModuleNotFoundError) and error.name):
        error = error.__cause__
    name = getattr(error, "name", None) or ""
    top = name.partition(".")[0]
    if not top or not (os.path.isfile(f"{top}.py") or os.path.isdir(top)):
        return ""
    return f"; {top} lies in this folder, from which nothing is imported: PYTHONPATH=. spikerl ..."


def check_text(args: Sequence[str]) -> None:
    """Refuse bytes that are no UTF-8, which no config and no record could hold."""
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
    """Ctrl-C, which is told apart from what an environment raises."""
    raise Interrupted


def escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code - 0xDC00 if 0xDC80 <= code <= 0xDCFF else code:02x}"


def say(line: str) -> None:
    """One line of bounded length, whatever the text holds: some may be from an untrusted file."""
    shown = "".join(c if c.isprintable() else escaped(c) for c in line[:LONGEST])
    shown += "..." * (len(line) > LONGEST)
    print(f"spikerl: {shown}", file=sys.stderr)


def wrong(line: str) -> int:
    if os.environ.get("LOCAL_RANK", "0") == "0":  # the other workers of a machine would repeat it
        say(line)
    return WRONG
