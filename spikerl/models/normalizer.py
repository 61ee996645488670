"""Running z-score of observations.

Shape legend   B batch, O observation entries.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from spikerl.errors import NonFinite

MOST = 1 << 53  # observations; a float64 counts exactly up to here
EPS = float(np.finfo(np.float32).eps)  # added to the variance, as PopSAN's code does
# Bounds of |mean| / std. Beyond the first, float32 has less than 12 of its 24 bits for what varies;
FAR = float(1 << 12)
# beyond the second less than 8, and observations replayed in float32 are too coarse.
TOO_FAR = float(1 << 16)
AT_ONCE = 1 << 20  # numbers whose moments are computed together; bounds the copies in float64


def moments_of(rows_MO: np.ndarray) -> np.ndarray:
    """Count, mean and variance of M observations, (1 + 2 O,); large M in groups of entries."""
    count, entries = rows_MO.shape
    if not count:
        return np.zeros(1 + 2 * entries)
    # At least two entries at a time: numpy sums a single column in another order.
    parts = min(-(-rows_MO.size // AT_ONCE), max(entries // 2, 1))
    blocks = (np.asarray(part, np.float64) for part in np.array_split(rows_MO, parts, axis=1))
    with np.errstate(over="ignore", invalid="ignore"):  # `merge` checks the moments
        means, variances = zip(*((block.mean(0), block.var(0)) for block in blocks), strict=True)
    return np.concatenate([[count], *means, *variances])


class RunningNorm:
    """Float64 moments of all observations seen; identity until the first merge.

    Observations wait in `pending` and are merged together (Chan et al., 1979), so that the moments
    change only between updates and, with several workers, everywhere at once.
    """

    def __init__(self, obs_dim: int, clip: float | None) -> None:
        # Normalised observations lie in [-clip, clip]; always a number, as policy files need one.
        self.clip = float(np.finfo(np.float32).max) if clip is None else clip
        self.count = 0
        self.mean_O = np.zeros(obs_dim)
        self.var_O = np.ones(obs_dim)
        self.pending: list[np.ndarray] = []
        self._refresh()

    def add(self, obs_BO: np.ndarray) -> None:
        self.pending.append(np.array(obs_BO, np.float64))  # a copy: environments reuse their arrays

    def pending_rows(self) -> np.ndarray:
        """Observations that wait to be merged, (M, O)."""
        return np.concatenate(self.pending) if self.pending else np.empty((0, len(self.mean_O)))

    def collect(self) -> np.ndarray:
        """Remove the pending observations; returns their count, mean and variance, (1 + 2 O,)."""
        rows, self.pending = self.pending_rows(), []
        return moments_of(rows)

    def merge(self, collected: Sequence[np.ndarray]) -> None:
        """Merge the moments that every worker collected, in rank order.

        Raises NonFinite if the result is not finite, or counts `MOST` or more observations.
        """
        O = len(self.mean_O)  # noqa: E741
        with np.errstate(over="ignore", invalid="ignore"):  # checked below
            for part in collected:
                self._merge_one(int(part[0]), part[1 : 1 + O], part[1 + O : 1 + 2 * O])
        sound = np.isfinite(self.mean_O) & np.isfinite(self.var_O) & (self.var_O >= 0.0)
        if not sound.all() or self.count >= MOST:
            i = int(np.argmin(sound))
            raise NonFinite(
                f"the observation normaliser diverged: entry {i} has mean {self.mean_O[i]:.3g} and"
                f" variance {self.var_O[i]:.3g} of {self.count:.3g} observations"
            )
        self._refresh()

    def _merge_one(self, count: int, mean: np.ndarray, var: np.ndarray) -> None:
        if count == 0:
            return
        total = self.count + count
        delta = mean - self.mean_O
        squares = self.var_O * self.count + var * count + delta**2 * (self.count * count / total)
        self.mean_O = self.mean_O + delta * (count / total)
        self.var_O = squares / total
        self.count = total

    def normalize(self, obs_BO: Tensor) -> Tensor:
        """clip((obs - mean) / sqrt(var + eps)) of float32 or float64 (B, O), in float32.

        Computed in float64 if some mean is so far from 0 that float32 would lose digits of what
        varies (`far`), otherwise in float32, which is faster.
        """
        moments = (self.exact_mean_std if self.far else self.mean_std).to(obs_BO.device)
        mean, std = moments
        near = ((obs_BO.to(moments.dtype) - mean) / std).clamp(-self.clip, self.clip)
        return near.to(torch.float32)

    def observe(self, obs_BO: np.ndarray, device: torch.device) -> Tensor:
        """Normalised raw observations, float32 (B, O)."""
        obs = torch.from_numpy(obs_BO.astype(np.float64 if self.far else np.float32))
        return self.normalize(obs.to(device))

    def coarse(self) -> dict[int, str]:
        """A warning for each entry whose variation the float32 replay resolves too coarsely."""
        far = np.flatnonzero(self._varies() & (np.abs(self.mean_O) > TOO_FAR * self._std()))
        return {
            int(i): f"warning: observation entry {i} lies around {self.mean_O[i]:.3g} and deviates"
            f" by {np.sqrt(self.var_O[i]):.2g}: learning replays float32, which has steps of"
            f" {np.spacing(np.float32(abs(self.mean_O[i]))):.2g} there; subtract a constant from it"
            " in the environment"
            for i in far
        }

    def _std(self) -> np.ndarray:
        return np.asarray(np.sqrt(self.var_O + EPS))

    def _varies(self) -> np.ndarray:
        """Per entry, whether its deviation is above rounding errors and not negligible to `EPS`."""
        least = np.maximum(1e-2 * np.sqrt(EPS), 1e-12 * np.abs(self.mean_O))
        return np.asarray(np.sqrt(self.var_O) > least)

    def state(self) -> dict[str, Tensor]:
        return {
            "count": torch.tensor(self.count, dtype=torch.int64),
            "mean": torch.from_numpy(self.mean_O.copy()),
            "var": torch.from_numpy(self.var_O.copy()),
        }

    def load(self, state: dict[str, Tensor]) -> None:
        self.count = int(state["count"])
        self.mean_O = state["mean"].numpy().astype(np.float64)
        self.var_O = state["var"].numpy().astype(np.float64)
        self._refresh()

    def _refresh(self) -> None:
        moments = np.stack([self.mean_O, self._std()])
        self.mean_std = torch.from_numpy(moments.astype(np.float32))
        self.exact_mean_std = torch.from_numpy(moments)
        self.far = bool((self._varies() & (np.abs(self.mean_O) > FAR * self._std())).any())
