"""Services get every committed row once, even if they could not be reached for a while."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from shell import SHORT, spikerl

from spikerl.runs.record import RunLog
from spikerl.runs.rows import cut_back
from spikerl.runs.services import Service


def row(step: int) -> dict[str, Any]:
    return {"step": step, "eval_return": float(step)}


class Remote(Service):
    """A service that keeps the steps it got, and cannot be reached while `away`."""

    name = "wandb"
    got: list[int]
    away = False

    def open(self) -> None:
        if self.away:
            raise ConnectionError("no route\nto it")
        self.state["id"] = self.state["id"] or "first"
        self.got = []

    def send(self, row: Mapping[str, Any]) -> None:
        if self.away:
            raise ConnectionError("no route\nto it")
        self.got.append(row["step"])


def remote(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[RunLog, Remote]:
    monkeypatch.setattr("spikerl.runs.record.Wandb", Remote)
    log = RunLog(folder, 0, ["wandb"])
    (service,) = log.services
    assert isinstance(service, Remote)
    return log, service


def test_a_service_gets_what_is_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, service = remote(tmp_path, monkeypatch)
    log.row(row(100))
    log.write()
    assert not service.opened
    assert log.publish() == []
    assert service.got == [100]
    assert log.publish() == []
    assert service.got == [100]


def test_a_resumed_run_goes_on_in_a_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 200 was committed but not sent, 300 was sent and then discarded."""
    log, service = remote(tmp_path, monkeypatch)
    log.row(row(100))
    log.write()
    log.publish()
    log.row(row(200))
    log.write()

    log, service = remote(tmp_path, monkeypatch)
    log.publish()
    assert service.got == [200]
    committed = log.metrics.length
    log.row(row(300))
    log.write()
    log.publish()
    assert service.got == [200, 300]

    cut_back(tmp_path, committed)
    log, service = remote(tmp_path, monkeypatch)
    for step in (300, 400):
        log.row(row(step))
    log.write()
    log.publish()
    assert service.got == [400]
    assert service.state["id"] == "first"


def test_a_service_that_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, service = remote(tmp_path, monkeypatch)
    monkeypatch.setattr(Remote, "away", True)
    log.row(row(100))
    log.write()
    assert log.publish() == [
        "warning: logger=wandb did not get all (ConnectionError: no route); metrics.jsonl has it"
    ]
    assert log.publish() == []  # warned once
    log.row(row(200))
    monkeypatch.setattr(Remote, "away", False)
    log.write()
    assert log.publish() == ["logger=wandb has all that it did not get before"]
    assert service.got == [100, 200]


def test_a_service_that_goes_away_in_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It got row 100 but not 200; the resumed run has the same id there, and goes on with 200."""
    log, service = remote(tmp_path, monkeypatch)
    send = Remote.send

    def until_200(self: Remote, row: Mapping[str, Any]) -> None:
        self.away = row["step"] >= 200
        send(self, row)

    monkeypatch.setattr(Remote, "send", until_200)
    for step in (100, 200):
        log.row(row(step))
    log.write()
    assert log.publish() == [
        "warning: logger=wandb did not get all (ConnectionError: no route); metrics.jsonl has it"
    ]
    assert service.got == [100]
    state = json.loads((tmp_path / "loggers.json").read_text())
    assert state == {"wandb": {"id": "first", "step": 100}}

    monkeypatch.setattr(Remote, "send", send)
    log, service = remote(tmp_path, monkeypatch)
    assert service.state == {"id": "first", "step": 100}
    assert log.publish() == []
    assert service.got == [200]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"wandb": 3}', '{"wandb": {"id": "x"}}'])
def test_a_foreign_state(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loggers.json").write_text(text)
    log, _ = remote(tmp_path, monkeypatch)
    log.row(row(100))
    log.write()
    assert log.publish() == []
    assert json.loads((tmp_path / "loggers.json").read_text()) == {
        "wandb": {"id": "first", "step": 100}
    }


# --- the services themselves, as far as they work without a network ----------------------------


def train(*args: str) -> Path:
    said = spikerl("train", *SHORT, "algo.random_steps=1000", *args)
    assert said.status == 0, said.err
    return Path("r")


def stop_and_go_on(logger: str) -> list[dict[str, Any]]:
    """Train, resume in a second session, and return the rows."""
    train(f"logger={logger}", "run_dir=r")
    # In its own process, as wandb can open a run only once in a process.
    command = [sys.executable, "-m", "spikerl", "train", "resume=r", "total_steps=450"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning: logger" not in done.stdout
    rows = [json.loads(line) for line in Path("r/metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [150, 300, 450]
    return rows


def records(content: bytes) -> Iterator[bytes]:
    """Records of wandb's offline file: after 7 bytes, each has a checksum, a length and a type."""
    at = 7
    while at < len(content):
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        assert kind == 1, "the run is short, so that no record is in several parts"
        yield content[at + 7 : at + 7 + length]
        at += 7 + length


@pytest.mark.slow
def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proto: Any = import_module("wandb.proto.wandb_internal_pb2")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "elsewhere"))
    Path("elsewhere").mkdir()
    rows = stop_and_go_on("wandb")
    assert not Path("r/tb").exists()
    history: list[tuple[int, float]] = []
    runs = set()
    for path in sorted(Path("elsewhere/wandb").glob("offline-run-*/run-*.wandb")):
        for content in records(path.read_bytes()):
            record = proto.Record()
            record.ParseFromString(content)
            if record.WhichOneof("record_type") == "run":
                runs.add((record.run.run_id, record.run.project, record.run.display_name))
            if record.WhichOneof("record_type") == "history":
                items = {i.key or i.nested_key[0]: i.value_json for i in record.history.item}
                values = json.loads(items["eval/mean_reward"])
                history.append((record.history.step.num, values))
    assert [step for step, _ in history] == [r["step"] for r in rows]
    assert [v for _, v in history] == pytest.approx([r["eval_return"] for r in rows])
    ((run_id, project, name),) = runs  # both sessions are one run
    assert (project, name) == ("spikerl", "r")
    assert json.loads(Path("r/loggers.json").read_text()) == {"wandb": {"id": run_id, "step": 450}}


@pytest.mark.slow
def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracking = import_module("mlflow.tracking")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    rows = stop_and_go_on("mlflow")
    client = tracking.MlflowClient()
    (experiment,) = client.search_experiments(filter_string="name = 'spikerl'")
    (run,) = client.search_runs([experiment.experiment_id])
    points = client.get_metric_history(run.info.run_id, "eval/mean_reward")
    assert [(p.step, p.value) for p in points] == [(r["step"], r["eval_return"]) for r in rows]
    assert (run.info.run_name, run.info.status) == ("r", "FINISHED")
    assert run.data.params["algo.name"] == "td3"


SLOW = """
import time

class Settings:
    def __init__(self, **settings):
        pass

class Run:
    def log(self, numbers, step, commit):
        with open("got", "a") as file:
            file.write(f"{step} ")

    def finish(self, exit_code):
        pass

def init(**settings):
    time.sleep(12)
    return Run()
"""


@pytest.mark.slow
def test_a_slow_service_loses_no_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other workers wait longer than timeout_s for the worker that sends to the service."""
    monkeypatch.chdir(tmp_path)
    Path("own").mkdir()
    Path("own/wandb.py").write_text(SLOW)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'own'}:{Path(__file__).parents[2]}")
    train("world_size=2", "logger=wandb", "backend.timeout_s=5", "run_dir=r")
    assert Path("got").read_text() == "150 300 "


def test_mlflow_gets_parameters_that_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service failed after the run was created and before its parameters were sent."""
    tracking = import_module("mlflow.tracking")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    log_batch = tracking.MlflowClient.log_batch

    def away(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route")

    log = RunLog(tmp_path, 0, ["mlflow"], {"seed": 3, "algo": {"name": "td3"}})
    log.row(row(100))
    log.write()
    monkeypatch.setattr(tracking.MlflowClient, "log_batch", away)
    assert len(log.publish()) == 1
    monkeypatch.setattr(tracking.MlflowClient, "log_batch", log_batch)
    assert log.publish() == ["logger=mlflow has all that it did not get before"]
    client = tracking.MlflowClient()
    (experiment,) = client.search_experiments(filter_string="name = 'spikerl'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.params == {"seed": "3", "algo.name": "td3"}
    assert run.data.metrics == {"time/total_timesteps": 100.0, "eval/mean_reward": 100.0}


def test_a_sweep_is_a_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracking = import_module("mlflow.tracking")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    short = [*SHORT, "algo.random_steps=1000", "total_steps=150"]
    said = spikerl("train", "-m", *short, "seed=0,1", "logger=mlflow,csv", "run_dir=both")
    assert said.status == 0, said.err
    client = tracking.MlflowClient()
    (experiment,) = client.search_experiments(filter_string="name = 'spikerl'")
    runs = client.search_runs([experiment.experiment_id])
    assert {r.info.run_name for r in runs} == {"seed=0", "seed=1"}
    assert {r.data.tags["group"] for r in runs} == {"both"}
    assert sorted(p.parent.name for p in Path("both").glob("*/metrics.csv")) == ["seed=0", "seed=1"]
