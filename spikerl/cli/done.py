"""Whether a job of a sweep is done already: its run or dataset exists, made as the job asks."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from spikerl.cli.resumed import RESUMABLE, chosen
from spikerl.config.yaml_file import NOT_CARRIED, read_config
from spikerl.errors import BadRequest
from spikerl.files import absolute, read_json, shown
from spikerl.runs.rows import MAX_BYTES
from spikerl.schema import dotted

# Keys that an import takes from the imported file, not from the config.
SETTLED = (
    "actor", "encoder.pop_size", "decoder.pop_size", "algo.norm_clip", "algo.norm_interval",
)  # fmt: skip


def done(command: str, config: Any, folder: Path) -> bool:
    """Whether an earlier sweep has done this job; make `config` resume an unfinished training."""
    try:
        manifest = dict(read_json(folder / "manifest.json", MAX_BYTES))
        ended = manifest["status"] == "done"
    except (OSError, ValueError, TypeError, KeyError):
        remedy = "has no readable manifest.json; remove the folder, and the job begins anew"
        raise BadRequest("run_dir", folder, remedy) from None
    if command == "import":
        check_imported(config, folder, manifest.get("imported_from"))
    return trained(config, folder, ended) if command == "train" else ended


def made_with(made: Path) -> str | None:
    """The command that this run, dataset or exported file records as its origin, or None."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        return str(read_json(made / "manifest.json", MAX_BYTES)["command"])
    with suppress(OSError, ValueError, TypeError, KeyError):
        return str(read_json(made / "data/metadata.json", MAX_BYTES)["recipe"]["command"])
    with suppress(OSError, ValueError, TypeError, KeyError):
        contract = made.with_name(f"{made.name}.json")
        return str(read_json(contract, MAX_BYTES)["made_from"]["command"])
    return None


def trained(config: Any, folder: Path, ended: bool) -> bool:
    """Whether the run has gone as far as `config` asks; if not, have `config` resume it."""
    free = {*RESUMABLE, *NOT_CARRIED} - {"kernel", "kernel.path", "energy", "energy.file"}
    asked, had = check_same(config, folder, free)
    if ended and had["total_steps"] >= asked["total_steps"]:
        return True
    config.resume, config.run_dir = str(folder), None
    here = [key for key in ("device", "threads") if asked[key] not in (None, had[key])]
    typed = [f"{key}=" for key in here]
    if asked["world_size"] is not None:
        typed.append(f"world_size={asked['world_size']}")
    for override in chosen(folder, typed):
        key, _, value = override.partition("=")
        plain = None if value == "null" else int(value) if value.isdecimal() else value
        OmegaConf.update(config, "kernel.name" if key == "kernel" else key, plain)
    return False


def check_imported(config: Any, folder: Path, sources: list[str] | None) -> None:
    """Refuse a policy that was imported from other files or with other settings than `config`'s."""
    keys = ("popsan", "dense", "stats")
    given = {key: config[key] for key in keys if config[key] not in (None, "none")}
    files = {key: shown(absolute(str(file))) for key, file in given.items()}  # as recorded
    if list(files.values()) != sources:
        key = next((key for key, file in files.items() if file not in (sources or ())), "stats")
        made = f"{folder} was imported from {', '.join(sources or ['nothing'])}"
        raise BadRequest(key, config[key], f"{made}; give another run_dir")
    check_same(config, folder, {*RESUMABLE, *NOT_CARRIED, *SETTLED, *keys})


def check_same(config: Any, folder: Path, free: set[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings asked for and those of the run in `folder`, by dotted keys; refuse those that
    differ in any key outside `free`.
    """
    asked = dict(dotted(OmegaConf.to_container(config, resolve=True)))
    had = dict(dotted(read_config(folder / "config.yaml")))
    for key in [*asked, *had]:
        within = [key == other or key.startswith(f"{other}.") for other in free]
        if not any(within) and asked.get(key) != had.get(key):
            remedy = f"{folder} was made with {had.get(key)}; give another run_dir"
            raise BadRequest(key, asked.get(key), remedy)
    return asked, had
