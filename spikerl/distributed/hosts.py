"""One machine among others: which of its resources a process has, and how others are reached."""

from __future__ import annotations

import fcntl
import os
import re
import socket
import struct
import subprocess
import time

SIOCGIFADDR = 0x8915  # Linux's request for an interface's address


def workers_here(world_size: int, nnodes: int = 1) -> int:
    """Number of a run's workers on this machine, as the launcher said or evenly distributed."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size // nnodes))


def has_own(share: str) -> bool:
    """Whether Slurm gave the cores, or the GPUs, that this process sees to it alone."""
    step = os.environ
    tasks = step.get("SLURM_STEP_NUM_TASKS", "1")
    # Workers that are not tasks themselves, as with torchrun in a task, share their task's.
    if tasks == "1" or step.get("WORLD_SIZE", tasks) != tasks:
        return False
    if share == "gpus":
        return "SLURM_GPUS_PER_TASK" in step
    cores = re.match(r"\d+", step.get("SLURM_CPUS_ON_NODE", ""))
    return cores is not None and len(os.sched_getaffinity(0)) < int(cores[0])


def interface_to(host: str) -> str | None:
    """The network interface through which this machine reaches `host`; None if it has no IPv4.

    gloo would take the interface of the machine's own name, which may be the loopback.
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
            except OSError:  # the interface has no address
                continue
            if socket.inet_ntoa(answer[20:24]) == mine:
                return name
    return None


def submitted() -> bool:
    """Whether this process is a job that submitit sent to a cluster."""
    return os.environ.get("SUBMITIT_EXECUTOR") == "slurm" and "SLURM_JOB_ID" in os.environ


def requeued() -> bool:
    """Put this job, which was told to stop, back into Slurm's queue, unless it was cancelled.

    Returns whether that was done.
    """
    if not submitted():
        return False
    job = os.environ["SLURM_JOB_ID"]
    asked = ["squeue", "--noheader", f"--jobs={job}", "--format=%T"]
    state = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    return state == "RUNNING" and subprocess.run(["scontrol", "requeue", job]).returncode == 0


def is_endpoint(text: str) -> bool:
    """Whether `text` is a valid HOST:PORT."""
    host, _, port = text.rpartition(":")
    try:
        host.encode("idna")
    except UnicodeError:
        return False
    return bool(re.fullmatch(r"\S+:\d{1,5}", text)) and 1 <= int(port) <= 65535


def cannot_listen(host: str, port: int) -> str | None:
    """Why this machine, the first, cannot listen at `host`:`port`; None if it can."""
    try:
        family, *_, address = socket.getaddrinfo(host, port)[0]
        with socket.socket(family) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except OSError as error:
        return f"{error.strerror}; give an address of machine 0 and a free port there"
    return None


def cannot_reach(host: str, port: int, within_s: float) -> str | None:
    """Why nobody could be reached at `host`:`port` in that time; None if someone was."""
    deadline = time.monotonic() + within_s
    while True:
        try:
            socket.create_connection((host, port), max(deadline - time.monotonic(), 0.1)).close()
            return None
        except OSError as error:
            if time.monotonic() >= deadline:
                return f"nobody answered within {within_s:g} s ({error.strerror or error})"
            time.sleep(0.1)
