"""Resuming a run: the settings that may change, and the choices that it keeps."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from spikerl.cli.words import unquoted
from spikerl.config.yaml_file import group_options, read_config
from spikerl.distributed.launchers import ranked
from spikerl.errors import BadRequest
from spikerl.files import read_json

# What `resume=RUN` may change: how far the run goes, where, and what is kept of it.
RESUMABLE = ("resume", "total_steps", "world_size", "device", "threads", "kernel", "kernel.path",
             "backend", "backend.timeout_s", "energy", "energy.file", "logger", "keep_replay",
             "max_restarts", "nnodes", "node_rank", "rdzv", "plugins")  # fmt: skip
MAX_BYTES = 1 << 28  # of a manifest.json


def check_resume(args: Sequence[str], sweeps: bool, run: Path) -> None:
    """Refuse what is not a run folder, and overrides that change what a resumed run computes."""
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
                continue  # typed to confirm the module that it imports
        if key not in RESUMABLE:
            remedy = f"a resumed run keeps it; only {', '.join(RESUMABLE[1:])} can change"
            raise BadRequest(key, value, remedy)


def chosen(run: Path, typed: Sequence[str]) -> list[str]:
    """Overrides that keep what the run chose at its start, so that a later resume does not choose
    anew; none for a key that was `typed`, or where the manifest cannot be read.

    The kernel is kept unless a device or kernel was typed, or no GPU is there for it; its path,
    unless this processor lacks it or it is `graphs` and there are several workers; the number of
    threads, unless the number of workers changed.
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
    import torch  # takes a second, which a refused request need not wait for

    return torch.cuda.is_available()


def _runs_here(path: str, run: Path) -> bool:
    """Whether the C++ kernel keeps its path: not one that "auto" chose and this processor lacks."""
    from spikerl.kernels.build import PATHS, supported_paths

    kernel = read_config(run / "config.yaml").get("kernel")
    named = kernel.get("path") if isinstance(kernel, dict) else None
    return path in supported_paths() or path == named or path not in PATHS
