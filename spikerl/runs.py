"""One training run from a validated config to a complete run folder."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from spikerl import hardware
from spikerl.checkpoint import save_checkpoint
from spikerl.config import Config
from spikerl.envs import make_env, task_of
from spikerl.errors import BadRequest
from spikerl.files import write_json, write_text
from spikerl.policy import Policy, find_policy, read_policy
from spikerl.runlog import RunLog, read_rows
from spikerl.trainer import Row, Trainer
from spikerl.types import Task
from spikerl.versions import git_state, versions
from spikerl.view import View, epoch_line

DONE, FAILED, STOPPED, INTERRUPTED = 0, 1, 75, 130

# A row's energy keys while nothing measures them: absent is null, never 0.
ENERGY_KEYS = ("energy_j", "energy_gpu_j", "energy_cpu_j", "power_w", "energy_train_j",
               "energy_eval_j")  # fmt: skip


def train(config: Config, command: Sequence[str]) -> int:
    """Train as `config` says; the exit status. BadRequest leaves nothing behind."""
    settings, training = config.scalars, config.training()
    torch.set_num_threads(int(config.threads.choice))
    torch.use_deterministic_algorithms(settings.deterministic)
    env = make_env(config.env)
    task = task_of(env)
    env.close()
    init = read_init(settings.init_from, config, task) if settings.init_from else None
    target = settings.run_dir or default_folder(config)
    check_free(target, named=settings.run_dir is not None)
    trainer = Trainer(training, task, init)
    try:
        record = manifest(config, task, command)
        folder = create_folder(target, config, record, lambda f: checkpoint(f, trainer))
        return _run(config, trainer, folder, announce(config, task, trainer, init))
    finally:
        trainer.close()


def write_imported(
    config: Config, policy: Policy, command: Sequence[str], sources: Sequence[Path]
) -> Path:
    """A run folder for a policy that another program trained."""
    target = config.scalars.run_dir or default_folder(config)
    check_free(target, named=config.scalars.run_dir is not None)
    record = manifest(config, policy.task, command)
    record |= {"status": "done", "imported_from": [str(path) for path in sources]}
    return create_folder(target, config, record, policy.save)


def _run(config: Config, trainer: Trainer, folder: Path, header: list[str]) -> int:
    log = RunLog(folder)
    view = View(f"{trainer.task.env_id}  {config.algo.name}  {folder}", trainer.t.total_steps)
    started = time.perf_counter()

    def say(text: str) -> None:
        view.line(text)
        log.line(text)

    try:
        for text in [*header, f"run folder: {folder}"]:
            say(text)
        with stop_signals() as stop:
            for row in trainer.epochs(view.progress, lambda: bool(stop)):
                record = with_energy(row, config)
                log.row(record)
                checkpoint(folder, trainer)
                view.epoch(record)
                log.line(epoch_line(record, trainer.t.total_steps))
        wall_s = time.perf_counter() - started
        trainer.policy.save(folder)
        if stop:
            interrupted = stop[0] == signal.SIGINT
            write_summary(folder, config, trainer, wall_s)
            set_status(folder, "interrupted" if interrupted else "preempted", wall_s)
            say(f"stopped at step {trainer.step} on {stop[0].name}; the policy so far is saved")
            return INTERRUPTED if interrupted else STOPPED
        write_summary(folder, config, trainer, wall_s)
        set_status(folder, "done", wall_s)
        say(f"done: {trainer.step} steps, {trainer.algo.updates} updates in {wall_s:.0f} s")
        return DONE
    except BaseException as error:
        set_status(folder, "failed", time.perf_counter() - started)
        write_text(folder / "error.txt", traceback.format_exc())
        say(f"failed at step {trainer.step}: {type(error).__name__}: {error}")
        if not isinstance(error, Exception):
            raise
        print(f"spikerl: {error} (see {folder / 'error.txt'})", file=sys.stderr)
        return FAILED
    finally:
        view.close()
        log.close()


def checkpoint(folder: Path, trainer: Trainer) -> None:
    save_checkpoint(folder, trainer.policy, trainer.algo.critic, trainer.step)


def announce(config: Config, task: Task, trainer: Trainer, init: Policy | None) -> list[str]:
    """What is about to run, with every choice that "auto" made."""
    t = config.training()
    resolved = {name: getattr(config, name) for name in ("device", "threads", "kernel", "energy")}
    lines = [
        f"{task.env_id}: {task.obs_dim} observations, {task.act_dim} actions;"
        f" {config.actor.actor.name} actor, {config.algo.name}, seed {t.seed}",
        f"1 worker, {t.num_envs} environments, batch {config.algo.batch_size},"
        f" {trainer.updates_due(t.total_steps)} updates in {t.total_steps} steps,"
        f" precision {config.precision.name}",
        "; ".join(f"{name}={r.choice} ({r.reason})" for name, r in resolved.items()),
    ]
    if init is not None:
        source = config.scalars.init_from
        lines.append(f"init_from={source}: actor weights and normaliser ({trainer.norm.count} obs)")
    return lines


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


def check_free(target: str, *, named: bool) -> None:
    """Refuse early, before anything is built, what `create_folder` would refuse late."""
    folder = Path(target)
    if named and folder.exists():
        remedy = "it exists already; give another run_dir, or leave it out for a dated one"
        raise BadRequest("run_dir", target, remedy)
    parent = folder.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise BadRequest("run_dir", target, f"{parent} cannot be written to; give another run_dir")


def create_folder(
    target: str, config: Config, record: dict[str, Any], fill: Callable[[Path], None]
) -> Path:
    """Make the run folder whole beside its place (config, manifest, policy), then rename it."""
    folder = Path(target)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        write_text(partial / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config.raw)))
        write_json(partial / "manifest.json", record)
        (partial / "metrics.jsonl").touch()
        fill(partial)
        return rename_free(partial, folder, named=config.scalars.run_dir is not None)
    except OSError as error:
        reason = error.strerror or str(error)
        raise BadRequest("run_dir", target, f"{reason}; give another run_dir") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def rename_free(partial: Path, folder: Path, *, named: bool) -> Path:
    """Rename to a name that nobody has; a dated folder whose second is taken gets a number."""
    for number in range(1, 1000):
        place = folder if number == 1 else folder.with_name(f"{folder.name}_{number}")
        try:
            if not place.exists():  # a rename would replace an empty folder
                os.rename(partial, place)
                return place
        except OSError:
            if not place.exists():
                raise
        if named:
            break
    raise BadRequest("run_dir", folder, "it exists already; give another run_dir")


def manifest(config: Config, task: Task, command: Sequence[str]) -> dict[str, Any]:
    names = ("device", "threads", "kernel", "backend", "energy")
    resolved = {name: getattr(config, name)._asdict() for name in names}
    return {
        "status": "running",
        "command": shlex.join(command),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "env_id": task.env_id,
        "world_size": config.scalars.world_size,
        "precision": config.precision.name,
        "resolved": resolved,
        "git": git_state(),
        "versions": versions(),
        "hardware": hardware.describe(),
    }


def set_status(folder: Path, status: str, wall_s: float) -> None:
    data = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    write_json(folder / "manifest.json", {**data, "status": status, "ended": now, "wall_s": wall_s})


def with_energy(row: Row, config: Config) -> Row:
    reason = f"{config.energy.choice}: {config.energy.reason}"
    return {**row, **dict.fromkeys(ENERGY_KEYS), "energy_source": reason}


def write_summary(folder: Path, config: Config, trainer: Trainer, wall_s: float) -> None:
    returns = [row["eval_return"] for row in read_rows(folder)]
    summary = {
        "env_id": trainer.task.env_id,
        "seed": config.scalars.seed,
        "steps": trainer.step,
        "updates": trainer.algo.updates,
        "evaluations": len(returns),
        "last_eval_return": returns[-1] if returns else None,
        "best_eval_return": max(returns) if returns else None,
        "last_ten_mean_eval_return": sum(returns[-10:]) / len(returns[-10:]) if returns else None,
        "wall_s": wall_s,
        "energy_j": None,
        "energy_source": f"{config.energy.choice}: {config.energy.reason}",
        "versions": versions(),
    }
    write_json(folder / "summary.json", summary)


@contextmanager
def stop_signals() -> Iterator[list[signal.Signals]]:
    """Collect SIGTERM, SIGUSR1 and Ctrl-C for the loop to see; a second Ctrl-C ends at once."""
    received: list[signal.Signals] = []

    def receive(number: int, frame: object) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(signal.Signals(number))

    caught = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = {number: signal.signal(number, receive) for number in caught}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
