"""Every number of a config has bounds; the built config has the requested values."""

from __future__ import annotations

import copy
import math
from dataclasses import fields
from functools import cache, reduce
from operator import getitem
from typing import Any

import pytest
from hydra import compose
from omegaconf import OmegaConf
from shell import refusal

from spikerl import machine
from spikerl.algos import ALGOS
from spikerl.algos.offpolicy import OfflineConfig
from spikerl.algos.td3 import TD3Config
from spikerl.config.build import build
from spikerl.config.run import RunConfig
from spikerl.distributed.world import BACKENDS
from spikerl.energy.meter import METERS
from spikerl.envs.config import EnvConfig
from spikerl.errors import BadRequest
from spikerl.kernels import KERNELS
from spikerl.kernels import build as native
from spikerl.machine import cores
from spikerl.models.networks import ACTORS
from spikerl.models.precision import PRECISIONS
from spikerl.schema import Registry
from spikerl.snn.decoders import DECODERS
from spikerl.snn.encoders import ENCODERS
from spikerl.snn.neurons import NEURONS

TINY = 1e-300
# For each number: values just inside its bounds, and values just outside.
BOUNDS: dict[str, tuple[list[Any], list[Any]]] = {
    "seed": ([0, 2**63 - 1], [-1, 2**63]),
    "total_steps": ([1], [0, -5]),
    "steps_per_epoch": ([1], [0]),
    "eval_episodes": ([0], [-1]),
    "env.reward_scale": ([1e-9], [0.0, -1.0]),
    "num_envs": ([1, None], [0]),
    "world_size": ([1, None], [0]),
    "threads": ([1, None], [0]),
    "max_restarts": ([0, 9], [-1]),
    "energy_to": ([{"return": -1.0}, None], [{"return": math.nan}]),
    "nnodes": ([1], [0]),
    "node_rank": ([None], [0]),
    "backend.timeout_s": ([1.0, 1e6], [0.99, 1.1e6, math.nan]),
    "env.max_episode_steps": ([1, None], [0]),
    "actor.hidden_sizes": ([[1], [1, 2, 3]], [[], [0], [4, -1], [1048577], [1 << 62, 4]]),
    "actor.spike_steps": ([1, 1000], [0, 1001]),
    "actor.lr": ([TINY], [0.0, -1.0]),
    "actor.recalibration_interval": ([1, None], [0]),
    "actor.recalibration_batches": ([1], [0]),
    "encoder.pop_size": ([1], [0, 1048577, 1 << 62]),
    "encoder.mean_range": ([[1.0, 1.0], [-1.0, 0.5]], [[1.0], [1.0, 0.0], [0.0, 1.0, 2.0]]),
    "encoder.var": ([TINY], [0.0]),
    "encoder.threshold": ([TINY], [0.0]),
    "decoder.pop_size": ([1], [0, 1048577, 1 << 62]),
    "decoder.voltage_decay": ([0.0, 1.0], [-TINY, 1.0000001]),
    "neuron.current_decay": ([0.0, 1.0], [-TINY, 1.0000001]),
    "neuron.voltage_decay": ([0.0, 1.0], [-TINY, 1.0000001]),
    "neuron.threshold": ([TINY], [0.0]),
    "neuron.surrogate_window": ([TINY], [0.0]),
    "neuron.surrogate_slope": ([TINY], [0.0]),
    "neuron.surrogate_slope_end": ([TINY, None], [0.0]),
    "neuron.adaptation": ([0.0], [-TINY]),
    "neuron.adaptation_decay": ([0.0, 1.0], [-TINY, 1.0000001]),
    "neuron.start": ([0.0, 1.0], [-TINY, 1.0000001]),
    "neuron.alpha": ([0.0], [-TINY, 1.0000001]),  # above 0 only in converted policies
    "neuron.theta_v": ([-1.0, 0.0], [math.nan]),
    "neuron.theta_u": ([-1.0, 0.0], [math.nan]),
    "neuron.theta_r": ([-1.0, 0.0], [math.nan]),
    "neuron.theta_s": ([-1.0, 0.0], [math.nan]),
    "actor.prune": ([TINY, 0.95, None], [0.0, 1.0, math.nan]),
    "actor.pixel_max": ([1e-6, 255.0, 1e6], [TINY, 0.0, -1.0, 1e7, math.inf, math.nan]),
    "actor.spike_cost_start": ([0], [-1]),
    "actor.spike_cost_warmup": ([0], [-1]),
    "actor.image": ([[3, 3], [3, 9]], [[3], [3, 0], [3, 3, 1]]),
    "actor.filters": ([[1]], [[], [0]]),
    "actor.kernel_sizes": ([[1], [10]], [[], [0], [11], [17], [1, 1]]),
    "actor.strides": ([[1], [9]], [[], [0], [1, 1]]),
    "algo.batch_size": ([1], [0]),
    "algo.gamma": ([0.0, 1.0], [-TINY, 1.0000001]),
    "algo.tau": ([TINY, 1.0], [0.0, 1.0000001]),
    "algo.critic_lr": ([TINY], [0.0]),
    "algo.critic_hidden_sizes": ([[1]], [[], [0]]),
    "algo.policy_delay": ([1], [0]),
    "algo.explore_noise": ([0.0], [-TINY]),
    "algo.target_noise": ([0.0], [-TINY]),
    "algo.noise_clip": ([0.0], [-TINY]),
    "algo.replay_capacity": ([1], [0]),
    "algo.random_steps": ([0], [-1]),
    "algo.learning_starts": ([0], [-1]),
    "algo.update_interval": ([1], [0]),
    "algo.updates_per_step": ([TINY], [0.0]),
    "algo.norm_interval": ([1, None], [0]),
    "algo.norm_clip": ([TINY, None], [0.0]),
    "algo.max_grad_norm": ([TINY, None], [0.0]),
    "algo.first_policy_update": ([0, 1], [-1, 2]),
    "algo.proxy_steps": ([1], [0]),
    "algo.proxy_lr": ([TINY], [0.0]),
    "algo.proxy_hidden_sizes": ([[1]], [[], [0]]),
    "algo.temperature": ([TINY], [0.0]),
    "algo.temperature_lr": ([TINY], [0.0]),
    "algo.target_entropy": ([-1.0, 0.0, None], [math.nan]),
    "algo.log_std_lr": ([TINY], [0.0]),
    "algo.log_std_hidden_sizes": ([[1]], [[], [0]]),
    "algo.log_std_range": ([[-1.0, -1.0]], [[1.0], [1.0, 0.0]]),
    "algo.n_step": ([1, 1000], [0, 1001]),
    "algo.target_interval": ([1], [0]),
    "algo.epsilon_start": ([0.0, 1.0], [-TINY, 1.0000001]),
    "algo.epsilon_end": ([0.0, 1.0], [-TINY, 1.0000001]),
    "algo.epsilon_steps": ([1], [0]),
    "algo.rollout_steps": ([80, 2000], [0]),
    "algo.epochs": ([1], [0]),
    "algo.clip_ratio": ([TINY], [0.0]),
    "algo.gae_lambda": ([0.0, 1.0], [-TINY, 1.0000001]),
    "algo.entropy_coef": ([0.0], [-TINY]),
    "algo.log_std": ([-1.0, 0.5], [math.nan]),
    "algo.target_kl": ([TINY, None], [0.0]),
    "algo.alpha": ([0.0, 2.5], [-TINY]),
    "algo.beta": ([0.0, 3.0], [-TINY]),
    "algo.expectile": ([TINY, 0.9999999], [0.0, 1.0]),
    "algo.critic_warmup": ([0, 9], [-1]),
    "algo.phi": ([0.0, 2.0], [-TINY, 2.0000001]),
    "algo.least_weight": ([0.0, 1.0], [-TINY, 1.0000001]),
    "algo.target_samples": ([1, 1000], [0, 1001]),
    "algo.act_samples": ([1, 1000], [0, 1001]),
    "algo.vae_lr": ([TINY], [0.0]),
    "algo.vae_hidden_sizes": ([[1]], [[], [0]]),
    "algo.weight_decay": ([0.0, 1.0], [-TINY]),
    "algo.warmup_share": ([0.0, 0.9999999], [-TINY, 1.0]),
    "algo.return_scale": ([TINY, 1e30], [0.0, 1e31]),
    "algo.target_return": ([-1e30, 0.0, None], [-1e31, 1e31]),
    "actor.context": ([1, 1000], [0, 1001]),
    "actor.dim": ([1, 16384], [0, 16385]),
    "actor.layers": ([1, 100], [0, 101]),
    "actor.heads": ([1, 128], [0, 3, 16385]),
    "actor.window": ([1, 1000], [0, 1001]),
    "actor.norm_share": ([0.0, 1.0], [-TINY, 1.0000001]),
    "actor.timesteps": ([1, 1_000_000], [0, 1_000_001]),
    "actor.dropout": ([0.0, 0.9999999], [-TINY, 1.0]),
}
# Other values that a number needs.
NEEDS: dict[str, dict[str, Any]] = {
    "neuron.surrogate_slope_end": {"neuron__surrogate": "atan"},
    "algo.target_entropy": {"algo__learn_temperature": True},
}
GROUPS: list[Registry[Any, Any]] = [
    ACTORS, ENCODERS, NEURONS, DECODERS, ALGOS, PRECISIONS, KERNELS, BACKENDS, METERS
]  # fmt: skip
OPTIONS: dict[str, dict[str, type[Any]]] = {
    group.group: {name: config for name, (config, _) in group.options.items()} for group in GROUPS
}
SCHEMAS: dict[str, list[type[Any]]] = {
    "": [RunConfig],
    "env.": [EnvConfig],
    **{f"{group}.": list(options.values()) for group, options in OPTIONS.items()},
}


def changed(data: dict[str, Any], **values: Any) -> dict[str, Any]:
    """A copy of `data` with these values; in the names of keys __ stands for a dot."""
    data = copy.deepcopy(data)
    for key, value in values.items():
        *groups, last = key.split("__")
        place = data
        for group in groups:
            place = place[group]
        place[last] = value
    return data


def numbers(schema: type[Any]) -> list[str]:
    return [
        field.name
        for field in fields(schema)
        if "int" in str(field.type) or "float" in str(field.type)
    ]


def test_the_bounds_above_are_those_of_every_number() -> None:
    found = {
        f"{prefix}{name}"
        for prefix, schemas in SCHEMAS.items()
        for schema in schemas
        for name in numbers(schema)
    }
    assert found == BOUNDS.keys()


@cache
def composed(*typed: str) -> dict[str, Any]:
    data: Any = OmegaConf.to_container(compose("train", list(typed)), resolve=True)
    return dict(data)


def with_number(default: dict[str, Any], key: str) -> dict[str, Any]:
    """The default config, or if it lacks the number `key`, one with an option that has it."""
    group, _, name = key.rpartition(".")
    options = OPTIONS.get(group, {})
    if group == "" or group == "env" or name in numbers(options[default[group]["name"]]):
        return default
    option = next(option for option, schema in options.items() if name in numbers(schema))
    typed = [f"{group}={option}"]
    if option in ("spikeformer", "transformer"):
        typed.append("algo=decision_transformer")
    elif option == "decision_transformer":
        typed.append("actor=transformer")
    data = composed(*typed)
    changes = {group: data[group] for group in ("actor", "algo")} | {group: data[group]}
    recorded = "d" if issubclass(OPTIONS["algo"][data["algo"]["name"]], OfflineConfig) else None
    return changed(default, **changes, dataset=recorded)


@pytest.mark.parametrize("key", BOUNDS)
def test_bounds(default: dict[str, Any], key: str) -> None:
    place = key.replace(".", "__")
    inside, outside = BOUNDS[key]
    default = changed(with_number(default, key), **NEEDS.get(key, {}))
    for value in inside:
        raw = build(changed(default, **{place: value})).raw
        assert reduce(getitem, key.split("."), raw) == value
    for value in outside:
        with pytest.raises(BadRequest) as refused:
            build(changed(default, **{place: value}))
        assert refused.value.args[0] == key
        assert repr(refused.value.args[1]) == repr(value)
        assert refused.value.args[2]


def test_the_dense_actor_has_the_same_bounds(default: dict[str, Any]) -> None:
    mlp = {"name": "mlp", "hidden_sizes": [8], "lr": 1e-3}
    config = build(changed(default, actor=mlp))
    assert [getattr(config.actor, g) for g in ("encoder", "neuron", "decoder")] == [None] * 3
    for key in ("hidden_sizes", "lr"):
        for value in BOUNDS[f"actor.{key}"][1]:
            with pytest.raises(BadRequest, match=rf"^actor\.{key}="):
                build(changed(default, actor={**mlp, key: value}))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"actor__attention": "full"}, "actor.attention=full: one of pssa, tssa"),
        ({"actor__heads": 3}, "actor.heads=3: give a number that divides actor.dim=128"),
        ({"precision__name": "bf16"}, "precision=bf16: actor=spikeformer learns in fp32 alone"),
        ({"env__reward_scale": 2.0}, "env.reward_scale=2.0: returns to go are divided by algo"),
        ({"algo": "td3"}, "actor=spikeformer: algo=td3 learns from single steps; use algo=decis"),
        ({"actor": "popsan"}, "actor=popsan: algo=decision_transformer learns from sequences"),
    ],
)
def test_what_goes_with_sequences(
    changes: dict[str, Any], line: str, default: dict[str, Any]
) -> None:
    made = with_number(default, "actor.window")
    was = {"td3": {"algo": default["algo"], "dataset": None}, "popsan": {"actor": default["actor"]}}
    for name in changes.keys() & {"algo", "actor"}:
        changes = was[changes[name]]
    assert str(refusal(build, changed(made, **changes))).startswith(line)


def test_training_gets_what_was_asked_for(default: dict[str, Any]) -> None:
    asked = {"seed": 11, "total_steps": 12, "steps_per_epoch": 13, "eval_episodes": 14,
             "num_envs": 6, "scaling": "weak", "world_size": 2}  # fmt: skip
    config = build(changed(default, **asked, device="cpu", algo__gamma=0.25))
    assert {key: getattr(config.run, key) for key in asked} == asked
    assert (config.num_envs, config.world_size) == (6, 2)
    assert config.algo.gamma == 0.25
    assert config.resolved.device.choice == "cpu"


def test_a_config_from_before_a_key_was_there(default: dict[str, Any]) -> None:
    """`convert` reads configs of dense runs from before algo.critic_warmup existed."""
    actor = {"name": "mlp", "hidden_sizes": [4], "lr": 1e-3}
    algo = {key: value for key, value in default["algo"].items() if key != "critic_warmup"}
    config = build(changed(default, actor=actor, algo=algo))
    assert isinstance(config.algo, TD3Config)
    assert config.algo.critic_warmup == 0


def test_threads(default: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread for small batches if the C++ library updates, else a share of the cores."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(machine, "cores", lambda: 6)

    def threads(**given: Any) -> tuple[str, str]:
        return build(changed(default, device="cpu", **given)).resolved.threads

    assert threads() == ("1", "batches of 100 gain little from more")
    assert threads(threads=3) == ("3", "requested")
    assert threads(neuron__reset="soft")[0] == "1"
    others = ({"algo__batch_size": 256}, {"kernel__name": "reference"}, {"actor__spike_steps": 33},
              {"precision__critic": "bf16"})  # fmt: skip
    for other in others:
        assert threads(**other) == ("6", "6 cores over 1 worker")


def test_one_environment_for_each_worker(default: dict[str, Any]) -> None:
    assert build(default).num_envs == 1
    assert build(changed(default, world_size=3)).num_envs == 3


def test_why_layer_by_layer(default: dict[str, Any]) -> None:
    reasons = [
        build(changed(default, device="cpu", **change)).resolved.kernel.reason
        for change in (
            {},
            {"neuron__reset": "soft", "neuron__surrogate": "atan"},
            {"actor__spike_steps": 33},
            {"precision__actor": "bf16"},
        )
    ]
    assert reasons == [
        "a C++ compiler is there",
        "a C++ compiler is there",
        "a C++ compiler is there; layer by layer because of more than 32 spike steps",
        "a C++ compiler is there; layer by layer because of products in bfloat16",
    ]
    sequences = build(changed(with_number(default, "actor.window"), device="cpu"))
    assert sequences.resolved.kernel.reason == (
        "a C++ compiler is there; layer by layer because of actor=spikeformer, whose attention runs"
        " in PyTorch"
    )


def test_what_auto_came_to(default: dict[str, Any]) -> None:
    chosen = build(changed(default, device="cpu")).resolved
    assert chosen.device == ("cpu", "requested")
    assert chosen.kernel.choice == f"cpu/{native.supported_paths()[0]}"
    assert chosen.backend.choice == "none"
    many = build(changed(default, device="cpu", world_size=10 * cores())).resolved
    assert many.threads.choice == "1"
    assert many.backend.choice == "gloo"


@pytest.mark.parametrize("group", ["env", "actor", "encoder", "algo", "precision", "energy"])
def test_a_group_is_missing(default: dict[str, Any], group: str) -> None:
    data = {key: value for key, value in default.items() if key != group}
    assert str(refusal(build, data)).startswith(f"{group}=null: ")


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"world_size": 2, "num_envs": 3}, "num_envs"),
        ({"world_size": 3, "algo__batch_size": 2}, "world_size"),
        ({"world_size": 3, "algo__replay_capacity": 2}, "algo.replay_capacity"),
    ],
)
def test_what_cannot_be_shared_out(
    default: dict[str, Any], values: dict[str, Any], key: str
) -> None:
    assert refusal(build, changed(default, **values)).args[0] == key
    assert build(changed(default, world_size=3, algo__batch_size=3, num_envs=6)).world_size == 3


def test_a_launcher_and_world_size_disagree(
    default: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RANK", "0"), ("MASTER_ADDR", "a"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert build(default).world_size == 2
    refused = refusal(build, changed(default, world_size=4))
    assert str(refused).startswith("world_size=4: the launcher started 2 workers")
