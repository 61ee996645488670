"""A sweep: one folder per job, a failed job stops none of the others, and a table at the end."""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from spikerl.errors import BadRequest


class Sweep:
    """The jobs of one `-m`; each writes its outcome to `jobs.jsonl` below the sweep's root."""

    def __init__(self, root: Path, varied: Sequence[str] = ()) -> None:
        self.root = root
        self.varied = set(varied)  # the keys that tell the jobs apart, and name their folders

    @classmethod
    def of(cls, command: str, args: Sequence[str]) -> Sweep | None:
        if not {"-m", "--multirun"} & set(args):
            return None
        typed = [a.partition("=")[2] for a in args if a.startswith("run_dir=")]
        if command != "train":
            return cls(Path(tempfile.mkdtemp(prefix="spikerl-sweep-")))
        stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        root = Path(typed[-1].strip("'\"") if typed else f"outputs/sweeps/{stamp}").absolute()
        return cls(root, varied_keys(args))

    def hydra_args(self) -> list[str]:
        return [f"hydra.sweep.dir='{self.root}'"]

    def job(self, config: Any, call: Callable[[Any], int]) -> int:
        """Run one job, whatever becomes of it, and note how it ended."""
        from hydra.core.hydra_config import HydraConfig

        info = HydraConfig.get().job
        overrides = HydraConfig.get().overrides.task
        name = ",".join(o for o in overrides if o.partition("=")[0] in self.varied) or str(info.num)
        print(f"\njob {info.num}: {name}")
        folder = self.root / name.replace("/", "_")
        if "run_dir" in config:
            config.run_dir = str(folder)
        outcome: dict[str, Any] = {"job": info.num, "name": name, "folder": str(folder)}
        try:
            outcome["status"] = call(config)
        except BadRequest as error:
            outcome |= {"status": 2, "error": str(error)}
            print(f"spikerl: {error}", file=sys.stderr)
        except Exception as error:  # a job's failure is reported, not propagated
            outcome |= {"status": 1, "error": f"{type(error).__name__}: {error}"}
            traceback.print_exc()
        with (self.root / "jobs.jsonl").open("a", encoding="utf-8") as f:
            f.write(json.dumps(outcome) + "\n")
        return int(outcome["status"])

    def end(self) -> int:
        """Print what ran, what failed and why, best first; 0 only if every job succeeded."""
        from rich.console import Console
        from rich.table import Table

        jobs = self.outcomes()
        table = Table("job", "status", "eval return", "reason or folder")
        for job in sorted(jobs, key=lambda j: (j["return"] is None, -(j["return"] or 0.0))):
            shown = "-" if job["return"] is None else f"{job['return']:.1f}"
            state = {0: "done", 2: "refused"}.get(job["status"], f"failed ({job['status']})")
            table.add_row(job["name"], state, shown, job.get("error") or job["folder"])
        Console(soft_wrap=True).print(table)
        failed = sum(job["status"] != 0 for job in jobs)
        print(f"{len(jobs) - failed} of {len(jobs)} jobs done; {self.root}")
        return 1 if failed or not jobs else 0

    def outcomes(self) -> list[dict[str, Any]]:
        jobs = []
        path = self.root / "jobs.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            job = json.loads(line)
            summary = Path(job["folder"]) / "summary.json"
            known = json.loads(summary.read_text(encoding="utf-8")) if summary.exists() else {}
            job["return"] = known.get("best_eval_return")
            if job["status"] == 1 and not job.get("error"):
                error = Path(job["folder"]) / "error.txt"
                lines = error.read_text(encoding="utf-8").splitlines() if error.exists() else []
                job["error"] = lines[-1] if lines else "see its log.txt"
            jobs.append(job)
        return jobs


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
