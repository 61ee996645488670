"""Watches a case: it must not run code, write outside its folder, take much memory or time, or
raise anything but a BadRequest.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from spikerl.errors import BadRequest

SECONDS = 10.0  # that one case may take
ROOM = 1 << 30  # address space beyond what the process has
PEAK = 256 << 20  # by which the resident memory may grow in one case
# HDF5 reserves as much memory as a file claims, but fills only as much as the file has bytes.
IMAGE = "memory allocation failed for on disk image buffer"

# Audit events that only code from a file would cause.
RUNS = {
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty",
    "os.startfile", "os.kill", "pty.spawn", "subprocess.Popen", "socket.connect", "socket.bind",
    "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request", "webbrowser.open",
    "ctypes.dlopen", "code.__new__",
}  # fmt: skip
CHANGES = {
    "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate",
    "os.chmod", "os.chown", "shutil.rmtree", "shutil.move", "shutil.copyfile",
}  # fmt: skip
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
FOREIGN = {"antigravity", "this", "fuzz_foreign", "webbrowser", "pty"}  # never imported here


class Hang(BaseException):
    """Not an Exception, so that no handler for damaged files catches it."""


class Ran(BaseException):
    """Raised by the audit hook to prevent what a case must not do."""


class Watch:
    """The audit hook, which cannot be removed again, and the folder in which a case may write."""

    def __init__(self) -> None:
        self.folder: str | None = None  # None: not watching
        self.caught = ""
        sys.addaudithook(self.hear)

    def hear(self, event: str, args: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event == "open":
            path, _, flags = args
            wrong = bool((flags or 0) & WRITES) and self.outside(path, follow=True)
        elif event == "import":
            wrong = str(args[0]).partition(".")[0] in FOREIGN
        else:
            made = event in ("os.link", "os.symlink")
            wrong = event in RUNS or (event in CHANGES and self.outside(args[made]))
        if wrong:
            self.caught = f"{event} {args!r}"[:300]
            raise Ran(self.caught)

    def outside(self, path: object, *, follow: bool = False) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False  # a descriptor, which was opened before
        place = os.path.abspath(os.fsdecode(path))
        above, name = os.path.split(os.path.realpath(place) if follow else place)
        place = os.path.join(os.path.realpath(above), name)
        return not f"{place}/".startswith(f"{self.folder}/") and place != os.devnull


WATCH = Watch()


@contextmanager
def bounded() -> Iterator[None]:
    """Limit the memory: an allocation of gigabytes fails instead of exhausting the machine's."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, before[1]))
    handler = signal.signal(signal.SIGALRM, _ring)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def _ring(number: int, frame: FrameType | None) -> None:
    raise Hang


def outcome(case: Callable[[], bool], folder: Path) -> str:
    """`loaded`, `refused`, or what went wrong: its kind, a colon, and a description."""
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak memory to the current one
    WATCH.folder, WATCH.caught = str(folder.resolve()), ""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        found = "loaded" if case() else "refused"
    except BadRequest as error:
        found = _refused(error)
    except Hang:
        found = f"hang: more than {SECONDS} s"
    except Ran:
        found = "code: "
    except BaseException as error:  # any other exception is a finding
        found = f"exception: {type(error).__name__}: {error}"[:300]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        WATCH.folder = None
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) << 10
    if WATCH.caught:
        return f"code: {WATCH.caught}"
    return f"memory: grew by {grown >> 20} MiB" if grown > PEAK else found


def _refused(error: BadRequest) -> str:
    """`refused`; but a refusal caused by a failed allocation is a finding: it came too late."""
    link: BaseException | None = error
    while link is not None:
        text = str(link).lower()
        if IMAGE in text:
            return "refused"
        if isinstance(link, MemoryError) or ("memory" in text and "alloc" in text):
            return f"memory: {type(link).__name__}: {link}"[:300]
        link = link.__cause__ or link.__context__
    return "refused"
