"""Python processes that this program starts import nothing from the folder that they stand in.

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
    """Meanwhile Python processes that others start (multiprocessing, joblib, submitit) are so, too.

    Not for longer, and with `safe` None as it was before: a script that somebody's code starts
    finds what lies beside it.
    """
    before = os.environ.get(SAFE)
    try:
        set_variable(SAFE, safe)
        yield
    finally:
        set_variable(SAFE, before)


def set_variable(name: str, value: str | None) -> None:
    """What processes started from now on find in their environment; None: nothing."""
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
