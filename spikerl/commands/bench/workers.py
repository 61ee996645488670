"""What an update of several workers takes, how much of it their exchanges are, and what these take
alone.

Every turn begins behind a barrier, and rank 0's clock counts. The time that an update spends in
exchanges includes the wait for the slowest worker.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spikerl.algos.offpolicy import OffPolicy
from spikerl.commands.bench.fixtures import BURST, Subject
from spikerl.commands.bench.timing import (
    Benchmark,
    Measurement,
    Ratios,
    measurement,
    ratio,
    run_interleaved,
)
from spikerl.commands.train import own_device
from spikerl.config import build as configs
from spikerl.config.build import Config
from spikerl.distributed import launch, mpi
from spikerl.distributed.world import BackendConfig, World, join, leave, resolve_backend, share
from spikerl.errors import BadRequest
from spikerl.training.trainer import SYNCHRONISED

SHARED = "shared memory"
ALONE, NORMALISER = "alone", "exchange of the normaliser"
LENGTHS = [4**power for power in (0, 5, 6, 7, 8, 9, 10, 11)]  # of vectors, in float32 numbers


@dataclass(kw_only=True)
class Job:
    part: str  # workers or exchange
    batch: int
    rounds: int
    run: str | None


@dataclass
class Found:
    measurements: list[Measurement] = field(default_factory=list)
    ratios: Ratios = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)  # and why


@dataclass(frozen=True)
class Watched(World):
    """Keeps the times that sums took."""

    spent_ms: list[float] = field(default_factory=list)

    def sum_(self, tensor: Tensor) -> None:
        begun = self.clock(tensor)
        super().sum_(tensor)
        self.spent_ms.append((self.clock(tensor) - begun) * 1e3)

    def clock(self, tensor: Tensor) -> float:
        if tensor.is_cuda:
            torch.cuda.synchronize(tensor.device)
        return time.perf_counter()


# --- the parent -----------------------------------------------------------------------------------


def measure(config: Config, job: Job, sizes: list[int]) -> Found:
    """Each number of workers over each backend that there is for them."""
    found, device = Found(), config.resolved.device.choice
    for size in sizes:
        for backend in ("nccl", "gloo", "mpi") if device != "cpu" else ("gloo", "mpi"):
            try:
                resolve_backend(BackendConfig(name=backend), device, size)
            except BadRequest as error:
                found.left_out[f"{backend}, {size} workers"] = error.args[2]
                continue
            told = launch_workers(config, job, backend, size)
            found.measurements += [Measurement(**m) for m in told["measurements"]]
            found.ratios |= told["ratios"]
            found.left_out |= told["left_out"]
    return found


def launch_workers(config: Config, job: Job, backend: str, size: int) -> dict[str, Any]:
    """What rank 0 of so many workers found."""
    raw = {**config.raw, "threads": 1, "backend": {**config.raw["backend"], "name": backend}}
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        spec = {"bench": asdict(job), "raw": raw, "answer": str(answer)}
        workers = launch.Workers(
            size=size, threads=1, backend=backend, timeout_s=config.backend.timeout_s
        )
        launch.launch(spec, workers)
        return dict(json.loads(answer.read_text(encoding="utf-8")))


# --- a worker -------------------------------------------------------------------------------------


def work(spec: Mapping[str, Any]) -> int:
    """A worker that `measure` launched."""
    config, job = configs.build(spec["raw"]), Job(**spec["bench"])
    device = own_device(config.resolved.device.choice)
    world = join(config.resolved.backend.choice, device, config.backend.timeout_s)
    try:
        worker = Worker(config, job, world, device)
        if job.part == "workers":
            worker.updates()
        else:
            worker.sums()
        if world.rank == 0:
            Path(spec["answer"]).write_text(json.dumps(asdict(worker.found)), encoding="utf-8")
        mpi.leave()
    finally:
        leave()
    return 0


class Worker:
    """What one of the workers does; all take the same turns."""

    def __init__(self, config: Config, job: Job, world: World, device: torch.device) -> None:
        self.config, self.job, self.world, self.device = config, job, world, device
        self.found = Found()

    def ways(self, lengths: list[int]) -> dict[str, World]:
        """Through what vectors of these lengths can be summed."""
        backend, sums = self.config.resolved.backend.choice, self.world.shm
        plain = {backend: replace(self.world, shm=None)}
        if sums and all([sums.sum_(torch.zeros(length)) for length in lengths]):
            return {SHARED: self.world, **plain}
        if backend == "gloo" and self.device.type == "cpu":
            what = f"{SHARED}, {self.world.size} workers, vectors of {max(lengths)}"
            self.found.left_out[what] = "the workers have not so much memory in common"
        return plain

    def time(self, benchmarks: list[Benchmark]) -> list[Measurement]:
        found = run_interleaved(benchmarks, self.job.rounds, 1, self.world.barrier)
        return [replace(m, world_size=self.world.size) for m in found]

    def sums(self) -> None:
        """Sums of vectors of several lengths, and nothing else."""
        benchmarks = []
        for length in LENGTHS:
            times = max(2, min(50, LENGTHS[-1] // length))
            for way, world in self.ways([length]).items():
                vector = torch.zeros(length, device=self.device)
                call = partial(again, times, partial(world.sum_, vector))
                what = f"sum of {length} numbers over {way}"
                benchmarks.append(Benchmark(what, "", "fp32", 1, "", times, call))
        self.found.measurements = self.time(benchmarks)

    def updates(self) -> None:
        """Updates, weak and strong; what they exchange, on its own; and an update of one worker."""
        subject, job, size = Subject(self.config, self.job.run), self.job, self.world.size
        kernel, weights, delay = subject.kernel, subject.weights, subject.algo.policy_delay
        alone = subject.learner(subject.spiking(kernel))
        critic, actor = (
            alone.critic_optimizer.gradient.vector,
            alone.actor_optimizer.gradient.vector,
        )
        pending = torch.zeros(2 * subject.task.obs_dim + 2, dtype=torch.float64)
        rows = {"weak": job.batch, "strong": share(job.batch, self.world.rank, size)}
        watched: dict[str, list[float]] = {}

        def update(name: str, batch: int, learner: OffPolicy) -> Benchmark:
            sample, world = subject.batch(BURST * batch), learner.world

            def call() -> None:
                learner.learn(sample, BURST)
                learner.check()
                if isinstance(world, Watched):
                    watched.setdefault(name, []).append(sum(world.spent_ms) / BURST)
                    world.spent_ms.clear()

            if name == ALONE and self.world.rank > 0:
                call = idle
            return Benchmark(f"update, {name}", kernel, "fp32", batch, weights, BURST, call)

        def exchanges(world: World) -> None:
            for i in range(BURST):
                world.sum_(critic)
                if i % delay == 0:
                    world.sum_(actor)

        def plain(what: str, call: Callable[[], object]) -> Benchmark:
            return Benchmark(what, "", "fp32", 1, "", BURST, call)

        benchmarks = [update(ALONE, job.batch, alone)]
        ways = self.ways([critic.numel(), actor.numel()])
        for way, world in ways.items():
            for scaling, batch in rows.items():
                own = Watched(world.rank, size, world.local_rank, world.exchange, world.shm)
                learner = subject.learner(subject.spiking(kernel), world=own)
                benchmarks.append(update(f"{scaling} over {way}", batch, learner))
            call = partial(exchanges, world)
            benchmarks.append(plain(f"exchanges of an update alone, over {way}", call))
        merge = partial(again, BURST, partial(self.world.gather, pending))
        benchmarks.append(plain(NORMALISER, merge))

        times = {m.what: m for m in self.time(benchmarks)}
        one = times[f"update, {ALONE}"] = replace(times[f"update, {ALONE}"], world_size=1)
        kept, ratios = list(times.values()), self.found.ratios
        for name, spent in watched.items():
            if name == ALONE:
                continue
            whole = times[f"update, {name}"]
            c = plain(f"exchanges of an update, {name}", idle)
            part = replace(measurement(c, spent[1:], 1), batch=whole.batch, world_size=size)
            kept.append(part)
            title = f"updates per second of {size} workers, {name} / one alone"
            ratios[title] = ratio(one.median_ms, whole.median_ms)
            # The normaliser's exchange belongs to so many updates.
            fewer = size if name.startswith("weak") else 1
            interval = subject.algo.norm_interval or SYNCHRONISED
            merging = (
                times[NORMALISER].median_ms * fewer / (interval * subject.algo.updates_per_step)
            )
            ratios[f"share of exchanges in an update of {size} workers, {name}"] = ratio(
                part.median_ms + merging, whole.median_ms + merging
            )
        self.found.measurements = kept


def again(times: int, call: Callable[[], object]) -> None:
    for _ in range(times):
        call()


def idle() -> None:
    """What the others do while one works alone."""
