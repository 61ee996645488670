"""Runs that are killed at random instants, resumed, and compared with an undisturbed run."""

from __future__ import annotations

import random
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

from processes import Run, computed, gone, record, resume, rows, train

CASES = {
    "td3": ["env=HalfCheetah"],
    "ddpg": ["env=HalfCheetah", "algo=ddpg", "num_envs=2"],
    "proxy_td3": [
        "env=Hopper", "algo=proxy_td3", "algo.proxy_steps=2", "algo.updates_per_step=0.5",
        "neuron=plif", "actor=care_bn", "actor.recalibration_interval=50",
        "actor.recalibration_batches=2",
    ],
    "sac": ["env=Hopper", "algo=sac", "algo.learn_temperature=true", "neuron=alif"],
    "ppo": ["env=Hopper", "algo=ppo", "num_envs=2"],
    "poisson": ["env=Walker2d", "encoder=poisson", "num_envs=2", "deterministic=true"],
    "async": ["env=Ant", "num_envs=3", "env.vectorizer=async"],
    "care_bn": ["env=Pendulum", "actor=care_bn", "encoder=learned", "algo.max_grad_norm=1.0"],
    "workers": ["env=HalfCheetah", "world_size=2", "num_envs=4"],
    "ppo_workers": ["env=Hopper", "algo=ppo", "world_size=2", "num_envs=4", "scaling=weak"],
}  # fmt: skip


@dataclass
class Whole:
    """An undisturbed run of a case, and how long it took."""

    home: Path
    args: list[str]
    start_s: float = 0.0  # until it trained
    train_s: float = 0.0

    def __post_init__(self) -> None:
        begun = time.monotonic()
        run = train(self.home, *self.args)
        run.until(run.begun)
        self.start_s = time.monotonic() - begun
        assert run.wait() == 0, run.said()
        self.train_s = time.monotonic() - begun - self.start_s


@dataclass
class Outcome:
    kills: list[str] = field(default_factory=list)  # when: "starting", "restoring" or "training"
    discarded: int = 0  # rows
    equal: bool = False  # to the undisturbed run


def soak(whole: Whole, home: Path, chance: random.Random, again: float = 0.5) -> Outcome:
    """Kill a run at a random instant, each resume with probability `again`; then let it finish."""
    outcome, folder = Outcome(), home / "run"
    home.mkdir()
    while not outcome.kills or chance.random() < again:
        resumed = folder.exists()
        run = resume(home) if resumed else train(home, *whole.args)
        if kill(run, whole, chance):
            doing = "restoring" if resumed else "starting"
            outcome.kills.append("training" if run.begun() else doing)
        elif outcome.kills:  # it ended before the kill
            break
        else:
            shutil.rmtree(folder)  # the run ended before its first kill: try again with a new one
        gone(home)
    last = resume(home) if folder.exists() else train(home, *whole.args)
    assert last.wait() == 0, last.said()
    gone(home)
    outcome.discarded = record(folder, "summary.json")["discarded_rows"]
    assert outcome.discarded == len(rows(folder, "discarded.jsonl"))
    outcome.equal = computed(folder) == computed(whole.home / "run")
    return outcome


def kill(run: Run, whole: Whole, chance: random.Random) -> bool:
    """Send SIGKILL at a random instant: with probability 1/4 of the start, else of the training.

    Returns False if the run ended before that.
    """
    if chance.random() < 0.25:
        time.sleep(chance.uniform(0, whole.start_s))
    else:
        run.until(lambda: run.begun() or not run.process.is_alive())
        time.sleep(chance.uniform(0, whole.train_s))
    if not run.process.is_alive():
        assert run.wait() == 0, run.said()
        return False
    return run.kill() < 0
