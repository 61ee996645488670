"""What sets runs apart whose results are shown side by side."""

from __future__ import annotations

from collections.abc import Sequence, Set
from pathlib import Path

from omegaconf import OmegaConf
from yaml import YAMLError

from spikerl.files import read_json
from spikerl.runs.rows import MAX_BYTES
from spikerl.schema import dotted

# Keys of a config that name a run, or do not change what it computes.
NAMES = ("run_dir", "resume", "config", "threads", "nnodes", "node_rank", "rdzv", "max_restarts",
         "logger", "keep_replay")  # fmt: skip


def differences(folders: Sequence[Path], varied: Set[str] | None = None) -> str | None:
    """A line that says in what the runs differ, or None: in code, versions and machine, and in keys
    of their configs other than the `varied` ones (None: configs are not compared).
    """
    records = [_record(folder, configs=varied is not None) for folder in folders]
    values: dict[str, set[str]] = {}  # by key, of the runs that have it
    for record in records:
        for key, value in record.items():
            values.setdefault(key, set()).add(value)
    apart = sorted(key for key, several in values.items() if len(several) > 1)
    free = varied or set()
    within = [any(key == v or key.startswith(f"{v}.") for v in free) for key in apart]
    odd = [key for key, asked in zip(apart, within, strict=True) if not asked]
    lacking = [str(folder) for folder, record in zip(folders, records, strict=True) if not record]
    said = [f"these runs differ in {', '.join(odd)}"] * bool(odd)
    said += [f"nothing is known of how {', '.join(lacking)} came about"] * bool(lacking)
    return f"note: {'; '.join(said)}" if said else None


def _record(folder: Path, *, configs: bool) -> dict[str, str]:
    """Code, versions, machine and config of a run, by dotted keys; empty where they are unknown."""
    try:
        manifest = read_json(folder / "manifest.json", MAX_BYTES)
        config = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
        known = {"git": manifest["git"], "versions": manifest["versions"],
                 "hardware": {k: manifest["hardware"][k] for k in ("cpu", "gpus")}}  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, YAMLError):
        return {}
    if not isinstance(config, dict):
        return {}
    own = {k: v for k, v in config.items() if configs and k not in NAMES}
    return {key: str(value) for key, value in dotted({**known, **own})}
