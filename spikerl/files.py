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

# Errors of file systems that lack a call: Lustre, CIFS, FUSE and others, each in its way.
LACKING = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF, errno.ENOLCK}


def absolute(path: str) -> Path:
    """The absolute path, as an environment's code may change the working folder; `~` is expanded,
    which zsh, cron and YAML do not do behind a `=`.
    """
    return Path(os.path.abspath(os.path.expanduser(path)))


def shown(path: Path) -> str:
    """The path as short as it can be typed: relative to the current folder, if it lies below."""
    with suppress(OSError):  # the current folder was removed
        if path.is_relative_to(here := os.getcwd()) and path != Path(here):
            return str(path.relative_to(here))
    return str(path)


def write_synced(path: Path, content: bytes | memoryview) -> str:
    """Write a file in a folder that nobody reads yet, and sync it; return its checksum."""
    with path.open("wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    return checksum(content)


def partial_of(path: Path) -> Path:
    """The hidden name of a file or folder until it is complete, unique to this call: a process id
    is not, as other machines and containers have the same ones.
    """
    return path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.partial")


def why_no_name(path: Path) -> str | None:
    """Why nothing in its folder, which exists, can have this name (it is too long), or None."""
    try:
        path.lstat()
    except FileNotFoundError:
        return None
    except OSError as error:
        return error.strerror or str(error)
    return None


def write_atomic(path: Path, content: bytes | memoryview) -> str:
    """Write and sync a file in place of what has this name; on failure no partial file is left."""
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
    """Write in UTF-8; bytes of a file's name that are not UTF-8 are written as escapes."""
    write_atomic(path, text.encode(errors="backslashreplace"))


def json_bytes(data: Any) -> bytes:
    """Strict JSON: a NaN is an error here rather than a file that others cannot read."""
    return (json.dumps(data, indent=1, allow_nan=False) + "\n").encode()


def write_json(path: Path, data: Any) -> None:
    write_atomic(path, json_bytes(data))


def there(path: Path) -> bool:
    """Whether something has that name; True where an error keeps us from knowing."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # reading it will raise the same
        return True
    return True


def make_folder(path: Path) -> None:
    """Make a folder below one that exists, as a removed run must not come back. Several processes
    may call this at once.
    """
    if not path.is_dir():
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def read_bytes(path: Path, most: int) -> bytes:
    """Read a regular file of at most `most` bytes; an OSError for anything else.

    A pipe would make the reader wait for ever, a device or a sparse file fill its memory.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with open(descriptor, "rb") as f:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{path.name} is not a regular file")
        if status.st_size > most:
            raise OSError(f"{path.name} is larger than {most} bytes")
        return f.read(status.st_size)  # read(most) would reserve that much memory


def read_json(path: Path, most: int) -> Any:
    """Read JSON as `parse_json` checks it; OSError or ValueError where the file holds none."""
    return parse_json(read_bytes(path, most))


def parse_json(text: bytes) -> Any:
    """Parse JSON as `json_bytes` writes it; ValueError for NaN, infinity, 1e999 or deep nesting."""
    try:
        data = json.loads(text, parse_constant=_finite, parse_float=_finite)
        if b"\\ud" in text.lower():  # a lone surrogate, which cannot be encoded
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
    """The folder's lock, held until it is closed or the process ends; or, as text, who has it."""
    file = (folder / ".lock").open("a+", encoding="utf-8")
    if not lock_file(file):
        with file:
            file.seek(0)
            return file.read().strip() or "another process"
    with suppress(OSError):  # unbuffered: a full disk may refuse the text, which is optional
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
    """Put a link in place of what has this name, or a file with the target's name if links fail."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        partial.symlink_to(to)
    except OSError as error:
        if error.errno not in LACKING | {errno.EPERM}:
            raise
        warn_once(f"links cannot be made here: {path.name} is a file that holds a name")
        write_synced(partial, to.encode())
    if path.is_dir() and not path.is_symlink():  # in a copy, as scp -r follows links
        shutil.rmtree(path)
    os.replace(partial, path)
    sync_folder(path.parent)


def checksum(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()


def checksum_of(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


class Journal:
    """A file that grows. What cannot be written is kept, and written in order with what follows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.length = path.stat().st_size if path.exists() else 0
        self.pending = b""

    def add(self, content: bytes) -> None:
        self.pending += content

    def write(self, *, sync: bool) -> None:
        """Write what is pending; OSError if the file was removed: a new one would be incomplete."""
        if not self.pending:
            return
        new = os.O_CREAT if self.length == 0 else 0
        with os.fdopen(os.open(self.path, os.O_WRONLY | new, 0o666), "wb") as f:
            if os.fstat(f.fileno()).st_size < self.length:
                raise OSError(errno.EIO, "it lost what it held", str(self.path))
            f.seek(self.length)  # over what a failed attempt left
            f.write(self.pending)
            f.truncate()
            f.flush()
            if sync:
                os.fsync(f.fileno())
        self.length += len(self.pending)
        self.pending = b""
