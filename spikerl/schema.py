"""Plain data in, validated dataclasses out; what does not fit is a BadRequest naming the key."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from typing import Any, Generic, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import (
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

from spikerl.errors import BadRequest, first_line

T = TypeVar("T")
MOST_WIDTH = 1 << 20  # of a layer or a population, so that no product of sizes overflows
FLOAT32_MAX = (2.0 - 2.0**-23) * 2.0**127  # replay and networks hold no larger number


def parse(schema: type[T], data: Mapping[str, Any], *, key: str = "") -> T:
    """An instance of the dataclass `schema`; `key` is where `data` stands in the whole config."""
    prefix = f"{key}." if key else ""
    if not isinstance(data, Mapping):
        raise BadRequest(key or "config", data, "give its keys and their values")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), dict(data))
        result = OmegaConf.to_object(merged)
    except MissingMandatoryValue as error:
        field = str(error).splitlines()[0].rpartition(": ")[2]
        raise BadRequest(f"{prefix}{field}", "???", "give it a value") from None
    except ConfigKeyError as error:
        names = ", ".join(f.name for f in fields(schema))  # type: ignore[arg-type]
        full = f"{prefix}{error.full_key}"
        raise BadRequest(full, data.get(str(error.key)), f"no such key; known: {names}") from None
    except ValidationError as error:
        field = str(error.full_key)
        value = OmegaConf.select(OmegaConf.create(dict(data)), field)
        known = schema.__dataclass_fields__  # type: ignore[attr-defined]
        declared = known.get(field.split("[")[0].split(".")[0])
        kind: Any = declared.type if declared else "another type"
        expected = kind.__name__ if isinstance(kind, type) else str(kind)
        expected = expected.replace(" | None", ", or null")
        raise BadRequest(f"{prefix}{field}", value, f"expected {expected}") from None
    except OverflowError:  # an integer of hundreds of digits where a float is expected
        remedy = "one of its numbers is too large; give less than 1e308"
        raise BadRequest(key or "config", "...", remedy) from None
    except OmegaConfBaseException as error:
        line = first_line(error)
        raise BadRequest(key or "config", dict(data), line) from None
    assert isinstance(result, schema)
    for field, value in vars(result).items():
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            raise BadRequest(f"{prefix}{field}", value, "give a finite number")
        if any(isinstance(number, float) and abs(number) > FLOAT32_MAX for number in numbers):
            raise BadRequest(f"{prefix}{field}", value, "float32 holds at most 3.4e38; give less")
        if any(isinstance(number, int) and abs(number) >= 1 << 63 for number in numbers):
            raise BadRequest(f"{prefix}{field}", value, "give a number below 2^63")
    return result


C = TypeVar("C")
P = TypeVar("P")


class Registry(Generic[C, P]):
    """The options of one config group: name to (config class, class that it configures).

    Whatever lists the group's options, validates them or builds from them reads this.
    """

    def __init__(self, group: str, **options: tuple[type[C], type[P]]) -> None:
        self.group = group
        self.options: dict[str, tuple[type[C], type[P]]] = dict(options)
        self.registered_in = dict.fromkeys(options, __name__)  # module that registered each

    def register(self, name: str, config: type[C], part: type[P]) -> None:
        """Add an option. A plugin calls this when it is imported; its conf/ has the values."""
        if self.options.get(name, (config, part)) != (config, part):
            raise ValueError(f"{self.group}={name} is registered already")
        self.options[name] = (config, part)
        self.registered_in.setdefault(name, sys._getframe(1).f_globals["__name__"])

    def parse(self, data: Any) -> C:
        """The validated config of the option that `data` names."""
        name = str(data.get("name") if isinstance(data, Mapping) else data)
        if not isinstance(data, Mapping) or name not in self.options:
            raise BadRequest(self.group, name, f"one of {', '.join(sorted(self.options))}")
        return parse(self.options[name][0], data, key=self.group)

    def part(self, config: Any) -> type[P]:
        """The class that `config` configures."""
        return self.options[config.name][1]

    def modules(self, config: Any) -> set[str]:
        """The modules that registered the option's name and that define its two classes."""
        classes = {kind.__module__ for kind in self.options[config.name]}
        return classes | {self.registered_in.get(config.name, __name__)}


def dotted(data: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings by their dotted keys."""
    if not isinstance(data, Mapping):
        yield prefix, data
        return
    for key, value in data.items():
        yield from dotted(value, f"{prefix}.{key}" if prefix else str(key))


def check_seed(seed: int) -> None:
    if not 0 <= seed < 2**63:
        raise BadRequest("seed", seed, "give 0 to 2^63 - 1")


def check_sizes(key: str, sizes: Iterable[int]) -> None:
    sizes = list(sizes)
    if not 1 <= len(sizes) <= 100 or any(not 1 <= size <= MOST_WIDTH for size in sizes):
        remedy = f"give a list of 1 to 100 widths of 1 to {MOST_WIDTH}, such as [256,256]"
        raise BadRequest(key, sizes, remedy)
