"""The border between this program and code of its users: neither changes the other's settings.

What is watched: torch's default type and device, gradients, autocast, deterministic algorithms and
threads; numpy's error state; warning filters; whether the processor takes denormal numbers for 0
(libraries built with -ffast-math switch that on as they are loaded); the hook for uncaught
exceptions; the working directory; and the handlers of the signals that stop a run.

Not watched: the states of global random generators, as nothing here draws from them, and what no
call can put back, such as environment variables that a library has read.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # `signal` turns its results into enums: slow
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from numpy._core.umath import _extobj_contextvar as numpy_errors

from spikerl.signals import STOPS

DENORMAL = 5e-324


class Settings(NamedTuple):
    dtype: torch.dtype
    device: torch.device | None
    gradients: bool
    autocast: bool
    deterministic: bool
    warn_only: bool
    threads: int
    numpy_errors: Any
    filters: Sequence[Any]
    flushes: bool
    hook: Any
    folder: str | None  # None: it was removed
    handlers: tuple[Any, ...]


def settings() -> Settings:
    """The current settings; reading them takes a microsecond."""
    try:
        folder = os.getcwd()
    except OSError:
        folder = None
    return Settings(
        torch.get_default_dtype(),
        _default_device(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.get_num_threads(),
        numpy_errors.get(),
        warnings.filters[:],
        DENORMAL * 1.0 == 0.0,
        sys.excepthook,
        folder,
        tuple(map(_signal.getsignal, STOPS)),
    )


def _default_device() -> torch.device | None:
    context = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    return None if context is None else context.device


def _set_deterministic(to: Settings) -> None:
    torch.use_deterministic_algorithms(to.deterministic, warn_only=to.warn_only)


def _set_filters(to: Settings) -> None:
    warnings.resetwarnings()  # also discards what warnings cached of the filters
    filters: Any = warnings.filters
    filters[:] = to.filters


def _set_folder(to: Settings) -> None:
    if to.folder is not None:
        with suppress(OSError):  # it was removed
            os.chdir(to.folder)


def _set_handlers(to: Settings) -> None:
    for number, handler in zip(STOPS, to.handlers, strict=True):
        if handler is not None:  # None if C code installed it
            signal.signal(number, handler)


SET: dict[str, Callable[[Settings], Any]] = {
    "dtype": lambda to: torch.set_default_dtype(to.dtype),
    "device": lambda to: torch.set_default_device(to.device),
    "gradients": lambda to: torch.set_grad_enabled(to.gradients),
    "autocast": lambda to: torch.set_autocast_enabled("cpu", to.autocast),
    "deterministic": _set_deterministic,
    "warn_only": _set_deterministic,
    "threads": lambda to: torch.set_num_threads(to.threads),
    "numpy_errors": lambda to: numpy_errors.set(to.numpy_errors),
    "filters": _set_filters,
    "flushes": lambda to: torch.set_flush_denormal(to.flushes),
    "hook": lambda to: setattr(sys, "excepthook", to.hook),
    "folder": _set_folder,
    "handlers": _set_handlers,
}
# Settings not given back to users' code: resizing a thread pool is slow, signals are the run's.
OURS = ("threads", "handlers")


def change(now: Settings, to: Settings) -> None:
    for name, old, new in zip(Settings._fields, now, to, strict=True):
        if old != new:
            SET[name](to)


_theirs: Settings | None = None  # settings that users' code left, where they differ from ours


class UserCode:
    """A context for users' code: inside, the settings that it left last; afterwards, ours again."""

    __slots__ = ("ours", "pid")

    def __enter__(self) -> None:
        self.ours, self.pid = settings(), os.getpid()
        if _theirs is not None:
            ours = {name: getattr(self.ours, name) for name in OURS}
            change(self.ours, _theirs._replace(**ours))

    def __exit__(self, *error: object) -> None:
        global _theirs
        end_if_forked(self.pid)
        now, _theirs = settings(), None
        if now != self.ours:
            _theirs = now
            change(now, self.ours)


def end_if_forked(pid: int) -> None:
    """End this process unless its id is `pid`: users' code forked it and let it return here, but
    the run and its files belong to the parent alone.
    """
    if os.getpid() != pid:
        if sys.exc_info()[0] is not None:
            traceback.print_exc(file=sys.__stderr__)  # line-buffered, as _exit flushes nothing
        os._exit(1)


def keep_theirs() -> None:
    """Set what users' code left, in a process that from now on runs nothing else."""
    if _theirs is not None:
        change(settings(), _theirs)
