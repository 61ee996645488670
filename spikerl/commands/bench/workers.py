"""The time of an update with several workers, of its exchanges, and of exchanges alone.

Every turn begins after a barrier, and is timed by rank 0. The time that an update spends in
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
from spikerl.commands.bench.fixtures import UPDATES_PER_TURN, BenchFixtures
from spikerl.commands.bench.progress import BenchProgress
from spikerl.commands.bench.timing import (
    Benchmark,
    Measurement,
    Results,
    do_nothing,
    measurement,
    ratio,
    run_interleaved,
)
from spikerl.config import build as configs
from spikerl.config.build import Config
from spikerl.distributed import launch, mpi
from spikerl.distributed.shared_folder import WorkerLost
from spikerl.distributed.world import BackendConfig, World, join, leave, resolve_backend, share
from spikerl.errors import DONE, BadRequest, RendezvousFailed
from spikerl.training.start import own_device
from spikerl.training.trainer import SYNC_INTERVAL

SHARED = "shared memory"
ALONE, NORMALISER = "alone", "exchange of the normaliser"
LENGTHS = [4**power for power in (0, 5, 6, 7, 8, 9, 10, 11)]  # of vectors, in float32 numbers


@dataclass(kw_only=True)
class Job:
    part: str  # workers or exchange
    batch: int
    rounds: int
    run: str | None


@dataclass(frozen=True)
class TimedWorld(World):
    """A world that records how long each of its sums takes."""

    sum_ms: list[float] = field(default_factory=list)

    def sum_(self, tensor: Tensor) -> None:
        start = now(tensor)
        super().sum_(tensor)
        self.sum_ms.append((now(tensor) - start) * 1e3)


def now(tensor: Tensor) -> float:
    """The time in seconds, read once the computation of `tensor` is done."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()


# --- the parent -----------------------------------------------------------------------------------


def measure(config: Config, job: Job, sizes: list[int], progress: BenchProgress) -> Results:
    """Measure each number of workers over each backend that is available for it."""
    results, device = Results(), config.resolved.device.choice
    for size in sizes:
        for backend in ("nccl", "gloo", "mpi") if device != "cpu" else ("gloo", "mpi"):
            try:
                resolve_backend(BackendConfig(name=backend), device, size)
            except BadRequest as error:
                results.left_out[f"{backend}, {size} workers"] = error.args[2]
                continue
            progress.part(f"{job.part}: {size} workers over {backend}")
            answer = launch_workers(config, job, backend, size)
            measurements = [Measurement(**m) for m in answer["measurements"]]
            results.add(Results(measurements, answer["ratios"], answer["left_out"]))
    return results


def launch_workers(config: Config, job: Job, backend: str, size: int) -> dict[str, Any]:
    """Launch `size` workers; the results of rank 0, as plain data."""
    raw = {**config.raw, "threads": 1, "backend": {**config.raw["backend"], "name": backend}}
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        spec = {"bench": asdict(job), "raw": raw, "answer": str(answer)}
        workers = launch.Workers(
            size=size, threads=1, backend=backend, timeout_s=config.backend.timeout_s
        )
        try:
            launch.launch(spec, workers, stoppable=False)
        except WorkerLost as lost:
            if lost.request:
                raise BadRequest(*lost.request) from None
            raise RendezvousFailed(str(lost)) from None
        return dict(json.loads(answer.read_text(encoding="utf-8")))


# --- a worker -------------------------------------------------------------------------------------


def run_in_worker(spec: Mapping[str, Any]) -> int:
    """Run one of the workers that `measure` launched; the exit status."""
    config, job = configs.build(spec["raw"]), Job(**spec["bench"])
    device = own_device(config.resolved.device.choice)
    world = join(config.resolved.backend.choice, device, config.backend.timeout_s)
    try:
        worker = Worker(config, job, world, device)
        if job.part == "workers":
            worker.measure_updates()
        else:
            worker.measure_sums()
        if world.rank == 0:
            answer = json.dumps(asdict(worker.results))
            Path(spec["answer"]).write_text(answer, encoding="utf-8")
        mpi.leave()
    finally:
        leave()
    return DONE


class Worker:
    """One of the workers, which all time the same benchmarks in turn."""

    def __init__(self, config: Config, job: Job, world: World, device: torch.device) -> None:
        self.config, self.job, self.world, self.device = config, job, world, device
        self.results = Results()

    def worlds(self, lengths: list[int]) -> dict[str, World]:
        """The ways in which vectors of these lengths can be summed here, by name."""
        backend, shm = self.config.resolved.backend.choice, self.world.shm
        over_backend = {backend: replace(self.world, shm=None)}
        if shm and all([shm.sum_(torch.zeros(length)) for length in lengths]):
            return {SHARED: self.world, **over_backend}
        if backend == "gloo" and self.device.type == "cpu":
            what = f"{SHARED}, {self.world.size} workers, vectors of {max(lengths)}"
            self.results.left_out[what] = "the workers have not so much memory in common"
        return over_backend

    def time(self, benchmarks: list[Benchmark]) -> list[Measurement]:
        rounds, barrier = self.job.rounds, self.world.barrier
        measurements = run_interleaved(benchmarks, rounds, 1, before_turn=barrier)
        return [replace(m, world_size=self.world.size) for m in measurements]

    def measure_sums(self) -> None:
        """Time sums of vectors of several lengths alone."""
        benchmarks = []
        for length in LENGTHS:
            times = max(2, min(50, LENGTHS[-1] // length))
            for name, world in self.worlds([length]).items():
                vector = torch.zeros(length, device=self.device)
                call = partial(repeat, times, partial(world.sum_, vector))
                what = f"sum of {length} numbers over {name}"
                benchmarks.append(Benchmark(what, "", "fp32", 1, "", times, call))
        self.results.measurements = self.time(benchmarks)

    def measure_updates(self) -> None:
        """Time updates with weak and strong scaling, exchanges alone, and updates of one worker."""
        job, size = self.job, self.world.size
        fixtures = BenchFixtures(self.config, job.run, self.device)
        kernel, weights, delay = fixtures.kernel, fixtures.weights, fixtures.algo.policy_delay
        alone = fixtures.learner(fixtures.spiking(kernel))
        critic_gradient = alone.critic_optimizer.gradient.vector
        actor_gradient = alone.actor_optimizer.gradient.vector
        moments = torch.zeros(2 * fixtures.task.obs_dim + 2, dtype=torch.float64)
        batches = {"weak": job.batch, "strong": share(job.batch, self.world.rank, size)}
        exchange_ms: dict[str, list[float]] = {}  # of each turn, by name

        def update(name: str, batch: int, learner: OffPolicy) -> Benchmark:
            sample, world = fixtures.batch(UPDATES_PER_TURN * batch), learner.world

            def call() -> None:
                learner.run_updates(sample, UPDATES_PER_TURN)
                learner.check()
                if isinstance(world, TimedWorld):
                    own = exchange_ms.setdefault(name, [])
                    own.append(sum(world.sum_ms) / UPDATES_PER_TURN)
                    world.sum_ms.clear()

            if name == ALONE and self.world.rank > 0:
                call = do_nothing  # the others wait at the next barrier
            what = f"update, {name}"
            return Benchmark(what, kernel, "fp32", batch, weights, UPDATES_PER_TURN, call)

        def exchange_all(world: World) -> None:
            for i in range(UPDATES_PER_TURN):
                world.sum_(critic_gradient)
                if i % delay == 0:
                    world.sum_(actor_gradient)

        def exchange(what: str, call: Callable[[], object]) -> Benchmark:
            return Benchmark(what, "", "fp32", 1, "", UPDATES_PER_TURN, call)

        benchmarks = [update(ALONE, job.batch, alone)]
        lengths = [critic_gradient.numel(), actor_gradient.numel()]
        for over, world in self.worlds(lengths).items():
            for scaling, batch in batches.items():
                own = TimedWorld(world.rank, size, world.local_rank, world.exchange, world.shm)
                learner = fixtures.learner(fixtures.spiking(kernel), world=own)
                benchmarks.append(update(f"{scaling} over {over}", batch, learner))
            call = partial(exchange_all, world)
            benchmarks.append(exchange(f"exchanges alone, over {over}", call))
        merge = partial(repeat, UPDATES_PER_TURN, partial(self.world.gather, moments))
        benchmarks.append(exchange(NORMALISER, merge))

        times = {m.what: m for m in self.time(benchmarks)}
        one = times[f"update, {ALONE}"] = replace(times[f"update, {ALONE}"], world_size=1)
        measurements, ratios = list(times.values()), self.results.ratios
        for name, turns in exchange_ms.items():
            update_ = times[f"update, {name}"]
            benchmark = exchange(f"exchanges, {name}", do_nothing)
            # The first turn belongs to the round that is not counted.
            part = measurement(benchmark, turns[1:], 1)
            part = replace(part, batch=update_.batch, world_size=size)
            measurements.append(part)
            title = f"updates per second of {size} workers, {name} / one alone"
            ratios[title] = ratio(one.median_ms, update_.median_ms)
            # How many updates there are for each exchange of the normaliser.
            fewer = size if name.startswith("weak") else 1
            interval = fixtures.algo.norm_interval or SYNC_INTERVAL
            updates = interval * fixtures.algo.updates_per_step / fewer
            merge_ms = times[NORMALISER].median_ms / updates
            ratios[f"share of exchanges in an update of {size} workers, {name}"] = ratio(
                part.median_ms + merge_ms, update_.median_ms + merge_ms
            )
        self.results.measurements = measurements


def repeat(times: int, call: Callable[[], object]) -> None:
    for _ in range(times):
        call()
