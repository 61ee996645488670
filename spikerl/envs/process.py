"""Environments in processes of their own.

They are forked by a server, a process without threads that has imported what they need. A process
that is forked while other threads run (torch's, BLAS's) may wait for them forever.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from multiprocessing import forkserver, resource_tracker
from typing import Any
from weakref import ref

import gymnasium as gym
from gymnasium.vector import AsyncVectorEnv
from gymnasium.vector.async_vector_env import _async_worker
from gymnasium.vector.utils import clear_mpi_env_vars

from spikerl.children import set_variable
from spikerl.distributed.process_lifetime import die_with_parent
from spikerl.envs.checked import CheckedEnv
from spikerl.envs.config import EnvConfig
from spikerl.envs.make import make_env
from spikerl.errors import BadRequest, EnvironmentFailed
from spikerl.isolation import keep_theirs
from spikerl.signals import STOPS

CONTEXT = "forkserver"


def start_server() -> None:
    """Start the fork server, which imports while the caller goes on; a second call does nothing."""
    set_here = {
        "SPIKERL_ENVS_OF": str(os.getpid()),
        "SPIKERL_ENVS_SAFE_PATH": "" if "PYTHONSAFEPATH" in os.environ else "1",
        "PYTHONSAFEPATH": "1",  # import nothing from the working directory
        # A killed run leaves semaphores; multiprocessing's tracker removes them, with a warning.
        "PYTHONWARNINGS": "ignore",
    }
    before = {name: os.environ.get(name) for name in set_here}
    multiprocessing.get_context(CONTEXT).set_forkserver_preload(["spikerl.envs.server"])

    os.environ.update(set_here)
    try:
        with clear_mpi_env_vars():
            resource_tracker.ensure_running()
            set_variable("PYTHONWARNINGS", before["PYTHONWARNINGS"])
            forkserver.ensure_running()
    finally:
        for name, value in before.items():
            set_variable(name, value)


class Processes(AsyncVectorEnv):
    """Gymnasium's vector of processes, forked by the server, and ended in every case."""

    def __init__(self, makers: Sequence[Callable[[], CheckedEnv]], **settings: Any) -> None:
        start_server()
        # At exit multiprocessing sends SIGTERM, which the processes ignore, and would wait.
        self.kill_at_exit = partial(_kill_all_of, ref(self))
        atexit.register(self.kill_at_exit)
        super().__init__(makers, context=CONTEXT, worker=_work, **settings)

    def close_extras(self, timeout: float | None = None, terminate: bool = False) -> None:
        try:
            if terminate:  # a hanging process does not answer
                self.kill_at_exit()
            super().close_extras(timeout, terminate)
        except (EOFError, OSError) as error:
            self.kill_at_exit()  # join would wait for processes that were not told to close
            for process in self.processes:
                process.join()
            raise EnvironmentFailed("close: lost a process: it was killed or crashed") from error
        finally:
            atexit.unregister(self.kill_at_exit)
        if not terminate and any(process.exitcode for process in self.processes):
            raise EnvironmentFailed("close: an environment failed while it was closed")

    def _raise_if_errors(self, successes: Iterable[bool]) -> None:
        if not all(successes):
            with warnings.catch_warnings():  # the error already says everything
                warnings.simplefilter("ignore")
                super()._raise_if_errors(successes)


def maker(config: EnvConfig) -> Callable[[], CheckedEnv]:
    """A function that makes the environment in any process, even if only this one registered it."""
    spec = gym.registry.get(config.id)
    return partial(_make, config, spec, os.getpid())


def _make(config: EnvConfig, spec: Any, parent: int) -> CheckedEnv:
    if os.getpid() == parent:  # the vector also makes one in its own process, to get the spaces
        return make_env(config)
    die_with_parent()
    for number in STOPS:  # the parent answers them; unlike SIG_IGN, handlers are not inherited
        signal.signal(number, _ignore)
    if spec is not None:
        gym.registry.setdefault(config.id, spec)
    try:
        env = make_env(config)
    except BadRequest as error:
        _say_and_exit(error)
    keep_theirs()
    env.close = partial(_close, env)  # type: ignore[method-assign]
    return env


def _kill_all_of(vector: ref[Processes]) -> None:
    for process in getattr(vector(), "processes", []):
        process.kill()


def _work(*arguments: Any) -> None:
    """Run an environment's process; it ends silently when the run's process has ended."""
    try:
        _async_worker(*arguments)
    except (EOFError, ConnectionError):
        os._exit(1)


def _close(env: CheckedEnv) -> None:
    try:
        CheckedEnv.close(env)
    except EnvironmentFailed as error:
        _say_and_exit(error)


def _say_and_exit(error: Exception) -> None:
    print(f"spikerl: {error}", file=sys.stderr, flush=True)
    sys.exit(1)


def _ignore(number: int, frame: object) -> None:
    pass
