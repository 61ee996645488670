"""A sweep: one folder per job, a failed job stops none of the others, and a table at the end."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from omegaconf.errors import OmegaConfBaseException

from spikerl.children import SAFE, safe_path
from spikerl.cli.done import done, made_with
from spikerl.cli.jobs import (
    alone,
    check_distinct,
    check_pages,
    choices,
    count,
    folder_name,
    varied_keys,
)
from spikerl.cli.outcomes import STOPPED, outcome_of, over_seeds, print_table, result
from spikerl.cli.words import unquoted
from spikerl.distributed import hosts, launchers
from spikerl.errors import (
    BY_DESIGN,
    DONE,
    FAILED,
    PREEMPTED,
    WRONG,
    BadRequest,
    Exists,
    Interrupted,
    stop_status,
    with_notes,
)
from spikerl.files import absolute, hold, lock_file, shown
from spikerl.output import duration, results
from spikerl.runs.differences import differences

KEEPS_FOLDERS = ("train", "import", "reproduce")  # commands whose jobs and sweeps keep a folder


class Sweep:
    """The jobs of one `-m`; each notes its beginning and its outcome in the root's `jobs.jsonl`.

    A launcher may run them in other processes, or on other machines, with copies of this object.
    """

    def __init__(
        self,
        root: Path,
        varied: Sequence[str] = (),
        total: int | None = None,
        *,
        command: str = "train",
        named: bool = True,
        answers: bool = False,
    ) -> None:
        """`total` is how many jobs there will be, if that is known. A root that the user has not
        `named` gets a number if it exists already. With `answers`, standard output holds only the
        JSON answers of the jobs.
        """
        self.id, self.pid = uuid.uuid4().hex, os.getpid()
        self.command, self.keep = command, command in KEEPS_FOLDERS
        self.safe, self.total, self.answers = os.environ.get(SAFE), total, answers
        self.own: dict[int, dict[str, Any]] = {}  # what the jobs of this process noted
        self.varied = set(varied)  # the keys that tell the jobs apart, and name their folders
        self.made = [folder for folder in (root, *root.parents) if not folder.exists()]
        try:
            self.root = own_folder(root, named)
            if self.root != root:
                self.made = [self.root]
            self.held = owned(self.root) if self.keep else None
            records = {name: self.root / name for name in ("multirun.yaml", "jobs.jsonl")}
            self.before = {n: p.read_bytes() if p.exists() else b"" for n, p in records.items()}
        except OSError as error:
            reason = error.strerror or str(error)
            raise BadRequest("run_dir", root, f"{reason}; give another run_dir") from None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "held": None}  # the lock stays with the process that took it

    @property
    def screen(self) -> IO[str]:
        """The stream that progress and the table are printed to."""
        return sys.stderr if self.answers else sys.stdout

    @classmethod
    def of(cls, command: str, args: Sequence[str]) -> Sweep | None:
        if not {"-m", "--multirun"} & set(args):
            return None
        if launchers.several():
            remedy = "a launcher started several workers; leave it out and give world_size"
            raise BadRequest("-m", os.environ["WORLD_SIZE"], remedy)
        varied, values = varied_keys(args), choices(args)
        check_distinct(values or [], folders=command in KEEPS_FOLDERS)
        if command == "report":
            check_pages(args, varied)
        total = None if values is None else count(values)
        if command not in KEEPS_FOLDERS:
            root = Path(tempfile.mkdtemp(prefix="spikerl-sweep-"))
            answers = "json=true" in map(str.lower, args)
            return cls(root, varied, total, command=command, answers=answers)
        submitted = [arg for arg in args if arg.startswith("hydra/launcher=submitit")]
        if submitted and find_spec("submitit") is None:
            remedy = "pip install 'spikerl[slurm]' brings hydra-submitit-launcher"
            raise BadRequest("hydra/launcher", submitted[-1].partition("=")[2], remedy)
        typed = [unquoted(a.partition("=")[2]) for a in args if a.startswith("run_dir=")]
        stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        named = typed and typed[-1] not in ("", "null")
        root = absolute(typed[-1] if named else f"outputs/sweeps/{stamp}")
        if (root / "manifest.json").exists():
            raise BadRequest("run_dir", root, "is a run; a sweep needs a folder of its own")
        sweep = cls(root, varied, total, command=command, named=bool(named))
        if submitted:
            os.environ["SUBMITIT_PREEMPT_SIGNAL"] = "USR1"  # on which a run saves and stops
            print(f"jobs are submitted; what they say: {sweep.root}/.submitit/*/*_log.out")
        return sweep

    def job(
        self,
        config: Any,
        call: Callable[[Any, Sequence[str]], int],
        explain: Callable[[Exception], str],
    ) -> float | None:
        """Run one job and note how it ended, also if it fails; `call` also gets the overrides that
        would be typed for this job alone.

        Return what a sweeper maximises: the return of the best evaluation, or of the one that
        `eval` made; None if the job failed.
        """
        from hydra.core.hydra_config import HydraConfig

        launchers.adopt()
        info = HydraConfig.get().job
        overrides = list(HydraConfig.get().overrides.task)
        typed = [override.lstrip("+") for override in overrides]  # ++env.kwargs.KEY=
        name = ",".join(o for o in typed if o.partition("=")[0] in self.varied) or str(info.num)
        print(f"\njob {info.num}: {name}{self.progress()}", file=self.screen, flush=True)
        folder = self.root / folder_name(name)
        if self.keep and "run_dir" in config:
            config.run_dir = str(folder)
            overrides = [o for o in overrides if not o.startswith("run_dir=")]
            overrides.append(f"run_dir={folder}")
        outcome: dict[str, Any] = {"job": info.num, "name": name, "folder": str(folder)}
        outcome["began"] = time.time()
        stopped = [o["status"] for o in self.noted() if o["status"] in STOPPED]
        self.note({**outcome, "status": None})
        try:
            if stopped and not hosts.submitted():
                outcome |= {"status": stopped[0], "error": "not started: the sweep was stopped"}
            elif (folder / "manifest.json").exists() and done(self.command, config, folder):
                outcome |= {"status": DONE, "note": "done already"}
            else:
                with safe_path(self.safe), results() as own:
                    if os.getpid() != self.pid and not hosts.submitted():
                        os.environ["SPIKERL_JOB"] = name  # a prefix of the lines that it prints
                    outcome["status"] = call(config, alone(overrides))
                outcome |= own
        except (BadRequest, OmegaConfBaseException) as error:
            command = shlex.join(["spikerl", self.command, *alone(overrides)])
            if isinstance(error, Exists) and made_with(made := Path(error.args[1])) == command:
                outcome |= {"status": DONE, "note": "done already", "folder": str(made)}
            else:
                outcome |= {"status": WRONG, "error": explain(error)}
                print(f"spikerl: {outcome['error']}", file=sys.stderr)
        except BY_DESIGN as error:
            outcome |= {"status": FAILED, "error": with_notes(error)}
            print(f"spikerl: {outcome['error']}", file=sys.stderr)
        except Interrupted as error:
            outcome |= {"status": stop_status(error.number), "error": str(error)}
        except Exception as error:  # a job's failure is reported, not propagated
            outcome |= {"status": FAILED, "error": f"{type(error).__name__}: {error}"}
            traceback.print_exc()
        if outcome["status"] == PREEMPTED and hosts.requeued():
            sys.exit(PREEMPTED)  # the scheduler will run this job again, to note its outcome
        self.note(outcome)
        return result(outcome)["return"] if outcome["status"] == DONE else None

    def note(self, outcome: dict[str, Any]) -> None:
        if not launchers.is_first():
            return  # one of several workers that a launcher started for this job
        self.own[outcome["job"]] = {**outcome, "sweep": self.id}
        try:
            with (self.root / "jobs.jsonl").open("a", encoding="utf-8") as f:
                lock_file(f, wait=True)  # or machines would write over each other's lines
                f.write(json.dumps(self.own[outcome["job"]]) + "\n")
        except OSError as error:  # a full disk must not stop a job
            print(f"spikerl: {self.root}/jobs.jsonl: {error.strerror or error}", file=sys.stderr)

    def progress(self) -> str:
        """How far the sweep is, as a job begins: what ended, what runs, and the time left."""
        if not self.total:
            return ""
        jobs = self.noted()
        ended = [job for job in jobs if job["status"] is not None]
        failed = sum(job["status"] not in (DONE, *STOPPED) for job in ended)
        running = len(jobs) - len(ended)
        said = [f"{len(ended)} of {self.total} ended"]
        said += [f"{failed} failed"] * bool(failed) + [f"{running} running"] * bool(running)
        if ran := [job["began"] for job in ended if "note" not in job]:
            left = (time.time() - min(ran)) / len(ran) * (self.total - len(ended))
            said.append(f"about {duration(left)} left")
        return f"  ({', '.join(said)})"

    def end(self) -> int:
        """Print what ran, what failed and why, best first; 0 only if every job succeeded."""
        end_pool()
        jobs = [outcome_of(job) for job in self.noted()]
        measure = "eval return" if self.command == "eval" else "best eval return"
        print_table(jobs, measure, self.screen)
        for line in (*over_seeds(jobs, measure), self.mixed(jobs)):
            if line:
                print(line, file=self.screen)
        statuses = [job["status"] for job in jobs]
        root = f"; {shown(self.root)}" if self.keep else ""
        refused = set(statuses) <= {WRONG}
        statuses += [None] * ((self.total or 0) - len(jobs))  # jobs that a launcher never began
        print(f"{statuses.count(DONE)} of {len(statuses)} jobs done{root}", file=self.screen)
        if refused:
            self.discard()
            return WRONG
        if self.keep and set(statuses) != {DONE}:
            own = "" if self.command == "reproduce" else f" with run_dir={shown(self.root)}"
            print(f"the same command{own} goes on with what is not done")
        if not self.keep:
            shutil.rmtree(self.root, ignore_errors=True)
        stopped = [status for status in statuses if status in STOPPED]
        return stopped[0] if stopped else int(set(statuses) != {DONE})

    def mixed(self, jobs: Sequence[dict[str, Any]]) -> str | None:
        """A line on what the table's runs differ in beside what the sweep varies, or None."""
        runs = [Path(job["folder"]) for job in jobs if self.keep and job["return"] is not None]
        # An experiment may set any key, so where it varies, configs are not compared.
        return differences(runs, None if "experiment" in self.varied else self.varied)

    def discard(self) -> None:
        """Restore the folder as it was before this sweep, of which no job has run."""
        for name, content in self.before.items():
            path = self.root / name
            if content:
                path.write_bytes(content)
            else:
                path.unlink(missing_ok=True)
        if self.root in self.made:
            shutil.rmtree(self.root / ".submitit", ignore_errors=True)
            (self.root / ".lock").unlink(missing_ok=True)
        with suppress(OSError):  # not empty, as somebody else put something there
            for folder in self.made if self.keep else [self.root]:
                folder.rmdir()

    def noted(self) -> list[dict[str, Any]]:
        """The latest note of each job of this sweep."""
        path = self.root / "jobs.jsonl"
        content = path.read_bytes() if path.exists() else b""
        lines = content[len(self.before["jobs.jsonl"]) :].splitlines()
        last: dict[Any, dict[str, Any]] = {}
        for line in lines:
            with suppress(ValueError):  # a line that was cut short by a full disk
                job = json.loads(line)
                if job["sweep"] == self.id:
                    last[job["job"]] = job
        return list({**last, **self.own}.values())


def own_folder(root: Path, named: bool) -> Path:
    """Make the folder if need be; where it exists and was not `named`, a numbered one beside it."""
    if named:
        root.mkdir(parents=True, exist_ok=True)
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    for number in range(1, 1000):
        place = root if number == 1 else root.with_name(f"{root.name}_{number}")
        with suppress(FileExistsError):
            place.mkdir()
            return place
    raise FileExistsError(f"{root} and a thousand others exist")


def owned(root: Path) -> IO[str]:
    """Lock a sweep's folder until this process ends; refuse if another process has the lock."""
    held = hold(root)
    if isinstance(held, str):
        raise BadRequest("run_dir", root, f"{held} sweeps there; give another run_dir, or wait")
    return held


def end_pool() -> None:
    """End the processes of hydra/launcher=joblib, which joblib keeps alive for further calls."""
    if loky := sys.modules.get("joblib.externals.loky"):
        loky.get_reusable_executor(reuse=True).shutdown(wait=True, kill_workers=True)
