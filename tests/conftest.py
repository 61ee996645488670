"""Shared by all tests; also makes the modules beside it importable."""

from __future__ import annotations

import os

import pytest
import torch


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One more than there are cores, as much of the suite waits; none for files that are named."""
    named = all(str(arg).partition("::")[0].endswith(".py") for arg in config.args)
    return 0 if named else min(len(os.sched_getaffinity(0)) + 1, 8)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)
