"""Views of metrics.jsonl that are files: TensorBoard's events, a table, Prometheus' gauges."""

from __future__ import annotations

import platform
import re
import struct
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from os import getpid
from pathlib import Path
from typing import Any

from spikerl.files import Journal, make_folder, write_text
from spikerl.runs.loggers import numbers, tagged


def framed(data: bytes) -> bytes:
    """A record of an event file: length, data, and a masked CRC-32C behind each.

    The same as tensorboard's RecordWriter makes, whose import takes a tenth of a second.
    """
    length = struct.pack("<Q", len(data))
    return b"".join(part + struct.pack("<I", masked_crc32c(part)) for part in (length, data))


def masked_crc32c(data: bytes) -> int:
    table, crc = crc32c_table(), 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


@cache
def crc32c_table() -> tuple[int, ...]:
    """The table of CRC-32C by byte, of Castagnoli's polynomial."""
    table = []
    for crc in range(256):
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        table.append(crc)
    return tuple(table)


class Events(Journal):
    """A file of TensorBoard events.

    TensorBoard's own writer does this in a thread, which dies with the first write that fails.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog

        name = f"events.out.tfevents.{int(time.time()):010d}.{platform.node()}.{getpid()}.0"
        super().__init__(folder / name)
        self.event(file_version="brain.Event:2")
        # Has TensorBoard drop later steps in earlier files, which were discarded.
        self.event(step=first_step, session_log=SessionLog(status=SessionLog.START))

    def event(self, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self.add(framed(Event(wall_time=time.time(), **content).SerializeToString()))

    def row(self, row: Mapping[str, Any]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        for tag, value in tagged(row).items():
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
            self.event(step=row["step"], summary=summary)

    def write(self, *, sync: bool) -> None:
        make_folder(self.path.parent)
        super().write(sync=sync)


class Table(Journal):
    """metrics.csv, written anew where a run begins or goes on, and where a column is added."""

    def __init__(self, path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
        super().__init__(path)
        self.length = 0
        self.columns: list[str] = []
        self.lines: list[bytes] = []  # all below the header
        for row in rows:
            self.row(row)

    def row(self, row: Mapping[str, Any]) -> None:
        shown = {
            name if layer is None else f"{name}.{layer}": number
            for name, layer, number in numbers(row)
        }
        new = [name for name in shown if name not in self.columns]
        if new:
            self.columns += new
            header = (",".join(self.columns) + "\n").encode()
            self.length, self.pending = 0, header + b"".join(self.lines)
        cells = (repr(shown[name]) if name in shown else "" for name in self.columns)
        self.lines.append((",".join(cells) + "\n").encode())
        self.add(self.lines[-1])


class Gauges:
    """metrics.prom, in Prometheus' text format: what the last row measured, and nothing else.

    Replaced whole, as a collector may read it at any moment.
    """

    def __init__(self, path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
        self.path = path
        name = path.absolute().parent.name
        for char, escaped in (("\\", r"\\"), ('"', r"\""), ("\n", r"\n")):
            name = name.replace(char, escaped)
        self.run = f'run="{name}"'
        self.pending: str | None = ""  # empties the file of an epoch that was discarded
        for row in rows[-1:]:
            self.row(row)

    def row(self, row: Mapping[str, Any]) -> None:
        lines, last = [], ""
        for name, layer, number in numbers(row):
            gauge = "spikerl_" + re.sub(r"\W", "_", name, flags=re.ASCII)  # a plugin may name it
            if gauge != last:
                lines.append(f"# HELP {gauge} {name} of metrics.jsonl, of the last epoch")
                lines.append(f"# TYPE {gauge} gauge")
            last = gauge
            where = self.run if layer is None else f'{self.run},layer="{layer}"'
            lines.append(f"{gauge}{{{where}}} {number!r}")
        self.pending = "\n".join([*lines, ""])

    def write(self, *, sync: bool) -> None:
        if self.pending is not None:
            write_text(self.path, self.pending)
            self.pending = None
