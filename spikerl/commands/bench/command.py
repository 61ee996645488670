"""`spikerl bench`: times acting, updates and training, also of dense networks and baselines."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from spikerl import kernels, machine
from spikerl.algos.offpolicy import OffPolicy
from spikerl.algos.proxy_td3 import ProxyTD3Config
from spikerl.algos.td3 import TD3Config
from spikerl.children import PYTHON
from spikerl.commands.bench import workers as bench_workers
from spikerl.commands.bench.baselines import (
    DenseActor,
    Loop,
    PopSANActor,
    dense_loop,
    popsan_loop,
)
from spikerl.commands.bench.fixtures import TRAINED, UPDATES_PER_TURN, BenchFixtures
from spikerl.commands.bench.progress import BenchProgress
from spikerl.commands.bench.roofline import Roofline, roofline
from spikerl.commands.bench.table import show
from spikerl.commands.bench.timing import (
    DENSE,
    Benchmark,
    Results,
    compare,
    ratio,
    run_interleaved,
)
from spikerl.config import build as configs
from spikerl.config.build import Config
from spikerl.config.memory import check_memory
from spikerl.config.run import MOST
from spikerl.envs.make import make_env
from spikerl.errors import DONE, BadRequest
from spikerl.kernels.cpu import OneAction
from spikerl.machine import git_state, versions
from spikerl.models.actor import MLPActor
from spikerl.models.actor_config import MLPConfig
from spikerl.models.precision import DTYPES
from spikerl.output import answer
from spikerl.schema import parse
from spikerl.snn.neurons import CubaLIFConfig, LIFConfig
from spikerl.training.start import task_for
from spikerl.training.trainer import Trainer
from spikerl.types import Batch

MOST_ROWS = 1 << 20  # of a batch; also the most rounds
REPLAY = 100_000  # rows that are stored at most
PARTS = ("acting", "update", "training", "proxy", "workers", "exchange", "start")
NEURON: dict[str, Any] = {
    "voltage_decay": 0.75, "threshold": 0.5, "reset": "hard", "surrogate": "rect",
    "surrogate_window": 0.5, "surrogate_slope": 2.0, "surrogate_slope_end": None,
}  # fmt: skip
LIF = LIFConfig(name="lif", **NEURON)
CUBA_LIF = CubaLIFConfig(name="cuba_lif", current_decay=0.5, **NEURON)
# Of Proxy Target: neurons, proxy steps before each step of the critics, widths of the proxy.
PROXIES = ((LIF, 3, [512, 512]), (CUBA_LIF, 3, [800, 600]), (LIF, 1, [512, 512]))


@dataclass(kw_only=True)
class BenchRequest:
    parts: list[str]
    batches: list[int]
    world_sizes: list[int]
    rounds: int
    run: str | None
    json: bool

    def __post_init__(self) -> None:
        for part in self.parts:
            if part not in PARTS:
                raise BadRequest("parts", part, f"give some of {', '.join(PARTS)}")
        for key, values in (("batches", self.batches), ("rounds", [self.rounds])):
            if any(not 1 <= value <= MOST_ROWS for value in values):
                raise BadRequest(key, values, f"give 1 to {MOST_ROWS}")
        if not self.batches:
            raise BadRequest("batches", [], "give at least one")
        if "workers" in self.parts and self.batches[-1] < max(self.world_sizes, default=0):
            remedy = f"its last is shared out; give at least {max(self.world_sizes)}"
            raise BadRequest("batches", self.batches, remedy)
        if any(not 2 <= size <= MOST for size in self.world_sizes):
            remedy = f"give 2 to {MOST}; one worker alone is measured beside them"
            raise BadRequest("world_sizes", self.world_sizes, remedy)


def main(data: dict[str, Any], argv: Sequence[str]) -> int:
    """`spikerl bench`: the exit status."""
    own = BenchRequest.__dataclass_fields__
    request = parse(BenchRequest, {key: data.pop(key) for key in own})
    if data["world_size"] is not None:
        raise BadRequest("world_size", data["world_size"], "bench has a list: give world_sizes")
    if data["num_envs"] not in (None, 1):
        remedy = "bench trains in one environment; leave it out"
        raise BadRequest("num_envs", data["num_envs"], remedy)
    for name in ("config", "resume", "init_from"):
        if data[name] is not None:
            remedy = "bench does not read it; type its keys, or give run=RUN"
            raise BadRequest(name, data[name], remedy)
    config = configs.build(data)
    short: Any = config.algo
    if hasattr(short, "replay_capacity"):
        short = replace(short, replay_capacity=REPLAY)
    check_memory(replace(config, algo=short), task_for(config))
    with BenchProgress() as progress:
        bench = Bench(config, request, progress)
        results = bench.measure()
        facts = {
            "machine": {**machine.describe(), "versions": versions(), **git_state()},
            **asdict(results),
            "roofline": asdict(bench.roofline()) if "update" in request.parts else None,
        }
    if request.json:
        answer(facts)
    else:
        show(facts)
    return DONE


class Bench(BenchFixtures):
    def __init__(self, config: Config, request: BenchRequest, progress: BenchProgress) -> None:
        super().__init__(config, request.run)
        self.request, self.progress = request, progress
        self.hidden = [layer.outputs for layer in list(self.actor.layers)[:-1]]
        self.dense = MLPConfig(name="mlp", hidden_sizes=self.hidden, lr=1e-3)

    def measure(self) -> Results:
        results = Results()
        for part in self.request.parts:
            for each in self.measure_part(part):
                results.add(each)
        return results

    def measure_part(self, part: str) -> Iterator[Results]:
        if part == "acting":
            yield self.time("acting", self.acting())
        elif part == "update":
            for batch in self.request.batches:
                yield self.time(f"update, batch {batch}", self.update(batch))
        elif part == "training":
            self.progress.part("filling replays")
            yield self.time("training", self.training())
        elif part == "proxy":
            yield self.proxies()
        elif part == "start":
            benchmarks = [
                Benchmark(what, "", "", 1, "", 1, partial(run_quietly, args))
                for what, args in COMMANDS.items()
            ]
            yield self.time("start", benchmarks)
        else:
            yield self.workers(part)

    def time(self, title: str, benchmarks: list[Benchmark]) -> Results:
        rounds, after_round = self.request.rounds, self.progress.after_round
        self.progress.part(title, rounds)
        times = run_interleaved(benchmarks, rounds, self.threads, after_round=after_round)
        return Results(times, compare(times, self.kernel))

    # --- what is timed ----------------------------------------------------------------------------

    def acting(self) -> list[Benchmark]:
        """One action: of the policy from a raw observation, of actors from a normalised one."""
        row = self.obs[:1]
        raw = row[0].double().cpu().numpy()
        kernel, task = self.kernel, self.task
        policy = self.policy(self.spiking(kernel))
        modules: dict[str, nn.Module] = {
            "popsan loop": PopSANActor(self.actor).to(self.device),
            "dense loop": DenseActor(task.obs_dim, task.act_dim, self.hidden).to(self.device),
            kernel: self.spiking(kernel),
        }

        def forward(module: nn.Module, times: int) -> Callable[[], None]:
            @torch.no_grad()
            def call() -> None:
                for _ in range(times):
                    module(row)

            return call

        def act() -> None:
            for _ in range(200):
                policy(raw)

        benchmarks = [Benchmark("policy(obs)", kernel, "fp32", 1, self.weights, 200, act)]
        if one := kernels.one_action(kernel, self.spiking(kernel), task):
            norm = policy.norm.mean_std.data_ptr()

            def call_library(one: OneAction = one) -> None:
                for _ in range(200):
                    one.run(norm, policy.norm.clip)

            what = "its library call"
            benchmarks.append(Benchmark(what, kernel, "fp32", 1, self.weights, 200, call_library))
        for name, module in modules.items():
            times = 20 if name == "popsan loop" else 200
            call = forward(module, times)
            benchmarks.append(Benchmark("actor", name, "fp32", 1, self.weights, times, call))
        return benchmarks

    def roofline(self) -> Roofline:
        delay = self.algo.policy_delay
        critic = self.learner(self.spiking("reference")).critic
        return roofline(self.actor, critic, delay, self.request.batches, self.device)

    def update(self, batch: int) -> list[Benchmark]:
        """One TD3 update: a critic step, and once in policy_delay updates all the rest."""
        O, A = self.task.obs_dim, self.task.act_dim  # noqa: E741
        rows = self.batch(UPDATES_PER_TURN * batch)
        batches = [Batch(*each) for each in zip(*(f.split(batch) for f in rows), strict=True)]

        def benchmark(kernel: str, precision: str, learner: Any) -> Benchmark:
            def call() -> None:
                if isinstance(learner, OffPolicy):
                    learner.run_updates(rows, UPDATES_PER_TURN)
                    learner.check()
                    return
                for batch in batches:
                    learner.update(batch)

            weights = self.weights if "dense" not in kernel else "random"
            return Benchmark("update", kernel, precision, batch, weights, UPDATES_PER_TURN, call)

        def spiking(kernel: str, precision: str) -> Benchmark:
            learner = self.learner(self.spiking(kernel), DTYPES[precision])
            return benchmark(kernel, precision, learner)

        dense = MLPActor(O, A, self.dense, kernel=self.kernel).to(self.device)
        return [
            spiking(self.kernel, "fp32"),
            spiking(self.kernel, "bf16"),
            *([spiking("reference", "fp32")] if self.kernel != "reference" else []),
            benchmark(DENSE, "fp32", self.learner(dense)),
            *(benchmark(name, "fp32", loop) for name, loop in self.loops(self.algo).items()),
        ]

    def loops(self, algo: TD3Config) -> dict[str, Loop]:
        """Both baselines, with networks as wide as those of this program that are timed."""
        O, A = self.task.obs_dim, self.task.act_dim  # noqa: E741
        return {
            "popsan loop": popsan_loop(self.actor, O, A, algo),
            "dense loop": dense_loop(O, A, self.hidden, algo, self.device),
        }

    def proxies(self) -> Results:
        """Updates of TD3 with a proxy target, and of TD3."""
        kernel, batch = self.kernel, self.request.batches[-1]

        def benchmark(name: str, learner: OffPolicy, weights: str) -> Benchmark:
            rows = self.batch(UPDATES_PER_TURN * learner.batches_per_update * batch)

            def call() -> None:
                learner.run_updates(rows, UPDATES_PER_TURN)
                learner.check()

            what, times = f"update, {name}", UPDATES_PER_TURN
            return Benchmark(what, kernel, "fp32", batch, weights, times, call)

        benchmarks = [benchmark("td3", self.learner(self.spiking(kernel)), self.weights)]
        for neuron, steps, widths in PROXIES:
            fields = {**asdict(self.algo), "name": "proxy_td3"}
            algo = ProxyTD3Config(
                **fields, proxy_steps=steps, proxy_lr=1e-3, proxy_hidden_sizes=widths
            )
            learner = self.learner(self.spiking(kernel, neuron), algo=algo)
            name = f"proxy_td3 {neuron.name} K={steps}"
            benchmarks.append(benchmark(name, learner, TRAINED))
        results = self.time(f"proxy, batch {batch}", benchmarks)
        td3, *others = results.measurements
        results.ratios = {f"{m.name} / td3": ratio(m.median_ms, td3.median_ms) for m in others}
        return results

    def training(self) -> list[Benchmark]:
        """Steps of a whole training loop, updates included, without evaluations."""
        algo, interval = self.algo, self.algo.update_interval
        short = replace(algo, random_steps=0, learning_starts=interval, replay_capacity=REPLAY)
        run = replace(self.config.run, num_envs=1)
        config = replace(self.config, run=run, algo=short)
        dense = replace(config, actor=replace(config.actor, actor=self.dense))
        spiking = Trainer(config, self.task, self.policy(self.actor))
        trainers = {self.kernel: spiking, DENSE: Trainer(dense, self.task)}
        loops = self.loops(short)

        def benchmark(kernel: str, step: Callable[[], object]) -> Benchmark:
            def call() -> None:
                for _ in range(2 * interval):
                    step()

            for _ in range(4 * interval):
                step()
            weights = "random" if "dense" in kernel else self.weights
            times = 2 * interval
            precision = "fp32" if kernel in loops else self.config.precision.name
            return Benchmark("training", kernel, precision, algo.batch_size, weights, times, call)

        benchmarks = [benchmark(kernel, t.advance) for kernel, t in trainers.items()]
        for kernel, loop in loops.items():
            steps = loop.train(make_env(config.env))
            benchmarks.append(benchmark(kernel, partial(next, steps)))
        return benchmarks

    def workers(self, part: str) -> Results:
        """The parts `workers` and `exchange`, which take several processes."""
        r = self.request
        job = bench_workers.Job(part=part, batch=r.batches[-1], rounds=r.rounds, run=r.run)
        return bench_workers.measure(self.config, job, r.world_sizes, self.progress)


# --- other processes -----------------------------------------------------------------------------

FIRST_STEP = ["train", "total_steps=1", "steps_per_epoch=1", "eval_episodes=1",
              "env.max_episode_steps=1", "energy=none"]  # fmt: skip
COMMANDS = {
    "spikerl --help": ["--help"],
    "spikerl train --cfg job": ["train", "--cfg", "job"],
    "spikerl train, one step and its evaluation": FIRST_STEP,
}


def run_quietly(args: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [*PYTHON, "-m", "spikerl", *args]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
