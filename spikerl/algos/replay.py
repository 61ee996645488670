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
    """Ring of transitions, a `Row` each.

    Normalisation happens at sampling, with the moments of that moment, so that no stored row is
    ever stale. Memory grows with what is stored.
    """

    FIRST = 1 << 14  # rows that there is room for at the start

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
        self.saved = 0  # rows that a checkpoint holds already
        self.width = width  # environments whose rows come together, in their order
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

        NonFinite: a reward is beyond float32, as scaling or a sum of such may make it.
        """
        row = self.row
        rows = np.empty((len(rew), row.columns), np.float32)
        rows[:, : row.obs_width] = row.pack(obs)
        rows[:, row.obs_width : row.act_start] = row.pack(next_obs)
        rows[:, row.act_start : row.rew_column] = act
        with np.errstate(over="ignore"):  # looked at below
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
        """Have room for so many rows, and for twice as many as before where it has to grow.

        MemoryError where there is none; what is stored stays.
        """
        if count <= len(self.rows):
            return
        count = min(max(count, 2 * len(self.rows)), self.capacity)
        try:
            rows = self.rows.new_empty(count, self.rows.shape[1])
        except RuntimeError as error:  # torch's, of the CPU and of CUDA
            size = count * self.rows.shape[1] * self.rows.element_size() / 2**30
            text = f"no {size:.3g} GiB for {count} transitions of algo.replay_capacity"
            raise MemoryError(f"{text}={self.capacity}: give less") from error
        rows[: len(self.rows)] = self.rows
        self.rows = rows

    def put(self, start: int, rows: Tensor) -> None:
        """Write rows number `start` onwards; of more than the capacity, the last ones stay."""
        start, rows = start + max(0, len(rows) - self.capacity), rows[-self.capacity :]
        head = start % self.capacity
        first = min(len(rows), self.capacity - head)
        self.reserve(min(start + len(rows), self.capacity))
        self.rows[head : head + first] = rows[:first]
        if first < len(rows):
            self.rows[: len(rows) - first] = rows[first:]

    def restore(self, numbers: Tensor, rows: Tensor) -> None:
        """Write rows with these numbers, of which it holds as many at once."""
        self.rows[(numbers % self.capacity).to(self.rows.device)] = rows.to(self.rows.device)

    def sound(self) -> bool:
        """Whether every number that it holds is finite."""
        return bool(self.rows[: self.size, self.row.numbers].isfinite().all())

    def interleave(self) -> None:
        """Take rows that came environment by environment, as many of each, for steps of all."""
        rows = self.rows[: self.added]
        each = rows.unflatten(0, (self.width, -1))
        rows.copy_(each.transpose(0, 1).flatten(0, 1))

    def between(self, start: int, stop: int) -> Tensor:
        """Rows number `start` to `stop`, which it must still hold."""
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
        """Rows drawn with replacement, their observations normalised; of `n_step` steps each, of
        fewer where an episode ends or its next step is not stored.
        """
        index = torch.randint(self.size, (count,), generator=generator, dtype=torch.int64)
        index = index.to(self.rows.device)
        rows = self.rows[index] if n_step == 1 else self._over(index, n_step)
        return self._batch(rows, normalize)[0]

    def _over(self, index: Tensor, n_step: int) -> Tensor:
        """Rows from there over up to `n_step` steps: their rewards' discounted sum, the product of
        their discounts, and the end of the last of them.
        """
        W, act, rew = self.row.obs_width, self.row.act_start, self.row.rew_column
        newest = self.added - 1
        number = newest - (newest - index) % self.capacity  # of the last step so far
        whole = self.rows[index]
        end = whole.clone()
        for _ in range(n_step - 1):
            following = number + self.width
            there = following <= newest
            following = torch.where(there, following, number)
            step = self.rows[following % self.capacity]
            # It begins where the last one ended: not so after a resume that reset environments.
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
        """From steps drawn with replacement, the `length` steps that follow, up to their episode's
        end; where they are fewer, padding comes before.

        Of rows whose `rew` is a return to go, and whose `discount` is a time.
        """
        W, act, rew = self.row.obs_width, self.row.act_start, self.row.rew_column
        device = self.rows.device
        first = torch.randint(self.size, (count,), generator=generator, dtype=torch.int64)
        place = torch.arange(length, dtype=torch.int64, device=device)
        first = first.to(device).unsqueeze(1)
        number = first + self.width * place
        last = self.rows[number.clamp(max=self.added - 1), rew + 2] > 0.0
        # Of whole numbers: on a GPU a sum of others is not deterministic.
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
        """The newest rows as they came, step by step and environment by environment; of each,
        whether it was its episode's last.
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
    """Where the rows of updates come from: drawn with this stream, normalised as they are now."""

    replay: Replay
    generator: torch.Generator
    normalize: Callable[[Tensor], Tensor]

    def batch(self, count: int, n_step: int = 1) -> Batch:
        return self.replay.sample(count, self.generator, self.normalize, n_step)

    def contexts(self, count: int, length: int) -> Contexts:
        return self.replay.contexts(count, length, self.generator, self.normalize)

    def newest(self, count: int) -> tuple[Batch, Tensor]:
        return self.replay.newest(count, self.normalize)
