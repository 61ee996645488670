"""A run while it runs: what it refuses to go on from, and how it goes on."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from shell import SHORT, refusal, spikerl

from spikerl.distributed.world import World
from spikerl.errors import PREEMPTED, EnvironmentFailed, Stopped
from spikerl.models.normalizer import RunningNorm
from spikerl.training.evaluator import Evaluation, Evaluator
from spikerl.training.session import Session
from spikerl.training.trainer import Trainer


def test_a_checkpoint_of_another_run_is_refused_in_a_line(tmp_path: Path) -> None:
    class Session_(Session):
        def __init__(self, trainer: Any) -> None:
            self.trainer, self.folder = trainer, tmp_path

    class Broken:
        def load(self, checkpoint: Any) -> bool:
            raise RuntimeError("first\nsecond")

    named: Any = type("Named", (), {"folder": tmp_path / "step_7"})
    line = str(refusal(Session_(Broken()).restore, named))
    assert line == f"resume={tmp_path}: its step_7 does not fit this run (RuntimeError: first)"


def reasons(
    was: dict[str, Any] | None,
    device: str = "cpu",
    *,
    own_products: bool = True,
    size: int = 1,
    offline: bool = False,
    epoch_began: int = 0,
) -> list[str]:
    """Why a resume is not exact, of a run at step 50 of 60, in the middle of an epoch."""
    now = {"kernel": "k", "threads": "1", "GPU": "A", "processor": "p", "torch": "2.1",
           "backend": "gloo", "code": "abc", "total_steps": 60}  # fmt: skip
    config = SimpleNamespace(
        algo=SimpleNamespace(anneals=False, policy_delay=3),
        actor=SimpleNamespace(neuron=None),
        own_products=own_products,
        num_envs=4,
        run=SimpleNamespace(total_steps=60, steps_per_epoch=49),
    )
    session: Any = SimpleNamespace(
        config=config,
        trainer=SimpleNamespace(
            step=50,
            offline=offline,
            algo=SimpleNamespace(updates=50),
            progress=SimpleNamespace(first_step=epoch_began),
        ),
        world=World(size=size),
        computed_by=now,
        resolved=lambda: {"device": {"choice": device}},
    )
    manifest = {} if was is None else {"computed_by": {**now, **was}}
    checkpoint: Any = SimpleNamespace(manifest=manifest, workers=size)
    return Session.differences(session, checkpoint)


@pytest.mark.parametrize(
    ("was", "said"),
    [
        ({}, []),
        ({"kernel": "j"}, ["kernel j became k: sums are in another order"]),
        ({"torch": "2.0", "processor": "q"}, ["processor q became p", "torch 2.0 became 2.1"]),
        ({"code": "abd"}, ["code abd became abc"]),
        ({"code": None, "torch": None, "total_steps": 50}, []),  # not known; nothing moves over it
        (None, ["an earlier version of this program saved it"]),
    ],
)
def test_what_computes_from_now_on(was: dict[str, Any] | None, said: list[str]) -> None:
    assert reasons(was) == said


def test_what_matters_on_some_devices() -> None:
    gpu, threads = (f"{one}: sums are in another order" for one in (
        "GPU B became A", "threads 2 became 1"
    ))  # fmt: skip
    assert reasons({"GPU": "B"}) == []
    assert reasons({"GPU": "B"}, "cuda:0") == [gpu]
    assert reasons({"threads": "2"}) == []
    assert reasons({"threads": "2"}, "cuda:0") == []
    assert reasons({"threads": "2"}, own_products=False) == [threads]


def test_sums_of_two_workers_have_no_order() -> None:
    assert reasons({"backend": "mpi"}, size=2) == []
    said = "backend mpi became gloo: sums are in another order"
    assert reasons({"backend": "mpi"}, size=3) == [said]


def test_evaluations_in_mid_epoch() -> None:
    """Four environments pass the end of the epoch, 49, with their step; an update is a step of an
    offline run. 50 updates end amid a round of three.
    """
    assert reasons({}, epoch_began=50) == []
    assert reasons({}, offline=True) == []  # it took place at step 0
    assert reasons({}, offline=True, epoch_began=50) == [
        "an evaluation in mid-epoch, at step 50: later ones, and updates differ"
    ]


def test_packages_that_compute_nothing() -> None:
    names = {"python", "spikerl", "torch", "numpy", "gymnasium", "mujoco"}
    session: Any = SimpleNamespace(
        config=SimpleNamespace(run=SimpleNamespace(total_steps=60)),
        world=World(),
        resolved=lambda: {name: {"choice": "c"} for name in ("kernel", "threads", "backend")},
    )
    own = Session.computed_by.func(session)  # type: ignore[attr-defined]
    assert own.keys() == names | {
        "kernel", "threads", "backend", "GPU", "processor", "code", "total_steps"
    }  # fmt: skip


def test_an_evaluation_that_is_stopped_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command that is printed goes on, though the last step went beyond total_steps, and what
    each attempt spent is kept.
    """
    monkeypatch.chdir(tmp_path)
    run, stops, spent = Evaluator.run, [0, 0], []

    def stopped(self: Evaluator, policy: Any, evaluation: int, *stop: Any) -> Evaluation:
        if evaluation and stops:
            stops.pop()
            raise Stopped(signal.SIGTERM)
        return run(self, policy, evaluation, *stop)

    monkeypatch.setattr(Evaluator, "run", stopped)
    request = [*SHORT, "num_envs=2", "total_steps=151", "steps_per_epoch=200", "run_dir=r"]
    for args in (request, ["resume=r"]):
        said = spikerl("train", *args)
        assert said.status == PREEMPTED, said.err
        assert "stopped at step 152 on SIGTERM; spikerl train resume=r goes on" in said.out
        notes = json.loads((tmp_path / "r/checkpoints/latest/worker_0.json").read_text())
        spent.append(notes["progress"]["cpu_s"])
    assert 0.0 < spent[0] < spent[1]
    said = spikerl("train", "resume=r")
    assert (said.status, said.err) == (0, "")
    assert "r is done at step 152" in spikerl("train", "resume=r").out
    line = spikerl("train", "resume=r", "total_steps=150").line
    assert line == "total_steps=150: the run is at step 152; give that or more"


def test_a_resume_resets_in_the_thread_that_made_the_environments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some environments cannot be used from another; two workers restore in one beside."""
    monkeypatch.chdir(tmp_path)
    threads: list[int] = []
    reset = Trainer.reset_envs

    def noted(self: Trainer, *resumed_at: int) -> None:
        threads.append(threading.get_ident())
        reset(self, *resumed_at)

    class Beside(World):
        def run_on_all(self, act: Callable[[], Any]) -> list[Any]:
            with ThreadPoolExecutor(1) as pool:
                return [pool.submit(act).result()]

    unknown = ["env=gym", "env.id=MountainCarContinuous-v0", "run_dir=r"]
    short = [word for word in SHORT if not word.startswith("env=")]
    assert spikerl("train", *short, *unknown, "total_steps=150").status == 0
    monkeypatch.setattr(Trainer, "reset_envs", noted)
    monkeypatch.setattr("spikerl.commands.train.ALONE", Beside())
    said = spikerl("train", "resume=r", "total_steps=300")
    assert said.status == 0, said.err
    assert threads == [threading.get_ident()] * 2


def test_a_failed_environment_is_no_wrong_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Session_(Session):
        def __init__(self, trainer: Any) -> None:
            self.trainer, self.folder = trainer, tmp_path

    class Fails:
        def load(self, checkpoint: Any) -> bool:
            raise EnvironmentFailed("step 1: Some-v0 raised RuntimeError")

    named: Any = type("Named", (), {"folder": tmp_path / "step_7"})
    with pytest.raises(EnvironmentFailed):
        Session_(Fails()).restore(named)


def test_what_is_said_of_updates_and_of_random_actions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the steps that are taken: eight environments come to 16 where 15 are asked for."""
    monkeypatch.chdir(tmp_path)
    ppo = ["algo=ppo", "total_steps=15", "num_envs=8", "algo.rollout_steps=16", "algo.epochs=1",
           "algo.norm_interval=16", "algo.batch_size=8", "steps_per_epoch=16"]  # fmt: skip
    short = [word for word in SHORT if not word.startswith(("algo.l", "algo.r", "steps", "total"))]
    said = spikerl("train", *short, *ppo, "run_dir=p")
    assert said.status == 0, said.err
    assert " 2 updates in 16 steps" in said.out
    assert "warning" not in said.out
    said = spikerl("train", *SHORT, "algo.random_steps=300", "run_dir=r")
    line = "warning: all actions of this run are random (algo.random_steps=300); give less, or more"
    assert line in said.out
    said = spikerl("train", *SHORT, "algo.learning_starts=1000", "run_dir=n")
    assert "or less algo.learning_starts\n" in said.out
    said = spikerl("train", *SHORT, "algo.critic_warmup=250", "run_dir=w")
    line = "warning: the policy stays as it is in all updates (algo.critic_warmup=250); give less\n"
    assert line in said.out


def test_coarse_entries_are_named_once_and_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two epochs, four entries: the first three, in the first."""
    monkeypatch.chdir(tmp_path)
    lines = {n: f"warning: entry {n}" for n in range(4)}
    monkeypatch.setattr(RunningNorm, "coarse", lambda self: lines)
    assert spikerl("train", *SHORT, "algo.learning_starts=1000", "run_dir=r").status == 0
    log = Path("r/log.txt").read_text().splitlines()
    said = [line.split(" ", 2)[2] for line in log if "warning: entry" in line]
    assert said == [lines[0], lines[1], lines[2]]
