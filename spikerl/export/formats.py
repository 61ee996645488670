"""The export formats, and the functions that write and read each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from spikerl.export import c, loihi, loihi_chip, nir, onnx, proof
from spikerl.models.policy import Policy


def anything(policy: Policy) -> None:
    """`check_policy` of a format without limits."""


def nothing() -> None:
    """`check_here` of a format that needs no optional packages."""


class Format(NamedTuple):
    check_here: Callable[[], None]  # BadRequest if something that the format needs is missing
    write: Callable[[Policy, Path], None]
    interpreter: Callable[[Path, dict[str, Any], Path], proof.Interpreter]
    dt: float | None = None  # seconds of a spike step, if the format has physical time
    check_policy: Callable[[Policy], None] = anything  # BadRequest if the policy does not fit
    facts: Callable[[Policy], dict[str, Any]] = lambda policy: {}  # further keys of the contract
    emulated: proof.Reference | None = None  # the file's reference, if not the policy itself


FORMATS = {
    "c": Format(c.check_here, c.write, c.Interpreter),
    "onnx": Format(onnx.check_here, onnx.write, onnx.Interpreter),
    "nir": Format(nir.check_here, nir.write, nir.Interpreter, nir.DT),
    "loihi": Format(
        nothing,
        loihi.write,
        loihi_chip.Interpreter,
        check_policy=loihi.check_policy,
        facts=loihi.facts,
        emulated=loihi.emulated,
    ),
}
