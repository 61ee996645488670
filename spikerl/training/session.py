"""A run while it runs: its folder, its record and view, and the commits."""

from __future__ import annotations

import math
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from spikerl.config.build import Config
from spikerl.distributed.world import World
from spikerl.energy.meter import source_of
from spikerl.errors import (
    DONE,
    FAILED,
    INTERRUPTED,
    BadRequest,
    DiskError,
    EnvironmentFailed,
    first_line,
    stop_status,
)
from spikerl.files import partial_of, shown, write_json, write_text
from spikerl.machine import versions
from spikerl.runs import folder as run_folder
from spikerl.runs.checkpoint import Checkpoint, remove_newer, save_checkpoint, verified
from spikerl.runs.display import View, epoch_line, idle_line, spent_text, stuck_layers
from spikerl.runs.record import RunLog
from spikerl.runs.rows import cut_back, read_rows, seconds_beyond
from spikerl.runs.summary import seconds_discarded, summary_of
from spikerl.signals import signal_name
from spikerl.training.announcement import announce, nothing_learned
from spikerl.training.epoch_row import Row
from spikerl.training.exactness import computed_by, inexact_because
from spikerl.training.state import load_checkpoint, shard_of
from spikerl.training.trainer import Trainer

FEW = 3  # warnings of one kind, at a time


class Session:
    """A run while it runs: the folder, its record and view (rank 0's alone), and the commits."""

    def __init__(
        self,
        config: Config,
        trainer: Trainer,
        world: World,
        run_dir: str,
        command: Sequence[str],
        restart_reason: str | None = None,
        announce_folder: Callable[[Path], None] = lambda folder: None,
    ) -> None:
        """`restart_reason`: why the program itself resumes the run, if it does.

        `announce_folder` gets the folder before anything is printed.
        """
        self.config, self.trainer, self.world = config, trainer, world
        self.is_rank0 = world.rank == 0
        self.wall_s = 0.0  # before this session
        self.started = time.perf_counter()
        self.committed = -1
        self.status = "running"
        self.unsaved: str | None = None  # why the last commit failed, if it did
        self.log: RunLog | None = None
        self.best: dict[str, bytes] = {}  # the files of the policy that evaluated best so far
        self.best_return = -math.inf
        self.summary: dict[str, Any] = {}
        self.stuck: set[int] = set()  # layers already reported to hardly learn
        self.coarse: set[int] = set()  # entries of observations already reported to lose digits
        self.caveats = 0  # how many of the meter's have been reported
        self.idle_w = None if config.run.resume else trainer.idle_power()
        restored: list[str] = []
        try:
            if config.run.resume:
                self.folder = Path(config.run.resume)
                restored = self.resume(command, restart_reason)
            else:
                self.folder = self.start(run_dir, command)
        except DiskError as error:
            key = "resume" if config.run.resume else "run_dir"
            raise BadRequest(key, run_dir, f"{error}; nothing was started") from None
        announce_folder(self.folder)
        if self.is_rank0:
            title = f"{trainer.task.env_id}  {config.algo.name}  {shown(self.folder)}"
            self.log = RunLog(self.folder, trainer.step, config.run.logger, config.raw)
            past = read_rows(self.folder / "metrics.jsonl")
            past += read_rows(self.folder / "discarded.jsonl")
            best = self.best_return if math.isfinite(self.best_return) else None
            self.view = View(title, config.run.total_steps, trainer.step, past, best)
            for text in [
                *announce(config, trainer, command),
                *idle_line(self.idle_w),
                *restored,
                f"run folder: {shown(self.folder)}",
            ]:
                self.say(text)
        world.run_on_all(self.flush)

    def start(self, run_dir: str, command: Sequence[str]) -> Path:
        """Make the run folder, which appears once it is whole, with checkpoint 0 of all workers."""
        named = self.config.run.run_dir is not None
        partial = Path(self.world.broadcast(str(partial_of(Path(run_dir)))))

        def begin() -> None:
            if self.is_rank0:
                raw, manifest = self.config.raw, self.manifest(command)
                self.lock = run_folder.fill_partial(partial, run_dir, raw, manifest)

        def appear() -> Path:
            if not self.is_rank0:
                return partial
            return run_folder.move_into_place(partial, run_dir, named=named)

        with run_folder.removed_after(partial) if self.is_rank0 else nullcontext():
            self.world.run_on_all(begin)
            self.save(partial)
            return self.world.run_on_all(appear)[0]

    def resume(self, command: Sequence[str], restart_reason: str | None) -> list[str]:
        """Load the newest checkpoint that verifies, on all workers; lines on what was restored."""
        notes: list[str] = []

        def choose() -> str:
            if not self.is_rank0:
                return ""
            self.lock = run_folder.lock(self.folder)
            return verified(self.folder, notes.append).folder.name

        checkpoint = Checkpoint.open(self.folder, self.world.run_on_all(choose)[0])
        each = self.world.run_on_all(lambda: self.restore(checkpoint))
        anew = list(dict.fromkeys(what for own in each for what in own))
        self.wall_s, self.committed = float(checkpoint.manifest["wall_s"]), self.trainer.step
        self.world.run_on_all(lambda: self.rewind(checkpoint, anew, command, restart_reason, notes))
        return notes

    def rewind(
        self,
        checkpoint: Checkpoint,
        anew: Sequence[str],
        command: Sequence[str],
        restart_reason: str | None,
        notes: list[str],
    ) -> None:
        """Bring the folder to where `checkpoint` was committed."""
        if not self.is_rank0:
            return
        remove_newer(checkpoint)
        lost = cut_back(self.folder, int(checkpoint.manifest["metrics_bytes"]))
        record = run_folder.read_manifest(self.folder, key="resume")
        size, had = self.world.size, checkpoint.workers
        reasons = inexact_because(checkpoint, self.computed_by, self.config, self.trainer)
        reasons += map("anew: {}".format, anew)
        event = {"time": run_folder.now(), "step": self.trainer.step, "exact": not reasons,
                 "not_exact_because": "; ".join(reasons) or None, "world_size": size,
                 "world_size_before": had, "discarded_rows": len(lost),
                 "discarded_s": seconds_beyond(lost, self.wall_s), "command": shlex.join(command),
                 "after": restart_reason, **run_folder.made_by()}  # fmt: skip
        changes: dict[str, Any] = {"resumed": [*record.get("resumed", []), event]}
        changes |= {"world_size": size, "resolved": self.resolved()}
        run_folder.update_manifest(self.folder, status="running", **changes)
        run_folder.write_total_steps(self.folder, self.config.run.total_steps)
        run_folder.remove_results(self.folder)
        self.restore_best(checkpoint)
        total, transitions = self.config.run.total_steps, self.trainer.replay.size * size
        parts = ["weights", "optimisers", "normaliser", f"{transitions} transitions"]
        parts += ["random streams", "environments"]
        parts = [part for part in parts if not any(line.startswith(part) for line in anew)]
        notes.append(
            f"resumed at step {self.trainer.step} of {total}: {', '.join(parts)}"
            + (f"; not exact: {'; '.join(reasons)}" if reasons else "")
            + (f"; {len(lost)} later rows moved to discarded.jsonl" if lost else "")
        )

    @cached_property
    def computed_by(self) -> dict[str, Any]:
        return computed_by(self.config, self.world)

    def restore(self, checkpoint: Checkpoint) -> list[str]:
        """Load `checkpoint`; return what begins anew. Nothing in the folder has changed so far."""
        try:
            return load_checkpoint(self.trainer, checkpoint)
        except (EnvironmentFailed, MemoryError):
            raise
        except Exception as error:  # a checkpoint of another run may raise anything
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            remedy = f"its {checkpoint.folder.name} does not fit this run ({reason})"
            raise BadRequest("resume", self.folder, remedy) from error

    def restore_best(self, checkpoint: Checkpoint) -> None:
        """Take the best policy and return as of `checkpoint`, without rows that are discarded."""
        rows = read_rows(self.folder / "metrics.jsonl")
        returns = [row["eval_return"] for row in rows if row["eval_return"] is not None]
        self.best, self.best_return = checkpoint.best(), max(returns, default=-math.inf)

    def keep_best(self, row: Row) -> None:
        """Keep the policy that was just evaluated, if its return is higher than all before."""
        if row["eval_return"] is not None and row["eval_return"] > self.best_return:
            self.best, self.best_return = self.trainer.policy.files(), row["eval_return"]

    def run(self, stop_signal: Callable[[], int]) -> int:
        trainer = self.trainer
        show = self.view.progress if self.is_rank0 else (lambda progress: None)
        try:
            for row in trainer.epochs(show, stop_signal):
                if self.is_rank0:
                    self.keep_best(row)
                    self.record(row)
                self.commit(self.folder)
            # It was stopped within an epoch or its evaluation, or before the row was saved.
            if self.committed != trainer.step or trainer.evaluation_due():
                self.commit(self.folder)
            return self.finish()
        except BaseException as error:
            if self.is_rank0:
                self.fail(error)
            raise
        finally:
            if self.is_rank0:
                self.view.close()
                if self.log:
                    self.log.close(self.status)
                self.lock.close()

    def record(self, row: Row) -> None:
        assert self.log is not None
        row = {**row, "wall_s": self.wall()}
        self.log.row(row)
        self.view.epoch(row)
        self.log.line(epoch_line(row, self.config.run.total_steps, self.view.spent))
        stuck, coarse = stuck_layers(row), self.trainer.norm.coarse()
        for layer in stuck.keys() - self.stuck:  # what has been said is not said every epoch
            self.say(stuck[layer])
        for entry in sorted(coarse.keys() - self.coarse)[:FEW]:
            self.say(coarse[entry])
        self.stuck, self.coarse = set(stuck), set(coarse)
        for caveat in self.trainer.meter.caveats[self.caveats :]:
            self.say(f"note: {caveat}")
        self.caveats = len(self.trainer.meter.caveats)

    def commit(self, run: Path) -> None:
        """Save, or print why that failed; the next commit then saves all that this one did not."""
        try:
            self.save(run)
        except DiskError as error:
            if self.is_rank0 and self.unsaved != str(error):
                self.say(f"warning: step {self.trainer.step} could not be saved ({error});"
                         " training goes on, and the next commit tries again")  # fmt: skip
            self.unsaved = str(error)
            return
        if self.is_rank0 and self.unsaved:
            self.say(f"step {self.trainer.step} is saved, with all that could not be before")
        self.unsaved = None

    def save(self, run: Path) -> None:
        """Write the rows that are due, then a checkpoint."""
        trainer = self.trainer
        lengths = self.world.run_on_all(lambda: self.log.write() if self.log else 0)
        facts = {
            "step": trainer.step,
            "epoch": trainer.progress.epoch,
            "world_size": self.world.size,
            "wall_s": self.wall(),
            "metrics_bytes": lengths[0],
            "reset_seed_bits": trainer.seed_bits,
            **({"computed_by": self.computed_by} if self.is_rank0 else {}),
        }
        learner = trainer.learner_state()
        policy = trainer.policy.files() if self.is_rank0 else {}
        policy |= {f"best/{name}": content for name, content in self.best.items()}
        save_checkpoint(run, self.world, shard_of(trainer), learner, facts, policy)
        self.committed = trainer.step
        self.world.run_on_all(self.publish)  # which may take as long as a slow disk

    def publish(self) -> None:
        """Send what is committed to the services that show the run."""
        if self.log:
            for text in self.log.publish():
                self.say(text)

    def finish(self) -> int:
        number = self.trainer.stopping
        status, code = "done", DONE
        if number:
            code = stop_status(number)
            status = "interrupted" if code == INTERRUPTED else "preempted"
        try:
            self.world.run_on_all(lambda: self.write_results(status))
        except DiskError as error:
            self.unsaved = self.unsaved or str(error)
        if self.unsaved:
            if self.is_rank0:
                self.report_unsaved(self.unsaved)
            return FAILED
        if self.is_rank0:
            if number:
                name = signal_name(number)
                self.say(f"stopped at step {self.trainer.step} on {name};"
                         f" spikerl train resume={shown(self.folder)} goes on")  # fmt: skip
            else:
                self.say(f"done: {self.trainer.step} steps, {self.trainer.algo.updates} updates"
                         f" in {self.wall():.0f} s, {spent_text(self.summary)}")  # fmt: skip
                if self.trainer.algo.updates == 0:
                    self.say(nothing_learned(self.config.algo))
            self.flush()
        return code

    def write_results(self, status: str) -> None:
        """Write the files that say how the run ended; its policy even if no checkpoint holds it."""
        if not self.is_rank0:
            return
        self.trainer.policy.save(self.folder)
        run_folder.write_best(self.folder, self.best)
        if not self.unsaved:
            self.summarise()
            self.end(status)
            if status == "done" and not self.config.run.keep_replay:
                try:
                    run_folder.free(self.folder)
                except (OSError, BadRequest) as error:
                    self.say(f"note: its replay could not be removed ({first_line(error)})")

    def end(self, status: str) -> None:
        self.status = status
        changes = {"status": status, "ended": run_folder.now(), "wall_s": self.wall()}
        run_folder.update_manifest(self.folder, **changes)

    def fail(self, error: BaseException) -> None:
        self.record_failure(traceback.format_exc())
        self.say(f"failed at step {self.trainer.step}: {type(error).__name__}: {error}")
        error.add_note(f"{self.folder}/error.txt has the traceback")
        self.flush()

    def report_unsaved(self, reason: str) -> None:
        """Report that training has ended, but that not all of it is saved."""
        line = f"step {self.trainer.step} could not be saved: {reason}; spikerl train"
        line += f" resume={shown(self.folder)} goes on from step {self.committed}"
        self.record_failure(line + "\n")
        assert self.log is not None
        self.log.line(line)
        self.flush()
        self.view.close()
        print(f"spikerl: {line}", file=sys.stderr)

    def record_failure(self, text: str) -> None:
        """Record a failure in the run folder, as far as the disk allows."""
        with suppress(OSError):
            self.end("failed")
        with suppress(OSError):
            if not (self.folder / "error.txt").exists():  # by a machine that knew the cause before
                write_text(self.folder / "error.txt", text)

    def summarise(self) -> None:
        rows = read_rows(self.folder / "metrics.jsonl")
        discarded = read_rows(self.folder / "discarded.jsonl")
        manifest = run_folder.read_manifest(self.folder, key="resume")
        lost_s = seconds_discarded(manifest.get("resumed"))
        summary = {
            "env_id": self.trainer.task.env_id,
            "seed": self.config.run.seed,
            "world_size": self.world.size,
            "steps": self.trainer.step,
            "updates": self.trainer.algo.updates,
            "wall_s": self.wall() + lost_s,
            "wall_discarded_s": lost_s,
            **summary_of(rows, discarded, self.config.run.energy_to),
            "power_idle_w": manifest.get("power_idle_w"),
            "energy_source": source_of([*rows, *discarded]) or self.trainer.meter.source,
            "versions": versions(),
        }
        write_json(self.folder / "summary.json", summary)
        self.summary = summary

    def manifest(self, command: Sequence[str]) -> dict[str, Any]:
        resolved = self.resolved()
        num_envs, precision = self.config.num_envs, self.config.precision.name
        facts = {"world_size": self.world.size, "num_envs": num_envs, "precision": precision,
                 "power_idle_w": self.idle_w}  # fmt: skip
        if dataset := self.trainer.dataset:
            facts["dataset"] = {"folder": shown(dataset.folder), "sha256": dataset.sha256}
        return run_folder.make_manifest(self.trainer.task.env_id, command, resolved, facts)

    def resolved(self) -> dict[str, dict[str, Any]]:
        return {name: r._asdict() for name, r in vars(self.config.resolved).items()}

    def wall(self) -> float:
        return self.wall_s + time.perf_counter() - self.started

    def say(self, text: str) -> None:
        assert self.log is not None
        self.view.line(text)
        self.log.line(text)

    def flush(self) -> None:
        if self.log:
            with suppress(OSError):
                self.log.write()
