"""Runs of `spikerl train` as processes of their own, to be killed and resumed.

Each run has its own working folder, by which all processes that it starts can be found.
"""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forkserver import SERVER

SHORT = [
    "total_steps=400",
    "steps_per_epoch=100",
    "algo.batch_size=16",
    "eval_episodes=2",
    "actor.hidden_sizes=[16]",
    "algo.critic_hidden_sizes=[16]",
    "env.max_episode_steps=37",
    "threads=1",
]
TINY = [
    *SHORT,
    "algo.random_steps=60",
    "algo.learning_starts=60",
    "algo.update_interval=10",
    "algo.norm_interval=20",
    "algo.replay_capacity=150",
]
# Epochs of 100 steps end in the middle of a rollout of 80.
PPO = [*SHORT, "algo.rollout_steps=80", "algo.norm_interval=80", "algo.epochs=2"]
# Fields of rows in which two runs that computed the same may differ.
SPENT = ("env_steps_per_s", "updates_per_s", "wall_s", "cpu_s", "power_w")

RANK = re.compile(rb"(PMI_)?RANK=")  # from the elastic agent, or from mpiexec


class Run:
    """A process that runs `spikerl train ARGS` in the folder `home`."""

    def __init__(self, home: Path, *args: str, **environ: str) -> None:
        self.home = home
        home.mkdir(exist_ok=True)
        self.out, self.err = home / "out.txt", home / "err.txt"
        for file in (self.out, self.err):
            file.write_text("")
        self.process = SERVER.Process(target=_enter, args=(str(home), args, environ))
        self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def wait(self, seconds: float = 100) -> int:
        """The exit status; if negative, the number of the signal that ended it."""
        self.process.join(seconds)
        status = self.process.exitcode
        if status is None:
            self.process.kill()
            raise AssertionError(f"still running after {seconds} s: {self.said()}")
        return status

    def kill(self, number: int = signal.SIGKILL) -> int:
        self.send(number)
        return self.wait()

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def said(self) -> str:
        return self.out.read_text() + self.err.read_text()

    def begun(self) -> bool:
        """Whether it trains: its folder exists or, in a resume, the checkpoint is restored."""
        return "run folder:" in self.out.read_text()

    def until(self, reached: Callable[[], object], seconds: float = 100) -> None:
        """Wait until `reached()` is true; fail if the run ends before that."""
        deadline = time.monotonic() + seconds
        while not reached():
            assert self.process.is_alive() or reached(), self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.005)


def _enter(home: str, args: tuple[str, ...], environ: dict[str, str]) -> None:
    os.chdir(home)
    for name, descriptor in (("out.txt", 1), ("err.txt", 2)):
        file = os.open(name, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, descriptor)
    os.environ |= environ
    sys.path.insert(0, environ.get("PYTHONPATH", ""))
    import torch

    from spikerl.cli.main import run

    torch.set_num_threads(1)
    mp.set_start_method("fork", force=True)  # as in a command; this process came from a forkserver
    sys.exit(run(["train", *args]))


def train(home: Path, *args: str, **environ: str) -> Run:
    """Start a new run in home/run."""
    return Run(home, *(PPO if "algo=ppo" in args else TINY), "run_dir=run", *args, **environ)


def resume(home: Path, *args: str) -> Run:
    return Run(home, "resume=run", *args)


def rows(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    path = run / name
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def computed(run: Path) -> tuple[list[dict[str, Any]], bytes]:
    """All that a run computed: its rows without times and energies, and its policy."""
    kept = [
        {k: v for k, v in row.items() if k not in SPENT and not k.startswith("energy_")}
        for row in rows(run)
    ]
    return kept, (run / "policy.safetensors").read_bytes()


def record(run: Path, name: str = "manifest.json") -> dict[str, Any]:
    return dict(json.loads((run / name).read_text()))


def living(home: Path) -> list[int]:
    """The ids of processes whose working folder is `home`; zombies have none."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if os.readlink(entry / "cwd") == str(home):
                    found.append(int(entry.name))
            except OSError:  # it has ended, or belongs to another user
                continue
    return found


def gone(home: Path, within: float = 10) -> float:
    """Wait until no process of the run is left; return the seconds that took."""
    begun = time.monotonic()
    while left := living(home):
        waited = time.monotonic() - begun
        names = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in left]
        assert waited < within, f"still there after {waited:.0f} s: {names}"
        time.sleep(0.02)
    return time.monotonic() - begun


def rank_of(pid: int) -> str | None:
    """The rank of a worker; None for any other process or one that has ended."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    ranks = [word.partition(b"=")[2].decode() for word in words if RANK.match(word)]
    return ranks[0] if ranks and b"spikerl.commands.worker" in command else None
