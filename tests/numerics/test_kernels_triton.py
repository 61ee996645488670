"""The GPU's neurons: under Triton's interpreter here, as compiled where there is a GPU."""

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

HERE = Path(__file__).parent
CHECKS = HERE / "triton_interpreted.py"
needs_triton = pytest.mark.skipif(not find_spec("triton"), reason="triton is not installed")


def run_checks(**environ: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CHECKS)],
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
    run_checks()


def asked(name: str) -> kernels.KernelConfig:
    return kernels.KernelConfig(name=name, path=None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_without_a_gpu() -> None:
    with pytest.raises(BadRequest, match="kernel=triton: this run uses cpu; it needs a CUDA"):
        kernels.resolve(asked("triton"), "cpu")


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "spikerl.kernels.triton", raising=False)
    monkeypatch.delattr(kernels, "triton", raising=False)  # where something has imported it before
    said = kernels.resolve(asked("auto"), "cuda:0")
    assert said == ("reference", "triton is not installed")
    with pytest.raises(BadRequest, match="kernel=triton: triton is not installed; use kernel=auto"):
        kernels.resolve(asked("triton"), "cuda:0")


def test_a_cpu_run_does_not_import_it() -> None:
    code = "import sys, spikerl.config; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
