"""Pictures of many lines: each can be told from the others, and the legend leaves room for them."""

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
        warnings.simplefilter("error")  # matplotlib's where nothing is left for the panel
        assert curves.encoded(figure, "png").startswith(b"\x89PNG")
    (ax,) = figure.axes
    assert len({(line.get_color(), line.get_linestyle()) for line in ax.lines}) == 40
    height = ax.get_position().height * figure.get_figheight()
    assert 1.5 < height < 2.7  # inches
