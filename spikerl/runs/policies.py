"""The policies of a run folder: its last one, and the best."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import torch

from spikerl import kernels
from spikerl.errors import BadRequest
from spikerl.machine import resolve_device
from spikerl.models.policy import Policy, leave_thread_pool, read_policy

CHOICES = ("last", "best")


def load_policy(
    run: str | Path, device: str | torch.device = "cpu", *, policy: str = "last"
) -> Policy:
    """The policy of a run folder: its final one, else that of its newest checkpoint.

    `policy`: last, or best, which had the highest evaluation return so far. `device`: auto, cpu,
    cuda or cuda:N. Raises BadRequest, a ValueError, for a device that is not there, and for a
    policy that is missing, foreign, damaged or inconsistent.
    """
    leave_thread_pool()
    choice = resolve_device(str(device).removesuffix(":0")).choice
    kernel = kernels.resolve(kernels.KernelConfig(name="auto", path=None), choice).choice
    folder = find_policy(Path(run), policy, key="run")
    return read_policy(folder, choice, key="run", kernel=kernel)


def find_policy(run: Path, policy: str = "last", *, key: str) -> Path:
    """The folder below `run` that holds the policy to use."""
    if policy not in CHOICES:
        raise BadRequest("policy", policy, f"give {' or '.join(CHOICES)}")
    folders, root = [run], run / "checkpoints"
    with suppress(OSError, ValueError):  # not a valid path
        # Not by `latest`, which is out of date where a run was killed before renewing it.
        folders += sorted(root.glob("step_*"), reverse=True)
    if policy == "best":
        folders = [folder / "best" for folder in folders]
    for folder in folders:
        if os.path.isfile(folder / "policy.json"):  # False, too, for a name that is too long
            return folder
    remedy = "no policy there; give a run folder (it holds policy.json and policy.safetensors)"
    if policy == "best":
        choice = "init_policy" if key == "init_from" else "policy"
        remedy = f"no best policy there: a run has one once it was evaluated; give {choice}=last"
    raise BadRequest(key, run, remedy)
