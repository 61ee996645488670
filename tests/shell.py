"""Run `spikerl ARGS` in this process, as if typed in a shell; and list what is on the disk."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from spikerl.cli import main as cli
from spikerl.errors import BadRequest

# A training that takes a second and makes 250 updates.
SHORT = [
    "env=InvertedPendulum",
    "env.max_episode_steps=30",
    "total_steps=300",
    "steps_per_epoch=150",
    "algo.learning_starts=100",
    "algo.random_steps=100",
    "algo.batch_size=10",
    "eval_episodes=1",
    "actor.hidden_sizes=[16]",
    "algo.critic_hidden_sizes=[16]",
    "threads=1",
    "device=cpu",
    "energy=none",
]


class Said(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The one line of a refused request, without `spikerl: `; asserts that it was refused."""
        assert self.status == 2, self
        assert not self.out
        assert self.err.startswith("spikerl: ")
        assert self.err.count("\n") == 1
        return self.err.removeprefix("spikerl: ").rstrip("\n")


def spikerl(*args: str) -> Said:
    """The status and the output of `spikerl ARGS`; an exception that leaves it gives status 1."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["spikerl"])
        patch.setenv("HYDRA_FULL_ERROR", "1")  # the program sets it too; the patch undoes that
        try:
            status = cli.run(args)
        except Exception as error:
            status = 1
            err.write(f"{type(error).__name__}: {error}\n")
    return Said(status, out.getvalue(), err.getvalue())


def refusal(call: Callable[..., Any], *args: Any, **settings: Any) -> BadRequest:
    """The BadRequest that a call must raise."""
    with pytest.raises(BadRequest) as caught:
        call(*args, **settings)
    return caught.value


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, hidden files too; None for a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }
