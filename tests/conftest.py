"""Fixtures and hooks of all tests; this file also makes the modules beside it importable."""

from __future__ import annotations

import gc
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from spikerl import isolation

ROOM = 4 << 30


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs except under `-m gpu`: device=auto would use one, and results would differ.

    The garbage collector runs less often: composing configs makes many objects and few cycles, and
    looking for these took a tenth of the suite's processor time.
    """
    gc.set_threshold(50_000)
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two more than there are cores, as tests often wait; none if only files are named."""
    named = all(str(arg).partition("::")[0].endswith(".py") for arg in config.args)
    return 0 if named else min(len(os.sched_getaffinity(0)) + 2, 8)


@pytest.fixture(autouse=True, scope="session")
def as_in_a_terminal() -> None:
    """Use one thread, and handle SIGHUP by default even if the suite was started with nohup."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def settings_of_its_own() -> Iterator[None]:
    """Forget the settings that a test's environments left, before the next test.

    Where tests run workers as threads, such settings could become the program's own.
    """
    yield
    isolation._theirs, left = None, torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    assert left == torch.float32


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Limit the memory: an allocation of gigabytes fails instead of exhausting the machine's."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
