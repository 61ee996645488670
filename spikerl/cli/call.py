"""Composes a command's config with Hydra and calls the command, once or for each job of a sweep."""

from __future__ import annotations

import io
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from importlib import import_module
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from spikerl import output
from spikerl.children import safe_path
from spikerl.cli.compose import deferred, module_of
from spikerl.cli.explain import beside, explain, say, wrong
from spikerl.cli.help import with_meanings
from spikerl.cli.jobs import refusals
from spikerl.cli.sweep import Sweep
from spikerl.cli.words import split
from spikerl.config.typed import PATHS
from spikerl.config.yaml_file import conf_folder, quoted, searchpath
from spikerl.errors import (
    BY_DESIGN,
    DONE,
    FAILED,
    WRONG,
    BadRequest,
    Interrupted,
    disk_is_full,
    stop_status,
    with_notes,
)
from spikerl.files import absolute


def compose_and_call(command: str, args: list[str], typed: list[str]) -> int:
    """The exit status of a command. `args` are the expanded words, `typed` those of the user."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that Hydra raises instead of printing and exiting

    def call(config: DictConfig, own: Sequence[str] = ()) -> int:
        # A sweep's training records the words of the sweep; `report` repeats it by its own config.
        return call_command(command, config, own if own and command != "train" else typed)

    def explained(error: Exception) -> str:
        return explain(command, args, error) + beside(error)

    if {*split(args)[1]} - {"--run", "-r", "--multirun", "-m"}:
        return show_config(command, args, explained)
    try:
        if sweep := Sweep.of(command, args):
            return run_sweep(sweep, args, call, explained)
        return run_once(command, args, call, explained)
    except OSError as error:
        if isinstance(error, output.Unwritten) or not disk_is_full(error):
            raise
        of_temporary = f"perhaps {tempfile.gettempdir()}, and TMPDIR=FOLDER names another"
        say(f"{error.strerror}: {error.filename or of_temporary}")
        return FAILED


def call_command(command: str, config: DictConfig, typed: Sequence[str]) -> int:
    data = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(data, dict)
    if command != "train":  # which records its paths as they were typed
        given = {key: data.get(key) for key in PATHS}
        words = ("", "none")  # stats=none is a choice, not a file
        paths = {key: v for key, v in given.items() if isinstance(v, str) and v not in words}
        data |= {key: str(absolute(path)) for key, path in paths.items()}
    main = import_module(module_of(command)).main
    with output.only_answers() if data.get("json") is True else nullcontext():
        return int(main(data, ["spikerl", command, *typed]))


def run_once(
    command: str,
    args: Sequence[str],
    call: Callable[[DictConfig], int],
    explained: Callable[[Exception], str],
) -> int:
    try:
        with hydra.initialize_config_dir(str(conf_folder()), version_base="1.3"):
            config = hydra.compose(command, [*searchpath(), *args])
    except Exception as error:
        return wrong(explained(error))
    try:
        return call(config)
    except (BadRequest, OmegaConfBaseException) as error:
        return wrong(explained(error))
    except BY_DESIGN as error:  # no fault of this program's code
        say(with_notes(error))
        return FAILED
    except SystemExit:  # raised by users' code, which must not choose the exit status
        return FAILED


def run_sweep(
    sweep: Sweep,
    args: Sequence[str],
    call: Callable[[DictConfig, Sequence[str]], int],
    explained: Callable[[Exception], str],
) -> int:
    def job(config: DictConfig) -> float | None:
        return sweep.job(config, call, explained)

    try:
        if sweep.command == "train" and (refused := refusals(args, explained)):
            return max(map(wrong, refused))
        with safe_path():  # for the processes of Hydra's launchers
            folder = f"hydra.sweep.dir={quoted(str(sweep.root))}"
            by_hydra(sweep.command, [folder, *deferred(args)], job)
    except SystemExit:
        return FAILED
    except Interrupted as error:  # between two jobs
        if not sweep.noted():
            raise
        sweep.end()
        return stop_status(error.number)
    except Exception as error:
        if not sweep.noted():
            if isinstance(error, OSError) and disk_is_full(error):
                if not sweep.keep:  # its folder is a temporary one
                    raise
                remedy = f"{error.strerror}; give another run_dir"
                error = BadRequest("run_dir", sweep.root, remedy)
            return wrong(explained(error))
        # A launcher lost a job, or a sweeper gave up.
        print(f"spikerl: {type(error).__name__}: {error}", file=sys.stderr)
    finally:
        if not sweep.noted():
            sweep.discard()
    return sweep.end()


def show_config(command: str, args: list[str], explained: Callable[[Exception], str]) -> int:
    """Print what Hydra says of a config for --help, --cfg or --info; the command is not called."""
    helps, text = not {"--help", "-h"}.isdisjoint(args), io.StringIO()
    try:
        with redirect_stdout(text) if helps else nullcontext():
            by_hydra(command, args, lambda config: None)
    except SystemExit as ended:  # by --help, and by a --package that does not exist
        if ended.code:
            return WRONG
    except Exception as error:
        return wrong(explained(error))
    if helps:
        print(with_meanings(text.getvalue(), command), end="")
    return DONE


def by_hydra(command: str, args: Sequence[str], job: Callable[[DictConfig], Any]) -> None:
    sys.argv = ["spikerl", *searchpath(), *args]
    hydra.main(str(conf_folder()), command, version_base="1.3")(job)()
