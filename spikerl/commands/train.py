"""One training run, from a validated config to its exit status, with one worker or many."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from spikerl.config.build import Config, build
from spikerl.config.memory import check_memory
from spikerl.config.together import check_image
from spikerl.config.yaml_file import EVERY_RUN, read_config
from spikerl.distributed import launch, mpi
from spikerl.distributed.launchers import is_first, ranked
from spikerl.distributed.shared_folder import (
    LOST_OTHERS,
    WorkerLost,
    announce_folder,
    stop_requested,
)
from spikerl.distributed.world import ALONE, join, leave
from spikerl.energy.meter import open_meter
from spikerl.envs.process import start_server
from spikerl.errors import DONE, FAILED, BadRequest, EnvironmentFailed, first_line
from spikerl.files import absolute, shown, write_text
from spikerl.runs import folder as run_folder
from spikerl.runs.checkpoint import verified
from spikerl.runs.rows import check_record, read_rows
from spikerl.signals import stop_signals
from spikerl.snn.neurons import ResidualIFConfig
from spikerl.training.session import Session
from spikerl.training.start import dataset_of, default_folder, own_device, read_init, task_for
from spikerl.training.trainer import Trainer
from spikerl.types import Task


def main(data: dict[str, Any], argv: Sequence[str]) -> int:
    """`spikerl train`: the exit status. BadRequest leaves nothing behind."""
    config = build(data)
    settings = config.run
    if isinstance(config.actor.neuron, ResidualIFConfig) and config.actor.neuron.alpha > 0.0:
        remedy = "a replayed decision has none before it to carry on from; give 0"
        raise BadRequest("neuron.alpha", config.actor.neuron.alpha, remedy)
    task = task_for(config)
    check_memory(config, task)
    if not settings.resume:  # a resumed run goes on as it began
        check_image(config.actor, task)
    check_read(argv, config, task)
    if settings.init_from:
        read_init(settings.init_from, config, task)
    if dataset := dataset_of(config, task):
        dataset.check()
    if settings.resume:
        if finished(Path(settings.resume), config):
            return DONE
        target = settings.resume
    else:
        target = settings.run_dir or str(absolute(default_folder(config)))
        run_folder.check_free(target, named=settings.run_dir is not None, dated=True)
    check_launch(config)
    if not ranked() and (config.world_size > 1 or settings.max_restarts > 0):
        return launch_workers(config, target, argv)
    try:
        return run(config, task, target, argv)
    except Exception:
        if mpi.joined():
            traceback.print_exc()
            mpi.abort()
        raise


def launch_workers(config: Config, target: str, argv: Sequence[str]) -> int:
    """Start the workers, and all of them again when one is lost, up to `max_restarts` times."""
    workers, settings = workers_of(config), config.run
    spec = {"raw": config.raw, "target": target, "command": list(argv), "after": None}
    folder, begun = settings.resume, False
    for left in range(settings.max_restarts, -1, -1):
        try:
            return launch.launch(spec, workers)
        except WorkerLost as lost:
            if lost.request and lost.folder is None and spec["after"] is None:
                raise BadRequest(*lost.request) from None
            folder, begun = lost.folder or folder, begun or not lost.apart
            unmet = isinstance(lost, launch.Apart)
            if left == 0 or lost.stopping or lost.request or unmet:
                return record_lost_worker(lost, folder, begun=begun)
            if folder:  # it has all that the run was started from
                spec["raw"] = {**config.raw, "resume": folder, "init_from": None, "dataset": None}
            spec["after"] = str(lost)
            if workers.nnodes > 1:  # a port that no earlier process used
                workers = replace(workers, port=workers.port + 1)
            print(f"spikerl: {lost}; restarting all ({left} of {settings.max_restarts} restarts"
                  " were left)", file=sys.stderr)  # fmt: skip
    raise AssertionError


def workers_of(config: Config) -> launch.Workers:
    s = config.run
    workers = launch.Workers(
        size=config.world_size,
        threads=int(config.resolved.threads.choice),
        backend=config.resolved.backend.choice,
        timeout_s=config.backend.timeout_s,
    )
    if s.rdzv is None:
        return workers
    host, _, port = s.rdzv.rpartition(":")
    rank = s.node_rank or 0
    return replace(workers, nnodes=s.nnodes, node_rank=rank, host=host, port=int(port))


def check_launch(config: Config) -> None:
    """Refuse settings that are up to the launcher that starts the workers."""
    settings = config.run
    if ranked():
        if settings.max_restarts > 0:
            remedy = "a launcher has started the workers; leave it out, and resume=RUN goes on"
            raise BadRequest("max_restarts", settings.max_restarts, remedy)
        if settings.nnodes > 1:
            remedy = "the workers have been started; give it to what started them"
            raise BadRequest("nnodes", settings.nnodes, remedy)
    elif config.resolved.backend.choice == "mpi" and settings.nnodes > 1:
        remedy = "mpiexec starts workers on several machines: mpiexec -hosts A,B spikerl train ..."
        raise BadRequest("nnodes", settings.nnodes, remedy)


def run_in_worker(spec: Mapping[str, Any], shared_dir: Path) -> int:
    """Run one of the workers that `train` launched; the exit status."""
    config = build(spec["raw"])
    return run(config, task_for(config), spec["target"], spec["command"], shared_dir, spec["after"])


def record_lost_worker(lost: WorkerLost, run: str | None, *, begun: bool = True) -> int:
    """Record that a worker was lost, and say how to resume from the last commit; the exit status.

    A resumed run whose workers have not `begun` is left as it was.
    """
    cause = str(lost)
    if run is not None:
        folder = Path(run)
        if begun:
            # Worker 0 on another machine may hold the folder a little after the workers here end.
            # A process that has resumed the run meanwhile keeps it.
            with suppress(OSError, BadRequest), run_folder.lock(folder, within_s=launch.SHUTDOWN_S):
                run_folder.update_manifest(folder, status="failed", ended=run_folder.now())
                if not known_elsewhere(folder / "error.txt", cause):
                    write_text(folder / "error.txt", f"{lost.trace}{cause}\n")
        cause += f" (spikerl train resume={shown(folder)} goes on from its last checkpoint)"
    print(f"spikerl: {cause}", file=sys.stderr)
    return FAILED


def known_elsewhere(error: Path, cause: str) -> bool:
    """Whether another machine has recorded the cause, of which this one may know less."""
    said = error.read_text(encoding="utf-8").splitlines()[-1:] if error.exists() else []
    told = [line for line in said if line.startswith("worker ")]
    lost_others = LOST_OTHERS in cause
    return any(lost_others or LOST_OTHERS not in line for line in told)


def run(
    config: Config,
    task: Task,
    target: str,
    command: Sequence[str],
    shared_dir: Path | None = None,
    after: str | None = None,
) -> int:
    """One worker's part of a run; all of them return the same status.

    `shared_dir` is the launching parent's, if there is one; `after` is why it restarted the run.
    """
    torch.set_num_threads(int(config.resolved.threads.choice))
    # Like torch.use_deterministic_algorithms, which takes a second to import torch's compiler.
    torch.set_deterministic_debug_mode("error" if config.run.deterministic else "default")
    if config.run.deterministic:  # which cuBLAS needs for that, and reads at its first use
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    device = own_device(config.resolved.device.choice)
    choice = config.resolved.backend.choice
    world = join(choice, device, config.backend.timeout_s) if ranked() else ALONE

    def announce(folder: Path) -> None:
        if shared_dir:
            announce_folder(shared_dir, folder)

    if config.env.vectorizer == "async":
        start_server()  # which imports meanwhile
    with stop_signals(partial(stop_requested, shared_dir) if shared_dir else None) as stop_signal:
        trainer, status = None, None
        try:
            meter = open_meter(config.energy, device=device, local_rank=world.local_rank)
            init_from = config.run.init_from
            init = read_init(init_from, config, task) if init_from else None
            dataset = dataset_of(config, task)
            trainer = Trainer(config, task, init, world, meter, device, dataset)
            session = Session(config, trainer, world, target, command, after, announce)
            status = session.run(stop_signal)
            mpi.leave()
            return status
        finally:
            try:
                if trainer is not None:
                    trainer.close()
            except EnvironmentFailed:
                if status is not None:  # else an earlier error is raised
                    raise
            finally:
                leave()


def check_read(argv: Sequence[str], config: Config, task: Task) -> None:
    """Refuse typed keys that change nothing; in a config file they are accepted."""
    discrete = task.kind == "discrete"
    unread = config.algo.unread(discrete)
    remedies = {f"algo.{key}": remedy for key, remedy in unread.items()} | config.actor.unread()
    if discrete:
        remedies["env.action_bounds"] = "discrete actions have no bounds; leave it out"
    if not config.run.init_from:
        remedies["init_policy"] = "it belongs to init_from; give that, or leave it out"
    for word in argv:
        key, _, value = word.lstrip("+").partition("=")
        if key in remedies:
            raise BadRequest(key, value, remedies[key])


def finished(folder: Path, config: Config) -> bool:
    """Whether the run has nothing left to do (then a line says so); refuse what cannot go on."""
    record = run_folder.read_manifest(folder, key="resume")
    held = read_config(folder / "config.yaml")
    if lacking := [key for key in EVERY_RUN if key not in held]:
        remedy = f"its config.yaml lacks {lacking[0]}, as one that was cut; put back a whole one"
        raise BadRequest("resume", folder, remedy)
    run_folder.check_own(folder)
    if is_first() and not config.run.node_rank:
        run_folder.lock(folder).close()
    freed, total = record.get("freed"), config.run.total_steps
    if freed:
        try:
            step = max((row["step"] for row in read_rows(folder / "metrics.jsonl")), default=0)
        except (OSError, ValueError) as error:
            remedy = f"its record cannot be read: {first_line(error)}"
            raise BadRequest("resume", folder, remedy) from None
        further = f"init_from={shown(folder)} starts from its policy"
        if step < total:
            remedy = f"its replay was removed when it was done, at step {step}; {further}"
            raise BadRequest("resume", folder, remedy)
    else:
        try:
            checkpoint = verified(folder, lambda text: None)
            check_record(folder, checkpoint.manifest)
        except OSError as error:
            remedy = f"{first_line(error)}; nothing was started"
            raise BadRequest("resume", folder, remedy) from None
        step, further = checkpoint.step, "a larger total_steps trains it further"
        if config.last_step < step:
            raise BadRequest("total_steps", total, f"the run is at step {step}; give that or more")
        if not config.run.keep_replay:
            further += f", spikerl runs path={shown(folder)} clean=true removes its replay"
    if record["status"] == "done" and step >= total:
        if is_first():
            print(f"{shown(folder)} is done at step {step}; {further}")
        return True
    return False
