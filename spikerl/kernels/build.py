"""Builds, loads and describes the C++ kernels: `spikerl/kernels/csrc` behind a C interface.

The compiler runs once for each state of the sources, compiler and instruction set; the library is
kept in the user's cache folder under a name made of all three.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from spikerl.errors import first_line
from spikerl.files import lock_file

SOURCES = Path(__file__).resolve().parent / "csrc"
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fPIC", "-fopenmp")
AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "fma", "popcnt")
# The compiler flags and the required processor flags of each path; the best path comes first.
PATHS = {
    "amx": (
        tuple(f"-m{x}" for x in (*AVX512, "avx512bf16", "amx-tile", "amx-bf16")),
        {*AVX512, "avx512_bf16", "amx_tile", "amx_bf16"},
    ),
    "avx512": (tuple(f"-m{x}" for x in AVX512), set(AVX512)),
    "avx2": (("-mavx2", "-mfma", "-mpopcnt"), {"avx2", "fma", "popcnt"}),
    "portable": ((), set[str]()),
}
LIMIT_S = 300.0  # time limit for a compiler call
Pointer = ctypes.c_void_p
Count = ctypes.c_int64


class Unbuilt(Exception):
    """The kernels cannot be built or loaded here; the message gives the reason in one line."""


class Neurons(ctypes.Structure):
    """Mirrors `struct Neurons` of the C++ sources."""

    _fields_ = [
        *((n, ctypes.c_int32) for n in ("equation", "surrogate")),
        *((n, ctypes.c_float) for n in ("current_decay", "voltage_decay", "threshold")),
        *((n, ctypes.c_float) for n in ("scale", "start", "adaptation", "adaptation_decay")),
        *((n, ctypes.c_float) for n in ("theta_v", "theta_u", "theta_r", "theta_s")),
    ]


class Net(ctypes.Structure):
    """Mirrors `struct Net` of the C++ sources."""

    _fields_ = [
        *((n, ctypes.c_int32) for n in ("obs_dim", "pop_size", "act_dim", "out_pop_size")),
        *((n, ctypes.c_int32) for n in ("spike_steps", "layers")),
        ("encoder_threshold", ctypes.c_float),
        ("neurons", Neurons),
        *((n, Pointer) for n in ("decay_logits", "widths", "mean", "std", "weights", "biases")),
        *((n, Pointer) for n in ("out_weight", "out_bias")),
        *((n, ctypes.c_int32) for n in ("analog", "squashes", "exit_steps")),
        ("exit_threshold", ctypes.c_float),
    ]


class Units(ctypes.Structure):
    """Mirrors `struct Units` of the C++ sources."""

    _fields_ = [(n, Pointer) for n in ("low", "half_range", "min", "max")]


class Critic(ctypes.Structure):
    """Mirrors `struct Critic` of the C++ sources."""

    _fields_ = [
        *((n, ctypes.c_int32) for n in ("networks", "layers", "obs_dim", "act_dim")),
        *((n, Pointer) for n in ("widths", "weights", "biases")),
        ("planes", ctypes.c_int32),
    ]


@cache
def supported_paths() -> list[str]:
    """The paths that this processor can run, best first."""
    runs = [path for path, (_, needed) in PATHS.items() if needed <= _processor_flags()]
    return [path for path in runs if path != "amx" or _may_use_tiles()]


@cache
def library(path: str) -> ctypes.CDLL:
    """The kernels for one path, built if necessary. Raises Unbuilt."""
    if path == "amx" and not _may_use_tiles():
        raise Unbuilt("the operating system does not give out AMX tiles")
    compiler = _compiler()
    command = [*compiler, *FLAGS, *PATHS[path][0]]
    source = b"".join(path.read_bytes() for path in _sources(".cpp", ".h"))
    # A home folder may be shared with machines that cannot run the same library.
    made_by = [_output([*compiler, "--version"]), platform.machine(), *platform.libc_ver()]
    if any("native" in word for word in compiler):
        made_by += sorted(_processor_flags())
    digest = hashlib.sha256("\0".join([*command, *made_by]).encode() + source).hexdigest()[:16]
    built = _cache_folder() / f"spiking-{path}-{digest}.so"
    try:
        if not built.exists():
            with _lock(built.with_suffix(".lock")) as alone:
                if not built.exists():
                    if alone:
                        _remove_leftovers(built)
                    _build(command, built)
    except OSError as error:
        why = f"{built.parent} cannot be used: {error.strerror or error}"
        raise Unbuilt(f"{why}; name another with SPIKERL_CACHE=FOLDER") from None
    try:
        lib = ctypes.CDLL(str(built))
    except OSError as error:
        raise Unbuilt(f"{built} cannot be loaded: {error}") from None
    _declare(lib)
    return lib


def first_built(paths: Sequence[str]) -> tuple[str | None, str]:
    """The first path that can be built here, or None; why the best could not be built, or ""."""
    why = ""
    for path in paths:
        try:
            library(path)
        except Unbuilt as error:
            why = why or str(error)
        else:
            return path, why
    return None, why


def _declare(lib: ctypes.CDLL) -> None:
    net, threads, p = ctypes.POINTER(Net), ctypes.c_int, Pointer
    lib.spikerl_saved_bytes.argtypes = [net, Count]
    lib.spikerl_saved_bytes.restype = Count
    lib.spikerl_forward.argtypes = [net, Count, p, p, p, p, ctypes.c_bool, threads]
    lib.spikerl_backward.argtypes = [net, Count, p, threads, p, p, p, p, p, threads]
    lib.spikerl_count_spikes.argtypes = [net, Count, p, p]
    lib.spikerl_drive_saved_bytes.argtypes = [net, Count]
    lib.spikerl_drive_saved_bytes.restype = Count
    lib.spikerl_drive.argtypes = [net, Count, p, p, p, p, p, threads]
    lib.spikerl_drive_back.argtypes = [net, Count, p, threads, p, p, p, p, threads]
    neurons = ctypes.POINTER(Neurons)
    lib.spikerl_scan.argtypes = [neurons, threads, Count, p, p, p, threads]
    lib.spikerl_scan_back.argtypes = [neurons, threads, Count, p, p, p, threads]
    lib.spikerl_scan_back.restype = ctypes.c_float
    lib.spikerl_connected_scan.argtypes = [neurons, threads, *[Count] * 3, *[p] * 5]
    lib.spikerl_connected_scan_back.argtypes = [neurons, threads, *[Count] * 3, *[p] * 7]
    lib.spikerl_connected_scan_back.restype = ctypes.c_float
    lib.spikerl_row_sums.argtypes = [Count, Count, p, p]
    lib.spikerl_row_affine.argtypes = [Count, Count, *[p] * 5]
    lib.spikerl_row_normalise.argtypes = [Count, Count, *[p] * 7]
    lib.spikerl_row_gradient_sums.argtypes = [Count, Count, p, p, p]
    lib.spikerl_row_gradient.argtypes = [Count, Count, *[p] * 5]
    lib.spikerl_act.argtypes = [net, ctypes.POINTER(Units), p, p, ctypes.c_float, p]
    critic, real = ctypes.POINTER(Critic), ctypes.c_float
    lib.spikerl_values.argtypes = [critic, Count, p, p, p, threads]
    lib.spikerl_td_target.argtypes = [critic, Count, *[p] * 7, threads]
    lib.spikerl_squashed.argtypes = [Count, Count, p, p, p, real, real, p, p, p]
    lib.spikerl_squashed_backward.argtypes = [Count, Count, *[p] * 5, real, real, p, p]
    lib.spikerl_add_clipped_noise.argtypes = [Count, p, p, real, real]
    lib.spikerl_critic_backward.argtypes = [critic, Count, p, p, p, real, p, p, p, threads]
    lib.spikerl_actor_loss_grad.argtypes = [critic, Count, p, p, real, p, threads]
    lib.spikerl_actor_loss_grad.restype = real
    lib.spikerl_dense_saved_bytes.argtypes = [critic, Count]
    lib.spikerl_dense_saved_bytes.restype = Count
    lib.spikerl_dense_forward.argtypes = [critic, Count, p, p, p, ctypes.c_bool, threads]
    lib.spikerl_dense_backward.argtypes = [critic, Count, p, p, p, p, p, threads]
    lib.spikerl_mse_backward.argtypes = [critic, Count, p, p, real, p, p, threads]
    lib.spikerl_adam.argtypes = [Count, p, p, p, p, p, real, real, p]
    lib.spikerl_adam.restype = None
    lib.spikerl_polyak.argtypes = [Count, p, p, real, p]
    lib.spikerl_polyak.restype = None
    lib.spikerl_shm_bytes.argtypes = [threads, Count]
    lib.spikerl_shm_bytes.restype = Count
    lib.spikerl_shm_write.argtypes = [p, threads, threads, Count, ctypes.c_uint32, p]
    lib.spikerl_shm_write.restype = None
    lib.spikerl_shm_sum.argtypes = [p, threads, threads, Count, ctypes.c_uint32, p, ctypes.c_bool]
    lib.spikerl_shm_sum.restype = ctypes.c_int
    for name in (
        "forward", "backward", "drive", "drive_back", "scan", "values", "td_target",
        "add_clipped_noise", "critic_backward", "dense_forward", "dense_backward", "mse_backward",
        "count_spikes", "squashed", "squashed_backward", "connected_scan", "row_sums", "row_affine",
        "row_normalise", "row_gradient_sums", "row_gradient",
    ):  # fmt: skip
        getattr(lib, f"spikerl_{name}").restype = None
    lib.spikerl_act.restype = ctypes.c_bool


def _build(command: list[str], built: Path) -> None:
    """Compile the sources in parallel, then link them."""
    beside = tempfile.TemporaryDirectory(dir=built.parent, prefix=f"{built.stem}-")
    with beside as folder, ThreadPoolExecutor() as pool:
        sources = _sources(".cpp")
        objects = [str(Path(folder) / f"{source.stem}.o") for source in sources]
        target = Path(folder) / "out.so"

        def compiled(source: Path, to: str) -> None:
            _succeed([*command, "-c", str(source), "-o", to])

        list(pool.map(compiled, sources, objects))
        _succeed([*command, "-shared", *objects, "-o", str(target)])
        with target.open("rb") as file:  # else a power cut could leave an empty library
            os.fsync(file.fileno())
        target.replace(built)


def _remove_leftovers(built: Path) -> None:
    """Remove the temporary folders of builds that were killed."""
    for folder in built.parent.glob(f"{built.stem}-*"):
        shutil.rmtree(folder, ignore_errors=True)


def _sources(*kinds: str) -> list[Path]:
    """Source files with these suffixes; excludes backup files of editors."""
    return sorted(p for p in SOURCES.iterdir() if p.suffix in kinds and p.is_file())


def _succeed(command: list[str]) -> None:
    done = _run(command)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        line = next((s for s in said if "error" in s), said[0])  # messages may be translated
        raise Unbuilt(f"{shlex.join(command[:1])} failed: {line.strip()}")


def _compiler() -> list[str]:
    said = os.environ.get("CXX", "")
    try:
        named = shlex.split(said)
    except ValueError as error:  # an unclosed quotation
        raise Unbuilt(f"CXX={said}: {first_line(error).lower()}") from None
    for candidate in [named] if named else [["g++"], ["clang++"], ["c++"]]:
        if shutil.which(candidate[0]):
            return candidate
    wanted = named[0] if named else "g++, clang++ or c++"
    raise Unbuilt(f"no C++ compiler ({wanted})")


def _cache_folder() -> Path:
    """The cache folder, which only this user may write to, since code is loaded from it."""
    root = os.environ.get("SPIKERL_CACHE") or os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(root).absolute() if root else Path.home() / ".cache"
        folder = folder / "spikerl"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home folder
        raise Unbuilt(f"no cache folder ({error}); name one with SPIKERL_CACHE=FOLDER") from None
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        why = "can be written to by others; name another with SPIKERL_CACHE=FOLDER"
        raise Unbuilt(f"{folder} {why}")
    return folder


@contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Wait for the lock; yields whether it is held. A file system without locks may see several
    builds at once, of which the last one's library stays.
    """
    with path.open("w") as file, path.open("w") as other:
        lock_file(file, wait=True)
        yield not lock_file(other)


def _processor_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    lines = (line.partition(":") for line in text.splitlines())
    words = ("flags", "Features")  # on x86-64, on Arm
    return next((set(value.split()) for key, _, value in lines if key.strip() in words), set())


def _may_use_tiles() -> bool:
    """Ask for the AMX tile registers, which Linux gives a process only on request."""
    arch_prctl, request, tiles = 158, 0x1023, 18  # x86-64's numbers
    try:
        return bool(ctypes.CDLL(None).syscall(arch_prctl, request, tiles) == 0)
    except (AttributeError, OSError):
        return False


def _output(command: list[str]) -> str:
    return _run(command).stdout


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=LIMIT_S
        )
    except subprocess.TimeoutExpired:
        why = f"took more than {LIMIT_S:g} s; try again on a less busy machine"
        raise Unbuilt(f"{command[0]} {why}") from None
    except OSError as error:
        raise Unbuilt(f"{command[0]} cannot be run: {error}") from None
