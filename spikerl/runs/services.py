"""Views of metrics.jsonl at a service: Weights & Biases, MLflow.

What is sent cannot be taken back: it is sent once it is committed, and a step that was sent is not
sent again.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from os import environ
from pathlib import Path
from typing import Any

from spikerl.files import read_json, write_json
from spikerl.runs.loggers import tagged
from spikerl.schema import dotted

STATE = "loggers.json"  # by service: the id that this run has there, and the last step sent
MAX_BYTES = 1 << 16
PARAMS = 100  # that MLflow accepts at once


class Service:
    """A run at a service, which may be unreachable: what it missed is sent at the next commit."""

    name: str

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.folder, self.config = folder, config
        self.state = _state(folder).get(self.name, {"id": None, "step": -1})
        self.pending: list[Mapping[str, Any]] = []
        self.failure: str | None = None
        self.opened = False

    @property
    def group(self) -> str | None:
        """The name by which a service shows a sweep's jobs together; None outside of sweeps."""
        parent = self.folder.absolute().parent
        return parent.name if (parent / "jobs.jsonl").exists() else None

    def row(self, row: Mapping[str, Any]) -> None:
        self.pending.append(row)

    def publish(self) -> str | None:
        """Send what is committed; return a line if the service began to fail, or works again."""
        said, self.failure = self.failure, None
        try:
            if not self.opened:
                self.open()
                self.opened = True
            while self.pending:
                row = self.pending[0]
                if row["step"] > self.state["step"]:
                    self.send(row)
                    self.state["step"] = row["step"]
                del self.pending[0]
        except Exception as error:  # a service may raise anything: away, full, not logged in
            reason = (str(error).splitlines() or [""])[0]
            self.failure = f"{type(error).__name__}: {reason}"
        if self.state["id"] is not None:  # what it got before it failed is not sent again
            with suppress(OSError):
                write_json(self.folder / STATE, {**_state(self.folder), self.name: self.state})
        if self.failure is None:
            return f"logger={self.name} has all that it did not get before" if said else None
        text = f"warning: logger={self.name} did not get all ({self.failure}); metrics.jsonl has it"
        return None if self.failure == said else text

    def close(self, status: str) -> None:
        if self.opened:
            with suppress(Exception):
                self.end(status)

    def open(self) -> None:
        """Begin a run, or go on with the one whose id is in `state`."""
        raise NotImplementedError

    def send(self, row: Mapping[str, Any]) -> None:
        raise NotImplementedError

    def end(self, status: str) -> None:
        raise NotImplementedError


class Wandb(Service):
    name = "wandb"

    def open(self) -> None:
        import wandb

        self.state["id"] = self.state["id"] or uuid.uuid4().hex[:8]
        # Its own capture of the console would fight with the live panel.
        settings = wandb.Settings(console="off", silent=True, disable_git=True, save_code=False)
        self.run = wandb.init(
            project=environ.get("WANDB_PROJECT", "spikerl"), id=self.state["id"], resume="allow",
            name=self.folder.absolute().name, group=self.group, config=dict(self.config),
            reinit="create_new", settings=settings,
        )  # fmt: skip

    def send(self, row: Mapping[str, Any]) -> None:
        self.run.log(tagged(row), step=row["step"], commit=True)  # else it waits for the next one

    def end(self, status: str) -> None:
        self.run.finish(exit_code=0 if status == "done" else 1)


class Mlflow(Service):
    name = "mlflow"

    def open(self) -> None:
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self.client = MlflowClient()
        if self.state["id"] is None:
            name = environ.get("MLFLOW_EXPERIMENT_NAME", "spikerl")
            known = self.client.get_experiment_by_name(name)
            experiment = known.experiment_id if known else self.client.create_experiment(name)
            tags = {"group": self.group} if self.group else {}
            own = self.folder.absolute().name
            run = self.client.create_run(experiment, run_name=own, tags=tags)
            self.state["id"] = run.info.run_id
        else:
            self.client.update_run(self.state["id"], status="RUNNING")
        there = self.client.get_run(self.state["id"]).data.params  # all, unless it failed meanwhile
        params = [Param(k, str(v)[:500]) for k, v in dotted(self.config) if k not in there]
        for i in range(0, len(params), PARAMS):
            self.client.log_batch(self.state["id"], params=params[i : i + PARAMS])

    def send(self, row: Mapping[str, Any]) -> None:
        from mlflow.entities import Metric

        now, step = int(time.time() * 1000), row["step"]
        metrics = [Metric(tag, value, now, step) for tag, value in tagged(row).items()]
        self.client.log_batch(self.state["id"], metrics=metrics)

    def end(self, status: str) -> None:
        ended = {"done": "FINISHED", "failed": "FAILED"}.get(status, "KILLED")
        self.client.set_terminated(self.state["id"], ended)


def _state(folder: Path) -> dict[str, Any]:
    """What is stored of each service; empty if it is damaged, and then each gets a new run."""
    try:
        state = read_json(folder / STATE, MAX_BYTES)
        sound = {
            name: {"id": str(own["id"]), "step": int(own["step"])} for name, own in state.items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}
    return sound
