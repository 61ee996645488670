"""A run on two machines, simulated by network namespaces, and what happens if the link is cut."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import TINY, computed, gone, train

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"),
    reason="network namespaces need root and iproute2",
)
NODES = tuple(f"spikerl-{os.getpid()}-{name}" for name in "ab")
TIMEOUT_S = 8
TWO = ["env=HalfCheetah", "num_envs=2"]
MEETING = ["nnodes=2", "world_size=2", "rdzv=10.77.0.1:29500", f"backend.timeout_s={TIMEOUT_S}"]


def ip(*args: str) -> None:
    done = subprocess.run(["ip", *args], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"ip {' '.join(args)}: {done.stderr.strip()}")


@pytest.fixture
def link() -> Iterator[None]:
    try:
        for name in NODES:
            ip("netns", "add", name)
        first, second = NODES
        ip("link", "add", "wire", "netns", first, "type", "veth", "peer", "wire", "netns", second)
        for number, name in enumerate(NODES, 1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "wire")
            for device in ("lo", "wire"):
                ip("-n", name, "link", "set", device, "up")
        yield
    finally:
        for name in NODES:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def start(home: Path, rank: int, *command: str) -> subprocess.Popen[str]:
    """Run a command on one machine: it sees neither the other's network nor its processes."""
    alone = ["ip", "netns", "exec", NODES[rank], "unshare", "--pid", "--fork", "--kill-child",
             "--mount-proc", sys.executable, "-m"]  # fmt: skip
    home.mkdir(exist_ok=True)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*alone, *command], cwd=home, **pipes)  # type: ignore[call-overload]


def spikerl(home: Path, rank: int, *args: str) -> subprocess.Popen[str]:
    return start(home, rank, "spikerl", "train", *MEETING, f"node_rank={rank}", *args)


def torchrun(home: Path, rank: int, *args: str) -> subprocess.Popen[str]:
    there = ["--nnodes=2", "--nproc_per_node=1", f"--node_rank={rank}",
             "--master_addr=10.77.0.1", "--master_port=29500"]  # fmt: skip
    return start(home, rank, "torch.distributed.run", *there, "-m", "spikerl", "train", *args)


def ended(machine: subprocess.Popen[str], status: int) -> tuple[str, str]:
    out, err = machine.communicate(timeout=60)
    assert machine.returncode == status, out + err
    # Other lines are PyTorch's: it warns that machines in namespaces have no host name.
    return out, "".join(f"{line}\n" for line in err.splitlines() if line.startswith("spikerl:"))


@pytest.mark.usefixtures("link")
@pytest.mark.slow
def test_they_train_together_and_outlive_a_cut(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", *TWO, "world_size=2")
    assert whole.wait() == 0, whole.said()
    home = tmp_path / "home"
    machines = [spikerl(home, rank, *TINY, *TWO, "run_dir=run") for rank in (0, 1)]
    metrics = home / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.stat().st_size):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    ip("-n", NODES[0], "link", "set", "wire", "down")
    begun = time.monotonic()
    for rank, machine in enumerate(machines):
        said = ended(machine, 1)[1]
        assert said.startswith(f"spikerl: worker {rank} of 2: lost the others: Timed out waiting")
        assert said.endswith("(spikerl train resume=run goes on from its last checkpoint)\n")
    assert time.monotonic() - begun < TIMEOUT_S + 30
    ip("-n", NODES[0], "link", "set", "wire", "up")
    machines = [torchrun(home, rank, "resume=run") for rank in (0, 1)]
    out = [ended(machine, 0)[0] for machine in machines]
    assert "gradients are summed over gloo" in out[0]
    assert not out[1]
    assert computed(home / "run") == computed(tmp_path / "whole" / "run")
    gone(home)


@pytest.mark.usefixtures("link")
@pytest.mark.slow
def test_nobody_there(tmp_path: Path) -> None:
    machines = [spikerl(tmp_path, 1, *TINY, *TWO, "backend.timeout_s=2"),
                spikerl(tmp_path, 0, *TINY, *TWO, "rdzv=10.77.0.2:29500")]  # fmt: skip
    for machine, host, why in zip(
        machines,
        ("10.77.0.1", "10.77.0.2"),
        ("nobody answered within 2 s (", "Cannot assign requested address; give an address of"),
        strict=True,
    ):
        out, err = ended(machine, 1)
        line = f"spikerl: rdzv={host}:29500: the 2 machines did not meet there: {why}"
        assert err.startswith(line)
        assert err.count("\n") == 1
        assert not out
    assert not list(tmp_path.iterdir())
