"""One training run: from a validated config to a complete run folder, with one worker or many."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from spikerl import runfolder
from spikerl.checkpoint import Checkpoint, drop_later, save_checkpoint, verified
from spikerl.config import Config, build
from spikerl.distributed.launch import WorkerLost, launch
from spikerl.distributed.world import ALONE, World, join, leave, ranked, share
from spikerl.energy import joules_to_reach, open_meter, total_joules
from spikerl.envs import make_env, task_of
from spikerl.errors import BadRequest
from spikerl.files import write_json, write_text
from spikerl.policy import Policy, find_policy, read_policy
from spikerl.runlog import RunLog
from spikerl.trainer import Row, Trainer
from spikerl.types import Task
from spikerl.versions import versions
from spikerl.view import View, epoch_line

DONE, FAILED, STOPPED, INTERRUPTED = 0, 1, 75, 130


def train(config: Config, command: Sequence[str]) -> int:
    """Train as `config` says; the exit status. BadRequest leaves nothing behind."""
    settings = config.scalars
    task = task_for(config)
    if settings.init_from:
        read_init(settings.init_from, config, task)
    if settings.resume:
        if finished(Path(settings.resume), config):
            return DONE
        target = settings.resume
    else:
        target = settings.run_dir or default_folder(config)
        runfolder.check_free(target, named=settings.run_dir is not None)
    if config.world_size == 1 or ranked():
        return run(config, task, target, command)
    spec = {"raw": config.raw, "target": target, "command": list(command)}
    try:
        return launch(spec, config.world_size, int(config.threads.choice))
    except WorkerLost as error:
        return mourn(Path(target), str(error))


def work(spec: Mapping[str, Any], earlier_stop: Callable[[], int | None]) -> int:
    """A worker that `train` launched."""
    config = build(spec["raw"])
    return run(config, task_for(config), spec["target"], spec["command"], earlier_stop)


def mourn(folder: Path, cause: str) -> int:
    """Record that a worker was lost; what it had committed can be resumed."""
    if (folder / "manifest.json").exists():
        runfolder.update_manifest(folder, status="failed", ended=runfolder.now())
        write_text(folder / "error.txt", cause + "\n")
        cause += f" (spikerl train resume={folder} goes on from its last checkpoint)"
    print(f"spikerl: {cause}", file=sys.stderr)
    return FAILED


def run(
    config: Config,
    task: Task,
    target: str,
    command: Sequence[str],
    earlier_stop: Callable[[], int | None] = lambda: None,
) -> int:
    """One worker's part of a run; all of them return the same status."""
    torch.set_num_threads(int(config.threads.choice))
    torch.use_deterministic_algorithms(config.scalars.deterministic)
    device = own_device(config.device.choice)
    world = join(config.backend.choice, device) if ranked() else ALONE
    with stop_signals(earlier_stop) as stop:
        trainer = None
        try:
            meter = open_meter(config.energy, device=device, local_rank=world.local_rank)
            training = replace(config.training(), device=device)
            init_from = config.scalars.init_from
            init = read_init(init_from, config, task) if init_from else None
            trainer = Trainer(training, task, init, world, meter)
            session = Session(config, trainer, world, target, command)
            return session.run(lambda: stop[0] if stop else 0)
        finally:
            if trainer is not None:
                trainer.close()
            leave()


class Session:
    """A run while it runs: the folder, its record and view (rank 0's alone), and the commits."""

    def __init__(
        self, config: Config, trainer: Trainer, world: World, target: str, command: Sequence[str]
    ) -> None:
        self.config, self.trainer, self.world = config, trainer, world
        self.first = world.rank == 0
        self.wall_s = 0.0  # before this session
        self.started = time.perf_counter()
        self.committed = -1
        notes = announce(config, trainer)
        if config.scalars.resume:
            self.folder = Path(config.scalars.resume)
            notes += self.go_on(command)
        else:
            self.folder = self.start(target, command)
        if self.first:
            title = f"{trainer.task.env_id}  {config.algo.name}  {self.folder}"
            self.log, self.view = (
                RunLog(self.folder, trainer.step),
                View(title, trainer.t.total_steps, trainer.step),
            )
            for text in [*notes, f"run folder: {self.folder}"]:
                self.say(text)
        world.barrier()  # the first epoch, its seconds and its joules begin on all together

    def start(self, target: str, command: Sequence[str]) -> Path:
        """A new folder, which appears whole, with checkpoint 0 from all workers."""
        named = self.config.scalars.run_dir is not None
        partial = Path(self.world.broadcast(str(runfolder.partial_of(target))))
        if self.first:
            runfolder.begin(partial, target, self.config.raw, self.manifest(command))
        try:
            self.world.barrier()
            self.commit(partial)
            place = str(runfolder.appear(partial, target, named=named)) if self.first else ""
        finally:
            if self.first:
                shutil.rmtree(partial, ignore_errors=True)
        folder = Path(self.world.broadcast(place))
        if self.first:
            self.lock = runfolder.lock(folder)
        return folder

    def go_on(self, command: Sequence[str]) -> list[str]:
        """Take the newest checkpoint that verifies, on all workers; what was restored."""
        notes: list[str] = []
        name = None
        if self.first:
            self.lock = runfolder.lock(self.folder)
            name = verified(self.folder, notes.append).folder.name
        name = self.world.broadcast(name)
        checkpoint = Checkpoint.open(self.folder, name)
        exact = all(self.world.gather_objects(self.trainer.load(checkpoint)))
        self.wall_s, self.committed = float(checkpoint.manifest["wall_s"]), self.trainer.step
        if not self.first:
            return notes
        drop_later(checkpoint)
        lost = runfolder.rewind(self.folder, int(checkpoint.manifest["metrics_bytes"]))
        record = runfolder.read_manifest(self.folder, key="resume")
        event = {"time": runfolder.now(), "step": self.trainer.step, "exact": exact,
                 "discarded_rows": lost, "command": " ".join(command)}  # fmt: skip
        resumed = [*record.get("resumed", []), event]
        runfolder.update_manifest(self.folder, status="running", resumed=resumed)
        total = self.trainer.t.total_steps
        notes.append(
            f"resumed at step {self.trainer.step} of {total}: weights, optimisers, normaliser,"
            f" {self.trainer.replay.size} transitions, random streams,"
            + (" environments" if exact else " environments from a reset (not exact)")
            + (f"; {lost} later rows moved to discarded.jsonl" if lost else "")
        )
        return notes

    def run(self, stop_signal: Callable[[], int]) -> int:
        trainer = self.trainer
        show = self.view.progress if self.first else (lambda progress: None)
        try:
            for row in trainer.epochs(show, stop_signal):
                if self.first:
                    self.record(row)
                self.commit(self.folder)
            if trainer.stopping and self.committed != trainer.step:
                self.commit(self.folder)
            return self.finish()
        except BaseException as error:
            if self.first:
                self.fail(error)
            raise
        finally:
            if self.first:
                self.view.close()
                self.log.close()
                self.lock.close()

    def record(self, row: Row) -> None:
        row = {**row, "wall_s": self.wall()}
        self.log.row(row)
        self.view.epoch(row)
        self.log.line(epoch_line(row, self.trainer.t.total_steps))

    def commit(self, run: Path) -> None:
        trainer = self.trainer
        metrics = run / "metrics.jsonl"
        facts = {
            "step": trainer.step,
            "epoch": trainer.progress.epoch,
            "world_size": self.world.size,
            "wall_s": self.wall(),
            "metrics_bytes": metrics.stat().st_size if self.first else 0,
        }
        learner = trainer.learner_state()
        save_checkpoint(run, self.world, trainer.shard(), learner, facts, trainer.policy.save)
        self.committed = trainer.step

    def finish(self) -> int:
        number = self.trainer.stopping
        status, code = "done", DONE
        if number:
            interrupted = number == signal.SIGINT
            status = "interrupted" if interrupted else "preempted"
            code = INTERRUPTED if interrupted else STOPPED
        if self.first:
            self.trainer.policy.save(self.folder)
            self.summarise()
            runfolder.update_manifest(
                self.folder, status=status, ended=runfolder.now(), wall_s=self.wall()
            )
            if number:
                name = signal.Signals(number).name
                self.say(f"stopped at step {self.trainer.step} on {name};"
                         f" spikerl train resume={self.folder} goes on")  # fmt: skip
            else:
                self.say(f"done: {self.trainer.step} steps, {self.trainer.algo.updates} updates"
                         f" in {self.wall():.0f} s")  # fmt: skip
        return code

    def fail(self, error: BaseException) -> None:
        status = {"status": "failed", "ended": runfolder.now(), "wall_s": self.wall()}
        runfolder.update_manifest(self.folder, **status)
        write_text(self.folder / "error.txt", traceback.format_exc())
        self.say(f"failed at step {self.trainer.step}: {type(error).__name__}: {error}")

    def summarise(self) -> None:
        rows = runfolder.read_rows(self.folder / "metrics.jsonl")
        discarded = runfolder.read_rows(self.folder / "discarded.jsonl")
        returns = [row["eval_return"] for row in rows]
        last_ten = returns[-10:]
        summary = {
            "env_id": self.trainer.task.env_id,
            "seed": self.config.scalars.seed,
            "world_size": self.world.size,
            "steps": self.trainer.step,
            "updates": self.trainer.algo.updates,
            "evaluations": len(returns),
            "last_eval_return": returns[-1] if returns else None,
            "best_eval_return": max(returns) if returns else None,
            "last_ten_mean_eval_return": sum(last_ten) / len(last_ten) if returns else None,
            "wall_s": self.wall(),
            "discarded_rows": len(discarded),
            "energy_j": total_joules([*rows, *discarded]),
            "energy_discarded_j": total_joules(discarded),
            "energy_to_best_j": joules_to_reach(rows, max(returns)) if returns else None,
            "energy_source": rows[-1]["energy_source"] if rows else self.trainer.meter.source,
            "versions": versions(),
        }
        write_json(self.folder / "summary.json", summary)

    def manifest(self, command: Sequence[str]) -> dict[str, Any]:
        names = ("device", "threads", "kernel", "backend")
        resolved = {name: getattr(self.config, name)._asdict() for name in names}
        resolved["energy"] = self.config.meter._asdict()
        facts = {"world_size": self.world.size, "precision": self.config.precision.name}
        return runfolder.make_manifest(self.trainer.task.env_id, command, resolved, facts)

    def wall(self) -> float:
        return self.wall_s + time.perf_counter() - self.started

    def say(self, text: str) -> None:
        self.view.line(text)
        self.log.line(text)


def task_for(config: Config) -> Task:
    env = make_env(config.env)
    env_task = task_of(env)
    env.close()
    return env_task


def own_device(choice: str) -> torch.device:
    """The device of the calling worker; several on CUDA take the devices in turn."""
    if not choice.startswith("cuda") or not ranked():
        return torch.device(choice)
    index = int(os.environ.get("LOCAL_RANK", os.environ["RANK"])) % torch.cuda.device_count()
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def announce(config: Config, trainer: Trainer) -> list[str]:
    """What is about to run and what each worker has of it, with every choice that was made."""
    t, size, algo = trainer.t, trainer.world.size, config.algo
    rows = [share(algo.batch_size, rank, size) for rank in range(size)]
    if t.scaling == "weak":
        rows = [algo.batch_size] * size
    each = str(rows[0]) if len(set(rows)) == 1 else f"{min(rows)} to {max(rows)}"
    resolved = {name: getattr(config, name) for name in ("device", "threads", "kernel", "backend")}
    resolved["energy"] = config.meter
    task = trainer.task
    lines = [
        f"{task.env_id}: {task.obs_dim} observations, {task.act_dim} actions;"
        f" {config.actor.actor.name} actor, {algo.name}, seed {t.seed},"
        f" precision {config.precision.name}",
        f"{size} worker{'s' * (size > 1)} x {t.num_envs // size} environments;"
        f" global batch {sum(rows)} ({each} per worker, {t.scaling} scaling);"
        f" {trainer.updates_due(t.total_steps)} updates in {t.total_steps} steps",
        "; ".join(f"{name}={r.choice} ({r.reason})" for name, r in resolved.items()),
    ]
    if config.scalars.init_from:
        norm = f"normaliser ({trainer.norm.count} observations)"
        lines.append(f"init_from={config.scalars.init_from}: actor weights and {norm}")
    return lines


def finished(folder: Path, config: Config) -> bool:
    """Whether there is nothing left to do; says so. Refuses what cannot go on."""
    status = runfolder.read_manifest(folder, key="resume")["status"]
    if os.environ.get("RANK", "0") == "0":
        runfolder.lock(folder).close()
    checkpoint = verified(folder, lambda text: None)
    if (had := checkpoint.manifest["world_size"]) != config.world_size:
        remedy = f"the run had {had}, each with a replay of its own; resume it with as many"
        raise BadRequest("world_size", config.world_size, remedy)
    if status == "done" and checkpoint.step >= config.scalars.total_steps:
        step = checkpoint.step
        print(f"{folder} is done at step {step}; a larger total_steps goes on with it")
        return True
    return False


def read_init(source: str, config: Config, task: Task) -> Policy:
    """The policy that training starts from; it must have the shapes that this run has."""
    policy = read_policy(find_policy(Path(source), key="init_from"), key="init_from")
    ours = (task.obs_shape, task.act_shape)
    theirs = (policy.task.obs_shape, policy.task.act_shape)
    if ours != theirs:
        remedy = (
            f"its policy maps {theirs[0]} to {theirs[1]} ({policy.task.env_id}),"
            f" but {task.env_id} needs {ours[0]} to {ours[1]}"
        )
        raise BadRequest("init_from", source, remedy)
    if policy.config.shape() != config.actor.shape():
        remedy = f"its actor is {policy.config.shape()}, this run's is {config.actor.shape()}"
        raise BadRequest("init_from", source, remedy)
    return policy


def default_folder(config: Config) -> str:
    name = config.env.id if config.env.name == "gym" else config.env.name
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", name)
    return f"outputs/{safe}/{config.algo.name}/{stamp}_seed{config.scalars.seed}"


@contextmanager
def stop_signals(earlier: Callable[[], int | None]) -> Iterator[list[int]]:
    """Collect SIGTERM, SIGUSR1 and Ctrl-C for the loop to see; a second Ctrl-C ends at once."""
    received: list[int] = []

    def receive(number: int, frame: object) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    caught = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = {number: signal.signal(number, receive) for number in caught}
    if (number := earlier()) is not None:
        received.append(number)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
