"""What a launcher over machines says to a process, and how this machine reaches the others."""

from __future__ import annotations

import fcntl
import os
import re
import socket
import struct

SIOCGIFADDR = 0x8915  # Linux's request for an interface's address


def adopt() -> None:
    """Take the rank that srun gave this process, if it did, as torchrun would give it."""
    step = os.environ
    if "RANK" in step or int(step.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return
    # Steps of one job may run side by side; a port below those that systems give out.
    place = 37 * int(step["SLURM_JOB_ID"]) + int(step["SLURM_STEP_ID"])
    step |= {
        "RANK": step["SLURM_PROCID"],
        "WORLD_SIZE": step["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": step["SLURM_LOCALID"],
    }
    step.setdefault("MASTER_ADDR", first_host(step["SLURM_STEP_NODELIST"]))
    step.setdefault("MASTER_PORT", str(20000 + place % 10000))


def first_host(nodes: str) -> str:
    """Of a list as Slurm writes it: node[07-12],gpu3."""
    found = re.match(r"([^\[,]+)(?:\[(\d+))?", nodes)
    assert found is not None
    return found[1] + (found[2] or "")


def several() -> bool:
    """Whether the workers are on more than one machine, as far as their launcher said."""
    here = os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])
    return here != os.environ["WORLD_SIZE"] or os.environ.get("SLURM_STEP_NUM_NODES", "1") != "1"


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
