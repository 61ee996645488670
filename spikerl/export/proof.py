"""That a file acts as the policy does: the same spikes, the same actions, a return of its own.

Shape legend   T spike steps, B observations, N neurons of a layer, O observation entries, A action
entries.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from spikerl.envs.make import EnvConfig, make_env, task_of
from spikerl.errors import BadRequest
from spikerl.kernels import reference
from spikerl.models.actor import SpikingActor
from spikerl.models.policy import Policy, check_shapes
from spikerl.seeding import seed_for
from spikerl.snn.encoders import Encoder, PopulationEncoder
from spikerl.training.evaluator import Evaluator
from spikerl.types import Task

LEAST, MOST = 1000, 3000  # observations that are reproduced
MOST_EPISODES = 2048  # that are run for them
TOLERANCE = 1e-6  # of actions, relative to the larger bound
# Voltages nearer to their threshold, relative to the layer's largest, are decided by the order in
# which float32 numbers are added, which differs between the policy's own kernels too.
ROUNDING = 2.0**-18


class ProofFailed(RuntimeError):
    """The file does not act as the policy."""


class Interpreter(Protocol):
    """Runs a written file."""

    def spikes(self, obs_BO: np.ndarray) -> list[np.ndarray]:
        """Whether they fire, (T, B, N): of the encoder, unless it gives currents; of each layer."""

    def actions(self, obs_BO: np.ndarray) -> np.ndarray:
        """In the environment's units, float32 (B, A)."""


@dataclass
class Recorded:
    """What the policy does; observations whose spikes rounding decides are set aside.

    Its actions are those that its spikes (dense: observations) give in float64.
    """

    obs_BO: np.ndarray  # float32
    spikes: list[np.ndarray]
    act_BA: np.ndarray
    set_aside: int


def prove(
    policy: Policy, file: Interpreter, env: EnvConfig | None, episodes: int, seed: int
) -> dict[str, Any]:
    """What was compared, for the contract; ProofFailed names the first difference.

    `env`: None where the environment is unknown; observations are then drawn.
    """
    recorded = record(policy, env, episodes, seed)
    spikes = file.spikes(recorded.obs_BO)
    compare_spikes(recorded, spikes)
    act_BA = file.actions(recorded.obs_BO)
    difference = compare_actions(policy.task, recorded, act_BA)
    proof: dict[str, Any] = {
        "observations": len(recorded.obs_BO),
        "observations_from": f"{env.id}, its own episodes" if env else "draws of its normaliser",
        "set_aside": recorded.set_aside,
        "spikes_compared": sum(layer.size for layer in spikes),
        "largest_action_difference": difference,
        "episodes": episodes if env else 0,
        "seed": seed,
        "return_mean": None,
        "return_mean_of_policy": None,
    }
    if env is not None:
        evaluator = Evaluator(env, episodes, seed)
        try:
            proof["return_mean"] = evaluator.run(FilePolicy(policy, file), 0).mean
            proof["return_mean_of_policy"] = evaluator.run(policy, 0).mean
        finally:
            evaluator.close()
    return proof


class InUnits(Task):
    """Of actions that have the environment's units already."""

    def to_env(self, act: np.ndarray) -> np.ndarray:
        return self.typed(act.reshape(*act.shape[:-1], *self.act_shape))


class FilePolicy(Policy):
    """Acts by the file alone; the rest of the policy says what its environment is."""

    def __init__(self, policy: Policy, file: Interpreter) -> None:
        task = InUnits(**{f.name: getattr(policy.task, f.name) for f in fields(policy.task)})
        super().__init__(task, policy.config, policy.actor, policy.norm)
        self.file = file

    def act(self, obs_BO: np.ndarray, generator: torch.Generator) -> np.ndarray:
        """Actions (B, A), here in the environment's units."""
        return self.file.actions(obs_BO.astype(np.float32))


def record(policy: Policy, env: EnvConfig | None, episodes: int, seed: int) -> Recorded:
    """At least LEAST observations, of as many episodes as that takes."""
    while True:
        obs_BO = observations(policy, env, episodes, seed)
        picked = obs_BO[np.linspace(0, len(obs_BO) - 1, min(len(obs_BO), MOST)).astype(int)]
        recorded = recorded_of(policy, picked)
        episodes *= 2
        if len(recorded.obs_BO) >= LEAST or len(obs_BO) > MOST or episodes > MOST_EPISODES:
            break
    if len(recorded.obs_BO) < LEAST:
        raise ProofFailed(
            f"{len(recorded.obs_BO)} observations were recorded, {LEAST} are needed;"
            f" {recorded.set_aside} more lie so near to a threshold that rounding decides"
        )
    return recorded


def observations(policy: Policy, env: EnvConfig | None, episodes: int, seed: int) -> np.ndarray:
    """Raw, float32 (B, O)."""
    if env is None:
        rng = np.random.default_rng(seed_for(seed, "eval"))
        drawn = rng.standard_normal((MOST + 1, policy.task.obs_dim))
        mean, std = policy.norm.mean_std.numpy()
        return (mean + std * drawn).astype(np.float32)
    evaluator = Evaluator(env, episodes, seed)
    try:
        return evaluator.observations(policy).astype(np.float32)
    finally:
        evaluator.close()


@torch.no_grad()
def recorded_of(policy: Policy, obs_BO: np.ndarray) -> Recorded:
    actor = policy.actor
    x = policy.norm.normalize(torch.from_numpy(obs_BO))
    exact = deepcopy(actor).double()  # so that a difference is the file's rounding alone
    if not isinstance(actor, SpikingActor) or not isinstance(exact, SpikingActor):
        exact.dtype = torch.float64
        return Recorded(obs_BO, [], in_units(policy, exact(x.double())), 0)
    layers, states = reference.record(actor, x, None)
    taken_TB1 = reference.taken(actor, layers[-1])
    act, near = decided(exact, layers[-1].double(), taken_TB1)
    act_BA = in_units(policy, act)
    near |= encoder_near(actor.encoder, x, actor.spike_steps)
    for neuron, own in zip(actor.neurons, states, strict=True):
        excess_TBN = torch.stack([neuron.excess(state) for state in own])
        largest = max(float(state.voltage_BN.abs().max()) for state in own)
        near |= (excess_TBN.abs() < ROUNDING * max(largest, 1.0)).any(2).any(0)
    clear = (~near).numpy()
    fired = layers if actor.encoder.spikes else layers[1:]
    spikes = [(layer.bool() & taken_TB1).numpy()[:, clear] for layer in fired]
    return Recorded(obs_BO[clear], spikes, act_BA[clear], int(near.sum()))


def decided(actor: SpikingActor, spikes_TBN: Tensor, taken_TB1: Tensor) -> tuple[Tensor, Tensor]:
    """Actions in [-1, 1], and where, (B,), rounding decides at which spike step they settled."""
    near = torch.zeros(spikes_TBN.shape[1], dtype=torch.bool)
    exit = actor.early_exit
    if exit is None:
        return actor.decoder(spikes_TBN).tanh(), near
    act_TBA = torch.stack(
        [actor.decoder(spikes_TBN[: t + 1]).tanh() for t in range(len(spikes_TBN))]
    )
    for t in range(exit.steps, len(act_TBA)):
        moved_B = (act_TBA[t] - act_TBA[t - exit.steps : t]).abs().amax((0, 2))
        near |= (moved_B - exit.threshold).abs() < TOLERANCE
    last_B = taken_TB1.sum(0).squeeze(1) - 1
    return act_TBA[last_B, torch.arange(len(last_B))], near


def in_units(policy: Policy, act_BA: Tensor) -> np.ndarray:
    task = replace(policy.task, act_dtype="float32")  # as files give them
    return task.to_env(act_BA.numpy()).reshape(act_BA.shape)


def encoder_near(encoder: Encoder, x_BO: Tensor, spike_steps: int) -> Tensor:
    """Where an encoder's voltage comes that near to its threshold, (B,)."""
    near = torch.zeros(len(x_BO), dtype=torch.bool)
    if isinstance(encoder, PopulationEncoder) and encoder.spikes:
        threshold, activity = encoder.config.threshold, encoder.activity(x_BO)
        voltage = torch.zeros_like(activity)
        for _ in range(spike_steps):
            voltage = voltage + activity
            excess = voltage - threshold
            near |= (excess.abs() < ROUNDING * max(threshold, 1.0)).any(1)
            voltage = torch.where(excess > 0.0, excess, voltage)
    return near


def compare_spikes(recorded: Recorded, spikes: list[np.ndarray]) -> None:
    shapes = [layer.shape for layer in recorded.spikes]
    if [layer.shape for layer in spikes] != shapes:
        raise ProofFailed(f"its layers' spikes are {[layer.shape for layer in spikes]}")
    first = None
    for i, (ours, theirs) in enumerate(zip(recorded.spikes, spikes, strict=True)):
        for t, b, n in np.argwhere(ours != theirs):
            where = (int(b), int(t), i, int(n))
            first = where if first is None else min(first, where)
    if first is not None:
        b, t, i, n = first
        fires = "the policy's fires" if recorded.spikes[i][t, b, n] else "the file's fires"
        raise ProofFailed(
            f"first spike that differs: observation {b}, spike step {t}, layer {i} of"
            f" {len(spikes)}, neuron {n}: {fires}"
        )


def compare_actions(task: Task, recorded: Recorded, act_BA: np.ndarray) -> float:
    """The largest difference, relative to the larger bound of its entry."""
    scale_A = np.maximum(np.abs(task.act_low), np.abs(task.act_high))
    if act_BA.shape != recorded.act_BA.shape:
        raise ProofFailed(f"its actions are {act_BA.shape}")
    difference = np.abs(act_BA.astype(np.float64) - recorded.act_BA) / scale_A
    if not (difference <= TOLERANCE).all():
        b, a = np.unravel_index(int(np.argmax(~(difference <= TOLERANCE))), difference.shape)
        raise ProofFailed(
            f"first action that differs: observation {b}, entry {a}: {act_BA[b, a]:.9g} for"
            f" {recorded.act_BA[b, a]:.9g}"
        )
    return float(difference.max())


def known_env(policy: Policy, run: str, env_id: str | None) -> EnvConfig | None:
    """The policy's environment, None where it is not registered here."""
    env = EnvConfig(
        name="gym",
        version=None,
        id=env_id or policy.task.env_id,
        max_episode_steps=policy.task.max_episode_steps,
        vectorizer="sync",
        kwargs=dict(policy.task.env_kwargs),
        wrappers=list(policy.task.env_wrappers),
    )
    key, value = ("env_id", env_id) if env_id else ("run", run)
    try:
        probe = make_env(env)
    except BadRequest as error:
        if env_id is None and "is no registered environment" in error.args[2]:
            return None
        raise BadRequest(key, value, error.args[2]) from error
    task = task_of(probe)
    probe.close()
    check_shapes(key, value, policy.task, task)
    return env
