"""A run folder on disk: how it appears, its manifest, its lock, and what ends up in it."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from omegaconf import OmegaConf

from spikerl import machine
from spikerl.errors import BadRequest, Exists, disk_is_full
from spikerl.files import (
    LACKING,
    hold,
    make_folder,
    partial_of,
    read_bytes,
    read_json,
    sync_folder,
    why_no_name,
    write_atomic,
    write_json,
    write_text,
)
from spikerl.machine import git_state, versions
from spikerl.runs.rows import MAX_BYTES


def check_free(target: str, *, named: bool, key: str = "run_dir", dated: bool = False) -> None:
    """Refuse early, before anything is built, what `create` would refuse late.

    `dated`: the remedy also offers to give no name, for a folder with a dated name of its own.
    """
    folder = Path(target)
    if named and os.path.lexists(folder):
        otherwise = ", or leave it out for a dated one" if dated else ""
        raise Exists(key, target, f"it exists already; give another {key}{otherwise}")
    parent, made = folder.absolute().parent, [partial_of(folder).name]
    while not os.path.lexists(parent):
        made.append(parent.name)
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise BadRequest(key, target, f"{parent} cannot be written to; give another {key}")
    for name in made:
        if reason := why_no_name(parent / name):
            raise BadRequest(key, target, f"{reason}; give another {key}")


def fill_partial(
    partial: Path, target: str, raw: Mapping[str, Any], manifest: Mapping[str, Any]
) -> IO[str]:
    """Make the hidden folder and fill it with what needs no workers; return its lock."""
    remove_abandoned(partial.parent)
    try:
        partial.mkdir(parents=True)
        held = hold(partial)
        assert not isinstance(held, str)  # nobody else has its name
        write_text(partial / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(dict(raw))))
        write_json(partial / "manifest.json", manifest)
        (partial / "metrics.jsonl").touch()
    except OSError as error:
        reason = error.strerror or str(error)
        raise BadRequest("run_dir", target, f"{reason}; give another run_dir") from None
    return held


@contextmanager
def removed_after(partial: Path) -> Iterator[None]:
    """On exit, remove the hidden folder if it is still there, and the folders above it that were
    made inside the context and are empty.
    """
    made = [folder for folder in partial.parents if not os.path.lexists(folder)]
    try:
        yield
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):
            for folder in made:
                folder.rmdir()


def remove_abandoned(folder: Path) -> None:
    """Remove hidden folders left by runs that were killed before they began: none is locked."""
    for partial in folder.glob(".*.partial"):
        with suppress(OSError), (partial / ".lock").open(encoding="utf-8") as file:
            if file.read():  # if empty, its owner is about to lock it
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(partial)


def move_into_place(partial: Path, target: str, *, named: bool) -> Path:
    """Rename to a name that is free; a dated folder whose second is taken gets a number."""
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
    """Make a run folder that appears whole, from a single process; `fill` adds its own files."""
    partial = partial_of(Path(target))
    with removed_after(partial), fill_partial(partial, target, raw, manifest):
        try:
            fill(partial)
            (partial / ".lock").unlink()
            return move_into_place(partial, target, named=named)
        except OSError as error:  # a full disk
            remedy = f"{error.strerror or error}; nothing was kept"
            raise BadRequest("run_dir", target, remedy) from error


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
        **made_by(),
        "resumed": [],
    }


def made_by() -> dict[str, Any]:
    """What computes from now on: code, packages and machine."""
    return {"git": git_state(), "versions": versions(), "hardware": machine.describe()}


def read_manifest(folder: Path, *, key: str) -> dict[str, Any]:
    try:
        data = read_json(folder / "manifest.json", MAX_BYTES)
    except (OSError, ValueError):
        data = None
    sound = isinstance(data, dict) and isinstance(data.get("status"), str)
    if not sound or not isinstance(data.get("resumed", []), list):
        raise BadRequest(key, folder, "is not a run folder (it has no readable manifest.json)")
    return dict(data)


def folders_below(root: str | Path) -> Iterator[Path]:
    """The run folders at or below `root`, which have a manifest.json, and folders that cannot be
    listed, which may be such. Not searched are runs, hidden folders, and what links lead to.
    """
    unlisted: list[Path] = []
    walk = os.walk(root, onerror=lambda error: unlisted.append(Path(error.filename)))
    for place, folders, files in walk:
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if "manifest.json" in files:
            folders.clear()  # its checkpoints have manifests too
            yield Path(place)
    yield from unlisted


def check_own(folder: Path) -> None:
    """Refuse to resume in a folder that holds links or special files, as an untrusted one may.

    Through a link, a resume would add to somebody's file, cut it, or remove folders.
    """
    # The second is left where a run was killed while it made the first.
    links = [folder / "checkpoints" / name for name in ("latest", ".latest.partial")]
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place, name)
            mode = path.lstat().st_mode
            if path in links and stat.S_ISLNK(mode):
                continue  # which names a checkpoint beside it, or is made anew
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                what = "a link" if stat.S_ISLNK(mode) else "neither file nor folder"
                remedy = f"its {path.relative_to(folder)} is {what}; put there what it stands for"
                raise BadRequest("resume", folder, remedy)


def update_manifest(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    write_json(path, {**json.loads(path.read_text(encoding="utf-8")), **changes})


def lock(folder: Path, *, within_s: float = 0.0) -> IO[str]:
    """Hold the folder until the file is closed or the process ends; refuse if another holds it and
    does not give it back within that time.
    """
    deadline = time.monotonic() + within_s
    while True:
        try:
            held = hold(folder)
        except OSError as error:
            raise BadRequest("resume", folder, f"cannot be written to: {error.strerror}") from None
        if not isinstance(held, str):
            return held
        if time.monotonic() >= deadline:
            raise BadRequest("resume", folder, f"{held} is running it; stop that first")
        time.sleep(0.1)


def is_held(folder: Path) -> bool:
    """Whether a process runs it, or where files cannot be locked, may; the lock stays as it is."""
    try:
        with (folder / ".lock").open(encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:  # or there is no lock at all
        return error.errno in LACKING
    return False


def for_going_on(folder: Path) -> list[Path]:
    """The parts of a finished run's folder that only a resume needs."""
    parts = (folder / "replay", folder / "checkpoints")
    return [part for part in parts if os.path.lexists(part)]


def free(folder: Path) -> int:
    """Remove the replay and the checkpoints of a finished run; return how many bytes they had.

    Its policies, record and results stay; it can be evaluated, and started from, not resumed.
    """
    there = for_going_on(folder)
    if not there:
        return 0
    if not (folder / "policy.json").is_file():
        raise BadRequest("path", folder, "it has no policy but those of its checkpoints")
    if links := [part.name for part in there if part.is_symlink()]:
        raise BadRequest("path", folder, f"its {links[0]} is a link; remove what it stands for")
    size = sum(p.lstat().st_size for part in there for p in part.rglob("*") if not p.is_dir())
    try:
        update_manifest(folder, freed=now())
    except OSError as error:
        if not disk_is_full(error):
            raise
        shutil.rmtree(there.pop(0))  # makes room to record it
        update_manifest(folder, freed=now())
    for part in there:
        shutil.rmtree(part)
    return size


def write_total_steps(folder: Path, total_steps: int) -> None:
    """Record how far the run goes from now on, for later resumes that do not give total_steps."""
    path = folder / "config.yaml"
    text = read_bytes(path, MAX_BYTES).decode()
    write_text(path, re.sub(r"(?m)^total_steps: .*$", f"total_steps: {total_steps}", text))


def remove_results(folder: Path) -> None:
    """Remove the results of a run that goes on; what error.txt says is kept in log.txt."""
    error = folder / "error.txt"
    if error.exists():
        with (folder / "log.txt").open("a", encoding="utf-8") as log:
            log.write(error.read_text(encoding="utf-8", errors="replace"))
    policies = [
        f"{place}policy.{kind}" for kind in ("json", "safetensors") for place in ("", "best/")
    ]
    for name in (*policies, "POLICY.md", "summary.json", "evaluation.json", "error.txt"):
        (folder / name).unlink(missing_ok=True)


def write_best(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write the policy that evaluated best; policy.json comes last, as readers look for that."""
    for name, content in sorted(files.items(), reverse=True):
        make_folder(folder / "best")
        write_atomic(folder / "best" / name, content)
