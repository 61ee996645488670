"""The composed config, validated: plain data in, each group's own dataclass out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from spikerl import kernels, plugins
from spikerl.algos import ALGOS, AlgoConfig
from spikerl.algos.offpolicy import OfflineConfig, OffPolicyConfig
from spikerl.config.run import RunConfig
from spikerl.config.together import (
    check_critics,
    check_dataset,
    check_sequence,
    check_shares,
    check_together,
    why_no_graphs,
)
from spikerl.config.yaml_file import quoted
from spikerl.distributed import hosts
from spikerl.distributed.world import (
    BACKENDS,
    BackendConfig,
    resolve_backend,
    resolve_world_size,
)
from spikerl.energy import meter
from spikerl.energy.meter import METERS, EnergyConfig
from spikerl.envs.config import EnvConfig
from spikerl.errors import BadRequest
from spikerl.kernels import KERNELS, coverage
from spikerl.machine import resolve_device, resolve_threads
from spikerl.models.actor import SpikingActor
from spikerl.models.actor_config import ActorConfig
from spikerl.models.networks import ACTOR_GROUPS, build_actor, least_obs, parse_actor
from spikerl.models.precision import PRECISIONS, PrecisionConfig, check_precision
from spikerl.models.sequence import SequenceConfig
from spikerl.schema import parse
from spikerl.types import Resolved

GROUPS = ("env", *ACTOR_GROUPS, "algo", "precision", "kernel", "backend", "energy")


@dataclass(kw_only=True)
class Choices:
    """What each "auto" or named choice resolved to, and why; written into the manifest."""

    device: Resolved
    threads: Resolved
    kernel: Resolved
    backend: Resolved
    energy: Resolved


@dataclass(kw_only=True)
class Config:
    """One run, validated; `raw` is the same as plain data, as config.yaml records it."""

    run: RunConfig
    env: EnvConfig
    actor: ActorConfig
    algo: AlgoConfig
    precision: PrecisionConfig
    backend: BackendConfig
    energy: EnergyConfig
    resolved: Choices
    own_products: bool  # all products are the kernel's, not PyTorch's, which depend on threads
    world_size: int
    raw: dict[str, Any]

    @property
    def num_envs(self) -> int:
        """The environments of all workers together; by default one for each worker."""
        return self.run.num_envs or self.world_size

    @property
    def last_step(self) -> int:
        """total_steps, rounded up to a multiple of num_envs unless the run is offline."""
        if isinstance(self.algo, OfflineConfig):
            return self.run.total_steps
        return -(-self.run.total_steps // self.num_envs) * self.num_envs


class Parsed(NamedTuple):
    """Each group as it was typed, with nothing decided."""

    run: RunConfig
    env: EnvConfig
    actor: ActorConfig
    algo: AlgoConfig
    precision: PrecisionConfig
    kernel: kernels.KernelConfig
    backend: BackendConfig
    energy: EnergyConfig


def parse_groups(raw: Mapping[str, Any]) -> Parsed:
    """Validate what does not depend on the machine."""
    if missing := [group for group in GROUPS if group not in raw]:
        raise BadRequest(missing[0], None, "the config lacks this group")
    run = parse(RunConfig, {k: v for k, v in raw.items() if k not in GROUPS})
    plugins.load(run.plugins)
    parsed = Parsed(
        run=run,
        env=parse(EnvConfig, raw["env"], key="env"),
        actor=parse_actor({group: raw[group] for group in ACTOR_GROUPS}),
        algo=ALGOS.parse(raw["algo"]),
        precision=PRECISIONS.parse(raw["precision"]),
        kernel=KERNELS.parse(raw["kernel"]),
        backend=BACKENDS.parse(raw["backend"]),
        energy=METERS.parse(raw["energy"]),
    )
    for key in ("kwargs", "wrappers"):  # refuse what a resume could not read back
        quoted(getattr(parsed.env, key), f"env.{key}")
    check_together(parsed.algo, parsed.actor)
    check_critics(parsed.algo, parsed.precision)
    check_sequence(parsed.algo, parsed.actor, parsed.env, parsed.precision)
    check_dataset(parsed.run, parsed.algo)
    return parsed


def build(raw: Mapping[str, Any]) -> Config:
    """Validate a composed config and decide everything that was left to "auto"."""
    run, env, actor, algo, precision, kernel, backend, energy = parse_groups(raw)
    device = resolve_device(run.device)
    world_size = resolve_world_size(run.world_size)
    sharers = 1 if hosts.has_own("cores") else hosts.workers_here(world_size, run.nnodes)
    check_shares(run, algo, world_size)
    check_precision(precision, torch.device(device.choice))
    layered = why_layered(actor, precision.actor_dtype)
    if (refusal := why_no_graphs(run, algo, actor, world_size)) and kernel.path == "graphs":
        raise refusal
    no_graphs = "{}={}".format(*refusal.args) if refusal else None
    chosen = kernels.resolve(kernel, device.choice, layered, no_graphs)
    whole = chosen.choice.startswith("cpu/") and layered is None  # PyTorch makes no product
    whole &= precision.critic_dtype == torch.float32 and isinstance(algo, OffPolicyConfig)
    rows = algo.batch_size if whole else None
    resolved = Choices(
        device=device,
        threads=resolve_threads(run.threads, sharers, rows),
        kernel=chosen,
        backend=resolve_backend(backend, device.choice, world_size, run.nnodes),
        energy=meter.resolve(energy, device=torch.device(device.choice)),
    )
    return Config(
        run=run,
        env=env,
        actor=actor,
        algo=algo,
        precision=precision,
        backend=backend,
        energy=energy,
        resolved=resolved,
        own_products=whole,
        world_size=world_size,
        raw=dict(raw),
    )


def why_layered(actor: ActorConfig, dtype: torch.dtype) -> str | None:
    """Why kernel=cpu runs such an actor layer by layer; None where one call runs all of it."""
    if isinstance(actor.actor, SequenceConfig):
        parts = "attention runs" if actor.neuron else "products run"
        return f"actor={actor.actor.name}, whose {parts} in PyTorch"
    with torch.device("meta"):
        net = build_actor(actor, least_obs(actor), 1, dtype=dtype)
    if isinstance(net, SpikingActor):
        return coverage.why_layered(net)
    return coverage.why_no_matrix(net.layers)
