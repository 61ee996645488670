"""Small policies to export; unless a test names an environment, theirs is registered nowhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from builders import (
    CUBA_LIF,
    POPULATION,
    RATE,
    alif_config,
    dense_config,
    dynamic_config,
    lif_config,
    membrane_config,
    plif_config,
    popsan_config,
)

from spikerl.export import contract
from spikerl.export.formats import FORMATS
from spikerl.files import checksum, json_bytes
from spikerl.models.actor_config import ActorConfig
from spikerl.models.networks import build_actor
from spikerl.models.normalizer import RunningNorm
from spikerl.models.policy import Policy
from spikerl.snn.decoders import DecoderConfig
from spikerl.snn.encoders import EncoderConfig, PopulationConfig
from spikerl.types import Task

DIRECT = EncoderConfig(name="direct")


def population(name: str) -> PopulationConfig:
    """A population encoder with wide receptive fields near 0."""
    fields: dict[str, Any] = {
        "pop_size": 4,
        "mean_range": [-1.0, 1.0],
        "var": 0.5,
        "threshold": 0.999,
    }
    return PopulationConfig(name=name, **fields)


def task(obs_dim: int = 3, act_dim: int = 2, env_id: str = "Nowhere-v0", steps: int = 20) -> Task:
    low, high = np.full(act_dim, -0.5), np.full(act_dim, 2.0)
    return Task(env_id, (obs_dim,), (act_dim,), low, high, steps)


def config(hidden: list[int] | None = None, **parts: Any) -> ActorConfig:
    chosen: dict[str, Any] = {"encoder": POPULATION, "neuron": CUBA_LIF, "decoder": RATE} | parts
    return ActorConfig(actor=popsan_config(hidden or [12, 9]), **chosen)


DENSE = dense_config([12, 9])


# Policies that can be exported to every format but NIR.
POLICIES: dict[str, ActorConfig] = {
    "popsan": config(),
    "converted": config(
        encoder=DIRECT, neuron=lif_config(voltage_decay=1.0, reset="soft"),
        decoder=DecoderConfig(name="linear"),
    ),
    "tanh": config(encoder=population("tanh_population"), neuron=lif_config()),
    "analog dynamic": config(encoder=population("analog"), neuron=dynamic_config()),
    "plif mean": config(neuron=plif_config(), decoder=membrane_config(read="mean")),
    "alif last": config(
        neuron=alif_config(reset="soft"), decoder=membrane_config(voltage_decay=0.5)
    ),
    "ilc max": config(decoder=membrane_config(name="ilc", read="max", pop_size=5)),
    "learned": config(
        encoder=EncoderConfig(name="learned"), decoder=DecoderConfig(name="learned")
    ),
    "dense": DENSE,
}  # fmt: skip


def policy_of(config: ActorConfig, task: Task, seed: int = 0) -> Policy:
    """A policy with random weights, large enough that its neurons fire, and a normaliser that is
    not the identity.
    """
    torch.manual_seed(seed)
    actor = build_actor(config, task.obs_dim, task.act_dim)
    with torch.no_grad():
        for layer in actor.layers:
            layer.weight_IN.mul_(2.0)
        for i, (name, p) in enumerate(actor.named_parameters()):
            if name.endswith("decay_logit"):  # trained, so no longer what the config says
                p.fill_(0.3 + 0.1 * i)
    norm = RunningNorm(task.obs_dim, 3.0)
    norm.add(np.random.default_rng(seed).normal(0.5, 2.0, (100, task.obs_dim)))
    norm.merge([norm.collect()])
    return Policy(task, config, actor, norm)


def saved(policy: Policy, folder: Path) -> Path:
    folder.mkdir()
    policy.save(folder)
    return folder


def exported(policy: Policy, format: str, folder: Path) -> Path:
    """Write a file and its contract as `spikerl export` does, but without a proof."""
    form, file = FORMATS[format], folder / f"policy.{format}"
    form.write(policy, file)
    described = contract.describe(format, policy, form.dt) | form.facts(policy)
    described |= {"sha256": checksum(file.read_bytes())}
    file.with_name(f"{file.name}.json").write_bytes(json_bytes(described))
    return file


def rewritten(file: Path, content: bytes | None = None, **changes: Any) -> Path:
    """Give the file other content, or its contract other entries; the contract names its sha256."""
    file.write_bytes(file.read_bytes() if content is None else content)
    beside = file.with_name(f"{file.name}.json")
    data = json.loads(beside.read_text()) | {"sha256": checksum(file.read_bytes())} | changes
    beside.write_text(json.dumps(data))
    return file


def small(folder: Path, format: str, parts: ActorConfig | None = None) -> Path:
    """An exported policy of Pendulum-v1, which can be evaluated."""
    return exported(policy_of(parts or config(), task(3, 1, "Pendulum-v1")), format, folder)


def confirmed(file: Path) -> list[str]:
    """The arguments with which `spikerl eval` runs this file: it may be code, so its sha256 too."""
    described = json.loads(file.with_name(f"{file.name}.json").read_text())
    return [f"run={file}", f"sha256={described['sha256']}"]
