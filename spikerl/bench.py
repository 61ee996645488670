"""How fast this machine acts, updates and trains: spiking beside dense, beside two yardsticks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import yaml
from torch import nn

from spikerl import config as configs
from spikerl import hardware
from spikerl.algos.proxy_td3 import ProxyTD3, ProxyTD3Config
from spikerl.algos.td3 import TD3, TD3Config
from spikerl.baselines import (
    DenseActor,
    PopSANActor,
    as_trained,
    critic_as_trained,
    dense_loop,
    popsan_loop,
)
from spikerl.compose import conf_folder
from spikerl.config import Config
from spikerl.distributed.world import ALONE, World, share_memory
from spikerl.errors import BadRequest
from spikerl.networks import (
    Actor,
    ActorConfig,
    Critics,
    MLPActor,
    MLPConfig,
    SpikingActor,
    build_actor,
)
from spikerl.normalize import RunningNorm
from spikerl.policy import NEURONS, Policy, load_policy
from spikerl.roofline import Roofline, roofline
from spikerl.runs import task_for
from spikerl.schema import choose, parse
from spikerl.snn.neurons import NeuronConfig
from spikerl.timing import (
    Contender,
    Measurement,
    Ratios,
    compare,
    in_turn,
    measurement,
    ratio,
    show,
)
from spikerl.trainer import Trainer
from spikerl.types import Batch
from spikerl.versions import git_state, versions

PARTS = ("acting", "update", "training", "proxy", "workers", "start")
# Of the encoder and of each layer, in the HalfCheetah policy that PopSAN's authors published, as
# `spikerl eval` measures them.
TRAINED_RATES = [0.196, 0.329, 0.509, 0.710]
# Shares of the units of a critic's hidden layers that are not 0, after 80 000 steps of HalfCheetah:
# 0.40 to 0.42 and 0.23 to 0.28, in four critics of two runs.
TRAINED_UNITS = [0.41, 0.27]
BURST = 20  # updates of a turn: they come in bursts, and the first of one finds cold caches
DENSE = MLPConfig(name="mlp", hidden_sizes=[256, 256], lr=1e-3)
# Proxy Target's neurons, steps of the proxy before each of the critics, the proxy's layers.
PROXIES = (("lif", 3, [512, 512]), ("cuba_lif", 3, [800, 600]), ("lif", 1, [512, 512]))


@dataclass(kw_only=True)
class BenchRequest:
    parts: list[str]
    batches: list[int]
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


def main(data: dict[str, Any]) -> int:
    """`spikerl bench`."""
    own = BenchRequest.__dataclass_fields__
    request = parse(BenchRequest, {key: data.pop(key) for key in own})
    bench = Bench(configs.build(data), request)
    answer = {
        "machine": {**hardware.describe(), "versions": versions(), **git_state()},
        "measurements": [asdict(m) for m in bench.measure()],
        "ratios": bench.ratios,
        "roofline": asdict(bench.roofline()) if "update" in request.parts else None,
    }
    if request.json:
        print(json.dumps(answer))
    else:
        show(answer)
    return 0


class Bench:
    def __init__(self, config: Config, request: BenchRequest) -> None:
        if not isinstance(build_actor(config.actor, 1, 1), SpikingActor):
            raise BadRequest("actor", config.actor.actor.name, "bench times a spiking actor")
        if why := config.actor.layered(torch.float32):
            remedy = f"bench times what a kernel covers in one call, and {why}"
            raise BadRequest("actor", config.actor.shape(), remedy)
        if not isinstance(config.algo, TD3Config):
            raise BadRequest("algo", config.algo.name, "bench times TD3; leave it out")
        self.config, self.request, self.algo = config, request, config.algo
        self.task = task_for(config)
        self.threads = int(config.threads.choice)
        torch.set_num_threads(self.threads)
        self.device = torch.device(config.device.choice)
        self.obs = torch.randn(4096, self.task.obs_dim).clamp(-3.0, 3.0)
        self.actor, self.weights = self.timed_actor()
        self.obs, self.actor = self.obs.to(self.device), self.actor.to(self.device)
        self.ratios: Ratios = {}

    def timed_actor(self) -> tuple[SpikingActor, str]:
        """The actor whose speed is told, with the weights of a trained one or such as fire so."""
        if self.request.run is not None:
            policy = load_policy(self.request.run)
            if policy.task.obs_dim != self.task.obs_dim or policy.task.act_dim != self.task.act_dim:
                raise BadRequest("run", self.request.run, f"its task is not {self.task.env_id}")
            if not isinstance(policy.actor, SpikingActor):
                raise BadRequest("run", self.request.run, "its actor is dense")
            return policy.actor, "run"
        return self.firing(self.config.actor), "trained rates"

    def firing(self, config: ActorConfig) -> SpikingActor:
        """An actor that fires as a trained one does."""
        actor = build_actor(config, self.task.obs_dim, self.task.act_dim)
        assert isinstance(actor, SpikingActor)
        hidden = len(actor.layers) - 1
        inner = np.interp(np.linspace(0, 1, hidden), [0, 1], TRAINED_RATES[1:3]).tolist()
        as_trained(actor, [TRAINED_RATES[0], *inner, TRAINED_RATES[-1]], self.obs[:256])
        return actor

    def spiking(self, kernel: str, neuron: str | None = None) -> SpikingActor:
        """The timed actor; one of another kind of neuron, if named."""
        config, source = self.config.actor, self.actor
        if neuron is not None:
            source = self.firing(config := replace(config, neuron=published(neuron)))
        actor = build_actor(config, self.task.obs_dim, self.task.act_dim, kernel=kernel)
        actor.load_state_dict(source.state_dict())
        assert isinstance(actor, SpikingActor)
        return actor.to(self.device)

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
            if part == "workers":
                found += self.workers()
            if part == "start":
                found += self.time([
                    Contender(what, "", "", 1, "", 1, partial(run_quietly, args))
                    for what, args in COMMANDS.items()
                ])  # fmt: skip
        return found

    def time(self, contenders: list[Contender]) -> list[Measurement]:
        found = in_turn(contenders, self.request.rounds, self.threads)
        self.ratios |= compare(found)
        return found

    # --- what is timed ----------------------------------------------------------------------------

    def acting(self) -> list[Contender]:
        """One action from one raw observation, or from one normalised one."""
        row = self.obs[:1]
        raw = row[0].double().cpu().numpy()
        choice, task = self.config.kernel.choice, self.task
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

        found = [Contender("policy(obs)", choice, "fp32", 1, self.weights, 200, policy)]
        for kernel, module in modules.items():
            times = 20 if kernel == "popsan loop" else 200
            call = forward(module, times)
            found.append(Contender("actor", kernel, "fp32", 1, self.weights, times, call))
        return found

    def roofline(self) -> Roofline:
        delay = self.algo.policy_delay
        critic = self.td3(self.spiking("reference")).critic
        return roofline(self.actor, critic, delay, self.request.batches, self.device)

    def policy(self, actor: Actor) -> Policy:
        return Policy(self.task, self.config.actor, actor, RunningNorm(self.task.obs_dim, 3.0))

    def update(self, batch: int) -> list[Contender]:
        """One TD3 update: a critic step, and every second time all the rest."""
        O, A = self.task.obs_dim, self.task.act_dim  # noqa: E741
        choice = self.config.kernel.choice
        rows = self.batch(BURST * batch)
        batches = [Batch(*each) for each in zip(*(f.split(batch) for f in rows), strict=True)]

        def contender(kernel: str, precision: str, learner: Any) -> Contender:
            def call() -> None:
                if isinstance(learner, TD3):
                    learner.learn(rows, BURST)
                    learner.check()
                    return
                for batch in batches:
                    learner.update(batch)

            weights = self.weights if "dense" not in kernel else "random"
            return Contender("update", kernel, precision, batch, weights, BURST, call)

        dense = MLPActor(O, A, DENSE).to(self.device)
        return [
            contender(choice, "fp32", self.td3(self.spiking(choice))),
            contender(choice, "bf16", self.td3(self.spiking(choice), torch.bfloat16)),
            contender("reference", "fp32", self.td3(self.spiking("reference"))),
            contender("dense", "fp32", self.td3(dense)),
            contender("popsan loop", "fp32", popsan_loop(self.actor, O, A)),
            contender("dense loop", "fp32", dense_loop(O, A, self.device)),
        ]

    def proxies(self) -> list[Measurement]:
        """Updates of TD3 with a proxy target, and of TD3, in turn."""
        choice, batch = self.config.kernel.choice, self.request.batches[-1]

        def contender(name: str, learner: TD3) -> Contender:
            rows = self.batch(BURST * learner.batches * batch)

            def call() -> None:
                learner.learn(rows, BURST)
                learner.check()

            return Contender(f"update, {name}", choice, "fp32", batch, self.weights, BURST, call)

        contenders = [contender("td3", self.td3(self.spiking(choice)))]
        for neuron, steps, widths in PROXIES:
            fields = {**asdict(self.algo), "name": "proxy_td3"}
            algo = ProxyTD3Config(
                **fields, proxy_steps=steps, proxy_lr=1e-3, proxy_hidden_sizes=widths
            )
            learner = self.td3(self.spiking(choice, neuron), rule=ProxyTD3, algo=algo)
            contenders.append(contender(f"proxy_td3 {neuron} K={steps}", learner))
        found = self.time(contenders)
        td3 = found[0].median_ms
        for m in found[1:]:
            self.ratios[f"{m.name} / td3"] = ratio(m.median_ms, td3)
        return found

    def td3(
        self,
        actor: Actor,
        critic_dtype: torch.dtype = torch.float32,
        world: World = ALONE,
        rule: type[TD3] = TD3,
        algo: TD3Config | None = None,
    ) -> TD3:
        O, A, algo = self.task.obs_dim, self.task.act_dim, algo or self.algo  # noqa: E741
        kernel = actor.kernel if isinstance(actor, SpikingActor) else self.config.kernel.choice
        critic = Critics(O, A, algo.critic_hidden_sizes, dtype=critic_dtype, kernel=kernel)
        hidden = len(algo.critic_hidden_sizes)
        units = np.interp(np.linspace(0, 1, hidden), [0, 1], TRAINED_UNITS).tolist()
        critic_as_trained(critic, units, self.obs[:256].cpu())
        generator = torch.Generator(self.device).manual_seed(0)
        return rule(
            actor,
            critic.to(self.device),
            algo,
            actor_lr=1e-4,
            generator=generator,
            world=world,
            weight=1.0 / world.size,
        )

    def batch(self, size: int) -> Batch:
        rows, following = (self.obs[torch.randint(len(self.obs), (size,))] for _ in range(2))
        act = torch.rand(size, self.task.act_dim) * 2.0 - 1.0
        live, discount = torch.zeros(size, dtype=torch.bool), torch.full((size,), 0.99)
        fields = (rows, act, torch.randn(size), following, live, discount)
        return Batch(*(field.to(self.device) for field in fields))

    def training(self) -> list[Contender]:
        """Steps of a whole training loop, updates included, without evaluations."""
        O, A = self.task.obs_dim, self.task.act_dim  # noqa: E741
        algo, burst = self.algo, self.algo.update_interval
        short = replace(algo, random_steps=0, learning_starts=burst, replay_capacity=100_000)
        training = replace(self.config.training(), algo=short, num_envs=1)
        dense = replace(training, actor=replace(training.actor, actor=DENSE))
        start = self.policy(self.actor)
        spiking = Trainer(training, self.task, start)
        trainers = {training.kernel: spiking, "dense": Trainer(dense, self.task)}
        dense_one = dense_loop(O, A, self.device)
        loops = {"popsan loop": popsan_loop(self.actor, O, A), "dense loop": dense_one}
        found = []

        def contender(kernel: str, step: Callable[[], object]) -> Contender:
            def call() -> None:
                for _ in range(2 * burst):
                    step()

            for _ in range(4 * burst):
                step()
            weights = "random" if "dense" in kernel else self.weights
            return Contender("training", kernel, "fp32", algo.batch_size, weights, 2 * burst, call)

        for kernel, trainer in trainers.items():
            found.append(contender(kernel, trainer.advance))
        for kernel, loop in loops.items():
            steps = loop.train(self.task.env_id, algo.batch_size, burst)
            found.append(contender(kernel, partial(next, steps)))
        return found

    def workers(self) -> list[Measurement]:
        """Updates of two workers, weak and strong, and of one alone, in turn."""
        batch = self.request.batches[-1]
        spec = json.dumps({"raw": self.config.raw, "batch": batch, "rounds": self.request.rounds})
        with tempfile.TemporaryDirectory() as folder:
            processes = [start_worker(rank, spec, folder) for rank in range(2)]
            said = [process.communicate(timeout=600)[0] for process in processes]
        if any(process.returncode for process in processes):
            raise RuntimeError("a worker of the benchmark failed")
        times: dict[str, list[float]] = json.loads(said[0])
        found = []
        for name, own in times.items():
            each = batch // 2 if name == "strong" else batch
            c = Contender(f"update, {name}", self.config.kernel.choice, "fp32", each, "", 1, exit)
            m = replace(measurement(c, own, 1), weights=self.weights)
            found.append(replace(m, world_size=1 if name == "alone" else 2))
        alone = found[0].median_ms
        for m in found[1:]:
            name = f"updates per second of two workers, {m.what[8:]} / one alone"
            self.ratios[name] = ratio(alone, m.median_ms)
        return found


def published(neuron: str) -> NeuronConfig:
    """A neuron with the settings of its file in conf/."""
    data = yaml.safe_load((conf_folder() / "neuron" / f"{neuron}.yaml").read_text(encoding="utf-8"))
    found: NeuronConfig = choose(NEURONS, data, key="neuron")
    return found


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
        command = [sys.executable, "-m", "spikerl", *args]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)


def start_worker(rank: int, spec: str, folder: str) -> subprocess.Popen[str]:
    """Process `rank` of two, which meet through a file."""
    environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "spikerl.bench", spec, folder]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def worker(spec: dict[str, Any], folder: str) -> None:
    """One of the two workers of `Bench.workers`; rank 0 prints its times."""
    rank = int(os.environ.pop("RANK"))
    del os.environ["WORLD_SIZE"]
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    request = BenchRequest(
        parts=[], batches=[spec["batch"]], rounds=spec["rounds"], run=None, json=True
    )
    bench = Bench(configs.build({**spec["raw"], "threads": 1}), request)
    both, choice = share_memory(World(rank, 2)), bench.config.kernel.choice
    learners = {
        "alone": (bench.td3(bench.spiking(choice)), spec["batch"]),
        "weak": (bench.td3(bench.spiking(choice), world=both), spec["batch"]),
        "strong": (bench.td3(bench.spiking(choice), world=both), spec["batch"] // 2),
    }
    batches = {rows: bench.batch(BURST * rows) for _, rows in learners.values()}
    times: dict[str, list[float]] = {name: [] for name in learners}
    for _ in range(spec["rounds"] + 1):
        for name, (learner, rows) in learners.items():
            dist.barrier()
            begun = time.perf_counter()
            if name != "alone" or rank == 0:
                learner.learn(batches[rows], BURST)
                learner.check()
            times[name].append((time.perf_counter() - begun) / BURST * 1e3)
    dist.destroy_process_group()
    if rank == 0:
        print(json.dumps({name: own[1:] for name, own in times.items()}))


if __name__ == "__main__":
    worker(json.loads(sys.argv[1]), sys.argv[2])
