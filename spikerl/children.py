"""Python processes that this program starts import nothing from their working folder.

`python -m` and `python -c` put that folder first on the path, and what lies there, such as a
queue.py or an untrusted run folder, takes the place of what was meant. `python -P` does not.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

PYTHON = (sys.executable, "-P")
SAFE = "PYTHONSAFEPATH"


@contextmanager
def safe_path(safe: str | None = "1") -> Iterator[None]:
    """Inside, the same holds for Python processes that libraries start (multiprocessing, joblib,
    submitit).

    Afterwards the variable is restored, and with `safe` None it is unset inside: a script that
    users' code starts has to find the modules beside it.
    """
    before = os.environ.get(SAFE)
    try:
        set_variable(SAFE, safe)
        yield
    finally:
        set_variable(SAFE, before)


def set_variable(name: str, value: str | None) -> None:
    """Set an environment variable for processes started from now on; None unsets it."""
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
