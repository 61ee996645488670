"""Joules are on the screen, and the panel that is left at the end has the last numbers."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from shell import SHORT, spikerl

from spikerl.runs.display import View, energy_text, epoch_line, idle_line, spent_text

ROW: dict[str, Any] = {
    "epoch": 1, "step": 1000, "eval_return": 10.0, "eval_return_std": 0.0, "train_return": 5.0,
    "critic_loss": 1.5, "q_mean": 0.25, "firing_rate": None, "env_steps_per_s": 99.0,
    "wall_s": 10.0, "energy_j": 1234.56, "power_w": 45.678, "energy_source": "zeus:rapl",
}  # fmt: skip
NOT_MEASURED = {"energy_j": None, "power_w": None, "energy_source": "none: no permission"}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "energy 1234.6 J 45.7 W (zeus:rapl)"),
        ({"power_w": None}, "energy 1234.6 J (zeus:rapl)"),
        ({"energy_j": 0.0, "energy_source": "replay:/a/b.csv"}, "energy 0 J 45.7 W (replay)"),
        (NOT_MEASURED, "energy - (none: no permission)"),
        ({**NOT_MEASURED, "energy_source": "none: " + "x" * 99}, "energy - (none: ...)"),
    ],
)
def test_energy(changes: dict[str, Any], text: str) -> None:
    assert energy_text({**ROW, **changes}) == text
    short = text.partition(" (")[0]
    assert epoch_line({**ROW, **changes}, 2000).endswith(f"  99 steps/s  10 s  {short}")


def test_the_joules_so_far_stand_beside_an_epochs() -> None:
    assert epoch_line(ROW, 2000, 5000.0).endswith("  energy 1234.6 J 45.7 W, 5000.0 J so far")
    assert epoch_line(ROW, 2000, 1234.56).endswith("  energy 1234.6 J 45.7 W")  # first epoch
    assert epoch_line({**ROW, **NOT_MEASURED}, 2000, None).endswith("  energy -")


def test_what_a_run_cost() -> None:
    whole = {"energy_j": 7.2e6, "energy_kwh": 2.0, "power_mean_w": 45.678, "power_peak_w": 50.0}
    source = {"power_idle_w": 12.0, "energy_source": "zeus:rapl"}
    assert spent_text({**whole, **source}) == (
        "energy 7200000.0 J = 2 kWh, 45.7 W on average, 50 W in its highest epoch, 12 W idle before"
        " (zeus:rapl)"
    )
    nothing = dict.fromkeys([*whole, *source], None)
    said = spent_text({**nothing, "energy_source": "none: no permission"})
    assert said == "energy - (none: no permission)"
    assert idle_line(None) == []
    assert idle_line(12.0) == ["idle power before the run: 12 W"]


class Stage:
    step, updates, epoch = 1999, 70, 1
    losses: dict[str, float] = {"critic_loss": 2.5}  # noqa: RUF012
    returns: list[float] = [7.5]  # noqa: RUF012


def panel(*rows: dict[str, Any], stage: Stage | None = None) -> str:
    """The text that a run leaves on the terminal, as one line."""
    file = io.StringIO()
    view = View("t", 2000, console=Console(file=file, force_terminal=True, width=90))
    if stage:
        view.shown = -1e9  # so that the panel is drawn at once
        view.progress(stage)
    for row in rows:
        view.epoch(row)
    view.close()
    picture = file.getvalue().rpartition("╭")[2]
    return " ".join(picture.replace("│", " ").split())


def test_the_panel_that_is_left_shows_the_last_evaluation() -> None:
    rows = [ROW, {**ROW, "step": 2000, "eval_return": 8.0}]
    left = panel(*rows, stage=Stage())
    assert "eval return 8 best 10" in left
    assert "2000/2000" in left
    assert "critic loss 2.5" in left
    assert "joules/epoch 1234.6 watts 45.7 joules so far 2469.1 kWh 0.000686" in left
    assert "zeus:rapl" in left


def test_the_panel_says_why_there_are_no_joules() -> None:
    left = panel({**ROW, **NOT_MEASURED})
    assert "joules/epoch - watts - joules so far - kWh -" in left
    assert "none: no permission" in left


def test_a_run_says_what_it_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Path("t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["t_s", "gpu:0"], [0.0, 50.0], [0.25, 50.0]])
    short = [arg for arg in SHORT if arg != "energy=none"]
    short += ["energy=replay", "energy.file=t.csv", "energy_to={return: -1000}"]
    said = spikerl("train", *short, "run_dir=r")
    assert said.status == 0, said.err
    lines = said.out.splitlines()
    summary = json.loads(Path("r/summary.json").read_text())
    rows = [json.loads(line) for line in Path("r/metrics.jsonl").read_text().splitlines()]
    joules = summary["energy_j"]
    shown, kwh = (f"{x:.1f}" if x >= 100 else f"{x:.3g}" for x in (joules, joules / 3.6e6))
    assert lines[-1].startswith("done: 300 steps, 250 updates in ")
    assert lines[-1].endswith(
        f" s, energy {shown} J = {kwh} kWh, 50 W on average, 50 W in its highest epoch,"
        " 50 W idle before (replay)"
    )
    assert "idle power before the run: 50 W" in lines
    epochs = [line for line in lines if line.startswith("epoch ")]
    assert len(epochs) == 2
    assert epochs[0].endswith(" J 50 W")
    assert epochs[1].endswith(f" J 50 W, {shown} J so far")
    assert sum("and repeats from here on" in line for line in lines) == 1
    assert summary["energy_to"] == {"return": -1000.0, "energy_j": rows[0]["energy_j"]}
    manifest = json.loads(Path("r/manifest.json").read_text())
    assert manifest["power_idle_w"] == summary["power_idle_w"] == pytest.approx(50.0)
    trace = Path("t.csv").absolute()
    assert f"energy=replay:{trace} (requested; after its 0.25 s it begins anew)" in said.out
    assert spikerl("train", "resume=r").out.startswith("r is done at step 300; ")
    assert "makes no update" not in said.out


def test_a_run_without_an_update_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = spikerl("train", *SHORT, "algo.learning_starts=1000", "run_dir=r")
    assert said.status == 0, said.err
    lines = said.out.splitlines()
    warned = [line for line in lines if line.startswith("warning: this run makes no update")]
    assert len(warned) == 2  # at the start and at the end
    assert lines[-1] == warned[-1]
    assert lines[-2].endswith(" s, energy - (none: requested)")
