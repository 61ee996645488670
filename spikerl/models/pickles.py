"""Untrusted pickles: nothing in them runs, and nothing is allocated that they do not hold."""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

# What torch writes into a file that is not an archive: three numbers of its own, the state dict,
# the names of its storages.
HEADERS, PICKLES = 3, 2


def check_torch_file(path: Path) -> None:
    """A ValueError unless what torch would allocate for it lies in it.

    It reserves a storage of the size that a pickle claims, and unpacks what is compressed.
    """
    content = path.read_bytes()
    if not zipfile.is_zipfile(path):
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
    """The sum of the numbers in the next pickle, with which its sizes are said."""
    total = 0
    for opcode, argument, _ in pickletools.genops(stream):  # a ValueError where it is cut
        if isinstance(argument, int) and "PUT" not in opcode.name and "GET" not in opcode.name:
            total += max(argument, 0)
    return total


def read_arrays(content: bytes) -> Any:
    """What a pickle of numpy arrays of numbers holds; any other raises almost anything."""
    for opcode, argument, _ in pickletools.genops(content):
        if "PUT" in opcode.name and int(argument or 0) > len(
            content
        ):  # each name follows an operation
            raise pickle.UnpicklingError("it numbers what it does not hold")
    return _ArraysOnly(io.BytesIO(content)).load()


class _Array:
    """Stands for numpy.ndarray in a pickle, where it is only ever an argument."""


def _reconstruct(kind: object, shape: object, code: object) -> np.ndarray:
    return np.empty(0, np.int8)  # what fills it brings its own shape, type and values


def _frombuffer(content: object, kind: object, shape: object, order: object = "C") -> np.ndarray:
    """What protocol 5 calls instead: the values come as one block of bytes."""
    if not isinstance(content, bytes | bytearray) or not isinstance(kind, np.dtype):
        raise pickle.UnpicklingError("makes an array of other than its bytes")
    if not isinstance(shape, tuple) or order not in ("C", "F"):
        raise pickle.UnpicklingError("makes an array of no shape")
    flat: np.ndarray = np.frombuffer(content, kind)
    return flat.reshape(shape, order="C" if order == "C" else "F")


def _dtype(code: object, *flags: object) -> np.dtype[Any]:
    if code not in ("f2", "f4", "f8", "i4", "i8"):
        raise pickle.UnpicklingError(f"holds an array of {code}; floats are needed")
    return np.dtype(str(code), copy=True)


def _encode(text: object, encoding: object = "latin1") -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("encodes other than an array's bytes")
    return text.encode("latin1")


class _ArraysOnly(pickle.Unpickler):
    """Admits what numpy arrays are pickled with, and nothing else: each name is ours here."""

    ALLOWED: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _dtype,
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy.core.numeric", "_frombuffer"): _frombuffer,
        ("numpy._core.numeric", "_frombuffer"): _frombuffer,
        ("_codecs", "encode"): _encode,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"names {module}.{name}, which an array does not need")
        return self.ALLOWED[module, name]
