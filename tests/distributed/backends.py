"""The same 200 updates over any backend; the states of all workers after them, and how they differ.

`backends.py OUT BACKEND` is one of the workers: mpiexec of any MPI starts it, or a caller that sets
the variables that torchrun would set.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from builders import small_config

from spikerl.distributed import mpi
from spikerl.distributed.launchers import ranked
from spikerl.distributed.world import World, join, leave
from spikerl.envs.make import make_env, task_of
from spikerl.training.trainer import Trainer

UPDATES = 200
State = dict[str, Tensor]


def states(out: Path, backend: str, size: int, start: list[str]) -> list[State]:
    """Run `size` workers; their states. `start` is the start of the command, ending in a Python."""
    command = [*start, __file__, str(out), backend]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    several = [environ]
    if backend == "gloo":
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1])}
        several = [{**environ, **place, "RANK": str(rank), "WORLD_SIZE": str(size)}
                   for rank in range(size)]  # fmt: skip
    running = [subprocess.Popen(command, env=each) for each in several]
    try:
        assert [process.wait(100) for process in running] == [0] * len(running)
    finally:
        for process in running:
            process.kill()
    return read(out, backend, size)


def read(out: Path, backend: str, size: int) -> list[State]:
    return [load_file(out / name_of(backend, rank, size)) for rank in range(size)]


def differ(a: State, b: State) -> float:
    """The largest difference of two entries, relative to the largest entry of their tensor."""
    assert a.keys() == b.keys()
    largest = [0.0]
    for name in a:
        scale = float(a[name].double().abs().max())
        largest.append(float((a[name].double() - b[name].double()).abs().max()) / (scale or 1.0))
    return max(largest)


def name_of(backend: str, rank: int, size: int) -> str:
    return f"{backend}_{rank}_of_{size}.safetensors"


def main(out: Path, backend: str) -> None:
    torch.set_num_threads(1)
    assert ranked()
    world = join(backend, torch.device("cpu"))
    train(world, out, backend)
    world.barrier()
    mpi.leave()
    leave()


def train(world: World, out: Path, backend: str) -> None:
    """Train as one worker, then save its learner's state."""
    # Ten updates at each of the steps 50, 60, ..., 240.
    training = small_config(num_envs=4, total_steps=240, steps_per_epoch=120, eval_episodes=4)
    with closing(make_env(training.env)) as env:
        task = task_of(env)
    with closing(Trainer(training, task, world=world)) as trainer:
        assert len(list(trainer.epochs())) == 2
        assert trainer.algo.updates == UPDATES
        state = {name: t.clone() for name, t in trainer.learner_state().items()}
    save_file(state, out / name_of(backend, world.rank, world.size))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
