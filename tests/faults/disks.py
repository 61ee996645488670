"""Simulated disk errors: calls by which a run reads or changes the disk are counted; some fail."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from processes import computed

from spikerl.commands import train
from spikerl.config.yaml_file import conf_folder
from spikerl.training.session import Session

TINY = [
    "env=Pendulum", "total_steps=60", "steps_per_epoch=20", "env.max_episode_steps=10",
    "eval_episodes=1", "algo.random_steps=10", "algo.learning_starts=10", "algo.batch_size=8",
    "algo.update_interval=10", "algo.norm_interval=10", "algo.replay_capacity=30",
    "actor.hidden_sizes=[8]", "algo.critic_hidden_sizes=[8]", "threads=1", "energy=none",
]  # fmt: skip

# The calls before which `act` is called; writes to files that io.open opened are added to them.
CALLS: list[tuple[Any, str]] = [
    (io, "open"),
    *((os, name) for name in ("open", "fsync", "mkdir", "rename", "replace", "symlink")),
    *((os, name) for name in ("unlink", "rmdir")),
]


class Written:
    """A file that calls `act` before each write; if `act` raises OSError, only half is written."""

    def __init__(self, file: Any, act: Callable[[str], None]) -> None:
        self.file, self.act = file, act

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> Written:
        return self

    def __exit__(self, *raised: Any) -> None:
        self.file.close()

    def write(self, content: Any) -> int:
        try:
            self.act("write")
        except OSError:
            self.file.write(content[: len(content) // 2])
            raise
        return int(self.file.write(content))


@contextmanager
def before_each_call(act: Callable[[str], None]) -> Iterator[None]:
    """Inside this context, `act` is called, and may raise, before each call of CALLS and write."""
    busy = False

    def once(name: str) -> None:
        nonlocal busy
        if not busy:
            busy = True
            try:
                act(name)
            finally:
                busy = False

    def wrap(module: Any, name: str) -> Callable[..., Any]:
        real = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            once(name)
            result = real(*args, **kwargs)
            writes = name == "open" and module is io and result.writable()
            return Written(result, once) if writes else result

        return call

    with pytest.MonkeyPatch.context() as patch:
        for module, name in CALLS:
            patch.setattr(module, name, wrap(module, name))
        yield


class Failing:
    """An `act` that raises the error `number` at the calls `first` to `last`, counted from 0."""

    def __init__(self, number: int, first: int, last: int | None = None) -> None:
        self.number, self.first, self.last = number, first, first if last is None else last
        self.seen = 0

    def __call__(self, name: str) -> None:
        self.seen += 1
        if self.first < self.seen <= self.last + 1:
            raise OSError(self.number, os.strerror(self.number), name)

    @property
    def reached(self) -> bool:
        return self.seen > self.first


class Undisturbed:
    """A run of three epochs in this process, and what it computed."""

    def __init__(self, home: Path, *args: str) -> None:
        composed = compose([*TINY, *args])
        self.raw = {**composed, "run_dir": str(home / "whole")}
        assert self.train() == 0
        self.computed = computed(home / "whole")

    def train(self, **changes: Any) -> int:
        return train.main({**self.raw, **changes}, ["spikerl", "train"])

    def equals(self, run: Path) -> bool:
        return computed(run) == self.computed

    def disturbed(self, run: Path, act: Callable[[str], None]) -> tuple[int, Path]:
        """Run the same in `run`, with `act` called before each call of its first commit; the exit
        status, and a copy of the folder made after that commit.
        """
        commit, left = Session.commit, run.with_name(f"{run.name}-left")

        def once(session: Session, folder: Path) -> None:
            if left.exists():
                return commit(session, folder)
            with before_each_call(act):
                commit(session, folder)
            shutil.copytree(run, left, symlinks=True)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Session, "commit", once)
            return self.train(run_dir=str(run)), left


def compose(args: list[str]) -> dict[str, Any]:
    """The config of `spikerl train ARGS`."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        composed = OmegaConf.to_container(hydra.compose("train", args), resolve=True)
    assert isinstance(composed, dict)
    return {str(key): value for key, value in composed.items()}


class Tried(NamedTuple):
    """The outcome of a run with `act` called before each call of its first commit."""

    refused: bool  # whether the commit failed
    ended: bool  # whether it ended with status 0, and equal to the undisturbed run
    resumed: bool  # whether the folder as it was after that commit does the same when resumed
    clean: bool  # whether no partial file or folder is left at the end


def attempt(whole: Undisturbed, run: Path, act: Callable[[str], None]) -> Tried:
    status, left = whole.disturbed(run, act)
    refused = "could not be saved" in (run / "log.txt").read_text()
    ended = status == 0 and whole.equals(run)
    resumed = whole.train(resume=str(left)) == 0 and whole.equals(left)
    clean = not list(run.rglob(".*.partial"))
    shutil.rmtree(run)
    shutil.rmtree(left)
    return Tried(refused, ended, resumed, clean)
