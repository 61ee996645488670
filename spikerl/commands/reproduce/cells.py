"""The work on a table's cells: they are claimed, started, resumed, evaluated, tidied.

What a cell still needs is read from its folder alone, so a killed process leaves nothing to repair.
A cell belongs to whoever holds the lock beside its folder: this process and the run that it
started, so that another takes it up only when both have ended.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO

from spikerl.algos import ALGOS
from spikerl.children import PYTHON
from spikerl.distributed.process_lifetime import die_with_parent
from spikerl.errors import BadRequest
from spikerl.files import checksum_of, lock_file, parse_json, read_bytes, there, write_json
from spikerl.reporting.cell_config import apart, config_of
from spikerl.reporting.records import Run
from spikerl.reporting.table_file import Cell, Table
from spikerl.runs import folder as run_folder
from spikerl.signals import signal_name

PROGRAM = [*PYTHON, "-m", "spikerl"]
EPISODES = 20  # in an evaluation of the final policy's file
MAX_BYTES = 1 << 20


def read(cell: Cell) -> Run | None:
    """The cell's run; None where it has not begun."""
    return read_folder(cell.folder)


def read_folder(folder: Path) -> Run | None:
    try:
        return Run.read(folder, key="table") if there(folder / "manifest.json") else None
    except BadRequest as error:
        table = folder.parents[2].name
        raise BadRequest("table", table, f"{folder}: {error.args[2]}; move it away") from None


def trained(cell: Cell, total_steps: int) -> bool:
    """Whether the cell's run is done, and cannot or need not be trained any further."""
    run = read(cell)
    if run is None or run.status != "done":
        return False
    if cell.source is None:
        return not _resumable(run, cell.times_steps * total_steps)
    return not goes_on(cell, total_steps) and not outdated(cell, run)


def goes_on(cell: Cell, total_steps: int) -> bool:
    """Whether the run that the cell is converted from is to be trained further."""
    source = read_folder(cell.source) if cell.source else None
    return source is not None and _resumable(source, cell.times_steps * total_steps)


def outdated(cell: Cell, run: Run) -> bool:
    """Whether a conversion was made from another policy than its source has now."""
    assert cell.source is not None
    made_of, policy = run.manifest.get("converted_sha256"), cell.source / "policy.safetensors"
    return made_of is not None and policy.is_file() and made_of != checksum_of(policy)


def _resumable(run: Run, total_steps: int) -> bool:
    whole = "freed" not in run.manifest and (run.folder / "checkpoints").is_dir()
    return run.step < total_steps and whole


def shorter(cell: Cell, total_steps: int) -> str | None:
    """A note if the result has fewer steps than asked for and cannot be trained further."""
    run = read(cell) if cell.command == "train" and trained(cell, total_steps) else None
    if run is None or run.step >= (wanted := cell.times_steps * total_steps):
        return None
    return (
        f"{run.folder} was done at {run.step} steps, not {wanted}, and kept no checkpoint to go on "
        "from; move that folder away to train it anew"
    )


def evaluation_of(cell: Cell) -> Path:
    return cell.folder / "evaluation.json"


def done(cell: Cell, total_steps: int) -> bool:
    return evaluation_of(cell).exists() and trained(cell, total_steps)


def next_command(cell: Cell, total_steps: int) -> list[str] | None:
    """The next command for the cell, whose source must be done; None if the cell is done."""
    if trained(cell, total_steps):
        if evaluation_of(cell).exists():
            return None
        seed = f"seed={cell.seed}"
        return ["eval", f"run={cell.folder}", f"episodes={EPISODES}", seed, "json=true"]
    length = f"total_steps={cell.times_steps * total_steps}"
    if cell.source is not None:
        clear(cell.folder)
        return ["convert", f"run={cell.source}", f"run_dir={cell.folder}", *cell.overrides]
    if read(cell) is None:
        return ["train", *cell.overrides, length, "threads=1", f"run_dir={cell.folder}"]
    return ["train", f"resume={cell.folder}", length]


def clear(folder: Path) -> None:
    """Remove a conversion that was made from another policy, or remains of one that was killed."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)  # so that it is never there in part
        shutil.rmtree(old)


def claim(cell: Cell) -> IO[str] | None:
    """The cell's lock, held until it is closed here and in what inherits it; None if it is held."""
    place = cell.folder.parent
    try:
        place.mkdir(parents=True, exist_ok=True)
        file = (place / f".{cell.folder.name}.lock").open("a", encoding="utf-8")
        if lock_file(file):
            return file
    except OSError as error:
        remedy = f"{place}: {error.strerror}; give another folder"
        raise BadRequest("out", cell.folder.parents[3], remedy) from None
    file.close()
    return None


def naming(plugins: Sequence[str]) -> list[str]:
    """The override with which a command imports these plugins, if there are any."""
    return [f"plugins=[{','.join(plugins)}]"] * bool(plugins)


class Job:
    """A claimed cell, and the process that does what it needs next."""

    def __init__(self, cell: Cell, lock: IO[str], nice: int, device: str | None) -> None:
        self.cell, self.lock, self.nice, self.device = cell, lock, nice, device
        self.process: subprocess.Popen[bytes] | None = None
        self.doing = ""

    def start(self, command: Sequence[str]) -> None:
        """Start the command in a session of its own: it gets a Ctrl-C from us alone, once."""
        self.doing = command[0]
        environment = dict(os.environ)
        if self.device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = self.device
        with self.output("out").open("wb") as out, self.output("err").open("wb") as err:
            self.process = subprocess.Popen(
                [*PROGRAM, *command],
                stdin=subprocess.DEVNULL,
                stdout=out if self.doing == "eval" else subprocess.DEVNULL,
                stderr=err,
                env=environment,
                pass_fds=(self.lock.fileno(),),
                start_new_session=True,
                preexec_fn=partial(_settle, os.getpid(), self.nice),
            )

    def output(self, name: str) -> Path:
        return self.cell.folder.with_name(f".{self.cell.folder.name}.{name}")

    def status(self) -> int | None:
        """The process's exit status; None while it runs."""
        assert self.process is not None
        return self.process.poll()

    def signal(self, number: int) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def keep_evaluation(self) -> None:
        """Save what `spikerl eval` printed as the cell's evaluation."""
        printed = parse_json(read_bytes(self.output("out"), MAX_BYTES))
        write_json(evaluation_of(self.cell), printed)

    def reason(self) -> str:
        """Why the process failed, in a line."""
        assert self.process is not None
        code = self.process.returncode
        if code < 0:
            return f"killed by {signal_name(-code)}; the same command goes on with it"
        lines: list[str] = []
        for path in (self.output("err"), self.cell.folder / "error.txt"):
            with suppress(OSError):
                text = path.read_text(encoding="utf-8", errors="replace")
                lines += [line for line in text.splitlines() if line.strip()]
            if lines:
                break
        return f"{lines[-1] if lines else 'see its log.txt'} (status {code})"

    def close(self) -> None:
        for name in ("out", "err"):
            self.output(name).unlink(missing_ok=True)
        self.lock.close()


def _settle(parent: int, nice: int) -> None:
    """In the new process: have it get SIGTERM when the parent ends, and set its priority."""
    die_with_parent(parent, signal.SIGTERM)
    if nice:
        os.nice(nice)
        # Linux weighs sessions as groups, whatever the priority of a process within one.
        with suppress(OSError):
            Path("/proc/self/autogroup").write_text(str(nice), encoding="ascii")


def tidy(cell: Cell) -> None:
    """Remove what only a resume needs; if that fails, the cell is done all the same."""
    with suppress(OSError, BadRequest):
        run_folder.free(cell.folder)


def check(table: Table, cells: Sequence[Cell], total_steps: int) -> None:
    """Refuse, before anything starts, cells whose config cannot be composed, and folders with runs
    that have other settings than the table's, or more steps.
    """
    for cell in cells:
        run = read(cell)
        if cell.command == "train":
            config_of(cell)
        if run is None:
            continue
        if others := apart(cell, run):
            remedy = f"{cell.folder} was made with other settings: {', '.join(others)}"
            raise BadRequest("table", table.name, f"{remedy}; move that folder away")
        wanted = cell.times_steps * total_steps
        if cell.command == "train" and run.step > whole_steps(run, wanted):
            remedy = f"{run.folder} has {run.step} steps already; give at least that, or"
            remedy += " out=FOLDER for a trial"
            raise BadRequest("total_steps", wanted, remedy)
        had = run.config.get("total_steps")
        if _moves(run.settings) and had != wanted and _resumable(run, wanted):
            remedy = (
                f"{run.folder} was begun with {had}, over which its learning rate or slope moves"
            )
            raise BadRequest(
                "total_steps", wanted, f"{remedy}; give that, or move that folder away"
            )


def _moves(settings: Mapping[str, str]) -> bool:
    """Whether a run's learning rate or slope follows a schedule over total_steps."""
    algo = ALGOS.options.get(settings.get("algo.name", ""))
    if algo is not None and algo[0].anneals:
        return True
    return settings.get("neuron.surrogate_slope_end", "None") != "None"


def whole_steps(run: Run, total_steps: int) -> int:
    """The step at which a run of `total_steps` ends: its environments step together."""
    num_envs = run.manifest.get("num_envs")
    together = num_envs if type(num_envs) is int and num_envs > 0 else 1
    return -(-total_steps // together) * together
