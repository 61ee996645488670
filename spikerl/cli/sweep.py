"""A sweep: one folder per job, a failed job stops none of the others, and a table at the end."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from spikerl.cli.compose import RESUMABLE, chosen, unquoted
from spikerl.config.yaml_file import NOT_CARRIED, quoted
from spikerl.distributed import hosts
from spikerl.errors import INTERRUPTED, PREEMPTED, WRONG, BadRequest
from spikerl.schema import dotted

STOPPED = {PREEMPTED: "preempted", INTERRUPTED: "interrupted"}
KEEPS_FOLDERS = ("train", "import")


class Sweep:
    """The jobs of one `-m`; each notes its beginning and its outcome in the root's `jobs.jsonl`.

    A launcher may run them in other processes, or on other machines, with copies of this object.
    """

    def __init__(self, root: Path, varied: Sequence[str] = (), *, keep: bool = True) -> None:
        self.root, self.keep = root, keep
        self.varied = set(varied)  # the keys that tell the jobs apart, and name their folders
        self.made = [folder for folder in (root, *root.parents) if not folder.exists()]
        try:
            root.mkdir(parents=True, exist_ok=True)
            kept = {name: root / name for name in ("multirun.yaml", "jobs.jsonl")}
            self.before = {n: p.read_bytes() if p.exists() else b"" for n, p in kept.items()}
        except OSError as error:
            reason = error.strerror or str(error)
            raise BadRequest("run_dir", root, f"{reason}; give another run_dir") from None

    @classmethod
    def of(cls, command: str, args: Sequence[str]) -> Sweep | None:
        if not {"-m", "--multirun"} & set(args):
            return None
        varied = varied_keys(args)
        if command not in KEEPS_FOLDERS:
            return cls(Path(tempfile.mkdtemp(prefix="spikerl-sweep-")), varied, keep=False)
        submitted = [arg for arg in args if arg.startswith("hydra/launcher=submitit")]
        if submitted and find_spec("submitit") is None:
            remedy = "pip install 'spikerl[slurm]' brings hydra-submitit-launcher"
            raise BadRequest("hydra/launcher", submitted[-1].partition("=")[2], remedy)
        typed = [unquoted(a.partition("=")[2]) for a in args if a.startswith("run_dir=")]
        stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        named = typed and typed[-1] not in ("", "null")
        sweep = cls(Path(typed[-1] if named else f"outputs/sweeps/{stamp}").absolute(), varied)
        if submitted:
            os.environ["SUBMITIT_PREEMPT_SIGNAL"] = "USR1"  # which a run knows
            print(f"jobs are submitted; what they say: {sweep.root}/.submitit/*/*_log.out")
        return sweep

    def hydra_args(self) -> list[str]:
        return [f"hydra.sweep.dir={quoted(str(self.root))}"]

    def job(
        self, config: Any, call: Callable[[Any], int], explain: Callable[[Exception], str]
    ) -> float | None:
        """Run one job, whatever becomes of it, and note how it ended.

        What a sweeper is to maximise: the best evaluation's return; None if the job failed.
        """
        from hydra.core.hydra_config import HydraConfig
        from omegaconf.errors import OmegaConfBaseException

        info = HydraConfig.get().job
        overrides = HydraConfig.get().overrides.task
        name = ",".join(o for o in overrides if o.partition("=")[0] in self.varied) or str(info.num)
        print(f"\njob {info.num}: {name}")
        folder = self.root / name.replace("/", "_")
        if "run_dir" in config:
            config.run_dir = str(folder)
        outcome: dict[str, Any] = {"job": info.num, "name": name, "folder": str(folder)}
        stopped = [o["status"] for o in self.noted() if o["status"] in STOPPED]
        self.note({**outcome, "status": None})
        try:
            if stopped and not hosts.submitted():
                outcome |= {"status": stopped[0], "error": "not started: the sweep was stopped"}
            elif (
                "resume" in config and (folder / "manifest.json").exists() and done(config, folder)
            ):
                outcome |= {"status": 0, "note": "done already"}
            else:
                outcome["status"] = call(config)
        except (BadRequest, OmegaConfBaseException) as error:
            outcome |= {"status": WRONG, "error": explain(error)}
            print(f"spikerl: {outcome['error']}", file=sys.stderr)
        except Exception as error:  # a job's failure is reported, not propagated
            outcome |= {"status": 1, "error": f"{type(error).__name__}: {error}"}
            traceback.print_exc()
        if outcome["status"] == PREEMPTED and hosts.requeued():
            sys.exit(PREEMPTED)  # it is this job that goes on later, and notes how it ended
        self.note(outcome)
        return best_return(outcome) if outcome["status"] == 0 else None

    def note(self, outcome: dict[str, Any]) -> None:
        if os.environ.get("RANK", "0") != "0":
            return  # a launcher made several workers of this job
        with (self.root / "jobs.jsonl").open("a", encoding="utf-8") as f:
            fcntl.flock(f, fcntl.LOCK_EX)  # or machines would write over each other's lines
            f.write(json.dumps(outcome) + "\n")

    def end(self) -> int:
        """Print what ran, what failed and why, best first; 0 only if every job succeeded."""
        from rich.console import Console
        from rich.table import Column, Table

        jobs = self.outcomes()
        words = ("job", "status", "eval return", "reason or folder")
        table = Table(*(Column(word, overflow="fold") for word in words))
        for job in sorted(jobs, key=lambda j: (j["return"] is None, -(j["return"] or 0.0))):
            shown = "-" if job["return"] is None else f"{job['return']:.1f}"
            known = {0: "done", WRONG: "refused", **STOPPED}
            state = job.get("note") or known.get(job["status"], f"failed ({job['status']})")
            place = job["folder"] if self.keep else ""
            table.add_row(job["name"], state, shown, job.get("error") or place)
        width = None if sys.stdout.isatty() else 200  # a path that is cut cannot be copied
        Console(width=width, markup=False, emoji=False).print(table)
        if note := self.mixed(jobs):
            print(note)
        statuses = [job["status"] for job in jobs]
        root = f"; {self.root}" if self.keep else ""
        print(f"{statuses.count(0)} of {len(jobs)} jobs done{root}")
        if not jobs or set(statuses) == {WRONG}:
            self.discard()
            return WRONG
        if not self.keep:
            shutil.rmtree(self.root, ignore_errors=True)
        stopped = [status for status in statuses if status in STOPPED]
        return stopped[0] if stopped else int(set(statuses) != {0})

    def mixed(self, jobs: Sequence[dict[str, Any]]) -> str | None:
        """What the runs of the table differ in beside what the sweep varies."""
        from spikerl.runs.folder import differences

        shown = [Path(job["folder"]) for job in jobs if job["return"] is not None]
        # An experiment sets keys of every group.
        return differences(shown, None if "experiment" in self.varied else self.varied)

    def discard(self) -> None:
        """Leave things as they were: no job began."""
        for name, content in self.before.items():
            path = self.root / name
            if content:
                path.write_bytes(content)
            else:
                path.unlink(missing_ok=True)
        if self.root in self.made:
            shutil.rmtree(self.root / ".submitit", ignore_errors=True)
        with suppress(OSError):  # somebody else put something there
            for folder in self.made if self.keep else [self.root]:
                folder.rmdir()

    def noted(self) -> list[dict[str, Any]]:
        """What the jobs of this sweep have noted so far, the last word of each."""
        path = self.root / "jobs.jsonl"
        content = path.read_bytes() if path.exists() else b""
        lines = content[len(self.before["jobs.jsonl"]) :].splitlines()
        last = {job["job"]: job for job in map(json.loads, lines)}
        return list(last.values())

    def outcomes(self) -> list[dict[str, Any]]:
        jobs = self.noted()
        for job in jobs:
            job["return"] = None if job["status"] == WRONG else best_return(job)
            if job["status"] is None:
                job["note"] = "not ended"
                job["error"] = "lost, or still running; the same command goes on with it"
            if job["status"] == 1 and not job.get("error"):
                error = Path(job["folder"]) / "error.txt"
                lines = error.read_text(encoding="utf-8").splitlines() if error.exists() else []
                job["error"] = lines[-1] if lines else "see its log.txt"
        return jobs


def best_return(job: dict[str, Any]) -> float | None:
    summary = Path(job["folder"]) / "summary.json"
    known = json.loads(summary.read_text(encoding="utf-8")) if summary.exists() else {}
    return known.get("best_eval_return")


def done(config: Any, folder: Path) -> bool:
    """Whether an earlier sweep has done this job; if it only began it, have `config` resume it."""
    from omegaconf import OmegaConf

    asked = dict(dotted(OmegaConf.to_container(config, resolve=True)))
    had = dict(dotted(OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))))
    free = ("threads", "logger", "keep_replay", *RESUMABLE, *NOT_CARRIED)
    for key in [*asked, *had]:
        within = [key == other or key.startswith(f"{other}.") for other in free]
        if not any(within) and asked.get(key) != had.get(key):
            remedy = f"{folder} was made with {had.get(key)}; give another run_dir"
            raise BadRequest(key, asked.get(key), remedy)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    if manifest["status"] == "done" and had["total_steps"] >= asked["total_steps"]:
        return True
    config.resume, config.run_dir = str(folder), None
    typed = ["device="] if asked["device"] != had["device"] else []
    if asked["world_size"] is not None:
        typed.append(f"world_size={asked['world_size']}")
    for override in chosen(folder, typed):
        key, _, value = override.partition("=")
        plain = int(value) if value.isdecimal() else value
        OmegaConf.update(config, "kernel.name" if key == "kernel" else key, plain)
    return False


def varied_keys(args: Sequence[str]) -> list[str]:
    """The keys of the overrides that give several values."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_overrides(
            [a for a in args if "=" in a and a[0] != "-"]
        )
    except HydraException:
        return []  # Hydra will say what is wrong with it
    return [override.key_or_group for override in parsed if override.is_sweep_override()]
