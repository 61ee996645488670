"""From what was typed to what Hydra composes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from spikerl import plugins
from spikerl.config.typed import for_hydra
from spikerl.config.yaml_file import (
    EVERY_RUN,
    conf_folder,
    group_options,
    overrides_of,
    read_config,
    typed_plugins,
)
from spikerl.distributed.launchers import ranked
from spikerl.errors import BadRequest, nearest
from spikerl.files import read_json

FLAGS = ("--help", "-h", "--cfg", "-c", "--resolve", "--package", "-p", "--multirun", "-m",
         "--info", "-i", "--hydra-help", "--run", "-r")  # fmt: skip
CFG = ("job", "hydra", "all")
INFO = ("", "all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
FLAG_VALUES = {"--cfg": CFG, "-c": CFG, "--info": INFO, "-i": INFO}
VALUED = (*FLAG_VALUES, "--package", "-p")
# They would load somebody's Hydra settings, which can name code to run.
REFUSED_FLAGS = ("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn",
                 "--experimental-rerun")  # fmt: skip
# What `resume=RUN` may change: how far the run goes, where, and what is kept of it.
RESUMABLE = ("resume", "total_steps", "world_size", "device", "threads", "kernel", "kernel.path",
             "backend", "backend.timeout_s", "energy", "energy.file", "logger", "keep_replay",
             "max_restarts", "nnodes", "node_rank", "rdzv", "plugins")  # fmt: skip
# Its other settings can name code to run: callbacks, logging, the search path.
HYDRA = r"\+{0,2}hydra(/(launcher|sweeper)|\.(launcher|sweeper)(\.\w+)+)"
NO_NAME = r"[-+]?([0-9._]+(e[-+]?\d+)?|inf|nan)|null|true|false"  # what Hydra reads as no text
OPTIONAL = ("experiment", "table")  # groups whose unknown options Hydra passes over
MAX_BYTES = 1 << 28  # of a manifest.json
# Actors, and the groups that they have no part of.
UNREAD = (
    (
        r"actor=(mlp|cnn|transformer)|experiment=(dense/[^,]*|proxy_target/ann)",
        r"\+*(encoder|neuron|decoder)[=.]",
    ),
    (r"actor=spikeformer|experiment=dsformer/[^,]*", r"\+*(encoder|decoder)[=.]"),
)


@cache
def commands() -> dict[str, str]:
    """What each command does: the first line of its config, conf/WORD.yaml."""
    lines = {path.stem: _first_line(path) for path in conf_folder().glob("*.yaml")}
    return dict(sorted(lines.items(), key=lambda item: (item[0] != "train", item)))


def _first_line(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        return file.readline().removeprefix("# ").rstrip()


def module_of(command: str) -> str:
    """Whose `main(data, argv)` does it: WORD.py, or command.py in a folder WORD."""
    name = "import_popsan" if command == "import" else command  # the word is Python's
    folder = (Path(__file__).parents[1] / "commands" / name).is_dir()
    return f"spikerl.commands.{name}.command" if folder else f"spikerl.commands.{name}"


def usage() -> str:
    lines = [f"  {name:<9} {text}" for name, text in commands().items()]
    return "\n".join(
        [
            "spikerl COMMAND [group=option] [key=value] ...",
            "",
            *lines,
            "",
            "spikerl COMMAND --help lists its groups, options and keys.",
            "spikerl train env=HalfCheetah algo.random_steps=1000 total_steps=20000: a first look.",
        ]
    )


def expand(command: str, args: Sequence[str]) -> list[str]:
    """Refuse what must not reach Hydra; replace config=FILE by the overrides that it stands for."""
    # Of a key at the top level, which is there, `++` says nothing.
    args = [re.sub(r"^\+(?=(config|resume)=)|^\+\+(?=\w+=)", "", arg) for arg in args]
    plugins.load(typed_plugins(args))
    overrides, flags = split(args)
    for arg in flags:
        flag = arg.partition("=")[0]
        if arg.startswith("-") and flag not in (*FLAGS, *REFUSED_FLAGS):
            raise BadRequest(flag, "", f"no such flag; {_without_dashes(command, flag)}")
        if "=" in arg and flag in FLAGS and flag not in VALUED:
            own = flag.lstrip("-") in known_keys(command)  # as `run` is of some
            remedy = _without_dashes(command, flag) if own else "takes no value"
            raise BadRequest(flag, arg.partition("=")[2], remedy)
        if flag in REFUSED_FLAGS:
            raise BadRequest(flag, "", "not accepted; config=FILE starts from a run's config.yaml")
    for arg in overrides:
        key, _, value = arg.partition("=")
        if re.match(r"^[+~]*hydra\.searchpath", arg):
            raise BadRequest(key, value, "not accepted; conf/ is what is searched")
        if "hydra" in key and "_target_" in arg:
            raise BadRequest(key, value, "naming code to run is not accepted")
        if "hydra" in key and ("${" in arg or not re.fullmatch(HYDRA, key)):
            remedy = "not accepted; of Hydra, launcher and sweeper can be chosen and set"
            raise BadRequest(key, value, remedy)
        _check_choice(key, value)
    named = {a.partition("=")[0]: a for a in overrides if re.match(r"(config|resume)=(?!null$)", a)}
    sweeps = not {"-m", "--multirun"}.isdisjoint(flags)
    typed = [for_hydra(arg, sweeps) for arg in overrides]
    held: list[str] = []
    if command == "train" and named:
        source = named.get("resume") or named["config"]
        path = Path(os.path.expanduser(unquoted(source.partition("=")[2])))
        if "resume" in named:
            check_resume(overrides, sweeps, path)
            path = path / "config.yaml"
            typed += chosen(path.parent, typed)
        else:
            _check_experiment(path, overrides)
        typed = [arg for arg in typed if not arg.startswith("config=")]
        held = overrides_of(path, typed, resumes="resume" in named)
    _check_read([*(arg.replace("'", "") for arg in held if arg.startswith("actor=")), *overrides])
    return [*held, *typed, *flags]


def _check_experiment(path: Path, args: Sequence[str]) -> None:
    """Refuse an experiment beside a file that sets all that it does."""
    experiments = [arg for arg in args if arg.startswith("experiment=")]
    if experiments and {*EVERY_RUN} <= read_config(path).keys():
        remedy = f"{path} sets all that an experiment does; leave one of them out"
        raise BadRequest("experiment", experiments[-1].partition("=")[2], remedy)


def chosen(run: Path, typed: Sequence[str]) -> list[str]:
    """What the run chose at its start: a resume on another day must not choose anew.

    On another device another kernel has to run, on another processor perhaps another path of it;
    other workers have another share of the cores, and more than one no graphs.
    """
    given = dict(arg.partition("=")[::2] for arg in typed)
    try:
        manifest = read_json(run / "manifest.json", MAX_BYTES)
        device, threads, kernel = (
            str(manifest["resolved"][name]["choice"]) for name in ("device", "threads", "kernel")
        )
        workers = str(int(manifest["world_size"]))
        carried = {"num_envs": str(int(manifest["num_envs"])), "threads": str(int(threads))}
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return []
    size = given.get("world_size", os.environ["WORLD_SIZE"] if ranked() else workers)
    carried["world_size"] = size
    if size != workers:
        del carried["threads"]
    if device == "cpu":
        carried["device"] = device
    kernel, _, path = kernel.partition("/")
    sound = kernel in group_options("kernel") and re.fullmatch(r"\w*", path) is not None
    sound &= kernel != "triton" or _sees_a_gpu()
    if sound and not given.keys() & {"device", "kernel", "kernel.path"}:
        carried["kernel"] = kernel
        if path and (kernel != "cpu" or _runs_here(path, run)):
            carried["kernel.path"] = path
    if path == "graphs" and size != "1":
        carried["kernel.path"] = "null"
    return [f"{key}={value}" for key, value in carried.items() if key not in given]


def _sees_a_gpu() -> bool:
    import torch  # a second, which a request that is refused need not wait for

    return torch.cuda.is_available()


def _runs_here(path: str, run: Path) -> bool:
    """Whether the C++ kernel keeps its path: not one that nobody named and the processor lacks."""
    from spikerl.kernels.build import PATHS, supported_paths

    kernel = read_config(run / "config.yaml").get("kernel")
    named = kernel.get("path") if isinstance(kernel, dict) else None
    return path in supported_paths() or path == named or path not in PATHS


def split(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides, and flags with their values; Hydra wants them apart."""
    overrides: list[str] = []
    flags: list[str] = []
    for before, arg in zip(["", *args], args, strict=False):
        takes = before in VALUED and "=" not in arg
        (flags if arg.startswith("-") or takes else overrides).append(arg)
    for i, flag in enumerate(flags):
        name, _, given = flag.partition("=")
        value = given or "".join(flags[i + 1 : i + 2])
        allowed = FLAG_VALUES.get(name, ())
        if allowed and value not in allowed:
            raise BadRequest(name, value, f"give {', '.join(filter(None, allowed))}")
        if name in ("--package", "-p") and not value:
            raise BadRequest(name, value, "give a group or a key")
    return overrides, flags


def unquoted(value: str) -> str:
    """What Hydra reads of it: a backslash counts before a quote, and at the end."""
    if not re.fullmatch(r"(['\"]).*\1", value):
        return value
    escaped = rf"(\\+)({value[0]}|\Z)"
    return re.sub(escaped, lambda m: m[1][: len(m[1]) // 2] + m[2], value[1:-1])


def _check_choice(key: str, value: str) -> None:
    """Refuse a choice that Hydra would trip over, or ignore, as it does for an optional group."""
    if not key:
        raise BadRequest(key, value, "cannot be read; write key=value")
    if not os.path.isdir(conf_folder() / key) or "(" in value:  # choice(...), glob(...)
        return
    options = group_options(key)
    if value.startswith("[") or not value:
        raise BadRequest(key, value, f"takes one option; {nearest(value, options)}")
    for option in value.split(","):
        known = key not in OPTIONAL or unquoted(option) in options
        if not known or re.fullmatch(NO_NAME, option, re.IGNORECASE):
            raise BadRequest(key, option, f"no such option; {nearest(option, options)}")


def _check_read(args: Sequence[str]) -> None:
    """Refuse groups that the chosen actor does not have."""
    chosen = [arg for arg in args if arg.startswith("actor=")]
    for actor in chosen or [arg for arg in args if arg.startswith("experiment=")]:
        for pattern, groups in UNREAD:
            if not re.fullmatch(pattern, actor):
                continue
            for arg in filter(re.compile(groups).match, args):
                key, _, value = arg.partition("=")
                raise BadRequest(key, value, f"has no effect with {actor}; leave it out")


def _without_dashes(command: str, flag: str) -> str:
    """Users of other programs write --env X."""
    name = flag.lstrip("-").replace("-", "_")
    if name in ("help", "cfg", "multirun") or name not in known_keys(command):
        return nearest(flag, FLAGS)
    return f"write {name}=VALUE"


def check_resume(args: Sequence[str], sweeps: bool, run: Path) -> None:
    """Refuse what is not a run folder, and to change what a resumed run computes."""
    if not os.path.isfile(run / "manifest.json"):
        why = "is not a run folder (it has no manifest.json)"
        raise BadRequest("resume", run, why if os.path.isdir(run) else "no such folder")
    if sweeps:
        raise BadRequest("resume", run, "one run at a time; leave out -m")
    for arg in args:
        key, _, value = arg.partition("=")
        if key == "env.id":
            env = read_config(run / "config.yaml").get("env")
            if isinstance(env, dict) and env.get("id") == unquoted(value):
                continue  # it confirms a module to import
        if key not in RESUMABLE:
            remedy = f"a resumed run keeps it; only {', '.join(RESUMABLE[1:])} can change"
            raise BadRequest(key, value, remedy)


def deferred(args: Sequence[str]) -> list[str]:
    """Of a sweep: a key that a swept option may bring is applied to each job alone, as a choice of
    one value. Else Hydra would miss it in the config of all jobs, which has no swept option.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    overrides, flags = split(args)
    parsed = OverridesParser.create().parse_overrides(overrides)
    swept = {override.get_key_element() for override in parsed if override.is_sweep_override()}
    for i, override in enumerate(parsed):
        key = override.get_key_element()
        group = key.lstrip("+").rpartition(".")[0]
        single = not override.is_sweep_override() and not override.is_delete()
        if single and group and swept & {group, "experiment"}:
            overrides[i] = f"{key}=choice({overrides[i].partition('=')[2]})"
    return [*overrides, *flags]


def default_config(command: str) -> Any:
    """What the command's config is where nothing is typed."""
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return compose(command)


def known_keys(command: str) -> list[str]:
    """Every key that the command's default config has, and every group."""
    from omegaconf import DictConfig, OmegaConf

    def walk(node: Mapping[Any, Any], prefix: str) -> Iterator[str]:
        for key in node:
            yield f"{prefix}{key}"
            if not OmegaConf.is_missing(node, key) and isinstance(node.get(key), DictConfig):
                yield from walk(node[key], f"{prefix}{key}.")

    return [*walk(default_config(command), ""), *(["experiment"] if command == "train" else [])]
