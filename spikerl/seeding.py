"""Named random streams: each is seeded from (run seed, stream, index), and none is global."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

RESET_BITS = 31
STREAMS = ("init", "env", "explore", "sample", "update", "eval")


def seed_for(run_seed: int, stream: str, *index: int) -> int:
    """A 63-bit seed that depends on every argument and on nothing else."""
    # spawn_key, not one entropy list: SeedSequence pads short lists with zeros, so (1,) == (1, 0).
    sequence = np.random.SeedSequence(run_seed, spawn_key=(STREAMS.index(stream), *index))
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def reset_seed(bits: int, run_seed: int, stream: str, *index: int) -> int:
    """The low `bits` of `seed_for`'s seed, for an environment's reset.

    New runs take RESET_BITS of them, as numpy's older generators and libraries in C accept no
    more; runs of version 0.1 were begun with all 63.
    """
    return seed_for(run_seed, stream, *index) & ((1 << bits) - 1)


def generator_for(
    run_seed: int, stream: str, *index: int, device: torch.device | str = "cpu"
) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed_for(run_seed, stream, *index))


@contextmanager
def initialising(run_seed: int) -> Iterator[None]:
    """Inside, layers draw their first weights from the `init` stream, the same on every worker."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(run_seed, "init"))
        yield


class Streams:
    """The generators that one worker draws from while it trains."""

    def __init__(
        self, run_seed: int, worker: int, device: torch.device, acting_on: torch.device
    ) -> None:
        self.explore = generator_for(run_seed, "explore", worker, device=acting_on)
        self.sample = generator_for(run_seed, "sample", worker)
        self.update = generator_for(run_seed, "update", worker, device=device)

    def restart(self, run_seed: int, worker: int, resumed_at: int) -> None:
        """Begin streams that no worker has drawn from, where a resume cannot load the old ones."""
        for name, generator in vars(self).items():
            generator.manual_seed(seed_for(run_seed, name, worker, resumed_at))

    def state(self) -> dict[str, Tensor]:
        return {name: generator.get_state() for name, generator in vars(self).items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        for name, generator in vars(self).items():
            generator.set_state(state[name])
