"""How fast this machine acts, updates and trains: spiking beside dense, beside two yardsticks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from spikerl import kernels, machine
from spikerl.algos.offpolicy import OffPolicy
from spikerl.algos.proxy_td3 import ProxyTD3Config
from spikerl.children import PYTHON
from spikerl.commands.bench import workers as bench_workers
from spikerl.commands.bench.baselines import DenseActor, PopSANActor, dense_loop, popsan_loop
from spikerl.commands.bench.fixtures import BURST, Subject
from spikerl.commands.bench.roofline import Roofline, roofline
from spikerl.commands.bench.timing import (
    Benchmark,
    Measurement,
    Ratios,
    compare,
    ratio,
    run_interleaved,
    show,
)
from spikerl.config import build as configs
from spikerl.config.build import Config
from spikerl.errors import BadRequest
from spikerl.kernels.cpu import OneAction
from spikerl.machine import git_state, versions
from spikerl.models.actor import MLPActor, MLPConfig
from spikerl.schema import parse
from spikerl.training.trainer import Trainer
from spikerl.types import Batch

PARTS = ("acting", "update", "training", "proxy", "workers", "exchange", "start")
DENSE = MLPConfig(name="mlp", hidden_sizes=[256, 256], lr=1e-3)
# Proxy Target's neurons, steps of the proxy before each of the critics, the proxy's layers.
PROXIES = (("lif", 3, [512, 512]), ("cuba_lif", 3, [800, 600]), ("lif", 1, [512, 512]))


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
            if any(value < 1 for value in values):
                raise BadRequest(key, values, "give at least 1")
        if any(size < 2 for size in self.world_sizes):
            remedy = "give at least 2; one worker alone is measured beside them"
            raise BadRequest("world_sizes", self.world_sizes, remedy)


def main(data: dict[str, Any], argv: Sequence[str]) -> int:
    """`spikerl bench`."""
    own = BenchRequest.__dataclass_fields__
    request = parse(BenchRequest, {key: data.pop(key) for key in own})
    if data["world_size"] is not None:
        raise BadRequest("world_size", data["world_size"], "bench has a list: give world_sizes")
    bench = Bench(configs.build(data), request)
    answer = {
        "machine": {**machine.describe(), "versions": versions(), **git_state()},
        "measurements": [asdict(m) for m in bench.measure()],
        "ratios": bench.ratios,
        "left_out": bench.left_out,
        "roofline": asdict(bench.roofline()) if "update" in request.parts else None,
    }
    if request.json:
        print(json.dumps(answer))
    else:
        show(answer)
    return 0


class Bench(Subject):
    def __init__(self, config: Config, request: BenchRequest) -> None:
        super().__init__(config, request.run)
        self.request = request
        self.ratios: Ratios = {}
        self.left_out: dict[str, str] = {}  # what could not be measured, and why

    def measure(self) -> list[Measurement]:
        found: list[Measurement] = []
        for part in self.request.parts:
            if part == "acting":
                found += self.time(self.acting())
            if part == "update":
                for batch in self.request.batches:
                    found += self.time(self.update(batch))
            if part == "training":
                found += self.time(self.training())
            if part == "proxy":
                found += self.proxies()
            if part in ("workers", "exchange"):
                found += self.workers(part)
            if part == "start":
                found += self.time([
                    Benchmark(what, "", "", 1, "", 1, partial(run_quietly, args))
                    for what, args in COMMANDS.items()
                ])  # fmt: skip
        return found

    def time(self, benchmarks: list[Benchmark]) -> list[Measurement]:
        found = run_interleaved(benchmarks, self.request.rounds, self.threads)
        self.ratios |= compare(found)
        return found

    # --- what is timed ----------------------------------------------------------------------------

    def acting(self) -> list[Benchmark]:
        """One action from one raw observation, or from one normalised one."""
        row = self.obs[:1]
        raw = row[0].double().cpu().numpy()
        choice, task = self.config.resolved.kernel.choice, self.task
        ours = self.policy(self.spiking(choice))
        modules: dict[str, nn.Module] = {
            "popsan loop": PopSANActor(self.actor).to(self.device),
            "dense loop": DenseActor(task.obs_dim, task.act_dim).to(self.device),
            choice: self.spiking(choice),
        }

        def forward(module: nn.Module, times: int) -> Callable[[], None]:
            @torch.no_grad()
            def call() -> None:
                for _ in range(times):
                    module(row)

            return call

        def policy() -> None:
            for _ in range(200):
                ours(raw)

        found = [Benchmark("policy(obs)", choice, "fp32", 1, self.weights, 200, policy)]
        if one := kernels.one_action(choice, self.spiking(choice), task):
            norm = ours.norm.mean_std.data_ptr()

            def bare(one: OneAction = one) -> None:
                for _ in range(200):
                    one.run(norm, ours.norm.clip)

            found.append(Benchmark("its library call", choice, "fp32", 1, self.weights, 200, bare))
        for kernel, module in modules.items():
            times = 20 if kernel == "popsan loop" else 200
            call = forward(module, times)
            found.append(Benchmark("actor", kernel, "fp32", 1, self.weights, times, call))
        return found

    def roofline(self) -> Roofline:
        delay = self.algo.policy_delay
        critic = self.learner(self.spiking("reference")).critic
        return roofline(self.actor, critic, delay, self.request.batches, self.device)

    def update(self, batch: int) -> list[Benchmark]:
        """One TD3 update: a critic step, and every second time all the rest."""
        O, A = self.task.obs_dim, self.task.act_dim  # noqa: E741
        choice = self.config.resolved.kernel.choice
        rows = self.batch(BURST * batch)
        batches = [Batch(*each) for each in zip(*(f.split(batch) for f in rows), strict=True)]

        def benchmark(kernel: str, precision: str, learner: Any) -> Benchmark:
            def call() -> None:
                if isinstance(learner, OffPolicy):
                    learner.learn(rows, BURST)
                    learner.check()
                    return
                for batch in batches:
                    learner.update(batch)

            weights = self.weights if "dense" not in kernel else "random"
            return Benchmark("update", kernel, precision, batch, weights, BURST, call)

        dense = MLPActor(O, A, DENSE).to(self.device)
        return [
            benchmark(choice, "fp32", self.learner(self.spiking(choice))),
            benchmark(choice, "bf16", self.learner(self.spiking(choice), torch.bfloat16)),
            benchmark("reference", "fp32", self.learner(self.spiking("reference"))),
            benchmark("dense", "fp32", self.learner(dense)),
            benchmark("popsan loop", "fp32", popsan_loop(self.actor, O, A)),
            benchmark("dense loop", "fp32", dense_loop(O, A, self.device)),
        ]

    def proxies(self) -> list[Measurement]:
        """Updates of TD3 with a proxy target, and of TD3, in turn."""
        choice, batch = self.config.resolved.kernel.choice, self.request.batches[-1]

        def benchmark(name: str, learner: OffPolicy) -> Benchmark:
            rows = self.batch(BURST * learner.batches_per_update * batch)

            def call() -> None:
                learner.learn(rows, BURST)
                learner.check()

            return Benchmark(f"update, {name}", choice, "fp32", batch, self.weights, BURST, call)

        benchmarks = [benchmark("td3", self.learner(self.spiking(choice)))]
        for neuron, steps, widths in PROXIES:
            fields = {**asdict(self.algo), "name": "proxy_td3"}
            algo = ProxyTD3Config(
                **fields, proxy_steps=steps, proxy_lr=1e-3, proxy_hidden_sizes=widths
            )
            learner = self.learner(self.spiking(choice, neuron), algo=algo)
            benchmarks.append(benchmark(f"proxy_td3 {neuron} K={steps}", learner))
        found = self.time(benchmarks)
        td3 = found[0].median_ms
        for m in found[1:]:
            self.ratios[f"{m.name} / td3"] = ratio(m.median_ms, td3)
        return found

    def training(self) -> list[Benchmark]:
        """Steps of a whole training loop, updates included, without evaluations."""
        O, A = self.task.obs_dim, self.task.act_dim  # noqa: E741
        algo, burst = self.algo, self.algo.update_interval
        short = replace(algo, random_steps=0, learning_starts=burst, replay_capacity=100_000)
        run = replace(self.config.run, num_envs=1)
        config = replace(self.config, run=run, algo=short)
        dense = replace(config, actor=replace(config.actor, actor=DENSE))
        start = self.policy(self.actor)
        spiking = Trainer(config, self.task, start)
        trainers = {self.kernel: spiking, "dense": Trainer(dense, self.task)}
        dense_one = dense_loop(O, A, self.device)
        loops = {"popsan loop": popsan_loop(self.actor, O, A), "dense loop": dense_one}
        found = []

        def benchmark(kernel: str, step: Callable[[], object]) -> Benchmark:
            def call() -> None:
                for _ in range(2 * burst):
                    step()

            for _ in range(4 * burst):
                step()
            weights = "random" if "dense" in kernel else self.weights
            return Benchmark("training", kernel, "fp32", algo.batch_size, weights, 2 * burst, call)

        for kernel, trainer in trainers.items():
            found.append(benchmark(kernel, trainer.advance))
        for kernel, loop in loops.items():
            steps = loop.train(self.task.env_id, algo.batch_size, burst)
            found.append(benchmark(kernel, partial(next, steps)))
        return found

    def workers(self, part: str) -> list[Measurement]:
        """What takes several workers."""
        r = self.request
        job = bench_workers.Job(part=part, batch=r.batches[-1], rounds=r.rounds, run=r.run)
        found = bench_workers.measure(self.config, job, r.world_sizes)
        self.ratios |= found.ratios
        self.left_out |= found.left_out
        return found.measurements


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
