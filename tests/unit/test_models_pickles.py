"""Untrusted files: their code is never run, and no more memory is allocated than they have data."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spikerl.errors import BadRequest
from spikerl.models.foreign import read_stats, read_weights, recognise

HUGE = 10**11
pytestmark = pytest.mark.usefixtures("little_memory")


class Calls:
    """An object whose pickle calls `function`."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.args


def reconstruct(*args: Any) -> Calls:
    function: Any = np.ndarray(0).__reduce__()[0]  # numpy's, in a private module
    return Calls(function, *args)


def nested(levels: int) -> Any:
    value: Any = [0.0] * 10
    for _ in range(levels):
        value = [value] * 10
    return value


def global_call(module: str, name: str, argument: str) -> bytes:
    return f"c{module}\n{name}\n(V{argument}\ntR.".encode()


def of_type(state: str, shape: int) -> bytes:
    """A pickle of two arrays of 16 bytes by `_frombuffer`; their dtype is f8 with this state."""
    f8 = b"cnumpy\ndtype\n(Vf8\n\x89\x88tR"
    kind = f8 + state.encode().replace(b"F8", f8) + b"b"
    size = b"J" + shape.to_bytes(4, "little") + b"\x85"
    one = b"cnumpy._core.numeric\n_frombuffer\n(C\x10" + bytes(16) + kind + size + b"VC\ntR"
    return b"\x80\x04](" + one + one + b"e."


PLAIN = "(K\x03V<\nNNNK\x08K\x08K\x00t"
# Elements of 500 f8 with the size of one f8: numpy would read beyond the bytes.
SUBARRAY = "(K\x03V<\n(F8(M\xf4\x01ttNNK\x08K\x08K\x00t"
STATS = {
    "subarray": of_type(SUBARRAY, 1000),
    "short": of_type(PLAIN, 3),
    "long": of_type(PLAIN, 1),
    "order": of_type(PLAIN.replace("<", "|"), 2),
    "system": pickle.dumps([Calls(os.system, "touch hit"), np.ones(2)]),
    "eval": pickle.dumps([Calls(eval, "open('hit', 'w')"), np.ones(2)]),
    "exec": pickle.dumps(Calls(exec, "open('hit', 'w')")),
    "getattr": pickle.dumps(Calls(getattr, "x", "upper")),
    "old": global_call("posix", "system", "touch hit"),
    "dotted": b"\x80\x04\x8c\x05numpy\x8c\x0bndarray.ctp\x93.",
    "attribute": b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__base__\x93.",
    "memo": b"cposix\nsystem\np0\n0(Vtouch hit\np1\n0g0\n(g1\ntR.",
    "instance": b"(Vtouch hit\niposix\nsystem\n.",
    "object": b"(cposix\nsystem\nVtouch hit\no.",
    "extension": b"\x80\x02\x82\x01.",
    "persistent": b"Vx\nQ.",
    "memo hole": b"\x80\x04h\x63.",
    "memo far": b"\x80\x04N" + b"r\xff\xff\xff\x7f" + b".",
    "codec": b"c_codecs\nencode\n(Vaaaa\nVrot13\ntR.",
    "codec import": b"c_codecs\nencode\n(Vaaaa\nVantigravity\ntR.",
    "huge ndarray": pickle.dumps([Calls(np.ndarray, (HUGE,))] * 2),
    "huge reconstruct": pickle.dumps([reconstruct(np.ndarray, (HUGE,), b"d")] * 2),
    "huge list": pickle.dumps([nested(9), nested(9)]),
    "huge dtype": pickle.dumps([Calls(np.dtype, f"({HUGE},)f8")] * 2),
    "object dtype": pickle.dumps([np.array([None, {}], object)] * 2),
    "huge string": b"\x80\x04\x8e" + HUGE.to_bytes(8, "little") + b".",
    "frame": b"\x80\x04\x95" + HUGE.to_bytes(8, "little") + b".",
    "deep": b"(" * 100_000 + b".",
    "deep list": b"]" * 100_000 + b"a" * 99_999 + b".",
    "one": pickle.dumps([np.ones(2)]),
    "lengths": pickle.dumps([np.ones(2), np.ones(3)]),
    "matrix": pickle.dumps([np.ones((2, 2)), np.ones((2, 2))]),
    "nan": pickle.dumps([np.array([np.nan]), np.ones(1)]),
    "negative": pickle.dumps([np.ones(1), -np.ones(1)]),
    "numbers": pickle.dumps([1.0, 2.0]),
    "words": pickle.dumps(["a", "b"]),
    "empty": b"",
    "text": b"mean,var\n0,1\n",
}


@pytest.mark.parametrize("name", STATS)
def test_stats(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("stats.p").write_bytes(STATS[name])
    with pytest.raises(BadRequest, match=r"^stats=stats\.p: "):
        read_stats(Path("stats.p"))
    assert os.listdir() == ["stats.p"]


@pytest.mark.parametrize("protocol", range(5))
@pytest.mark.parametrize("dtype", ["<f4", ">f8", "<f8", "<i8"])
def test_honest_stats(protocol: int, dtype: str, tmp_path: Path) -> None:
    arrays = [np.arange(3).astype(dtype), np.arange(1, 4).astype(dtype)]
    (tmp_path / "s.p").write_bytes(pickle.dumps(arrays, protocol))
    for got, want in zip(read_stats(tmp_path / "s.p"), arrays, strict=True):
        assert got.dtype == np.float64
        assert (got == want).all()


def test_types_by_their_state(tmp_path: Path) -> None:
    """The ordinary form of the dtypes that are refused above can be read."""
    (tmp_path / "s.p").write_bytes(of_type(PLAIN, 2))
    assert [a.tolist() for a in read_stats(tmp_path / "s.p")] == [[0.0, 0.0]] * 2


def state(**changes: Any) -> dict[str, Any]:
    honest = {
        "encoder.mean": torch.zeros(1, 2, 3),
        "encoder.std": torch.ones(1, 2, 3),
        "snn.hidden_layers.0.weight": torch.zeros(4, 6),
        "snn.hidden_layers.0.bias": torch.zeros(4),
        "snn.out_pop_layer.weight": torch.zeros(3, 4),
        "snn.out_pop_layer.bias": torch.zeros(3),
        "decoder.decoder.weight": torch.zeros(1, 1, 3),
        "decoder.decoder.bias": torch.zeros(1),
    }
    return honest | {name.replace("__", "."): value for name, value in changes.items()}


WEIGHTS = {
    "system": Calls(os.system, "touch hit"),
    "inside": state(encoder__mean=Calls(os.system, "touch hit")),
    "module": torch.nn.Linear(2, 2),
    "list": [torch.zeros(2)],
    "numbers": {"encoder.mean": 1.0},
    "foreign": {"weight": torch.zeros(2, 2)},
    "nan": state(encoder__mean=torch.full((1, 2, 3), torch.nan)),
    "whole": state(encoder__mean=torch.zeros(1, 2, 3).bool()),
    "shape": state(encoder__std=torch.ones(1, 2, 4)),
    "rank": state(encoder__mean=torch.ones(2, 3)),
    "extra": state(more=torch.ones(1)),
    "huge": state(encoder__mean=torch.zeros(1).expand(1, 2, HUGE)),
    "sparse": state(encoder__mean=torch.zeros(1, 2, 3).to_sparse()),
    "nothing there": state(encoder__mean=torch.zeros(1, 2, 3, device="meta")),
}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("zipped", [True, False])
def test_weights(name: str, zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(WEIGHTS[name], "m.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(BadRequest, match=r"^popsan=m\.pt: "):
        recognise(read_weights(Path("m.pt")), Path("m.pt"))
    assert os.listdir() == ["m.pt"]


def test_weights_with_an_archive_behind(tmp_path: Path) -> None:
    """Refused: by the first bytes torch would read the weights before the archive."""
    path = tmp_path / "m.pt"
    torch.save(state(), path, _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("data.pkl", pickle.dumps({}))
    with pytest.raises(BadRequest, match="an archive at one end only"):
        read_weights(path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", bytes(range(250)), b"\x80\x02."])
def test_no_weights(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.pt").write_bytes(content)
    with pytest.raises(BadRequest):
        read_weights(tmp_path / "m.pt")


def test_damaged_weights(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save(state(), path)
    whole = path.read_bytes()
    assert recognise(read_weights(path), path).hidden == [4]
    for cut in range(0, len(whole) - 1, len(whole) // 23):
        path.write_bytes(whole[:cut])
        with pytest.raises(BadRequest):
            recognise(read_weights(path), path)
