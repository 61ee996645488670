"""A run folder on disk: how it appears, its manifest and lock, and what a resume does to it."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from omegaconf import OmegaConf

from spikerl import hardware
from spikerl.errors import BadRequest
from spikerl.files import sync_folder, write_json, write_text
from spikerl.versions import git_state, versions


def check_free(target: str, *, named: bool) -> None:
    """Refuse early, before anything is built, what `create` would refuse late."""
    folder = Path(target)
    if named and os.path.lexists(folder):
        remedy = "it exists already; give another run_dir, or leave it out for a dated one"
        raise BadRequest("run_dir", target, remedy)
    parent = folder.absolute().parent
    while not os.path.lexists(parent):
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise BadRequest("run_dir", target, f"{parent} cannot be written to; give another run_dir")


def partial_of(target: str) -> Path:
    folder = Path(target)
    return folder.with_name(f".{folder.name}.{os.getpid()}.partial")


def begin(partial: Path, target: str, raw: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
    """Fill the hidden folder with what does not need the workers."""
    made = [folder for folder in partial.parents if not os.path.lexists(folder)]
    try:
        partial.mkdir(parents=True)
        write_text(partial / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(dict(raw))))
        write_json(partial / "manifest.json", manifest)
        (partial / "metrics.jsonl").touch()
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):
            for folder in made:
                folder.rmdir()
        reason = error.strerror or str(error)
        raise BadRequest("run_dir", target, f"{reason}; give another run_dir") from None


def appear(partial: Path, target: str, *, named: bool) -> Path:
    """Rename to a name that nobody has; a dated folder whose second is taken gets a number."""
    folder = Path(target)
    for number in range(1, 2 if named else 1000):
        place = folder if number == 1 else folder.with_name(f"{folder.name}_{number}")
        try:
            if not place.exists():  # a rename would replace an empty folder
                os.rename(partial, place)
                with suppress(OSError):
                    sync_folder(place.parent)
                return place
        except OSError:
            if not place.exists():
                raise
    raise BadRequest("run_dir", target, "it exists already; give another run_dir")


def create(
    target: str,
    raw: Mapping[str, Any],
    manifest: Mapping[str, Any],
    fill: Callable[[Path], None],
    *,
    named: bool,
) -> Path:
    """A whole folder at once, for a single process."""
    partial = partial_of(target)
    begin(partial, target, raw, manifest)
    try:
        fill(partial)
        return appear(partial, target, named=named)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def make_manifest(
    env_id: str, command: Sequence[str], resolved: Mapping[str, Any], facts: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "status": "running",
        "command": shlex.join(command),
        "started": now(),
        "env_id": env_id,
        **facts,
        "resolved": dict(resolved),
        "git": git_state(),
        "versions": versions(),
        "hardware": hardware.describe(),
        "resumed": [],
    }


def read_manifest(folder: Path, *, key: str) -> dict[str, Any]:
    try:
        data = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        data = None
    if not isinstance(data, dict) or "status" not in data:
        raise BadRequest(key, folder, "is no run folder (it has no readable manifest.json)")
    return data


def update_manifest(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    write_json(path, {**json.loads(path.read_text(encoding="utf-8")), **changes})


def lock(folder: Path) -> IO[str]:
    """Hold the folder until the file is closed or the process ends; refuse if another holds it."""
    try:
        file = (folder / ".lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise BadRequest("resume", folder, f"cannot be written to: {error.strerror}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        owner = file.read().strip() or "another process"
        file.close()
        raise BadRequest("resume", folder, f"{owner} is running it; stop that first") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return file


def rewind(folder: Path, length: int) -> int:
    """Cut metrics.jsonl back to the commit; the rows beyond go to discarded.jsonl. How many."""
    path = folder / "metrics.jsonl"
    content = path.read_bytes()
    if len(content) < length:
        raise BadRequest("resume", folder, "its metrics.jsonl is shorter than its checkpoint says")
    beyond = content[length:].splitlines(keepends=True)
    whole = [line for line in beyond if line.endswith(b"\n")]
    discarded = folder / "discarded.jsonl"
    before = discarded.read_bytes() if discarded.exists() else b""
    rows = b"".join(whole)
    if not before.endswith(rows):  # else an earlier resume was killed before it cut
        write_text(discarded, (before + rows).decode("utf-8"))
    if len(content) != length:
        with path.open("r+b") as f:
            f.truncate(length)
            os.fsync(f.fileno())
    return len(whole)


def reopen(folder: Path) -> None:
    """Remove what says how the run ended, which it goes beyond; log.txt keeps why it failed."""
    error = folder / "error.txt"
    if error.exists():
        with (folder / "log.txt").open("a", encoding="utf-8") as log:
            log.write(error.read_text(encoding="utf-8"))
    for name in ("policy.json", "policy.safetensors", "summary.json", "error.txt"):
        (folder / name).unlink(missing_ok=True)


def read_rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as f:
        return [json.loads(line) for line in f]
