"""The Triton kernels: run by Triton's interpreter on a CPU, and compiled where there is a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from spikerl import kernels
from spikerl.errors import BadRequest
from spikerl.kernels import reference
from spikerl.kernels.gradient import Moments

HERE = Path(__file__).parent
CHECKS = HERE / "triton_interpreted.py"
needs_triton = pytest.mark.skipif(not find_spec("triton"), reason="triton is not installed")


def run_checks(*args: str, **environ: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *args, str(CHECKS)],
        env={**os.environ, **environ}, capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    assert "22 passed" in done.stdout


@needs_triton
def test_under_the_interpreter() -> None:
    run_checks(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")
@needs_triton
def test_compiled() -> None:
    run_checks("-m", "gpu")


@needs_triton
@pytest.mark.parametrize("entries", [1, 4096, 5001, 140_037, 140_549, 524_288])
def test_adam_in_pieces(entries: int) -> None:
    """It equals the reference to the bit."""
    from spikerl.kernels import triton

    def moments() -> Moments:
        zeros = torch.zeros(entries)
        return Moments(torch.linspace(-1, 1, entries), torch.zeros(()), zeros, zeros.clone())

    whole, pieces, masked = moments(), moments(), torch.zeros(())
    for seed in range(3):
        gradient = torch.randn(entries + 1, generator=torch.Generator().manual_seed(seed))
        reference.adam(whole, gradient.clone(), 1e-3, 0.5, masked)
        triton.adam(pieces, gradient.clone(), 1e-3, 0.5, masked)
    assert all(torch.equal(a, b) for a, b in zip(whole, pieces, strict=True))
    assert not torch.equal(whole.weights, moments().weights)


@needs_triton
@pytest.mark.parametrize("entries", [1, 147_456, 147_457, 33_000_000])
def test_a_launch_of_adam_takes_all_pieces(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from spikerl.kernels import triton

    seen: list[int] = []
    monkeypatch.setattr(reference, "adam", lambda *args: seen.append(args[5]))
    flat = torch.empty(entries + 1, device="meta")
    triton.adam(Moments(flat, flat, flat, flat), flat, 1e-3, 1.0, flat)
    assert -(-entries // seen[0]) <= 36
    assert seen[0] % 16 == 0  # so that each piece has whole vectors, even of the widest kind


def asked(name: str) -> kernels.KernelConfig:
    return kernels.KernelConfig(name=name, path=None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_without_a_gpu() -> None:
    with pytest.raises(BadRequest, match="kernel=triton: this run uses cpu; it needs a CUDA"):
        kernels.resolve(asked("triton"), "cpu")


@needs_triton
@pytest.mark.parametrize(
    ("name", "path", "no_graphs", "chosen"),
    [
        ("auto", None, None, ("triton/graphs", "a CUDA device")),
        ("auto", None, "algo=ppo", ("triton", "a CUDA device; no graphs with algo=ppo")),
        ("triton", None, None, ("triton", "requested")),
        ("triton", "graphs", None, ("triton/graphs", "requested")),
    ],
)
def test_graphs_are_chosen_by_auto_alone(
    name: str, path: str | None, no_graphs: str | None, chosen: tuple[str, str]
) -> None:
    config = kernels.KernelConfig(name=name, path=path)
    assert kernels.resolve(config, "cuda:0", no_graphs=no_graphs) == chosen


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "spikerl.kernels.triton", raising=False)
    monkeypatch.delattr(kernels, "triton", raising=False)  # if a test has imported it
    said = kernels.resolve(asked("auto"), "cuda:0")
    assert said == ("reference", "triton is not installed")
    with pytest.raises(BadRequest, match="kernel=triton: triton is not installed; use kernel=auto"):
        kernels.resolve(asked("triton"), "cuda:0")


def test_a_cpu_run_does_not_import_it() -> None:
    code = "import sys, spikerl.config; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
