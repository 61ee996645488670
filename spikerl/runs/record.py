"""A run's record on disk: metrics.jsonl first; log.txt and the loggers as views of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from spikerl.files import Journal
from spikerl.runs.logger_files import Events, Gauges, Table
from spikerl.runs.rows import read_rows
from spikerl.runs.services import Mlflow, Service, Wandb


class RunLog:
    """The files of one run folder that grow; they are written by `write` alone."""

    def __init__(
        self,
        folder: Path,
        step: int,
        loggers: Sequence[str] = ("tensorboard",),
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.metrics = Journal(folder / "metrics.jsonl")
        self.log = Journal(folder / "log.txt")
        self.views: list[Events | Gauges | Table] = []
        self.services: list[Service] = []
        past = read_rows(folder / "metrics.jsonl")
        for name in ("metrics.csv", "metrics.prom"):  # of rows since discarded, or no longer wanted
            with suppress(OSError):
                (folder / name).unlink()
        for name in loggers:
            if name == "tensorboard":
                self.views.append(Events(folder / "tb", step + 1))
            elif name == "csv":
                self.views.append(Table(folder / "metrics.csv", past))
            elif name == "prometheus":
                self.views.append(Gauges(folder / "metrics.prom", past))
            else:
                kind = Wandb if name == "wandb" else Mlflow
                self.services.append(kind(folder, config or {}))
        for row in past:  # the last of which may not have been sent
            for service in self.services:
                service.row(row)

    def row(self, row: Mapping[str, Any]) -> None:
        self.metrics.add((json.dumps(row, allow_nan=False) + "\n").encode())
        for view in (*self.views, *self.services):
            view.row(row)

    def line(self, text: str) -> None:
        self.log.add(f"{datetime.now().isoformat(' ', 'seconds')} {text}\n".encode())

    def write(self) -> int:
        """Write what came since the last call; return the length of metrics.jsonl. OSError if that
        is not all written; where log.txt or a view cannot be written, the next call does it.
        """
        for view in (self.log, *self.views):
            with suppress(OSError):
                view.write(sync=False)
        self.metrics.write(sync=True)
        return self.metrics.length

    def publish(self) -> list[str]:
        """Send what is committed to services; return lines to print about them."""
        return [text for service in self.services if (text := service.publish())]

    def close(self, status: str) -> None:
        for service in self.services:
            service.close(status)
