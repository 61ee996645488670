"""The output of a run: lines if it goes to a file, a panel on a terminal."""

from __future__ import annotations

import io
import time
from dataclasses import dataclass, field
from typing import Any

import pytest
from rich.console import Console

from spikerl.runs.display import View, epoch_line, number, stuck_layers

ROW = {
    "epoch": 3,
    "step": 3000,
    "eval_return": 123.456,
    "eval_return_std": 0.04567,
    "train_return": None,
    "critic_loss": 1.5,
    "q_mean": -0.25,
    "firing_rate": 0.12345,
    "env_steps_per_s": 99.96,
    "wall_s": 61.6,
    "energy_j": None,
    "energy_source": "none: requested",
    "power_w": None,
}


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Progress:
    step: int = 0
    updates: int = 0
    epoch: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    returns: list[float] = field(default_factory=list)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


def plain(**changes: Any) -> tuple[View, io.StringIO]:
    file = io.StringIO()
    console = Console(file=file, highlight=False, soft_wrap=True)
    return View("title", 2000, console=console, **changes), file


def live(title: str = "Ant-v5  td3") -> tuple[View, io.StringIO]:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=90, highlight=False)
    return View(title, 2000, console=console), file


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "-"), (0.0, "0"), (7, "7"), (12345678, "12345678"), (99.94, "99.9"),
     (-123.46, "-123.5"), (1e-7, "1e-07"), (0.123456, "0.123")],
)  # fmt: skip
def test_numbers_are_short(value: float | None, shown: str) -> None:
    assert number(value) == shown


def test_epoch_line() -> None:
    assert epoch_line(ROW, 9000) == (
        "epoch 3  step 3000/9000  eval 123.5 +- 0.0457  train -  critic_loss 1.5  q -0.25"
        "  firing 0.123  100 steps/s  62 s  energy -"
    )


def test_a_layer_that_can_learn_no_more_is_named() -> None:
    row = {
        "layer_window_fractions": [0.2, 0.0005, 0.001],
        "layer_silent": [0.0, 0.75, 0.0],
        "layer_saturated": [0.0, 0.25, 0.0],
    }
    assert stuck_layers(row) == {
        2: "warning: spiking layer 2 of 3 hardly learns any more: 0.05% of its voltages lie inside"
        " the surrogate window (75% of its neurons never fire, 25% always);"
        " docs/neurons.md says what helps"
    }
    assert stuck_layers({"layer_window_fractions": None}) == {}  # a dense actor


def test_lines_where_there_is_no_terminal(clock: Clock) -> None:
    shown, file = plain()
    clock.now += 59.0
    shown.progress(Progress(step=900))
    assert file.getvalue() == ""
    clock.now += 1.0
    shown.progress(Progress(step=1200, losses={"critic_loss": 0.5}))
    shown.progress(Progress(step=1300))
    assert file.getvalue() == "step 1200/2000  20 steps/s  40 s left  critic_loss 0.5\n"
    shown.epoch(ROW)
    shown.close()
    assert file.getvalue().splitlines()[1] == epoch_line(ROW, 2000)


def test_a_resumed_run_is_as_fast_as_since_it_went_on(clock: Clock) -> None:
    shown, file = plain(first_step=1000)
    clock.now += 100.0
    shown.progress(Progress(step=1500))
    assert file.getvalue().startswith("step 1500/2000  5 steps/s  100 s left  critic_loss -")


def test_a_resumed_run_keeps_its_best(clock: Clock) -> None:
    shown, _ = plain(first_step=1000, best=500.0)
    shown.epoch(ROW)
    assert shown.best == 500.0
    shown.epoch(ROW | {"eval_return": 500.5})
    assert shown.best == 500.5


def test_the_loss_of_an_epoch() -> None:
    """The line has the critics' loss, or the actor's if there is none."""
    for critic, actor, shown in (
        (None, None, "critic_loss -"), (None, 2.5, "actor_loss 2.5"), (1.5, 2.5, "critic_loss 1.5"),
    ):  # fmt: skip
        assert f"  {shown}  q" in epoch_line(ROW | {"critic_loss": critic, "actor_loss": actor}, 1)


def test_nothing_done_yet(clock: Clock) -> None:
    shown, file = plain()
    clock.now += 60.0
    shown.progress(Progress())
    assert file.getvalue() == "step 0/2000  0 steps/s  inf s left  critic_loss -\n"


def test_panel(clock: Clock) -> None:
    shown, file = live()
    shown.epoch({**ROW, "eval_return": 50.0})
    shown.epoch({**ROW, "eval_return": 20.0})
    clock.now += 10.0
    file.truncate(0)
    stage = Progress(500, 123, 1, {"critic_loss": 2.5, "actor_loss": -3.25}, [7.5, 8.5])
    shown.progress(stage)
    text = file.getvalue()
    shown.close()
    words = " ".join(text.replace("│", " ").split())
    for part in (
        "Ant-v5 td3",
        "500/2000",
        "25%",
        "eval return 20 best 50",
        "episode return 8.5 firing rate 0.123",
        "critic loss 2.5 actor loss -3.25",
        "steps/s 50 updates 123",
    ):
        assert part in words


def test_the_panel_is_drawn_a_few_times_a_second(clock: Clock) -> None:
    shown, file = live()
    sizes = []
    for seconds in (0.3, 0.1, 0.1, 0.1):
        clock.now += seconds
        shown.progress(Progress(step=1))
        sizes.append(len(file.getvalue()))
    shown.close()
    assert sizes[0] == sizes[1] == sizes[2] < sizes[3]


@pytest.mark.parametrize("title", ["runs/a[/b]", "[red]x", "x/:cat:/y"])
def test_names_are_shown_as_they_are(title: str) -> None:
    shown, file = live(title)
    shown.line(f"at {title}")
    shown.close()
    assert f"at {title}" in file.getvalue()
    assert f"─ {title} ─" in file.getvalue()
