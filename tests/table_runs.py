"""The cells of a small table, and a program that runs them in place of `spikerl`, in moments.

Run as a script, this file is that program. It writes the files of a run that `reproduce` reads:
config, manifest, record and policy. Each row is final once written. The return of a row is
100 seed + step. A run with seed 1 fails at step 30 while the working folder has a file `fail`.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

SECONDS = 0.05  # that an epoch takes
EPOCH = 10  # steps


def main(command: str, *args: str) -> int:
    given = dict(arg.split("=", 1) for arg in args)
    if command == "eval":
        print(json.dumps({"return_mean": 1.0, "returns": [0.5, 1.5], "firing_rate": None}))
        return 0
    if command == "convert":
        return convert(Path(given["run"]), Path(given["run_dir"]))
    folder = Path(given.get("resume") or given["run_dir"])
    stopped: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda n, frame: stopped.append(n))
    note(folder, "resumed" if "resume" in given else "started")
    (folder / "evaluation.json").unlink(missing_ok=True)
    if "resume" not in given:
        partial = folder.with_name(f".{folder.name}.partial")
        partial.mkdir(parents=True)
        (partial / "config.yaml").write_text(f"seed: {given['seed']}\nalgo: {{gamma: 0.99}}\n")
        (partial / "metrics.jsonl").touch()
        (partial / "checkpoints").mkdir()
        status(partial, "running")
        partial.rename(folder)
    seed = int((folder / "config.yaml").read_text().split()[1])
    rows = (folder / "metrics.jsonl").read_text().splitlines()
    for step in range(len(rows) * EPOCH + EPOCH, int(given["total_steps"]) + 1, EPOCH):
        time.sleep(SECONDS)
        if stopped:
            status(folder, "preempted")
            return 130 if stopped[0] == signal.SIGINT else 75
        if seed == 1 and step == 30 and Path("fail").exists():
            (folder / "error.txt").write_text("Traceback\nValueError: it fell over\n")
            status(folder, "failed")
            return 1
        row = {"step": step, "eval_return": 100.0 * seed + step, "energy_j": None, "wall_s": 1.0}
        with (folder / "metrics.jsonl").open("a") as f:
            f.write(json.dumps(row) + "\n")
    (folder / "policy.json").write_text("{}")
    (folder / "policy.safetensors").write_text(given["total_steps"])
    status(folder, "done")
    return 0


def convert(source: Path, folder: Path) -> int:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text((source / "config.yaml").read_text())
    policy = (source / "policy.safetensors").read_bytes()
    status(folder, "done", converted_sha256=hashlib.sha256(policy).hexdigest())
    return 0


def status(folder: Path, word: str, **facts: str) -> None:
    partial = folder / "manifest.partial"
    partial.write_text(json.dumps({"status": word, "command": " ".join(sys.argv), **facts}))
    partial.rename(folder / "manifest.json")


def note(folder: Path, what: str) -> None:
    """Append a line to the file `events`: what was done to which run, and this process's parent."""
    line = f"{what} {folder.parts[-3]}/{folder.parts[-2]}/{folder.name} {os.getppid()}\n"
    with open("events", "a") as f:
        f.write(line)


TABLE = {
    "name": "small",
    "title": "a small table",
    "source": "nowhere",
    "baseline": "dense",
    "protocol": {"total_steps": 50, "seeds": 2, "eval_episodes": 1, "metric": "max_average"},
    "rows": {
        "popsan": {"label": "PopSAN", "experiment": "popsan/td3"},
        "dense": {"label": "dense", "experiment": "dense/td3"},
        "converted": {"label": "converted", "convert": "dense", "overrides": ["reset=soft"]},
    },
    "columns": {
        "Ant": {"env": "Ant", "version": "v5"},
        "Hopper": {"env": "Hopper", "version": "v5"},
    },
}


def run_cells(jobs: int = 2, total_steps: int = 50) -> tuple[int, dict[Any, Any]]:
    """Run the table's cells in the working folder; the exit status, and the states of the cells."""
    from rich.console import Console

    from spikerl.commands.reproduce import cells, scheduler
    from spikerl.commands.reproduce.screen import Screen
    from spikerl.reporting.table_file import cell_of, table_of

    scheduler.POLL = 0.02
    cells.PROGRAM = [sys.executable, str(Path(__file__).resolve())]
    table = table_of(TABLE)
    wanted = [(r, c, seed) for seed in (0, 1) for c in table.columns for r in table.rows]
    every = [cell for which in wanted if (cell := cell_of(table, *which))]
    screen = Screen("small", Console(file=sys.stdout, soft_wrap=True))
    running = scheduler.Scheduler(
        every, total_steps, screen, slots=[None] * jobs, nice=0, keep=total_steps < 50
    )
    return running.run(), running.states


COUNTED = {"firing_rate": 0.25, "macs": 1.0, "acs": 2.5, "modelled_45nm_nj": 30.5,
           "modelled_memory_nj": 400.5}  # fmt: skip


def write_run(
    folder: Path, *, algo: str = "td3", seed: int = 0, counted: bool = False, **facts: Any
) -> Path:
    """A run folder with two evaluations; with `counted`, operations were counted in them, which
    earlier versions did not do.
    """
    folder.mkdir(parents=True)
    manifest = {"status": "done", "env_id": "Ant-v5", "command": "spikerl train env=Ant"}
    (folder / "manifest.json").write_text(json.dumps(manifest | facts))
    config = f"seed: {seed}\nrun_dir: x{seed}\nalgo:\n  name: {algo}\n  tau: 0.005\n"
    (folder / "config.yaml").write_text(config)
    rows = [
        {"step": step, "eval_return": 10.0 * step + seed, "wall_s": 36.0 * step, "energy_j": 5.0,
         "cpu_s": 900.0,
         "layer_firing_rates": [0.1, 0.2], "layer_window_fractions": [0.5],
         "layer_silent": [0.25], "layer_saturated": [0.125], "critic_loss": 1.5,
         **(COUNTED if counted else {})}
        for step in (100, 200)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
