"""Replay: transitions as they were seen, raw and unnormalised.

Shape legend   B batch, K steps of a context, O observation entries, A action entries, W columns of
               an observation, C columns of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from spikerl.errors import NonFinite
from spikerl.types import Batch, Contexts, Row


class Replay:
    """Ring buffer of transitions, each laid out as a `Row`.

    Rows are normalised when they are sampled, with the normaliser's current moments, so no stored
    row becomes stale. Memory grows with the number of stored rows.
    """

    FIRST = 1 << 14  # rows allocated at the start

    def __init__(
        self,
        capacity: int,
        obs_dim: int,
        act_dim: int,
        device: torch.device | str = "cpu",
        *,
        width: int = 1,
        obs_bytes: bool = False,
    ) -> None:
        self.capacity = capacity
        self.added = 0  # rows ever stored; row k lies at k modulo capacity
        self.saved = 0  # rows already held by a checkpoint
        self.width = width  # environments; each step adds one row per environment, in order
        self.row = Row(obs_dim, act_dim, obs_bytes)
        self.rows = torch.empty(0, self.row.columns, dtype=torch.float32, device=device)
        self.reserve(min(capacity, self.FIRST))

    def add(
        self,
        obs: np.ndarray,
        act: np.ndarray,
        rew: np.ndarray,
        next_obs: np.ndarray,
        terminated: np.ndarray,
        last: np.ndarray,
        discount: float | np.ndarray,
    ) -> None:
        """Store B transitions: obs and next_obs (B, O), act (B, A), the others (B,).

        Raises NonFinite if a reward, perhaps scaled or summed, exceeds float32's range.
        """
        row = self.row
        rows = np.empty((len(rew), row.columns), np.float32)
        rows[:, : row.obs_width] = row.pack(obs)
        rows[:, row.obs_width : row.act_start] = row.pack(next_obs)
        rows[:, row.act_start : row.rew_column] = act
        with np.errstate(over="ignore"):  # checked below
            rows[:, row.rew_column] = rew
        if not np.isfinite(rows[:, row.rew_column]).all():
            worst = np.abs(rew).max()
            raise NonFinite(f"learning would see a reward of {worst:.3g}, which float32 lacks")
        rows[:, row.rew_column + 1], rows[:, row.rew_column + 2] = terminated, last
        rows[:, row.rew_column + 3] = discount
        self.put(self.added, torch.from_numpy(rows))
        self.added += len(rows)

    @property
    def size(self) -> int:
        return min(self.added, self.capacity)

    def reserve(self, count: int) -> None:
        """Make room for `count` rows; the room at least doubles when it has to grow.

        Raises MemoryError if it cannot be allocated; the stored rows remain.
        """
        if count <= len(self.rows):
            return
        count = min(max(count, 2 * len(self.rows)), self.capacity)
        try:
            rows = self.rows.new_empty(count, self.rows.shape[1])
        except RuntimeError as error:  # torch's error for a failed allocation, on CPU and CUDA
            size = count * self.rows.shape[1] * self.rows.element_size() / 2**30
            text = f"no {size:.3g} GiB for {count} transitions of algo.replay_capacity"
            raise MemoryError(f"{text}={self.capacity}: give less") from error
        rows[: len(self.rows)] = self.rows
        self.rows = rows

    def put(self, start: int, rows: Tensor) -> None:
        """Write rows with numbers from `start` on; of more than the capacity only the last ones."""
        start, rows = start + max(0, len(rows) - self.capacity), rows[-self.capacity :]
        head = start % self.capacity
        first = min(len(rows), self.capacity - head)
        self.reserve(min(start + len(rows), self.capacity))
        self.rows[head : head + first] = rows[:first]
        if first < len(rows):
            self.rows[: len(rows) - first] = rows[first:]

    def restore(self, numbers: Tensor, rows: Tensor) -> None:
        """Write rows with these numbers, which the ring must be able to hold at the same time."""
        self.rows[(numbers % self.capacity).to(self.rows.device)] = rows.to(self.rows.device)

    def sound(self) -> bool:
        """Whether every stored number is finite."""
        return bool(self.rows[: self.size, self.row.numbers].isfinite().all())

    def interleave(self) -> None:
        """Reorder rows that came environment by environment, equally many of each, by step."""
        rows = self.rows[: self.added]
        each = rows.unflatten(0, (self.width, -1))
        rows.copy_(each.transpose(0, 1).flatten(0, 1))

    def between(self, start: int, stop: int) -> Tensor:
        """Rows with numbers `start` to `stop` - 1, which must still be stored."""
        head, tail = start % self.capacity, start % self.capacity + stop - start
        rows = self.rows[head:tail]
        return (
            rows if tail <= self.capacity else torch.cat([rows, self.rows[: tail % self.capacity]])
        )

    def sample(
        self,
        count: int,
        generator: torch.Generator,
        normalize: Callable[[Tensor], Tensor],
        n_step: int = 1,
    ) -> Batch:
        """Rows drawn with replacement, with normalised observations.

        Each row spans `n_step` steps, or fewer where its episode ends or the next step is not
        stored.
        """
        index = torch.randint(self.size, (count,), generator=generator, dtype=torch.int64)
        index = index.to(self.rows.device)
        rows = self.rows[index] if n_step == 1 else self._over(index, n_step)
        return self._batch(rows, normalize)[0]

    def _over(self, index: Tensor, n_step: int) -> Tensor:
        """Rows that begin at `index` and span up to `n_step` steps each: the discounted sum of the
        rewards, the product of the discounts, and next_obs, terminated and last of the last step.
        """
        W, act, rew = self.row.obs_width, self.row.act_start, self.row.rew_column
        newest = self.added - 1
        number = newest - (newest - index) % self.capacity  # row number of the last step so far
        whole = self.rows[index]
        end = whole.clone()
        for _ in range(n_step - 1):
            following = number + self.width
            there = following <= newest
            following = torch.where(there, following, number)
            step = self.rows[following % self.capacity]
            # A step counts only if it continues the one before: the episode did not end there, and
            # no resume reset the environment.
            there &= self._same(step[:, :W], end[:, W:act]) & (end[:, rew + 2] == 0.0)
            discount = whole[:, -1]
            whole[:, rew] += torch.where(there, discount * step[:, rew], 0.0)
            whole[:, -1] = torch.where(there, discount * step[:, -1], discount)
            number = torch.where(there, following, number)
            end = torch.where(there.unsqueeze(1), step, end)
        whole[:, W:act] = end[:, W:act]
        whole[:, rew + 1 : rew + 3] = end[:, rew + 1 : rew + 3]
        return whole

    def _same(self, obs: Tensor, other: Tensor) -> Tensor:
        """Whether columns (B, W) hold the same observation, (B,)."""
        if self.row.obs_bytes:
            obs, other = obs.view(torch.int32), other.view(torch.int32)
        return (obs == other).all(-1)

    def contexts(
        self,
        count: int,
        length: int,
        generator: torch.Generator,
        normalize: Callable[[Tensor], Tensor],
    ) -> Contexts:
        """Contexts of `length` steps from starts drawn with replacement, cut at the episode's end
        and then padded in front.

        In these rows the reward column holds the return to go and the discount column the time.
        """
        W, act, rew = self.row.obs_width, self.row.act_start, self.row.rew_column
        device = self.rows.device
        first = torch.randint(self.size, (count,), generator=generator, dtype=torch.int64)
        place = torch.arange(length, dtype=torch.int64, device=device)
        first = first.to(device).unsqueeze(1)
        number = first + self.width * place
        last = self.rows[number.clamp(max=self.added - 1), rew + 2] > 0.0
        # A cumulative sum of integers: on a GPU one of floats is not deterministic.
        ended = (last.cumsum(1) > last) | (number >= self.added)
        missing = ended.sum(1, keepdim=True)
        there = place >= missing
        rows = self.rows[first + self.width * (place - missing).clamp(min=0)]
        obs = normalize(self.row.unpack(rows[:, :, :W]))
        mask = there.unsqueeze(2)
        return Contexts(
            obs=torch.where(mask, obs, 0.0),
            act=torch.where(mask, rows[:, :, act:rew], 0.0),
            togo=torch.where(there, rows[:, :, rew], 0.0),
            time=torch.where(there, rows[:, :, -1].long(), 0),
            there=there,
        )

    def newest(self, count: int, normalize: Callable[[Tensor], Tensor]) -> tuple[Batch, Tensor]:
        """The newest `count` rows in the order of storage (by step, then by environment), and
        whether each was the last of its episode.
        """
        return self._batch(self.between(self.added - count, self.added), normalize)

    def _batch(self, rows: Tensor, normalize: Callable[[Tensor], Tensor]) -> tuple[Batch, Tensor]:
        row = self.row
        both = row.unpack(rows[:, : row.act_start].unflatten(1, (2, row.obs_width)))
        obs, next_obs = normalize(both).unbind(1)
        rew, terminated, last, discount = rows[:, row.rew_column :].unbind(1)
        act = rows[:, row.act_start : row.rew_column]
        fields = (obs, act, rew, next_obs, terminated > 0, discount)
        return Batch(*(field.contiguous() for field in fields)), last > 0


class Sampler(NamedTuple):
    """Draws rows for updates with its own generator, normalised with the current moments."""

    replay: Replay
    generator: torch.Generator
    normalize: Callable[[Tensor], Tensor]

    def batch(self, count: int, n_step: int = 1) -> Batch:
        return self.replay.sample(count, self.generator, self.normalize, n_step)

    def contexts(self, count: int, length: int) -> Contexts:
        return self.replay.contexts(count, length, self.generator, self.normalize)

    def newest(self, count: int) -> tuple[Batch, Tensor]:
        return self.replay.newest(count, self.normalize)
