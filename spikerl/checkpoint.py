"""Checkpoints: complete or absent, the last few kept, `latest` always readable."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from safetensors.torch import save_file

from spikerl.files import sync_folder, write_atomic
from spikerl.networks import TwinCritic
from spikerl.policy import Policy

KEEP = 3


def save_checkpoint(run: Path, policy: Policy, critic: TwinCritic, step: int) -> None:
    """Write checkpoints/step_N, complete or not at all; point `latest` at it; drop the oldest."""
    root = run / "checkpoints"
    root.mkdir(exist_ok=True)
    name = f"step_{step:010d}"
    partial = root / f".{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    policy.save(partial)
    tensors = {key: value.detach().clone() for key, value in critic.state_dict().items()}
    write_atomic(partial / "critic.safetensors", lambda path: save_file(tensors, path))
    os.rename(partial, root / name)
    link = root / ".latest.partial"
    link.unlink(missing_ok=True)
    link.symlink_to(name)
    os.replace(link, root / "latest")
    sync_folder(root)
    for old in sorted(root.glob("step_*"))[:-KEEP]:
        shutil.rmtree(old)
