"""Views of a run have every number of metrics.jsonl, and their steps never go back."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from shell import refusal
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

from spikerl.cli.compose import expand
from spikerl.runs.logger_files import framed, masked_crc32c
from spikerl.runs.loggers import check_loggers
from spikerl.runs.record import RunLog
from spikerl.runs.rows import cut_back

EVERY: dict[str, Any] = {
    "epoch": 3, "step": 300, "updates": 200, "train_return": 1.5, "train_episodes": 4,
    "eval_return": 2.5, "eval_return_std": 0.5, "eval_length": 30.0, "critic_loss": 0.25,
    "actor_loss": -0.75, "q_mean": 1.25, "firing_rate": 0.125, "window_fraction": 0.375,
    "layer_firing_rates": [0.1, 0.2, 0.3], "layer_window_fractions": [0.4, 0.5],
    "layer_silent": [0.6, 0.7], "layer_saturated": [0.8, 0.9], "entropy": -1.0,
    "macs": 91.0, "acs": 92.0, "modelled_45nm_nj": 93.0, "modelled_memory_nj": 94.0,
    "temperature": 0.2, "approx_kl": 0.01, "clip_fraction": 0.02, "proxy_loss": 0.03,
    "skipped_updates": 7, "something_new": 8.0, "env_steps_per_s": 100.0, "updates_per_s": 50.0,
    "energy_j": 12.0, "energy_gpu_j": 11.0, "energy_cpu_j": 10.0, "energy_source": "zeus:nvml",
    "power_w": 9.0, "energy_train_j": 8.5, "energy_eval_j": 3.5, "wall_s": 6.0,
    "cpu_s": 5.0,
}  # fmt: skip
TAGGED = {
    "time/epoch": 3, "time/total_timesteps": 300, "train/n_updates": 200,
    "rollout/ep_rew_mean": 1.5, "rollout/episodes": 4, "eval/mean_reward": 2.5,
    "eval/std_reward": 0.5, "eval/mean_ep_length": 30.0, "train/critic_loss": 0.25,
    "train/actor_loss": -0.75, "train/q_mean": 1.25, "train/firing_rate": 0.125,
    "train/window_fraction": 0.375, "layers/firing_rate/0": 0.1, "layers/firing_rate/1": 0.2,
    "layers/firing_rate/2": 0.3, "layers/window_fraction/1": 0.4, "layers/window_fraction/2": 0.5,
    "layers/silent/1": 0.6, "layers/silent/2": 0.7, "layers/saturated/1": 0.8,
    "layers/saturated/2": 0.9, "train/entropy": -1.0, "train/ent_coef": 0.2,
    "train/approx_kl": 0.01, "train/clip_fraction": 0.02, "train/proxy_loss": 0.03,
    "train/skipped_updates": 7, "train/something_new": 8.0, "time/fps": 100.0,
    "time/updates_per_s": 50.0, "energy/joules": 12.0, "energy/gpu_joules": 11.0,
    "energy/cpu_joules": 10.0, "energy/watts": 9.0, "energy/train_joules": 8.5,
    "energy/eval_joules": 3.5, "time/time_elapsed": 6.0, "time/cpu_seconds": 5.0,
    "decision/macs": 91.0,
    "decision/acs": 92.0, "modelled/45nm_nj": 93.0, "modelled/memory_nj": 94.0,
}  # fmt: skip


def row(step: int, **values: Any) -> dict[str, Any]:
    return {"step": step, "eval_return": float(step), **values}


def test_every_number_reaches_tensorboard(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0)
    log.row(EVERY)
    log.row({**dict.fromkeys(EVERY), "step": 400, "layer_firing_rates": [None, 0.5]})
    log.write()
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    first = {tag: e for tag in events.Tags()["scalars"] for e in events.Scalars(tag)[:1]}
    assert {tag: e.value for tag, e in first.items()} == pytest.approx(TAGGED, rel=1e-6)
    assert {e.step for e in first.values()} == {300}
    later = {tag for tag in first if len(events.Scalars(tag)) > 1}
    assert later == {"time/total_timesteps", "layers/firing_rate/1"}  # nulls are left out


def test_records_of_events_are_tensorboards() -> None:
    assert masked_crc32c(b"") == 0xA282EAD8  # 0, masked
    assert (
        masked_crc32c(b"123456789") == 0xC78AB0E5
    )  # RFC 3720: E3069283, rotated by 15 bits, plus the mask
    for data in (b"", b"spikes", bytes(range(256)) * 3):
        theirs = io.BytesIO()
        RecordWriter(theirs).write(data)
        assert framed(data) == theirs.getvalue()


def test_csv(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0, ["csv"])
    log.row(row(100, energy_source="none: requested", train_return=None, layer_silent=[0.5, 0.25]))
    log.write()
    log.row(row(200, train_return=0.1, layer_silent=[0.0, 1.0]))  # one more column
    log.row(row(300, train_return=None, layer_silent=[0.0, 1.0]))
    log.write()
    assert (tmp_path / "metrics.csv").read_text() == (
        "step,eval_return,layer_silent.1,layer_silent.2,train_return\n"
        "100,100.0,0.5,0.25\n200,200.0,0.0,1.0,0.1\n300,300.0,0.0,1.0,\n"
    )
    assert not (tmp_path / "tb").exists()


def test_gauges_by_hand(tmp_path: Path) -> None:
    """Gauges are of the last row only; nulls and text are left out."""
    folder = tmp_path / 'a "b" \\ c'
    folder.mkdir()
    log = RunLog(folder, 0, ["prometheus"])
    log.write()
    path = folder / "metrics.prom"
    assert path.read_text() == ""
    log.row(row(100, energy_j=12.5, power_w=9.0))
    log.row(row(200, energy_j=None, power_w=None, energy_source="none: requested",
                layer_firing_rates=[None, 0.5], layer_silent=[0.25, 1e-05]))  # fmt: skip
    log.write()
    run = r'run="a \"b\" \\ c"'
    expected = f"""\
# HELP spikerl_step step of metrics.jsonl, of the last epoch
# TYPE spikerl_step gauge
spikerl_step{{{run}}} 200
# HELP spikerl_eval_return eval_return of metrics.jsonl, of the last epoch
# TYPE spikerl_eval_return gauge
spikerl_eval_return{{{run}}} 200.0
# HELP spikerl_layer_firing_rates layer_firing_rates of metrics.jsonl, of the last epoch
# TYPE spikerl_layer_firing_rates gauge
spikerl_layer_firing_rates{{{run},layer="1"}} 0.5
# HELP spikerl_layer_silent layer_silent of metrics.jsonl, of the last epoch
# TYPE spikerl_layer_silent gauge
spikerl_layer_silent{{{run},layer="1"}} 0.25
spikerl_layer_silent{{{run},layer="2"}} 1e-05
"""
    assert path.read_text() == expected
    before = path.stat().st_ino
    log.write()
    assert path.stat().st_ino == before  # not written again
    log.row(row(300, energy_j=1.5))
    log.write()
    assert path.stat().st_ino != before  # replaced by a complete file
    assert f"\nspikerl_energy_j{{{run}}} 1.5\n" in path.read_text()


def test_a_gauge_has_a_name_that_a_collector_takes(tmp_path: Path) -> None:
    """A plugin may name its metrics freely, but a collector rejects a file with an invalid name."""
    log = RunLog(tmp_path, 0, ["prometheus"])
    log.row({"loss/q-1": 2.5})
    log.write()
    assert (tmp_path / "metrics.prom").read_text() == (
        "# HELP spikerl_loss_q_1 loss/q-1 of metrics.jsonl, of the last epoch\n"
        "# TYPE spikerl_loss_q_1 gauge\n"
        f'spikerl_loss_q_1{{run="{tmp_path.name}"}} 2.5\n'
    )


def test_gauges_go_back_with_the_run(tmp_path: Path) -> None:
    """After a resume, gauges are of the last row that was not discarded, if there is one."""
    log = RunLog(tmp_path, 0, ["prometheus"])
    for step in (100, 200):
        log.row(row(step))
    length = log.write()
    for keep, shown in ((length // 2, " 100\n"), (0, "")):
        cut_back(tmp_path, keep)
        RunLog(tmp_path, 0, ["prometheus"]).write()
        text = (tmp_path / "metrics.prom").read_text()
        assert shown in text
        assert bool(text) == bool(keep)


def test_csv_that_cannot_be_read(tmp_path: Path) -> None:
    """An unusable metrics.csv does not stop the run, and is complete once it can be written."""
    log = RunLog(tmp_path, 0, ["csv"])
    log.row(row(100))
    log.write()
    path = tmp_path / "metrics.csv"
    path.unlink()
    path.mkdir()
    log.row(row(200, more=1.0))
    log.write()
    path.rmdir()
    log.write()
    assert path.read_text() == "step,eval_return,more\n100,100.0\n200,200.0,1.0\n"


def test_a_run_without_tensorboard_does_not_import_it() -> None:
    code = "import sys, spikerl.runs.record; sys.exit('tensorboard' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_csv_of_a_resumed_run(tmp_path: Path) -> None:
    """Rows that the resume discarded, and a partial line, are not in the file."""
    first = RunLog(tmp_path, 0, ["csv"])
    first.row(row(100))
    committed = first.write()
    for step in (200, 300):
        first.row(row(step, more=1.0))
    first.write()
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("400,4")
    cut_back(tmp_path, committed)
    second = RunLog(tmp_path, 100, ["csv"])
    second.row(row(150))
    second.write()
    text = (tmp_path / "metrics.csv").read_text()
    assert text == "step,eval_return\n100,100.0\n150,150.0\n"


def test_csv_of_a_run_that_lost_all_its_rows(tmp_path: Path) -> None:
    first = RunLog(tmp_path, 0, ["csv"])
    first.row(row(100))
    first.write()
    cut_back(tmp_path, 0)
    RunLog(tmp_path, 0, ["csv"]).write()
    assert not (tmp_path / "metrics.csv").exists()


def test_no_file_of_a_logger_that_a_resume_leaves_out(tmp_path: Path) -> None:
    """Files of loggers that a resume leaves out are removed, since their numbers would be old."""
    first = RunLog(tmp_path, 0, ["csv", "prometheus"])
    first.row(row(100))
    first.write()
    second = RunLog(tmp_path, 100, [])
    second.row(row(200))
    second.write()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    ("typed", "composed"),
    [
        ("logger=csv", "logger=[csv]"),
        ("logger=tensorboard,csv", "logger=[tensorboard,csv]"),
        ("logger=[csv]", "logger=[csv]"),
        ("logger=null", "logger=[]"),
        ("logger=none", "logger=[]"),
    ],
)
@pytest.mark.parametrize("sweep", [[], ["-m"]])
def test_a_list_without_brackets(typed: str, composed: str, sweep: list[str]) -> None:
    assert expand("train", [typed, *sweep])[0] == composed


def test_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    line = str(refusal(check_loggers, ["csv", "tensorbord"]))
    assert line == "logger=tensorbord: give a list of tensorboard, csv, prometheus, wandb, mlflow"
    monkeypatch.setattr("spikerl.runs.loggers.find_spec", lambda name: None)
    line = str(refusal(check_loggers, ["mlflow"]))
    assert line == "logger=mlflow: mlflow is missing; pip install 'spikerl[mlflow]'"
    check_loggers(["csv", "tensorboard"])
