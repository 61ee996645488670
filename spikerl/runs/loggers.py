"""What shows a run elsewhere: views of metrics.jsonl, each with every number of it.

`tensorboard`   events below tb/
`csv`           metrics.csv, a column for each number by its name in metrics.jsonl
`prometheus`    metrics.prom, the last row as gauges, for a collector of text files
`wandb`         Weights & Biases; WANDB_MODE=offline needs no account
`mlflow`        MLflow, at MLFLOW_TRACKING_URI

A resumed run goes on in the same view, and no view's steps go back. What is sent to a service
cannot be taken back: it is sent once it is committed, and a step that was sent is not sent again.
"""

from __future__ import annotations

import platform
import struct
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from os import environ, getpid
from pathlib import Path
from typing import Any

from spikerl.errors import BadRequest
from spikerl.files import Journal, make_folder, read_json, write_json, write_text
from spikerl.schema import dotted

# The tag of each number of metrics.jsonl, as users of other libraries know it. What is not here is
# train/NAME.
TAGS = {
    "train_return": "rollout/ep_rew_mean",
    "train_episodes": "rollout/episodes",
    "eval_return": "eval/mean_reward",
    "eval_return_std": "eval/std_reward",
    "eval_length": "eval/mean_ep_length",
    "updates": "train/n_updates",
    "temperature": "train/ent_coef",
    "layer_firing_rates": "layers/firing_rate",
    "layer_window_fractions": "layers/window_fraction",
    "layer_silent": "layers/silent",
    "layer_saturated": "layers/saturated",
    "macs": "decision/macs",
    "acs": "decision/acs",
    "modelled_45nm_nj": "modelled/45nm_nj",
    "modelled_memory_nj": "modelled/memory_nj",
    "epoch": "time/epoch",
    "step": "time/total_timesteps",
    "env_steps_per_s": "time/fps",
    "updates_per_s": "time/updates_per_s",
    "wall_s": "time/time_elapsed",
    "cpu_s": "time/cpu_seconds",
    "energy_j": "energy/joules",
    "energy_gpu_j": "energy/gpu_joules",
    "energy_cpu_j": "energy/cpu_joules",
    "energy_train_j": "energy/train_joules",
    "energy_eval_j": "energy/eval_joules",
    "power_w": "energy/watts",
}
WITH_ENCODER = ("layer_firing_rates",)  # layer 0; the other lists begin with layer 1
SERVICES = ("wandb", "mlflow")
NAMES = ("tensorboard", "csv", "prometheus", *SERVICES)
STATE = "loggers.json"  # of each service: which run of it this is, and the last step sent
MAX_BYTES = 1 << 16
PARAMS = 100  # that MLflow accepts at once


def check_loggers(names: Sequence[str]) -> None:
    for name in names:
        if name not in NAMES:
            raise BadRequest("logger", name, f"give a list of {', '.join(NAMES)}")
        if name in SERVICES and find_spec(name) is None:
            raise BadRequest("logger", name, f"{name} is missing; pip install 'spikerl[{name}]'")


def numbers(row: Mapping[str, Any]) -> Iterator[tuple[str, int | None, float]]:
    """Every number of a row: its name, its layer where it is one of a list, and itself."""
    for name, value in row.items():
        if isinstance(value, list):
            first = 0 if name in WITH_ENCODER else 1
            layers = enumerate(value, first)
            yield from ((name, i, number) for i, number in layers if number is not None)
        elif isinstance(value, int | float):
            yield name, None, value


def tagged(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row by their tags."""
    shown = {}
    for name, layer, number in numbers(row):
        tag = TAGS.get(name, f"train/{name}")
        shown[tag if layer is None else f"{tag}/{layer}"] = number
    return shown


def framed(data: bytes) -> bytes:
    """A record of an event file: length, data, and a masked CRC-32C behind each.

    As tensorboard's RecordWriter writes it, whose import takes a tenth of a second.
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
    """What each byte contributes, by Castagnoli's polynomial."""
    table = []
    for crc in range(256):
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        table.append(crc)
    return tuple(table)


class Events(Journal):
    """A file of TensorBoard events.

    Its own writer does this in a thread, which dies with the first write that fails.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog

        name = f"events.out.tfevents.{int(time.time()):010d}.{platform.node()}.{getpid()}.0"
        super().__init__(folder / name)
        self.event(file_version="brain.Event:2")
        # Later steps in earlier files were discarded.
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
        if not self.lines:
            with suppress(OSError):
                path.unlink()  # of epochs that were discarded

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
        self.pending: str | None = ""  # of an epoch that was discarded
        for row in rows[-1:]:
            self.row(row)

    def row(self, row: Mapping[str, Any]) -> None:
        lines, last = [], ""
        for name, layer, number in numbers(row):
            gauge = f"spikerl_{name}"
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


class Service:
    """A run of a service, which may be away: what it did not get, it gets with the next commit."""

    name: str

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.folder, self.config = folder, config
        self.state = _state(folder).get(self.name, {"id": None, "step": -1})
        self.pending: list[Mapping[str, Any]] = []
        self.failure: str | None = None
        self.opened = False

    @property
    def group(self) -> str | None:
        """A sweep's jobs stand side by side."""
        parent = self.folder.absolute().parent
        return parent.name if (parent / "jobs.jsonl").exists() else None

    def row(self, row: Mapping[str, Any]) -> None:
        self.pending.append(row)

    def publish(self) -> str | None:
        """Send what is committed; what there is to say of it, once."""
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
        except Exception as error:  # a service raises anything: away, full, not logged in
            said, reason = self.failure, (str(error).splitlines() or [""])[0]
            self.failure = f"{type(error).__name__}: {reason}"
            known = said == self.failure
            text = f"warning: logger={self.name} got nothing ({self.failure}); metrics.jsonl has it"
            return None if known else text
        with suppress(OSError):
            write_json(self.folder / STATE, {**_state(self.folder), self.name: self.state})
        said, self.failure = self.failure, None
        return f"logger={self.name} has all that it did not get before" if said else None

    def close(self, status: str) -> None:
        if self.opened:
            with suppress(Exception):
                self.end(status)

    def open(self) -> None:
        """Begin or go on with the run of the id in `state`."""
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
        if self.state["id"] is not None:
            self.client.update_run(self.state["id"], status="RUNNING")
            return
        name = environ.get("MLFLOW_EXPERIMENT_NAME", "spikerl")
        known = self.client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self.client.create_experiment(name)
        tags = {"group": self.group} if self.group else {}
        run = self.client.create_run(experiment, run_name=self.folder.absolute().name, tags=tags)
        self.state["id"] = run.info.run_id
        params = [Param(key, str(value)[:500]) for key, value in dotted(self.config)]
        for i in range(0, len(params), PARAMS):
            self.client.log_batch(run.info.run_id, params=params[i : i + PARAMS])

    def send(self, row: Mapping[str, Any]) -> None:
        from mlflow.entities import Metric

        now, step = int(time.time() * 1000), row["step"]
        metrics = [Metric(tag, value, now, step) for tag, value in tagged(row).items()]
        self.client.log_batch(self.state["id"], metrics=metrics)

    def end(self, status: str) -> None:
        ended = {"done": "FINISHED", "failed": "FAILED"}.get(status, "KILLED")
        self.client.set_terminated(self.state["id"], ended)


def _state(folder: Path) -> dict[str, Any]:
    """Nothing where it is not as it was written: then a service gets a new run."""
    try:
        state = read_json(folder / STATE, MAX_BYTES)
        sound = {
            name: {"id": str(own["id"]), "step": int(own["step"])} for name, own in state.items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}
    return sound
