"""Hostile bytes, plain data, tensors and pickles, each a function of a random.Random alone."""

from __future__ import annotations

import json
import pickle
import struct
from random import Random
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

INTERESTING = (0, 1, -1, 127, 128, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63)
TEXTS = (
    "", "x", "../../x", "/etc/passwd", "/dev/zero", "a/b", "${oc.env:HOME}", "${seed}", "os:X-v0",
    "fuzz_foreign:X-v0", "\x1b[2J", "a\nb", "\0", "null", "1e400", "9" * 5000, "auto", "cpu",
    "popsan", "mlp", "td3", "Ant-v5", "Pendulum-v1", "é" * 9, "'", '"', "\\", "_target_", "x" * 300,
)  # fmt: skip
NUMBERS = (
    -1, 0, 1, 2, 3, 10**6, 2**31, 2**53, 2**63, 2**64, 10**30, -(10**30), 10**400, 0.5, -0.0,
    1e-300, 1e300, float("inf"), float("-inf"), float("nan"),
)  # fmt: skip


def mutated(chance: Random, data: bytes) -> bytes:
    """A copy of `data` with one to four random damages."""
    out = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        at = chance.randrange(len(out) + 1)
        size = chance.choice((1, 1, 2, 4, 8, 64))
        kind = chance.randrange(8)
        if kind == 0 and out:
            out[at % len(out)] ^= 1 << chance.randrange(8)
        elif kind == 1:
            out[at : at + size] = chance.randbytes(size)
        elif kind == 2:
            del out[at : at + size]
        elif kind == 3:
            out[at:at] = out[chance.randrange(len(out) + 1) :][:size]
        elif kind == 4:
            del out[at:]
        elif kind == 5:
            number = chance.choice(INTERESTING)
            width = chance.choice((1, 2, 4, 8))
            out[at : at + width] = (number % (1 << 8 * width)).to_bytes(width, "little")
        elif kind == 6:
            out[at:at] = chance.choice((b"[", b"{", b"(", b"]", b'"', b"\0", b"9")) * (size * size)
        else:
            out[at : at + size] = chance.choice(TEXTS).encode()
    return bytes(out)


def value(chance: Random, depth: int = 0) -> Any:
    """Random plain data, to be put where it does not belong."""
    kind = chance.randrange(10)
    if kind < 4:
        return chance.choice(NUMBERS)
    if kind < 7:
        return chance.choice(TEXTS)
    if kind == 7:
        return chance.choice((None, True, False, [], {}))
    if depth > 3:
        return None
    if kind == 8:
        return [value(chance, depth + 1) for _ in range(chance.choice((1, 2, 3, 300 >> 3 * depth)))]
    if chance.random() < 0.3:
        nested: Any = 1
        for _ in range(chance.choice((5, 60, 200))):
            nested = [nested]
        return nested
    return {chance.choice(("name", "_target_", "x", "id")): value(chance, depth + 1)}


def places(data: Any) -> list[tuple[Any, Any]]:
    """Every container with every key or index in it."""
    own: list[tuple[Any, Any]]
    if isinstance(data, dict):
        own = [(data, key) for key in data]
    elif isinstance(data, list):
        own = [(data, i) for i in range(len(data))]
    else:
        return []
    return own + [place for holder, key in own for place in places(holder[key])]


def twisted(chance: Random, data: Any) -> Any:
    """A copy of `data` with one to three entries removed, replaced or added."""
    data = json.loads(json.dumps(data))
    for _ in range(chance.choice((1, 1, 2, 3))):
        found = places(data)
        if not found:
            return value(chance)
        holder, key = chance.choice(found)
        kind = chance.randrange(8)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[chance.choice(TEXTS)] = value(chance)
        elif kind == 2:
            other, from_ = chance.choice(found)
            if from_ in other if isinstance(other, dict) else from_ < len(other):
                holder[key] = json.loads(json.dumps(other[from_]))
        elif kind == 3 and isinstance(holder[key], list):
            holder[key] = holder[key] * chance.choice((2, 50))
        elif kind == 4 and type(holder[key]) in (int, float):
            holder[key] = holder[key] * chance.choice((-1, 2, 1000)) + chance.choice((-1, 0, 1))
        else:
            holder[key] = value(chance)
    return data


def json_text(chance: Random, data: Any) -> bytes:
    return damaged(chance, json.dumps(twisted(chance, data)).encode())


def damaged(chance: Random, data: bytes) -> bytes:
    return mutated(chance, data) if chance.random() < 0.2 else data


def tensors_file(chance: Random, tensors: dict[str, Tensor]) -> bytes:
    """A safetensors file with damaged bytes, a wrong header, or wrong tensors."""
    kind = chance.randrange(3)
    if kind == 0:
        return mutated(chance, save(tensors))
    if kind == 1:
        return header_twisted(chance, save(tensors))
    odd = dict(tensors)
    for _ in range(chance.choice((1, 1, 2))):
        name = chance.choice(sorted(odd))
        odd[name] = odd_tensor(chance, odd[name])
        if chance.random() < 0.2:
            del odd[name]
        if chance.random() < 0.2 or not odd:
            odd[chance.choice(("actor.x", "norm.x", "x", name + "x"))] = torch.zeros(2)
    return save({name: t.contiguous().clone() for name, t in odd.items()})


def odd_tensor(chance: Random, t: Tensor) -> Tensor:
    kind = chance.randrange(8)
    if kind == 0:
        return t.to(chance.choice((torch.float64, torch.float16, torch.int64, torch.bool)))
    if kind == 1:
        return t.to(torch.float32).to(torch.float8_e4m3fn)
    if kind == 2:
        return t.flatten()
    if kind == 3:
        return t.unsqueeze(0).expand(2, *t.shape)
    if kind == 4:
        return t[..., :-1] if t.dim() else t
    t = t.clone()
    if t.numel():
        extremes = (float("nan"), float("inf"), -1.0, 0.0, 3e38, -1e-40)
        bad = chance.choice(extremes if t.is_floating_point() else (0, 1, 127))
        t.view(-1)[chance.randrange(t.numel()) if kind < 7 else slice(None)] = bad
    return t


def header_twisted(chance: Random, data: bytes) -> bytes:
    (size,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    for _ in range(chance.choice((1, 2))):
        entry = header[chance.choice(sorted(header))]
        kind = chance.randrange(5)
        if kind == 0:
            entry["dtype"] = chance.choice(("F64", "F32", "F16", "BF16", "BOOL", "I64", "F8_E4M3",
                                            "F4", "C64", "X", 3))  # fmt: skip
        elif kind == 1:
            entry["shape"] = [
                chance.choice((*INTERESTING, 2, 3)) for _ in range(chance.randrange(4))
            ]
        elif kind == 2:
            entry["data_offsets"] = [chance.choice((*INTERESTING, len(body))) for _ in range(2)]
        elif kind == 3:
            header[chance.choice(TEXTS)] = json.loads(json.dumps(entry))
        else:
            header = twisted(chance, header)
            if not isinstance(header, dict) or not all(
                isinstance(e, dict) for e in header.values()
            ):
                break
            if not header:
                break
    text = json.dumps(header).encode()
    length = chance.choice((len(text),) * 6 + (0, 1, 2**63, 2**64 - 1, 100_000_001))
    return damaged(chance, struct.pack("<Q", length) + text + body)


NAMES = (
    ("os", "system"), ("posix", "system"), ("builtins", "eval"), ("builtins", "exec"),
    ("builtins", "getattr"), ("builtins", "open"), ("__builtin__", "eval"), ("io", "open"),
    ("subprocess", "Popen"), ("fuzz_foreign", "run"), ("antigravity", "x"),
    ("copyreg", "add_extension"), ("copyreg", "_reconstructor"), ("functools", "partial"),
    ("importlib", "import_module"),
    ("numpy", "ndarray"), ("numpy", "dtype"), ("numpy", "load"), ("numpy", "memmap"),
    ("numpy", "ndarray.tofile"), ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "scalar"),
    ("_codecs", "encode"), ("collections", "OrderedDict"), ("torch._utils", "_rebuild_tensor_v2"),
    ("torch", "FloatStorage"), ("torch", "load"), ("torch.nn", "Linear"),
    ("torch.storage", "_load_from_bytes"), ("torch._utils", "_rebuild_parameter"),
    ("torch.serialization", "_get_layout"),
)  # fmt: skip
ARGUMENTS = (
    "touch hit",
    "open('hit','w')",
    "hit",
    "w",
    "latin1",
    "rot13",
    "f8",
    "<",
    "storage",
    "cpu",
    "0",
)


def pickle_of(chance: Random) -> bytes:
    """A pickle of random opcodes, which put objects on the stack and call them."""
    out = [b"\x80" + bytes([chance.choice((0, 2, 4, 4, 5, 99))])]
    for _ in range(chance.choice((3, 8, 20, 60))):
        out.append(opcode(chance))
    return b"".join(out) + b"." * (chance.random() < 0.95)


def opcode(chance: Random) -> bytes:
    module, name = (text.encode() for text in chance.choice(NAMES))
    text = chance.choice(ARGUMENTS).encode()
    size = chance.choice((0, 1, 2**16, 2**31 - 1, 2**31, 2**62))
    four, eight = (size % 2**32).to_bytes(4, "little"), size.to_bytes(8, "little")

    def short(word: bytes) -> bytes:
        return b"\x8c" + bytes([len(word)]) + word

    return chance.choice((
        b"c" + module + b"\n" + name + b"\n",  # GLOBAL
        short(module) + short(name) + b"\x93",  # STACK_GLOBAL
        b"c" + module + b"\n" + name + b"\n(" + short(text) + b"tR",  # a call
        short(module) + short(name) + b"\x93" + short(text) + b"\x85R",
        b"(" + short(text) + b"i" + module + b"\n" + name + b"\n",  # INST
        b"(c" + module + b"\n" + name + b"\n" + short(text) + b"o",  # OBJ
        b"c" + module + b"\n" + name + b"\n)\x81",  # NEWOBJ
        b"c" + module + b"\n" + name + b"\n)}\x92",  # NEWOBJ_EX
        b"R", b"b", b"\x81", b"}b", b")R", b"(", b"t", b"l", b"d", b"0", b"2", b"1", b"a", b"e",
        b"s", b"u", b"]", b"}", b")", b"\x85", b"\x86", b"\x87", b"\x8f", b"\x90", b"\x91",
        short(text), b"V" + text + b"\n", b"S'" + text + b"'\n", b"N", b"\x88", b"\x89",
        b"K\x05", b"M\x05\x05", b"J" + four, b"I" + str(size).encode() + b"\n", b"L5L\n",
        b"G" + chance.randbytes(8), b"F1e400\n", b"\x8a\x04" + four, b"\x8b" + four,
        b"B" + four, b"\x8e" + eight, b"X" + four, b"\x8d" + eight, b"\x95" + eight,
        b"\x96" + eight, b"C\x04" + four, b"q\x01", b"r" + four, b"p5\n", b"\x94", b"h\x01",
        b"j" + four, b"g5\n",
        b"Q", b"Px\n", b"\x82\x01", b"\x83\x01\x00", b"\x84" + four, b"\x97", b"\x98",
    ))  # fmt: skip


def pickled(chance: Random, honest: Any) -> bytes:
    """A pickle of `honest` that is damaged, one of other data, or one of random opcodes."""
    kind = chance.randrange(4)
    if kind == 0:
        return pickle_of(chance)
    protocol = chance.randrange(6)
    if kind == 1:
        return mutated(chance, pickle.dumps(honest, protocol))
    if kind == 2:
        whole = pickle.dumps(honest, protocol)
        at = chance.randrange(len(whole))
        return (
            whole[:at] + b"".join(opcode(chance) for _ in range(chance.choice((1, 3)))) + whole[at:]
        )
    return pickle.dumps(
        [value(chance), honest[0], value(chance)][: chance.choice((1, 2, 3))], protocol
    )
