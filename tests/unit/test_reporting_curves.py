"""Plots of many lines: all lines look different, and the legend leaves room for the panel."""

from __future__ import annotations

import warnings

import numpy as np

from spikerl.reporting import curves


def test_forty_lines() -> None:
    x = np.arange(3.0)
    panel = {f"algo.critic_lr={i}": [(x, x + i)] for i in range(40)}
    figure = curves.curves({"Ant-v5": panel}, "step", "return")
    assert figure is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns if no room is left
        assert curves.encoded(figure, "png").startswith(b"\x89PNG")
    (ax,) = figure.axes
    assert len({(line.get_color(), line.get_linestyle()) for line in ax.lines}) == 40
    height = ax.get_position().height * figure.get_figheight()
    assert 1.5 < height < 2.7  # inches


def test_as_many_points() -> None:
    """Twenty labels have different markers; the legend has the counts of runs of all panels."""
    panel: dict[str, list[curves.Point]] = {
        str(i): [(1.0 + i, 2.0), (2.0 + i, 3.0)] for i in range(20)
    }
    panels: dict[str, dict[str, list[curves.Point]]] = {
        "Ant": dict(panel),
        "Hopper": {"0": [(1.0, 2.0), (None, 9.0)], "1": [(1.0, 2.0), (2.0, 2.0)]},
    }
    figure = curves.scatter(panels, "x", "y", lines=False)
    assert figure is not None
    points = [line for line in figure.axes[0].lines if line.get_marker() != "x"]
    assert len({(line.get_color(), line.get_marker()) for line in points}) == 20
    (legend,) = figure.legends
    shown = [text.get_text() for text in legend.get_texts()]
    assert shown[:3] == ["0 (n=1 to 2)", "1 (n=2)", "2 (n=2)"]


def test_runs_of_other_evaluations_make_no_zigzag() -> None:
    """Between its own evaluations a run is interpolated; before its first it does not count."""
    lines = [
        (np.array([10.0, 20.0]), np.array([1000.0, 1000.0])),
        (np.array([5.0, 10.0, 15.0, 20.0]), np.full(4, 2000.0)),
    ]
    x, mean, _, _ = curves.band(lines, shared=True)
    assert (x.tolist(), mean.tolist()) == ([5, 10, 15, 20], [2000, 1500, 1500, 1500])


def test_runs_that_never_meet_have_no_mean() -> None:
    lines = [(np.array([10.0, 30.0]), np.ones(2)), (np.array([100.0, 200.0]), np.ones(2))]
    assert all(len(part) == 0 for part in curves.band(lines, shared=False))
