"""Datasets with random damage, as of an untrusted source."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any

import fuzz_inputs as odd
import numpy as np
import torch
from builders import INVERTED_PENDULUM
from recorded import episode, task_for, write

from spikerl.envs.dataset import FIELDS, MAIN, METADATA, Dataset

# What h5py may raise while a damaged file is made here.
UNMADE = (ValueError, TypeError, KeyError, OSError, RuntimeError, OverflowError, MemoryError)


def dataset(folder: Path) -> Callable[[Random], bool]:
    """Damaged bytes, HDF5 fields or metadata; mostly the checksum is that of the damaged file."""
    task = task_for(INVERTED_PENDULUM)
    write(folder / "d", [episode(5), episode(3, 9.0, False)])
    main, metadata = folder / "d" / MAIN, folder / "d" / METADATA
    whole, facts = main.read_bytes(), json.loads(metadata.read_text())

    def case(chance: Random) -> bool:
        main.write_bytes(whole)
        described, kind = dict(facts), chance.randrange(4)
        if kind == 0:
            main.write_bytes(odd.mutated(chance, whole))
        elif kind == 1:
            with suppress(*UNMADE):
                respell(chance, main)
        elif kind == 2:
            described = odd.twisted(chance, facts)
        if isinstance(described, dict) and chance.random() < 0.8:
            described["sha256"] = hashlib.sha256(main.read_bytes()).hexdigest()
        text = json.dumps(described).encode()
        metadata.write_bytes(odd.mutated(chance, text) if kind == 3 else text)
        Dataset.open(folder / "d", task, 1 << 24).check()
        return True

    return case


def respell(chance: Random, path: Path) -> None:
    """Remove one to three fields, or replace them by links or by data of other types, sizes and
    filters.
    """
    h5py: Any = import_module("h5py")
    with h5py.File(path, "a") as file:
        for _ in range(chance.choice((1, 1, 2, 3))):
            group = file[chance.choice(("episode_0", "episode_1"))]
            name = chance.choice(FIELDS)
            values = group[name][()]
            del group[name]
            kind = chance.randrange(11)
            if kind == 0:
                group[name] = h5py.ExternalLink(chance.choice(("/etc/passwd", "x.h5")), "/x")
            elif kind == 1:
                group[name] = h5py.SoftLink(chance.choice(("/", "..", "/episode_0", "nowhere")))
            elif kind == 2:
                group[name] = file[chance.choice(("/", "episode_0", "episode_1"))]
            elif kind == 3:
                group[name] = odd.odd_tensor(chance, torch.from_numpy(values)).numpy()
            elif kind == 4:
                group[name] = chance.choice((odd.value(chance), np.void(b"\0" * 9), "touch hit"))
            elif kind == 5:
                size = chance.choice((2**20, 2**33, 2**40))
                group.create_dataset(name, (size, *values.shape[1:]), values.dtype, chunks=True)
            elif kind == 6:
                code = chance.choice(("gzip", "lzf", "szip", 307, 32015))
                group.create_dataset(name, data=values, compression=code, chunks=True)
            elif kind == 7:
                places = [(chance.choice(("/etc/passwd", "/dev/zero", "own")), 0, values.nbytes)]
                group.create_dataset(name, values.shape, values.dtype, external=places)
            elif kind == 8:
                virtual = h5py.VirtualLayout(values.shape, values.dtype)
                place = chance.choice(("/etc/x", "."))
                virtual[...] = h5py.VirtualSource(place, name, values.shape)
                group.create_virtual_dataset(name, virtual)
            elif kind == 9:
                length = chance.choice((bytes, str, np.float64))
                group.create_dataset(name, values.shape, h5py.special_dtype(vlen=length))
