"""Runs cases of a target and counts how they ended."""

from __future__ import annotations

import faulthandler
import os
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path
from random import Random

import numpy as np
from fuzz_guard import bounded, outcome
from fuzz_targets import TARGETS

__all__ = ["TARGETS", "fuzz"]
ENDS = ("loaded", "refused")
KEPT = 20  # findings whose files are kept

Findings = list[tuple[int, str, str]]  # the case's number, its outcome, the folder of its files


def fuzz(
    target: str, numbers: Sequence[int], seed: int, folder: Path, *, seconds: float | None = None
) -> tuple[dict[str, int], Findings]:
    """How often each outcome came, and the findings.

    With `seconds`, 50 cases that take longer than that end the process with a traceback.
    """
    sandbox = folder / "sandbox"
    sandbox.mkdir(parents=True)
    counts: Counter[str] = Counter()
    findings: Findings = []
    with chdir(sandbox), np.errstate(all="ignore"):
        case = TARGETS[target][0](sandbox)
        for warm in range(-3, 0):  # before watching: modules are imported at first use
            outcome(lambda: case(Random(f"{target} {warm}")), Path("/"))  # noqa: B023
        with bounded():
            for done, number in enumerate(numbers):
                if seconds and done % 50 == 0:
                    assert sys.__stderr__ is not None
                    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)
                chance = Random(f"{target} {seed} {number}")
                end = outcome(lambda: case(chance), sandbox)  # noqa: B023
                counts[end if end in ENDS else end.partition(":")[0]] += 1
                if end not in ENDS:
                    kept = folder / f"case_{number}"
                    if len(findings) < KEPT:
                        shutil.copytree(os.getcwd(), kept, symlinks=True)
                    findings.append((number, end, str(kept)))
        faulthandler.cancel_dump_traceback_later()
    return dict(counts), findings
