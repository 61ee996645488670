"""Files that are whole or absent, files that grow, and untrusted files."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import platform
import secrets
import shutil
import stat
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

# What a file system answers that lacks a call: Lustre, CIFS, FUSE and others, each in its way.
LACKING = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF, errno.ENOLCK}


def absolute(path: str) -> Path:
    """A path as the user means it, wherever an environment's code will go; `~` is a home.

    zsh, cron and YAML leave a `~` behind a `=` as it is.
    """
    return Path(os.path.abspath(os.path.expanduser(path)))


def shown(path: Path) -> str:
    """As short as it can be typed: from the current folder on, if it lies below that."""
    with suppress(OSError):  # of a folder that was removed
        if path.is_relative_to(here := os.getcwd()) and path != Path(here):
            return str(path.relative_to(here))
    return str(path)


def write_synced(path: Path, content: bytes | memoryview) -> str:
    """A file in a folder that nobody reads yet; the checksum of its content."""
    with path.open("wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    return checksum(content)


def partial_of(path: Path) -> Path:
    """What it is called until it is whole, by this call alone: other machines and containers have
    the same numbers of processes.
    """
    return path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.partial")


def why_no_name(path: Path) -> str | None:
    """Why nothing in that folder, which is there, can have this name: it is too long."""
    try:
        path.lstat()
    except FileNotFoundError:
        return None
    except OSError as error:
        return error.strerror or str(error)
    return None


def write_atomic(path: Path, content: bytes | memoryview) -> str:
    """The same in place of what has this name; on failure nothing is left."""
    partial = partial_of(path)
    try:
        digest = write_synced(partial, content)
        os.replace(partial, path)
        sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    return digest


def write_text(path: Path, text: str) -> None:
    """In UTF-8; what a file's name has that is none is written as an escape."""
    write_atomic(path, text.encode(errors="backslashreplace"))


def json_bytes(data: Any) -> bytes:
    """Strict JSON: a NaN is an error here rather than a file that others cannot read."""
    return (json.dumps(data, indent=1, allow_nan=False) + "\n").encode()


def write_json(path: Path, data: Any) -> None:
    write_atomic(path, json_bytes(data))


def there(path: Path) -> bool:
    """Whether something has that name, so far as can be seen: where nothing can, it is assumed."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # which reading it will name
        return True
    return True


def make_folder(path: Path) -> None:
    """Below one that exists: what went away is not begun anew. Several may make it at once."""
    if not path.is_dir():
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def read_bytes(path: Path, most: int) -> bytes:
    """A regular file of at most `most` bytes; an OSError says what else it is.

    A pipe would make the reader wait for ever, a device or a sparse file fill its memory.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with open(descriptor, "rb") as f:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{path.name} is not a regular file")
        if status.st_size > most:
            raise OSError(f"{path.name} is larger than {most} bytes")
        return f.read(status.st_size)  # not `most`, which would be reserved


def read_json(path: Path, most: int) -> Any:
    """Checked data whose numbers are finite; an OSError or a ValueError where it is none."""
    return parse_json(read_bytes(path, most))


def parse_json(text: bytes) -> Any:
    """As `json_bytes` wrote it: no NaN, no infinity, no 1e999, no nesting without end."""
    try:
        data = json.loads(text, parse_constant=_finite, parse_float=_finite)
        if b"\\ud" in text.lower():  # half of a pair, which no file and no terminal takes
            json.dumps(data, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it nests too deep") from None
    return data


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:20]} is not a finite number")
    return value


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in LACKING:
            raise
        warn_once("folders cannot be synced here: a power cut may undo the last commit")
    finally:
        os.close(descriptor)


def hold(folder: Path) -> IO[str] | str:
    """The folder's lock, held until it is closed or the process ends; or who holds it, in words."""
    file = (folder / ".lock").open("a+", encoding="utf-8")
    if not lock_file(file):
        with file:
            file.seek(0)
            return file.read().strip() or "another process"
    with suppress(OSError):  # a full disk takes no words, and nothing of them is to wait for it
        os.ftruncate(file.fileno(), 0)
        os.write(file.fileno(), f"process {os.getpid()} on {platform.node()}".encode())
    return file


def lock_file(file: IO[Any], *, wait: bool = False) -> bool:
    """Lock an open file until it is closed; False where another process holds it.

    Where the file system has no locks, a line says so, and nothing is locked.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in LACKING:
            raise
        warn_once("files cannot be locked here: nothing keeps two processes out of one folder")
    return True


@cache
def warn_once(text: str) -> None:
    print(f"spikerl: warning: {text}", file=sys.stderr)


def link_to(path: Path, to: str) -> None:
    """A symbolic link in place of what has this name; a text file of it where there are none."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        partial.symlink_to(to)
    except OSError as error:
        if error.errno not in LACKING | {errno.EPERM}:
            raise
        warn_once(f"links cannot be made here: {path.name} is a file that holds a name")
        write_synced(partial, to.encode())
    if path.is_dir() and not path.is_symlink():  # of a copy that follows links, such as scp -r's
        shutil.rmtree(path)
    os.replace(partial, path)
    sync_folder(path.parent)


def checksum(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()


def checksum_of(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


class Journal:
    """A file that grows. What the disk refuses is kept, and written in order with what follows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.length = path.stat().st_size if path.exists() else 0
        self.pending = b""

    def add(self, content: bytes) -> None:
        self.pending += content

    def write(self, *, sync: bool) -> None:
        """A file that went away is not begun anew: it would lack what came before."""
        if not self.pending:
            return
        new = os.O_CREAT if self.length == 0 else 0
        with os.fdopen(os.open(self.path, os.O_WRONLY | new, 0o666), "wb") as f:
            if os.fstat(f.fileno()).st_size < self.length:
                raise OSError(errno.EIO, "it lost what it held", str(self.path))
            f.seek(self.length)  # over what an earlier attempt left
            f.write(self.pending)
            f.truncate()
            f.flush()
            if sync:
                os.fsync(f.fileno())
        self.length += len(self.pending)
        self.pending = b""
