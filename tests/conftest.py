"""Shared by all tests; also makes tests/ importable, for builders.py and fakes.py."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)
