"""The least memory that a run needs, so that a size that cannot fit is refused by its key.

Shape legend   O observation entries, A action entries.
"""

from __future__ import annotations

import math
import os
import resource
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from spikerl.algos.offpolicy import OfflineConfig
from spikerl.config.build import Config
from spikerl.errors import BadRequest
from spikerl.machine import CGROUP, GROUPS, control_groups
from spikerl.models.actor import SpikingActor
from spikerl.models.actor_config import CareBNConfig, PopSANConfig
from spikerl.models.networks import build_actor
from spikerl.models.sequence import SequenceConfig
from spikerl.models.spikeformer import SpikeformerConfig
from spikerl.models.transformer import TransformerConfig
from spikerl.snn.conv import Conv
from spikerl.types import Task

NUMBER = 4  # bytes
COPIES = 4  # of a weight: itself, its gradient, Adam's two moments


def check_memory(config: Config, task: Task) -> None:
    """Refuse what is larger than this machine's memory, before any of it is allocated."""
    there = memory()
    needs = least_bytes(config, task)
    if sum(needs.values()) > there:
        key = max(needs, key=lambda key: needs[key])
        group, _, name = key.partition(".")
        remedy = (
            f"the run needs {sum(needs.values()) / 2**30:.3g} GiB at the least, most of it for"
            f" this; this machine has {there / 2**30:.3g}"
        )
        raise BadRequest(key, config.raw[group][name], remedy)


LIMITS = ("memory.max", "memory.limit_in_bytes")  # files of a control group, in cgroup v2 and v1


def memory(groups: Path = GROUPS, root: Path = CGROUP) -> int:
    """Bytes that this process may have: the machine's, or fewer in a container or by ulimit -v."""
    most = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    most += [limit for limit in resource.getrlimit(resource.RLIMIT_AS)[:1] if limit > 0]
    for group in control_groups(("memory",), groups, root):
        for name in LIMITS:
            with suppress(OSError, ValueError):  # none there, or "max"
                most.append(int((group / name).read_text()))
    return min(most)


def least_bytes(config: Config, task: Task) -> dict[str, int]:
    """What a run needs on this machine at the least, by the config key that each part grows with.

    Of the rows of the replay, each of several machines holds an equal share.
    """
    algo, actor = config.algo, config.actor.actor
    if isinstance(actor, SequenceConfig):
        return sequence_bytes(actor, algo.batch_size)
    O, A = task.obs_dim, task.act_dim  # noqa: E741
    with torch.device("meta"):  # where it takes no memory
        net = build_actor(config.actor, algo.inputs(O, A), algo.outputs(A))
    hidden = "actor.hidden_sizes"

    def key_of(coder: str, otherwise: str) -> str:
        sized = hasattr(getattr(config.actor, coder), "pop_size")
        return f"{coder}.pop_size" if sized else otherwise

    parts = list[nn.Module](net.layers)
    keys = ["actor.filters" if isinstance(layer, Conv) else hidden for layer in net.layers]
    keys[0], keys[-1] = key_of("encoder", keys[0]), key_of("decoder", keys[-1])
    widths = [O, *(layer.outputs for layer in net.layers)]
    if isinstance(net, SpikingActor):
        parts += [net.encoder, net.decoder]
        keys += [key_of("encoder", hidden), key_of("decoder", hidden)]
        widths[0] = net.encoder.outputs
    steps = actor.spike_steps if isinstance(actor, PopSANConfig) else 1
    rows = min(algo.capacity(), config.run.total_steps) // config.run.nnodes
    if isinstance(algo, OfflineConfig):
        rows = 0  # a dataset's size is checked where it is opened
    # A batch is repeated target_samples times; an update takes proxy_steps batches.
    times = [name for name in ("target_samples", "proxy_steps") if hasattr(algo, name)]
    several = times[0] if times else "batch_size"
    at_once = algo.batch_size * math.prod(getattr(algo, name) for name in times)
    rollout = "rollout_steps" if hasattr(algo, "rollout_steps") else "replay_capacity"
    needs = {
        f"algo.{rollout}": rows * task.row.columns * NUMBER,
        f"algo.{several}": at_once * (sum(widths) * steps + 2 * O) * NUMBER,
    }
    for key, part in zip(keys, parts, strict=True):
        numbers = sum(p.numel() for p in part.parameters())
        needs[key] = needs.get(key, 0) + numbers * NUMBER * COPIES
    if isinstance(actor, CareBNConfig):
        batches = actor.recalibration_batches
        needs["actor.recalibration_batches"] = batches * algo.batch_size * 2 * O * NUMBER
    own = [name for name in vars(algo) if name.endswith("hidden_sizes")]
    return needs | {f"algo.{name}": weights([O, *getattr(algo, name), 1]) for name in own}


def sequence_bytes(actor: SequenceConfig, batch_size: int) -> dict[str, int]:
    """The same for an actor over sequences: a block has 12 D^2 weights, 12 D entries per token."""
    D, each = actor.dim, 3  # tokens of a step
    if isinstance(actor, SpikeformerConfig):
        each = actor.spike_steps
    tokens = batch_size * actor.context * each
    needs = {
        "algo.batch_size": tokens * 12 * D * actor.layers * NUMBER,
        "actor.dim": actor.layers * 12 * D * D * NUMBER * COPIES,
    }
    if isinstance(actor, TransformerConfig):
        needs["actor.timesteps"] = actor.timesteps * D * NUMBER * COPIES
    return needs


def weights(widths: list[int]) -> int:
    return sum(a * b for a, b in pairwise(widths)) * NUMBER * COPIES
