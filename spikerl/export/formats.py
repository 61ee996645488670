"""The formats, and what each is made and read with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from spikerl.export import c, loihi, loihi_chip, nir, onnx, proof
from spikerl.models.policy import Policy


def anything(policy: Policy) -> None:
    """Of a format that has no limits."""


def nothing() -> None:
    """Of a format that needs no more than is always installed."""


class Format(NamedTuple):
    check_here: Callable[[], None]  # BadRequest where something that it needs is not installed
    write: Callable[[Policy, Path], None]
    interpreter: Callable[[Path, dict[str, Any], Path], proof.Interpreter]
    dt: float | None = None  # seconds of a spike step, where the format has time
    check_policy: Callable[[Policy], None] = anything  # BadRequest where it cannot hold that much
    facts: Callable[[Policy], dict[str, Any]] = lambda policy: {}  # more for the contract
    emulated: proof.Reference | None = None  # what its file must do, if not what the policy does


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
