"""Settings of the process that users' code changes, and tensors' dtypes despite such changes."""

from __future__ import annotations

import ast
import ctypes
import os
import random
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sympy  # type: ignore[import-untyped]  # noqa: F401  # its import adds a filter of warnings
import torch
from builders import small_config
from transitions_env import CounterEnv, registered

import spikerl
from spikerl import isolation
from spikerl.envs.make import make_env, task_of
from spikerl.isolation import UserCode, settings
from spikerl.runs.policies import load_policy
from spikerl.training.trainer import Trainer


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = settings()
    yield
    isolation.change(settings(), before)


def handler(number: int, frame: object) -> None:
    pass


def set_handler(number: signal.Signals, folder: Path) -> None:
    signal.signal(number, handler)


CHANGES: dict[str, tuple[Callable[[Path], Any], Callable[[], Any]]] = {
    "dtype": (lambda _: torch.set_default_dtype(torch.float64), torch.get_default_dtype),
    "device": (lambda _: torch.set_default_device("meta"), lambda: torch.empty(1).device),
    "gradients": (lambda _: torch.set_grad_enabled(False), torch.is_grad_enabled),
    "suspended generator": (lambda _: kept.append(next(without_grad())), torch.is_grad_enabled),
    "autocast": (
        lambda _: torch.set_autocast_enabled("cpu", True),
        lambda: torch.is_autocast_enabled("cpu"),
    ),
    "deterministic": (
        lambda _: torch.use_deterministic_algorithms(True, warn_only=True),
        lambda: (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
    ),
    "threads": (lambda _: torch.set_num_threads(3), torch.get_num_threads),
    "numpy": (lambda _: np.seterr(all="raise"), np.geterr),
    "warnings": (lambda _: warnings.simplefilter("error"), lambda: list(warnings.filters)),
    "denormals": (lambda _: torch.set_flush_denormal(True), lambda: isolation.DENORMAL * 1.0),
    "hook": (lambda _: setattr(sys, "excepthook", None), lambda: sys.excepthook),
    "folder": (os.chdir, os.getcwd),
    **{
        number.name: (partial(set_handler, number), partial(signal.getsignal, number))
        for number in isolation.STOPS
    },
}
kept: list[Any] = []


def without_grad() -> Iterator[Any]:
    generator = suspended()
    next(generator)
    yield generator


def suspended() -> Iterator[None]:
    with torch.no_grad():
        yield
        yield


@pytest.mark.parametrize("name", CHANGES)
def test_what_they_change_is_put_back(name: str, tmp_path: Path) -> None:
    change, look = CHANGES[name]
    ours = look()
    with UserCode():
        change(tmp_path)
        theirs = look()
    assert theirs != ours
    assert look() == ours
    with UserCode():  # their settings are back, except the run's own
        assert look() == (ours if name == "threads" or name.startswith("SIG") else theirs)
    assert look() == ours


@pytest.mark.parametrize("name", CHANGES)
def test_so_it_is_where_they_raise(name: str, tmp_path: Path) -> None:
    change, look = CHANGES[name]
    ours = look()
    with suppress(SystemExit), UserCode():
        change(tmp_path)
        raise SystemExit
    assert look() == ours


def test_a_handler_that_they_need_themselves_stays() -> None:
    before = signal.getsignal(signal.SIGALRM)
    try:
        with UserCode():
            signal.signal(signal.SIGALRM, handler)
        assert signal.getsignal(signal.SIGALRM) is handler
    finally:
        signal.signal(signal.SIGALRM, before)


class Settled(CounterEnv):
    """Changes all settings when it is made, reset or stepped, as `when` says."""

    when = ""

    def __init__(self) -> None:
        super().__init__()
        self.spoil("make")

    def reset(self, **kwargs: Any) -> Any:
        self.spoil("reset")
        return super().reset(**kwargs)

    def step(self, action: np.ndarray) -> Any:
        self.spoil("step")
        return super().step(action)

    def close(self) -> None:
        self.spoil("close")

    def spoil(self, now: str) -> None:
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        if now == Settled.when:
            for change, _ in CHANGES.values():
                change(Path("/"))


def outcome(env: Any) -> dict[str, torch.Tensor]:
    config = small_config(env=env, eval_episodes=1, total_steps=100, steps_per_epoch=100)
    with closing(make_env(env)) as one:
        task = task_of(one)
    with closing(Trainer(config, task)) as trainer:
        list(trainer.epochs())
        return {name: tensor.clone() for name, tensor in trainer.learner_state().items()}


@pytest.mark.parametrize("when", ["make", "reset", "step", "close"])
def test_an_environment_that_changes_everything_changes_no_number(when: str) -> None:
    env, ours = registered("Settled", Settled, limit=9), settings()
    try:
        Settled.when = ""
        wanted = outcome(env)
        Settled.when = when
        got = outcome(env)
    finally:
        Settled.when = ""
    assert settings() == ours
    assert {name: tensor.dtype for name, tensor in got.items()} == {
        name: tensor.dtype for name, tensor in wanted.items()
    }
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_a_policy_is_loaded_where_the_default_type_is_another(tmp_path: Path) -> None:
    config = small_config()
    with closing(make_env(config.env)) as one, closing(Trainer(config, task_of(one))) as trainer:
        trainer.policy.save(tmp_path)
    obs = np.linspace(-1.0, 1.0, 4)
    wanted = load_policy(tmp_path)(obs)
    torch.set_default_dtype(torch.float64)
    policy = load_policy(tmp_path)
    assert {p.dtype for p in policy.actor.parameters()} == {torch.float32}
    assert policy(obs).tobytes() == wanted.tobytes()


# --- how the sources are written ------------------------------------------------------------------

MAKERS = {
    *("empty", "zeros", "ones", "full", "tensor", "rand", "randn", "randint", "normal"),
    *("arange", "linspace", "logspace", "eye"),
}
GENERATORS = ("SeedSequence", "PCG64", "Generator", "default_rng")
OWN_PROCESS = "bench"  # runs no users' code
SOURCES = [p for p in Path(spikerl.__file__).parent.rglob("*.py") if OWN_PROCESS not in p.parts]


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_every_tensor_that_is_made_has_a_type() -> None:
    seen = 0
    for path in SOURCES:
        for name, call in calls(path):
            module, _, maker = name.rpartition(".")
            if module == "torch" and maker in MAKERS:
                seen += 1
                given = {keyword.arg for keyword in call.keywords}
                assert "dtype" in given, f"{path}:{call.lineno}: {ast.unparse(call)}"
    assert seen > 20


def test_nothing_draws_from_a_global_generator() -> None:
    """Users' code may seed global generators; `initialising` seeds a fork of one to draw from."""
    drawn = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial"}
    for path in SOURCES:
        for name, call in calls(path):
            where = f"{path}:{call.lineno}: {ast.unparse(call)}"
            module, _, maker = name.rpartition(".")
            assert module != "random", where
            assert module != "np.random" or maker in GENERATORS, where
            if module == "torch" and maker in drawn:
                assert "generator" in {keyword.arg for keyword in call.keywords}, where


def test_settings_of_the_processor_are_seen() -> None:
    """Loading a library built with -ffast-math sets DAZ and FTZ of the register MXCSR."""
    assert settings().flushes is False
    torch.set_flush_denormal(True)
    assert settings().flushes is True
    assert ctypes.c_double(isolation.DENORMAL).value * 1.0 == 0.0


class Forks(CounterEnv):
    """Forks in a step; the child returns from the step or raises in it."""

    how, status = "", 0

    def step(self, action: np.ndarray) -> Any:
        child = os.fork()
        if child == 0 and Forks.how == "raises":
            raise RuntimeError("in the child")
        if child:
            self.status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return super().step(action)


CAME_BACK = 7


@pytest.mark.parametrize("how", ["returns", "raises"])
def test_a_forked_child_that_comes_back_ends(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child ends with status 1 instead of returning to the run."""
    monkeypatch.setattr(Forks, "how", how)
    ours = os.getpid()
    with closing(make_env(registered("Forks", Forks, limit=9))) as env:
        env.reset(seed=0)
        try:
            env.step(env.action_space.sample())
        finally:
            if os.getpid() != ours:
                os._exit(CAME_BACK)
        inner: Any = env.unwrapped
        assert inner.status == 1


def test_so_does_one_that_is_forked_elsewhere() -> None:
    ours = os.getpid()
    try:
        with UserCode():
            child = os.fork()
    finally:
        if os.getpid() != ours:
            os._exit(CAME_BACK)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
