"""Runs one of whose processes is killed in a chosen phase.

When a worker comes to the phase, it writes its process id into a file and sleeps. The others wait
for it where they next need it, and the test kills it, or the parent, in the middle of the phase.
The code that does so is in a `sitecustomize`, which Python imports when a worker starts.
"""

from __future__ import annotations

import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

from processes import Run, computed, gone, record, resume, rows, train

from spikerl.runs.checkpoint import verified

# For each phase, the module and the function before or after whose call a worker sleeps.
PLACES = {
    "acting": "spikerl.envs.vector Envs.step",
    "update": "spikerl.algos.td3 TD3.update",
    "collective": "spikerl.distributed.world World.sum_",
    "evaluation": "spikerl.training.evaluator Evaluator._wave",
    "checkpoint": "spikerl.runs.segments append_segment",
}
STAYING = """
import os, sys, time
from importlib import import_module
from importlib.machinery import PathFinder

HOME, RANK, MODULE, NAME, CALL, BEHIND = {values!r}


def staying(function):
    calls = 0

    def call(*args, **kwargs):
        nonlocal calls
        calls += 1
        here = calls == CALL and not os.path.exists(HOME + "/here")
        if here and not BEHIND:
            stay()
        result = function(*args, **kwargs)
        if here:
            stay()
        return result

    return call


def stay():
    with open(HOME + "/.here", "w") as file:
        file.write(str(os.getpid()))
    os.rename(HOME + "/.here", HOME + "/here")
    time.sleep(60)


class Finder:
    def find_spec(self, name, path=None, target=None):
        if name != MODULE or os.environ.get("RANK", os.environ.get("PMI_RANK")) != RANK:
            return None
        spec = PathFinder.find_spec(name, path)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            *owner, last = NAME.split(".")
            place = getattr(module, owner[0]) if owner else module
            setattr(place, last, staying(getattr(place, last)))

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder())
"""


@dataclass(frozen=True)
class Strike:
    """SIGKILL to `victim` (a rank, or "parent") when a worker comes to its call number `call` of
    the function of `phase`: before that call or, if `behind`, after it.
    """

    victim: str
    phase: str
    call: int
    behind: bool

    def hit(self, home: Path, *args: str) -> Run:
        """Start a run and kill the victim; the run, which may not have noticed yet."""
        home.mkdir()
        module, name = PLACES[self.phase].split()
        rank = "0" if self.victim == "parent" else self.victim
        values = (str(home), rank, module, name, self.call, self.behind)
        (home / "sitecustomize.py").write_text(STAYING.replace("{values!r}", repr(values)))
        path = os.pathsep.join([str(home), os.environ.get("PYTHONPATH", "")])
        run = train(home, *args, PYTHONPATH=path)
        here = home / "here"
        run.until(here.exists)
        pid = run.pid if self.victim == "parent" else int(here.read_text())
        os.kill(pid, signal.SIGKILL)
        return run

    def check(self, home: Path, whole: Path, restarts: int, *args: str) -> str:
        """Kill, resume if need be, and compare with the undisturbed run `whole`; a line about it.

        Raises AssertionError if the run does anything but what is documented.
        """
        run = self.hit(home, *args, f"max_restarts={restarts}")
        folder, ended = home / "run", run.wait()
        gone(home)
        lost = f"worker {self.victim} of 2 was killed by SIGKILL"
        if self.victim == "parent":
            assert ended == -signal.SIGKILL
            assert record(folder)["status"] == "running"
        elif restarts:
            assert ended == 0, run.said()
            assert run.err.read_text().startswith(f"spikerl: {lost}; restarting all")
        else:
            assert ended == 1, run.said()
            assert run.err.read_text().startswith(f"spikerl: {lost} (spikerl train resume=run")
            assert record(folder)["status"] == "failed"
            assert (folder / "error.txt").read_text() == lost + "\n"
        damaged: list[str] = []
        verified(folder, damaged.append)
        assert not damaged
        if ended != 0:
            again = resume(home)
            assert again.wait() == 0, again.said()
            gone(home)
        assert computed(folder) == computed(whole)
        assert record(folder)["status"] == "done"
        (event,) = record(folder)["resumed"]
        assert event["exact"]
        assert not list(folder.rglob(".*.partial"))
        lost_rows = len(rows(folder, "discarded.jsonl"))
        assert lost_rows == event["discarded_rows"]
        shutil.rmtree(home)
        how = "restarted" if restarts and self.victim != "parent" else "resumed"
        return f"ended with {ended}; {how} at step {event['step']}, {lost_rows} rows discarded"


def which_call(phase: str, where: float) -> int:
    """The number of a call after the first epoch; `where` (0 to 1) says how late in the run."""
    epochs = {"evaluation": 4, "checkpoint": 5}  # one for each epoch, and a checkpoint at step 0
    if phase in epochs:
        return 2 + int(where * 3) + (phase == "checkpoint")
    calls = {"acting": 100, "update": 170, "collective": 500}[phase]  # in each worker
    return int(calls * (0.3 + 0.6 * where))
