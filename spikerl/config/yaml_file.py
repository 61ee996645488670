"""A config file as plain data, and the overrides that make Hydra compose the same.

The file may be untrusted, so it can set nothing but values.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spikerl import plugins
from spikerl.errors import BadRequest, first_line, nearest
from spikerl.files import read_bytes, shown

if TYPE_CHECKING:
    from spikerl.types import Task

MAX_BYTES = 1 << 17  # some forty times a run's config.yaml
NAME = r"[A-Za-z][A-Za-z0-9_]*"  # of a key
ARGUMENT = r"[A-Za-z_][A-Za-z0-9_-]*"  # of a key among arguments for users' code
# Where a run was started from or kept is not part of what it computes.
NOT_CARRIED = ("run_dir", "resume", "config", "nnodes", "node_rank", "rdzv")
# Keys whose values are counts.
COUNTS = re.compile(r"(?:^|[._])(?:steps|interval|capacity|starts|episodes|envs|size|per_epoch)$")
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
# Values that are passed on whole, as no config file of ours has their keys: arguments for users'
# code, and the return that energy_to asks for.
PLAIN = ("env.kwargs", "env.wrappers", "energy_to")
# Keys that the config.yaml of every run has, whatever version wrote it.
EVERY_RUN = (
    "env", "actor", "algo", "precision", "backend", "energy", "seed", "total_steps",
    "steps_per_epoch", "eval_episodes", "num_envs", "scaling", "deterministic",
)  # fmt: skip
STARTED_FROM = ("init_from", "dataset")  # read once, at the start
READ = (*STARTED_FROM, "energy.file")  # paths that a run reads


def conf_folder() -> Path:
    """conf/ beside the package in a checkout, inside it in an installed wheel."""
    here = Path(__file__).resolve().parents[1]
    inside = here / "conf"
    return inside if inside.is_dir() else here.parent / "conf"


def searchpath() -> list[str]:
    """The override that makes Hydra search the conf/ folders of plugins too; empty without any."""
    folders = [quoted(folder.as_uri()) for folder in plugins.conf_folders()]
    return [f"hydra.searchpath=[{','.join(folders)}]"] if folders else []


def group_options(group: str) -> list[str]:
    """The names of a group's options, those of plugins too."""
    folders = [folder / group for folder in (conf_folder(), *plugins.conf_folders())]
    files = [(folder, path) for folder in folders for path in folder.rglob("*.yaml")]
    return sorted(str(path.relative_to(folder).with_suffix("")) for folder, path in files)


def option_file(group: str, option: str) -> Path:
    """The file of one of `group_options`."""
    folders = (conf_folder(), *plugins.conf_folders())
    files = [folder / group / f"{option}.yaml" for folder in folders]
    return next(path for path in files if path.is_file())


def read_config(path: Path) -> dict[Any, Any]:
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses huge integers, and aliases, by which a small file can stand for a huge one."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("it holds an alias; write the value out")
            return super().compose_node(parent, index)

        def construct_yaml_int(self, node: Any) -> int:
            number = int(super().construct_yaml_int(node))
            if abs(number) >= 1 << 63:
                raise yaml.YAMLError("numbers have 63 bits")
            return number

    if os.path.isdir(path):  # Path.is_dir() raises for a name that is too long
        raise BadRequest("config", path, f"is a folder; give {path}/config.yaml")
    Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)
    try:
        data = yaml.load(read_bytes(path, MAX_BYTES).decode(), Loader)
    except Exception as error:  # scalars such as `!!int x` or 2020-13-45 raise almost anything
        reason = first_line(error)
        raise BadRequest("config", path, f"cannot be read: {reason}") from None
    if not isinstance(data, dict):
        raise BadRequest("config", path, "holds no mapping; give a run's config.yaml")
    return data


def overrides_of(path: Path, typed: Sequence[str], *, resumes: bool = False) -> list[str]:
    """The overrides that make Hydra compose what the config file `path` holds.

    The file is data: no interpolation, no code, no Hydra settings, no path that leads out of the
    working folder. A group whose option the user chooses anew takes that option's values, not the
    file's. With `resumes`, paths that the run was started from are left out: it has its weights.
    """
    data = read_config(path)
    groups = {folder.name for folder in conf_folder().iterdir() if folder.is_dir()}
    chosen = {re.sub(r"^\++(?=env\.kwargs[.=])", "", arg).partition("=")[0] for arg in typed}
    choices, values = [], []
    for key, value in data.items():
        if not isinstance(key, str) or key == "hydra" or not re.fullmatch(NAME, key):
            raise BadRequest("config", path, f"the key {key} is not accepted in a config file")
        if key == "plugins":
            plugins.check_typed(path, value, typed_plugins(typed))
        if key in NOT_CARRIED or (resumes and key in STARTED_FROM):
            continue
        if key in groups:
            if key in chosen:
                continue
            name = value.get("name") if isinstance(value, dict) else value
            if not isinstance(name, str | None) or value is None:
                raise BadRequest("config", path, f"its group {key} is neither option nor settings")
            if name is not None:
                choices.append(f"{key}={quoted(name)}")
            if isinstance(value, str):
                if value not in (options := group_options(key)):
                    raise BadRequest(key, value, f"no such option; {nearest(value, options)}")
                continue
            own = (f"{name}-{value.get('version')}", "${.name}-${.version}")
            if key == "env" and value.get("id") in own:  # the second as --cfg job prints it
                value = {k: v for k, v in value.items() if k != "id"}
        leaves = list(_leaves(key, value, path, chosen))
        if not resumes:
            _check_paths(leaves, path)
        for name, leaf in leaves:
            if isinstance(leaf, dict):  # or Hydra would merge it with what the option has
                values.append(f"{name}=null")
            values.append(f"{name}={quoted(counted(name, leaf))}")
    return [*choices, *values]


def counted(key: str, value: Any) -> Any:
    """The value of a key that counts, as a whole number if it is one: 1e6, 1_000_000, 1M, 10k."""
    counts = COUNTS.search(key) and not key.lstrip("+").startswith(PLAIN)
    if not counts or not isinstance(value, str | float):
        return value
    # No leading zeros: a sweep over 1,000 is over 1 and 000, and 000 is not a count.
    number = r"((?:0|[1-9][\d_]*)(?:\.\d+)?(?:[eE]\+?\d{1,2})?)([kKMG]?)"
    match = re.fullmatch(number, str(value))
    if match is None:
        return value
    count = Decimal(match[1].replace("_", "")) * UNITS[match[2].upper()]
    return int(count) if count == int(count) else value


def typed_plugins(args: Sequence[str]) -> list[str]:
    """The packages that `plugins=[...]` names."""
    values = [arg.partition("=")[2] for arg in args if re.match(r"^\+{0,2}plugins=", arg)]
    if not values:
        return []
    if not (match := re.fullmatch(r"\[([\w\s,]*)\]", values[-1])):
        raise BadRequest("plugins", values[-1], "give a list of packages, such as [my_package]")
    return [name for name in re.split(r"[\s,]+", match[1]) if name]


def _leaves(prefix: str, value: Any, path: Path, typed: set[str]) -> Iterator[tuple[str, Any]]:
    if prefix in typed:
        return
    if prefix in PLAIN and isinstance(value, dict):
        value = {name: own for name, own in value.items() if f"{prefix}.{name}" not in typed}
    if not isinstance(value, dict) or prefix in PLAIN:
        if "${" in str(value) or (":" in str(value) and prefix == "env.id"):
            raise _refusal(prefix, value, path)
        yield prefix, value
        return
    for key, inner in value.items():
        if not isinstance(key, str) or not re.fullmatch(NAME, key):
            raise BadRequest("config", path, f"the key {prefix}.{key} is not accepted")
        yield from _leaves(f"{prefix}.{key}", inner, path, typed)


def _check_paths(leaves: Sequence[tuple[str, Any]], path: Path) -> None:
    for key, value in leaves:
        place = Path(str(value))
        if key in READ and (place.is_absolute() or ".." in place.parts):
            raise _refusal(key, value, path)
        for name, own in value.items() if isinstance(value, dict) else [("", value)]:
            if key in PLAIN and leads_out(own):
                raise _refusal(f"{key}.{name}".rstrip("."), own, path)


def leads_out(value: Any) -> bool:
    """Whether `value` is or holds a path that leads out of the working folder."""
    if isinstance(value, dict | list):
        return any(map(leads_out, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str) and (value[:1] in ("/", "~") or ".." in Path(value).parts)


def check_confirmed(run: str, task: Task, typed: str | None) -> None:
    """Refuse to import the module that a run's environment id names, and to give the environment
    paths, unless the id was typed too.
    """
    reason = f"its environment {task.env_id} names a module to import" if ":" in task.env_id else ""
    if leads_out(dict(task.env_kwargs)):
        reason = reason or "its environment is given paths of files"
    if reason and task.env_id != typed:
        raise BadRequest("run", run, f"{reason}; confirm with env_id={task.env_id}")


def config_for(
    target: str, run: str, task: Task, typed: str | None, plugins: Sequence[str]
) -> dict[str, Any]:
    """The config of `run`, changed for a folder `target` that is made from its policy. `typed` is
    the environment id that the user typed to confirm it, for `check_confirmed`.
    """
    path = Path(run) / "config.yaml"
    raw = read_config(path)
    check_confirmed(run, task, typed)
    named = [f"env.id={task.env_id}", f"plugins=[{','.join(plugins)}]"]
    overrides_of(path, named, resumes=True)  # called only to refuse what is not plain data
    own = {"run_dir": shown(Path(target)), "plugins": list(plugins)}
    began = {"resume": None, "config": None, "init_from": None, "init_policy": "last"}
    return {**raw, **began, **own}


def _refusal(key: str, value: Any, path: Path) -> BadRequest:
    return BadRequest(
        key,
        value,
        f"not accepted from {path}, as it may run code; if it is to be trusted, type"
        f" {key}=... on the command line",
    )


def quoted(value: Any, key: str = "config") -> str:
    """`value` in Hydra's override grammar; `key` is named where it is not plain data."""
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value)
    if isinstance(value, list):
        return "[" + ",".join(quoted(item, key) for item in value) + "]"
    if isinstance(value, dict) and all(re.fullmatch(ARGUMENT, str(name)) for name in value):
        return "{" + ",".join(f"{name}:{quoted(v, key)}" for name, v in value.items()) + "}"
    if isinstance(value, str):
        escaped = re.sub(r"(\\+)(?='|$)", r"\1\1", value).replace("'", "\\'")
        return f"'{escaped}'"
    remedy = "not plain data, with keys of letters, digits, _ and -, that a resume could give back"
    raise BadRequest(key, value, remedy)
