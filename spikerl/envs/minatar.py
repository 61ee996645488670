"""The games of MinAtar (Young and Tian, 2019, arXiv:1903.03176), whose package is an extra."""

from __future__ import annotations

from typing import Any

import numpy as np
from minatar.gym import BaseEnv


class MinAtar(BaseEnv):  # type: ignore[misc]  # it has no types
    """An episode begins without a last action: its own repeats it with a probability of 0.1, and so
    would carry one episode's into the next.
    """

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        self.game.last_action = 0
        obs, info = super().reset(seed, options)
        return obs, info
