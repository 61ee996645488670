"""Processes forked from one that has imported what a run needs, which saves each one seconds."""

from __future__ import annotations

import multiprocessing as mp
import os
import sys
from pathlib import Path

from shell import Said

SERVER = mp.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["spikerl.commands.train", "spikerl.cli.main", "spikerl.runs.record", "hydra", "pytest"]
)


def command(home: Path, *args: str, **environ: str) -> Said:
    """Run `spikerl ARGS` in the folder `home` until it ends."""
    out, err = home.parent / f"{home.name}.out", home.parent / f"{home.name}.err"
    for file in (out, err):
        file.write_text("")
    process = SERVER.Process(target=enter, args=(home, out, err, args, environ))
    process.start()
    process.join(200)
    assert process.exitcode is not None, "it hangs"
    return Said(process.exitcode, out.read_text(), err.read_text())


def enter(home: Path, out: Path, err: Path, args: tuple[str, ...], environ: dict[str, str]) -> None:
    os.chdir(home)
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
    os.environ |= environ
    sys.path[:0] = environ.get("PYTHONPATH", "").split(os.pathsep)
    import torch

    from spikerl.cli.main import run

    torch.set_num_threads(1)
    mp.set_start_method("fork", force=True)  # as in a command; this process came from a forkserver
    sys.exit(run(list(args)))
