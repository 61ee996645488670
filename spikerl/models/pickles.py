"""Reads untrusted pickles: runs none of their code and allocates no more than the file's size."""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

# Pickles in a torch file that is not a zip archive: three headers, then the state dict and the
# names of its storages.
HEADERS, PICKLES = 3, 2


def check_torch_file(path: Path) -> None:
    """Raise ValueError if torch could allocate more for this file than it holds.

    torch allocates storages of the size that a pickle states, and unpacks compressed members.
    """
    content = path.read_bytes()
    zipped = content.startswith(b"PK\x03\x04")  # torch's test for an archive
    if zipped != zipfile.is_zipfile(path):
        raise ValueError("it is an archive at one end only")
    if not zipped:
        stream = io.BytesIO(content)
        for _ in range(HEADERS):
            claimed(stream)
        total = sum(claimed(stream) for _ in range(PICKLES))
    else:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if any(m.compress_type != zipfile.ZIP_STORED for m in members):
                raise ValueError("it is compressed, which torch.save does not do")
            if sum(m.file_size for m in members) > len(content):
                raise ValueError("its members overlap")
            pickles = [archive.read(m) for m in members if m.filename.endswith(".pkl")]
        total = sum(claimed(io.BytesIO(content)) for content in pickles)
    if total > len(content):
        raise ValueError("it claims more values than it holds")


def claimed(stream: io.BytesIO) -> int:
    """The sum of the integers in the next pickle, an upper bound of the sizes it states."""
    total = 0
    for opcode, argument, _ in pickletools.genops(stream):  # ValueError if it is truncated
        if isinstance(argument, int) and "PUT" not in opcode.name and "GET" not in opcode.name:
            total += max(argument, 0)
    return total


def read_arrays(content: bytes) -> list[np.ndarray]:
    """The arrays in a pickled list of numeric arrays; other content may raise any exception."""
    # An unpickler allocates its memo up to the largest index, which no honest pickle makes larger
    # than its own length.
    for opcode, argument, _ in pickletools.genops(content):
        if "PUT" in opcode.name and int(argument or 0) > len(content):
            raise pickle.UnpicklingError("it numbers what it does not hold")
    loaded = _ArraysOnly(io.BytesIO(content)).load()
    if not isinstance(loaded, list | tuple) or not all(isinstance(a, _Array) for a in loaded):
        raise pickle.UnpicklingError("something else is in it")
    return [array.values for array in loaded]


class _Type:
    """Replaces numpy.dtype, whose layout a pickle could change without changing its name."""

    def __init__(self, code: object, *flags: object) -> None:
        if code not in ("f2", "f4", "f8", "i4", "i8"):
            raise pickle.UnpicklingError(f"holds an array of {code}; floats are needed")
        self.dtype = np.dtype(str(code))

    def __setstate__(self, state: object) -> None:
        """Takes numpy's tuple: version, byte order, then items that only structured types set."""
        if not isinstance(state, tuple) or len(state) < 5 or state[2:5] != (None, None, None):
            raise pickle.UnpicklingError("holds an array of other than plain numbers")
        if state[1] not in ("<", ">", "="):
            raise pickle.UnpicklingError("holds an array of no byte order")
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Replaces numpy.ndarray, both as an argument and as the array built from shape and bytes."""

    values: np.ndarray

    @classmethod
    def of(cls, content: object, kind: object, shape: object, order: object = "C") -> _Array:
        if not isinstance(content, bytes | bytearray) or not isinstance(kind, _Type):
            raise pickle.UnpicklingError("makes an array of other than its bytes")
        sizes = shape if isinstance(shape, tuple) else (-1,)
        if order not in ("C", "F") or not all(type(n) is int and n >= 0 for n in sizes):
            raise pickle.UnpicklingError("makes an array of no shape")
        if len(content) != kind.dtype.itemsize * math.prod(sizes):
            raise pickle.UnpicklingError("makes an array of more or fewer bytes than it has")
        made = cls()
        flat: np.ndarray = np.frombuffer(content, kind.dtype)
        made.values = flat.reshape(sizes, order="C" if order == "C" else "F")
        return made

    def __setstate__(self, state: object) -> None:
        """Takes numpy's tuple: version, shape, type, whether in Fortran order, bytes."""
        if not isinstance(state, tuple) or len(state) != 5:
            raise pickle.UnpicklingError("makes an array of no state")
        _, shape, kind, columns, content = state
        self.values = _Array.of(content, kind, shape, "F" if columns else "C").values


def _reconstruct(kind: object, shape: object, code: object) -> _Array:
    """Protocols up to 4 call this first; the array's state follows."""
    return _Array()


def _encode(text: object, encoding: object = "latin1") -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("encodes other than an array's bytes")
    return text.encode("latin1")


class _ArraysOnly(pickle.Unpickler):
    """Resolves only the names in pickled numpy arrays, each to a replacement in this module."""

    ALLOWED: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Type,
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy.core.numeric", "_frombuffer"): _Array.of,
        ("numpy._core.numeric", "_frombuffer"): _Array.of,
        ("_codecs", "encode"): _encode,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"names {module}.{name}, which an array does not need")
        return self.ALLOWED[module, name]
