"""The training loop: act, store, update, evaluate. It holds no file and no terminal.

Shape legend   N environments, A action entries.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from spikerl.algos.td3 import TD3, TD3Config
from spikerl.buffers import Replay
from spikerl.envs import EnvConfig, Steps, make_envs
from spikerl.evaluate import Evaluation, Evaluator
from spikerl.networks import ActorConfig, TwinCritic, build_actor
from spikerl.normalize import RunningNorm
from spikerl.policy import Policy
from spikerl.precision import PrecisionConfig
from spikerl.seeding import Streams, initialising, seed_for
from spikerl.types import Task

Row = dict[str, Any]


@dataclass(kw_only=True)
class Training:
    """What a run is made of, validated and resolved."""

    env: EnvConfig
    actor: ActorConfig
    algo: TD3Config
    precision: PrecisionConfig
    device: torch.device
    seed: int
    num_envs: int
    total_steps: int
    steps_per_epoch: int
    eval_episodes: int


class Progress:
    """Sums since the last epoch, and the newest losses; what a live view shows between epochs."""

    def __init__(self) -> None:
        self.step = self.updates = self.epoch = 0
        self.losses: dict[str, float] = {}
        self.returns: list[float] = []
        self.reset()

    def reset(self) -> None:
        self.sums: dict[str, tuple[float, int]] = {}
        self.returns = []
        self.started = time.perf_counter()
        self.first_step, self.first_update = self.step, self.updates

    def add(self, metrics: list[dict[str, torch.Tensor]]) -> None:
        """Take in a burst of updates; here the host waits for the device, once."""
        for name in dict.fromkeys(key for m in metrics for key in m):
            values = torch.stack([m[name] for m in metrics if name in m]).double()
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = (total + float(values.sum()), count + len(values))
            self.losses[name] = float(values[-1])

    def mean(self, name: str) -> float | None:
        total, count = self.sums.get(name, (0.0, 0))
        return total / count if count else None


class Trainer:
    def __init__(self, training: Training, task: Task, init: Policy | None = None) -> None:
        self.t, self.task = training, task
        t, algo, device = training, training.algo, training.device
        with initialising(t.seed):
            actor = build_actor(t.actor, task.obs_dim, task.act_dim, dtype=t.precision.actor_dtype)
            critic = TwinCritic(
                task.obs_dim,
                task.act_dim,
                algo.critic_hidden_sizes,
                dtype=t.precision.critic_dtype,
            )
        self.norm = RunningNorm(task.obs_dim, algo.norm_clip)
        if init is not None:
            actor.load_state_dict(init.actor.state_dict())
            self.norm.load(init.norm.state())
        self.streams = Streams(t.seed, 0, device)
        self.algo = TD3(
            actor.to(device),
            critic.to(device),
            algo,
            actor_lr=t.actor.actor.lr,
            generator=self.streams.update,
            scales_loss=t.precision.scales_loss,
        )
        self.policy = Policy(task, t.actor, actor, self.norm)
        self.replay = Replay(algo.replay_capacity, task.obs_dim, task.act_dim, device)
        self.envs = make_envs(t.env, t.num_envs, task)
        self.envs.reset([seed_for(t.seed, "env", i) for i in range(t.num_envs)])
        self.evaluator = Evaluator(t.env, t.eval_episodes, t.seed)
        self.progress = Progress()

    @property
    def step(self) -> int:
        return self.progress.step

    def epochs(
        self,
        on_burst: Callable[[Progress], None] = lambda progress: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[Row]:
        """Train to `total_steps`, yielding one row per epoch; ends early once `should_stop`."""
        t, p = self.t, self.progress
        started = time.perf_counter()
        p.reset()
        while p.step < t.total_steps and not should_stop():
            before = p.step
            self.act()
            self.learn(before)
            on_burst(p)
            end = min((before // t.steps_per_epoch + 1) * t.steps_per_epoch, t.total_steps)
            if p.step >= end:
                p.epoch += 1
                yield self.row(time.perf_counter() - started)
                p.reset()

    def act(self) -> None:
        """One step in every environment, stored with its true successors."""
        algo, explore = self.t.algo, self.streams.explore
        obs_NO = self.envs.obs
        if self.step < algo.random_steps:
            shape = (len(obs_NO), self.task.act_dim)
            act = torch.rand(shape, generator=explore, device=explore.device) * 2.0 - 1.0
        else:
            obs = torch.from_numpy(obs_NO.astype(np.float32)).to(self.t.device)
            act = self.algo.explore(self.norm.normalize(obs), explore)
        self.store(self.envs.step(act.cpu().numpy()))

    def store(self, steps: Steps) -> None:
        self.replay.add(*steps, discount=self.t.algo.gamma)
        self.norm.add(steps.obs)
        before, interval = self.step, self.t.algo.norm_interval
        self.progress.step += len(steps.rew)
        if self.step // interval > before // interval:
            self.norm.merge()
        self.progress.returns += [episode.ret for episode in self.envs.finished]
        self.envs.finished.clear()

    def learn(self, before: int) -> None:
        """The bursts of updates that became due since step `before`."""
        algo = self.t.algo
        due = self.updates_due(self.step) - self.updates_due(before)
        if due == 0:
            return
        metrics = []
        for _ in range(due):
            batch = self.replay.sample(algo.batch_size, self.streams.sample, self.norm.normalize)
            metrics.append(self.algo.update(batch))
        self.algo.guard.check()
        self.progress.updates = self.algo.updates
        self.progress.add(metrics)

    def updates_due(self, step: int) -> int:
        """Updates that belong to the first `step` steps, a burst at each update_interval."""
        algo = self.t.algo
        first = -(-max(algo.learning_starts, 1) // algo.update_interval)  # the first burst's number
        bursts = max(step // algo.update_interval - first + 1, 0)
        return int(bursts * algo.update_interval * algo.updates_per_step)

    def evaluate(self) -> Evaluation:
        return self.evaluator.run(self.policy, self.progress.epoch)

    def row(self, wall_s: float) -> Row:
        """The epoch's line of metrics.jsonl: means over the epoch, and an evaluation."""
        p = self.progress
        train_s = time.perf_counter() - p.started
        evaluation = self.evaluate()
        activity = evaluation.activity
        eval_s = time.perf_counter() - p.started - train_s
        row: Row = {
            "epoch": p.epoch,
            "step": p.step,
            "updates": p.updates,
            "wall_s": wall_s + eval_s,
            "train_return": float(np.mean(p.returns)) if p.returns else None,
            "train_episodes": len(p.returns),
            "eval_return": evaluation.mean,
            "eval_return_std": evaluation.std,
            "eval_length": evaluation.length,
            "critic_loss": p.mean("critic_loss"),
            "actor_loss": p.mean("actor_loss"),
            "q_mean": p.mean("q_mean"),
            "firing_rate": activity.firing_rate if activity else None,
            "window_fraction": activity.window_fraction if activity else None,
            "layer_firing_rates": activity.layers if activity else None,
            "env_steps_per_s": (p.step - p.first_step) / train_s,
            "updates_per_s": (p.updates - p.first_update) / train_s,
        }
        if self.algo.guard.scales_loss:
            row["skipped_updates"] = int(self.algo.guard.skipped)
        return row

    def close(self) -> None:
        self.envs.close()
        self.evaluator.close()
