"""Plain data parsed into dataclasses: errors name the key that does not fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
from shell import refusal

from spikerl.errors import BadRequest
from spikerl.schema import Registry, parse


@dataclass(kw_only=True)
class Part:
    parts: ClassVar[int] = 7  # not a key

    name: str
    count: int
    rate: float
    sizes: list[int]
    span: list[float]
    limit: float | None
    on: bool

    def __post_init__(self) -> None:
        if self.count < 1:
            raise BadRequest("part.count", self.count, "give at least 1")


FITS: dict[str, Any] = {
    "name": "a",
    "count": 1,
    "rate": 0.5,
    "sizes": [1, 2],
    "span": [0.0, 1.0],
    "limit": None,
    "on": False,
}


def test_fits() -> None:
    part = parse(Part, FITS)
    assert isinstance(part, Part)
    assert vars(part) == FITS
    assert type(part.sizes) is list


@pytest.mark.parametrize(
    ("key", "given", "taken"),
    [("rate", 2, 2.0), ("limit", 3, 3.0), ("span", [1, 2], [1.0, 2.0]), ("sizes", [], []),
     ("on", "true", True), ("count", "7", 7), ("rate", 3.4e38, 3.4e38)],
)  # fmt: skip
def test_converts(key: str, given: object, taken: object) -> None:
    value = getattr(parse(Part, {**FITS, key: given}), key)
    assert value == taken
    assert type(value) is type(taken)


@pytest.mark.parametrize(
    ("key", "given", "line"),
    [
        ("count", 1.5, "part.count=1.5: expected int"),
        ("count", True, "part.count=True: expected int"),
        ("count", None, "part.count=null: expected int"),
        ("count", "x", "part.count=x: expected int"),
        ("count", [1], "part.count=[1]: expected int"),
        ("rate", "fast", "part.rate=fast: expected float"),
        ("sizes", 3, "part.sizes=3: expected list[int]"),
        ("sizes", [1, "b"], "part.sizes[1]=b: expected list[int]"),
        ("sizes", [1, 2.5], "part.sizes[1]=2.5: expected list[int]"),
        ("on", "maybe", "part.on=maybe: expected bool"),
        ("on", 2.0, "part.on=2.0: expected bool"),
        ("limit", "x", "part.limit=x: expected float, or null"),
        ("name", {"a": 1}, "part.name={'a': 1}: expected str"),
        ("rate", float("nan"), "part.rate=nan: give a finite number"),
        ("limit", float("-inf"), "part.limit=-inf: give a finite number"),
        ("span", [0.0, float("inf")], "part.span=[0.0, inf]: give a finite number"),
        ("rate", 3.5e38, "part.rate=3.5e+38: float32 holds at most 3.4e38; give less"),
        (
            "span",
            [-3.5e38, 0],
            "part.span=[-3.5e+38, 0.0]: float32 holds at most 3.4e38; give less",
        ),
        ("rate", "???", "part.rate=???: give it a value"),
        ("count", 0, "part.count=0: give at least 1"),
        ("more", 1, "part.more=1: no such key; known: name, count, rate, sizes, span, limit, on"),
    ],
)
def test_does_not_fit(key: str, given: object, line: str) -> None:
    assert str(refusal(parse, Part, {**FITS, key: given}, key="part")) == line


def test_lacking() -> None:
    data = {k: v for k, v in FITS.items() if k != "rate"}
    assert str(refusal(parse, Part, data)) == "rate=???: give it a value"


def test_a_dangling_reference() -> None:
    line = str(refusal(parse, Part, {**FITS, "rate": "${nowhere}"}, key="part"))
    assert line.startswith("part=")
    assert "\n" not in line


class Machine:
    pass


def test_a_registry() -> None:
    """A registry refuses unknown names, and to register a name again with another class."""
    machines: Registry[Part, Machine] = Registry("part", b=(Part, Machine), a=(Part, Machine))
    assert machines.parse(FITS) == Part(**FITS)
    assert machines.part(Part(**FITS)) is Machine
    own = machines.modules(Part(**FITS))
    for data in ({"name": "c"}, {}, "a", None, ["a"]):
        assert refusal(machines.parse, data).args[2] == "one of a, b"
    machines.register("a", Part, Machine)  # again, with the same class
    assert machines.modules(Part(**FITS)) == own
    machines.register("c", Part, Machine)
    assert machines.parse({**FITS, "name": "c"}) == Part(**{**FITS, "name": "c"})
    with pytest.raises(ValueError, match="part=a is registered already"):
        machines.register("a", Part, type("Another", (Machine,), {}))
    assert machines.part(Part(**FITS)) is Machine
