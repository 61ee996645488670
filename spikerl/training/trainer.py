"""The training loop: act, store, update, evaluate. It writes no file.

Shape legend   N environments, A action entries.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import numpy as np
import torch
from torch import Tensor

from spikerl import kernels
from spikerl.algos.decision_transformer import DecisionTransformerConfig
from spikerl.algos.offpolicy import OfflineConfig
from spikerl.algos.replay import Replay, Sampler
from spikerl.config.build import Config
from spikerl.distributed.world import ALONE, World
from spikerl.energy.meter import Meter, Reading, merge, power
from spikerl.envs.dataset import Dataset
from spikerl.envs.vector import make_envs
from spikerl.errors import BadRequest, NonFinite, Stopped
from spikerl.models.actor import SpikingActor
from spikerl.models.actor_config import CareBNConfig, PopSANConfig
from spikerl.models.normalizer import RunningNorm
from spikerl.models.policy import Policy
from spikerl.models.spikeformer import Spikeformer
from spikerl.seeding import RESET_BITS, Streams, reset_seed
from spikerl.training.epoch_row import Row, WorkerEpoch, epoch_row
from spikerl.training.evaluator import Evaluator
from spikerl.training.learner import batch_share, build_learner
from spikerl.training.offline import store_dataset
from spikerl.training.progress import Progress, since
from spikerl.types import Task

# Up to so many environments a worker acts on the CPU, whatever device it learns on: an action there
# takes 0.01 ms, on an H100 0.95 (docs/speed.md).
FEW_ENVS = 64
SYNC_INTERVAL = 50  # steps between exchanges where the normaliser sets no interval


class Trainer:
    """One worker's training loop; with several, each steps its own share of the environments."""

    def __init__(
        self,
        config: Config,
        task: Task,
        init: Policy | None = None,
        world: World = ALONE,
        meter: Meter | None = None,
        device: torch.device | None = None,
        dataset: Dataset | None = None,
    ) -> None:
        """`device`: this worker's own, where workers are spread over several GPUs. `dataset`: what
        an offline algorithm learns from; None if a checkpoint will be loaded, which holds it.
        """
        self.config, self.run, self.task, self.world = config, config.run, task, world
        self.dataset, self.offline = dataset, isinstance(config.algo, OfflineConfig)
        self.meter = meter or Meter("none: not asked for")
        c, run, algo = config, config.run, config.algo
        device = device or torch.device(c.resolved.device.choice)
        own_envs = c.num_envs // world.size
        self.acting_on = torch.device("cpu") if own_envs <= FEW_ENVS else device
        self.streams = Streams(run.seed, world.rank, device, self.acting_on)
        self.batch_size, self.batch_weight = batch_share(c, world)
        # Batches of an update: with weak scaling each worker has one of the whole size.
        self.batches = world.size if run.scaling == "weak" else 1
        self.algo = build_learner(c, task, self.streams.update, world, device, init)
        self.init_actor = init.config if init else None
        self.norm = RunningNorm(task.obs_dim, algo.norm_clip)
        if init is not None:  # it then takes no moments of a dataset
            self.norm.load(init.norm.state())
        if self.acting_on != device and not self.offline:
            auto = kernels.KernelConfig(name="auto", path=None)
            self.algo.act_on_cpu(kernels.resolve(auto, "cpu").choice)
        self.algo.total_updates = self.updates_due(run.total_steps)
        if isinstance(self.algo.actor, SpikingActor | Spikeformer):
            for norm in self.algo.actor.norms:
                norm.sum_ = world.sum_  # over the rows of all workers
        capacity = algo.capacity() // c.num_envs * own_envs  # whole steps of all environments
        self.replay = Replay(
            capacity, task.obs_dim, task.act_dim, device, width=own_envs, obs_bytes=task.obs_bytes
        )
        if dataset is not None:
            store_dataset(dataset, c, self.algo, self.replay, self.norm, world.rank)
        self.envs = make_envs(c.env, own_envs, task)
        self.seed_bits = RESET_BITS  # of the seeds of resets
        self.reset_due = False
        self.reset_envs()
        try:
            self.evaluator = Evaluator(c.env, run.eval_episodes, run.seed, world)
        except BadRequest as error:
            self.envs.close()
            remedy = f"beside those that train, {error.args[2]}; 0 trains without evaluations"
            raise BadRequest("eval_episodes", run.eval_episodes, remedy) from error
        self.progress = Progress()
        self.clock, self.cpu_clock = time.perf_counter(), time.process_time()
        self.stopping = 0  # the signal that all workers agreed to stop on

    @property
    def step(self) -> int:
        return self.progress.step

    @property
    def policy(self) -> Policy:
        """The policy that is evaluated and saved."""
        config, actor = self.algo.inference(self.config.actor, self.task.act_dim)
        return Policy(self.task, config, actor, self.norm)

    @property
    def sampler(self) -> Sampler:
        return Sampler(self.replay, self.streams.sample, self.norm.normalize)

    def reset_if_due(self) -> None:
        """Reset environments that a resume could not restore, in the thread that made them."""
        if self.reset_due:
            self.reset_due = False
            self.reset_envs(self.step)

    def reset_envs(self, *resumed_at: int) -> None:
        first = self.world.rank * len(self.envs)
        numbers = range(first, first + len(self.envs))
        key = (self.seed_bits, self.run.seed, "env")
        self.envs.reset([reset_seed(*key, i, *resumed_at) for i in numbers])

    def epochs(
        self,
        on_updates: Callable[[Progress], None] = lambda progress: None,
        stop_signal: Callable[[], int] = lambda: 0,
    ) -> Iterator[Row]:
        """Train to `total_steps`, yielding a row per epoch, the same on every worker.

        Ends early, between updates, once `stop_signal` gives a signal's number on any worker. An
        evaluation is broken off at once; the resumed run begins with it.
        """
        p = self.progress
        self.reset_if_due()
        self.start_window()
        while not self.stopping:
            if self.evaluation_due():
                try:
                    row = self.evaluate_epoch(stop_signal)
                except Stopped as stopped:
                    self.stopping = stopped.number
                    return
                p.epoch += 1
                p.next_epoch()
                self.start_window()
                yield row
            elif p.step < self.run.total_steps:
                self.advance(stop_signal)
                on_updates(p)
            else:
                break
        self.end_window()

    def evaluation_due(self) -> bool:
        """Whether an epoch's steps are done and its evaluation is not."""
        p, run = self.progress, self.run
        ended = p.step > p.first_step and p.step >= run.total_steps
        return ended or crossed(p.first_step, p.step, run.steps_per_epoch)

    def advance(self, stop_signal: Callable[[], int] = lambda: 0) -> None:
        """One step in every environment, or the next steps of an offline run, and the updates that
        became due with them.
        """
        before, algo = self.step, self.config.algo
        if self.offline:
            self.progress.step += self.steps_ahead()
        else:
            self.act()
        try:
            if self.algo.on_policy:  # before the normaliser, which its rollout used, changes
                self.make_updates(before)
            # Offline, every advance ends where workers meet.
            interval = 1 if self.offline else algo.norm_interval or SYNC_INTERVAL
            if crossed(before, self.step, interval):
                self.synchronise(stop_signal())
            elif self.world.size == 1:  # no other worker has to agree
                self.stopping = stop_signal()
            if not self.algo.on_policy:
                self.make_updates(before)
            self.recalibrate(before)
        except NonFinite as error:
            raise NonFinite(f"step {self.step}: {error}") from error

    def steps_ahead(self) -> int:
        """Steps that an offline run makes at once: up to where workers meet, spikes begin to cost,
        the actor is recalibrated, or the epoch or the run ends.
        """
        if isinstance(self.config.algo, DecisionTransformerConfig):
            return 1  # an update may take a second, and a signal waits for it
        every, actor = [SYNC_INTERVAL, self.run.steps_per_epoch], self.config.actor.actor
        if isinstance(actor, CareBNConfig) and actor.recalibration_interval is not None:
            every.append(actor.recalibration_interval)
        ends = [each - self.step % each for each in every] + [self.run.total_steps - self.step]
        if isinstance(actor, PopSANConfig) and self.step < actor.spike_cost_start - 1:
            ends.append(actor.spike_cost_start - 1 - self.step)  # the last without a cost
        return min(ends)

    def act(self) -> None:
        """One step in every environment, stored with its true successors."""
        algo, explore = self.config.algo, self.streams.explore
        obs_NO = self.envs.obs
        self.algo.step = self.step  # for its schedules
        if self.step < self.algo.random_steps:
            shape = (len(obs_NO), self.task.act_dim)
            uniform = torch.rand(
                shape, generator=explore, dtype=torch.float32, device=explore.device
            )
            act = uniform * 2.0 - 1.0
        else:
            act = self.algo.explore(self.norm.observe(obs_NO, self.acting_on), explore)
        self.envs.steps = self.step  # an error names the run's step, also after a resume
        steps = self.envs.step(act.cpu().numpy())
        if (scale := self.config.env.reward_scale) != 1.0:
            steps = steps._replace(rew=steps.rew * scale)
        try:
            self.replay.add(*steps, discount=algo.gamma)
        except NonFinite as error:
            raise NonFinite(f"step {self.step + 1}: {error}; env.reward_scale={scale}") from error
        if algo.norm_interval is not None:
            self.norm.add(steps.obs)
        self.progress.step += len(steps.rew) * self.world.size  # each has as many environments
        self.progress.returns += [episode.ret for episode in self.envs.finished]
        self.envs.finished.clear()

    def synchronise(self, stop_signal: int) -> None:
        """Merge the normaliser's moments and agree on stopping, in one exchange."""
        mine = torch.from_numpy(np.append(self.norm.collect(), stop_signal))
        everyone = [part.numpy() for part in self.world.gather(mine)]
        self.norm.merge([part[:-1] for part in everyone])
        self.stopping = int(max(part[-1] for part in everyone))

    def make_updates(self, before: int) -> None:
        """The updates that became due since step `before`."""
        due = self.updates_due(self.step) - self.updates_due(before)
        if due == 0:
            return
        self.schedule(self.step)
        metrics = self.algo.train(self.sampler, due, self.batch_size)
        self.algo.check()
        self.progress.updates = self.algo.updates
        self.progress.add(metrics, self.batch_weight)

    def schedule(self, step: int) -> None:
        """Give surrogates their slopes, and spikes their costs, for updates at that step."""
        if isinstance(self.algo.actor, SpikingActor):
            self.algo.actor.schedule(step, self.run.total_steps)

    def last_update(self) -> int:
        """The step at which updates were last due, 0 before the first."""
        step, due = self.step, self.updates_due(self.step)
        while due and self.updates_due(step - self.config.num_envs) == due:
            step -= self.config.num_envs
        return step if due else 0

    def recalibrate(self, before: int) -> None:
        """Where drives are batch-normalised, measure their moments anew when that is due."""
        config, actor = self.config.actor.actor, self.algo.actor
        if not isinstance(config, CareBNConfig) or config.recalibration_interval is None:
            return
        if self.algo.updates <= self.algo.critic_warmup:
            return
        if not crossed(before, self.step, config.recalibration_interval):
            return
        assert isinstance(actor, SpikingActor)
        count = config.recalibration_batches * self.batch_size
        rows = self.sampler.batch(count)
        actor.recalibrate(rows.obs.split(self.batch_size), self.streams.update)
        self.algo.refresh()

    def updates_due(self, step: int) -> int:
        """Updates that belong to the first `step` steps."""
        return self.config.algo.updates_due(step, self.batches)

    def updates_by(self, step: int) -> int:
        """Updates that will have been made by `step`: those so far, whose number a resize may have
        changed, and those due until then.
        """
        return self.algo.updates + self.updates_due(step) - self.updates_due(self.step)

    def evaluate_epoch(self, stop_signal: Callable[[], int] = lambda: 0) -> Row:
        """Evaluate; the epoch's line of metrics.jsonl, with means over the epoch's steps."""
        p = self.progress
        trained = self.end_window()
        self.meter.begin("eval")
        try:
            evaluation = self.evaluator.run(self.policy, p.epoch + 1, stop_signal)
        finally:
            evaluated = since(p.eval_energy, self.meter.end("eval"))
            p.eval_energy = evaluated.as_data()
            self.count_cpu()
        self.check_in_sync()
        cpu_s = p.cpu_s if self.config.env.vectorizer == "sync" else None
        own = WorkerEpoch(p.returns, p.sums, p.train_s, cpu_s, trained, evaluated)
        everyone = self.world.gather_objects(own)
        return epoch_row(p, everyone, evaluation, self.algo, self.meter.source)

    def start_window(self) -> None:
        self.world.barrier()  # so that the windows of all workers span the same time
        self.meter.begin("train")
        self.clock = time.perf_counter()

    def end_window(self) -> Reading:
        """Count the time and the joules since `start_window`, and those before a resume."""
        p = self.progress
        p.train_s += time.perf_counter() - self.clock
        reading = since(p.energy, self.meter.end("train"))
        p.energy = reading.as_data()
        self.count_cpu()
        return reading

    def count_cpu(self) -> None:
        """Add this process's processor time since the last count, that of saving included."""
        now = time.process_time()
        if self.progress.cpu_s is not None:
            self.progress.cpu_s += now - self.cpu_clock
        self.cpu_clock = now

    def idle_power(self) -> float | None:
        """Watts before anything runs, measured while all workers wait; None where not measured."""
        self.world.barrier()
        readings = self.world.gather_objects(tuple(self.meter.idle()))
        return power(merge([Reading(*reading) for reading in readings]))

    def check_in_sync(self) -> None:
        """Raise unless all workers have the same parameters and normaliser, to the bit."""
        state = [*self.algo.state().values(), *self.norm.state().values()]
        digest = torch.stack([fingerprint(tensor) for tensor in state])
        first, *others = self.world.gather(digest)
        for rank, other in enumerate(others, 1):
            if not torch.equal(other, first):
                raise RuntimeError(f"workers 0 and {rank} have diverged at step {self.step}")

    def learner_state(self) -> dict[str, Tensor]:
        """Live tensors that are the same on every worker."""
        norm = {f"norm.{name}": tensor for name, tensor in self.norm.state().items()}
        return {**self.algo.state(), **norm}

    def close(self) -> None:
        with ExitStack() as stack:  # each is closed, even if closing the other fails
            stack.callback(self.evaluator.close)
            stack.callback(self.envs.close)


def crossed(before: int, now: int, interval: int) -> bool:
    """Whether a multiple of `interval` lies in (before, now]."""
    return now // interval > before // interval


def fingerprint(tensor: Tensor) -> Tensor:
    """An int64 that depends on every bit of `tensor`: its words, weighted by their positions."""
    words = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    words = torch.nn.functional.pad(words, (0, -len(words) % 8)).view(torch.int64)
    # Odd factors are invertible modulo 2^64, so that no bit is lost.
    odd = torch.arange(1, len(words) + 1, dtype=torch.int64) * 2 - 1
    return (words * odd).sum()
