"""What a launcher over machines says to a process, and how this machine reaches the others."""

from __future__ import annotations

import fcntl
import os
import re
import socket
import struct
import subprocess
import time

SIOCGIFADDR = 0x8915  # Linux's request for an interface's address


def adopt() -> None:
    """Take the rank that srun gave this process, if it did, as torchrun would give it."""
    step = os.environ
    if int(step.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return
    if "RANK" not in step:
        # Steps of one job may run side by side; a port below those that systems give out.
        place = 37 * int(step["SLURM_JOB_ID"]) + int(step["SLURM_STEP_ID"])
        step.setdefault("MASTER_ADDR", first_host(step["SLURM_STEP_NODELIST"]))
        step.setdefault("MASTER_PORT", str(20000 + place % 10000))
        step |= {"RANK": step["SLURM_PROCID"], "WORLD_SIZE": step["SLURM_STEP_NUM_TASKS"]}
    if "LOCAL_RANK" not in step:  # an MPI under srun says no more than the rank
        here = tasks_per_node(step["SLURM_STEP_TASKS_PER_NODE"])[int(step["SLURM_NODEID"])]
        step |= {"LOCAL_RANK": step["SLURM_LOCALID"], "LOCAL_WORLD_SIZE": str(here)}


def first_host(nodes: str) -> str:
    """Of a list as Slurm writes it: node[07-12],gpu3."""
    match = re.match(r"([^\[,]+)(?:\[(\d+))?", nodes)
    assert match is not None
    return match[1] + (match[2] or "")


def tasks_per_node(counts: str) -> list[int]:
    """How many each node has, from a list as Slurm writes it: 4(x2),3."""
    counts_and_times = re.findall(r"(\d+)(?:\(x(\d+)\))?", counts)
    return [int(count) for count, times in counts_and_times for _ in range(int(times or 1))]


def workers_here(world_size: int, nnodes: int = 1) -> int:
    """How many of a run's workers are on this machine, as far as their launcher said."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size // nnodes))


def has_own(share: str) -> bool:
    """Whether Slurm gave this process alone the cores, or the GPUs, that it sees."""
    step = os.environ
    if "SLURM_STEP_NUM_TASKS" not in step:
        return False
    if share == "gpus":
        return "SLURM_GPUS_PER_TASK" in step
    return len(os.sched_getaffinity(0)) < int(step["SLURM_CPUS_ON_NODE"])


def interface_to(host: str) -> str | None:
    """The network interface through which this machine reaches `host`; None if it has no IPv4.

    gloo would take the one that the machine's own name leads to, which may be the loopback.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # sends nothing
        except OSError:
            return None
        mine = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe, SIOCGIFADDR, request)
            except OSError:  # it has no address
                continue
            if socket.inet_ntoa(answer[20:24]) == mine:
                return name
    return None


def submitted() -> bool:
    """Whether this process is a job that submitit sent to a cluster."""
    return os.environ.get("SUBMITIT_EXECUTOR") == "slurm"


def requeued() -> bool:
    """Whether this job, told to stop, is back in Slurm's queue; not if it was cancelled."""
    if not submitted():
        return False
    job = os.environ["SLURM_JOB_ID"]
    asked = ["squeue", "--noheader", f"--jobs={job}", "--format=%T"]
    state = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    return state == "RUNNING" and subprocess.run(["scontrol", "requeue", job]).returncode == 0


def cannot_listen(host: str, port: int) -> str | None:
    """Why the first machine cannot be met at `host`:`port`, if so."""
    try:
        family, *_, address = socket.getaddrinfo(host, port)[0]
        with socket.socket(family) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except OSError as error:
        return f"{error.strerror}; give an address of machine 0 and a free port there"
    return None


def cannot_reach(host: str, port: int, within_s: float) -> str | None:
    """Why nobody was met at `host`:`port`, if so."""
    deadline = time.monotonic() + within_s
    while True:
        try:
            socket.create_connection((host, port), max(deadline - time.monotonic(), 0.1)).close()
            return None
        except OSError as error:
            if time.monotonic() >= deadline:
                return f"nobody answered within {within_s:g} s ({error.strerror or error})"
            time.sleep(0.1)
