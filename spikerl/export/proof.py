"""Proof that a file acts as the policy does: same spikes, same actions, and its measured return.

Shape legend   T spike steps, B observations, N neurons of a layer, O observation entries, A action
entries.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from spikerl.envs.config import EnvConfig
from spikerl.envs.make import UNREGISTERED
from spikerl.errors import BadRequest, NonFinite
from spikerl.kernels import reference
from spikerl.kernels.reference import Carried
from spikerl.models.activity import Activity
from spikerl.models.actor import SpikingActor
from spikerl.models.policy import Policy
from spikerl.models.sequence import History
from spikerl.runs.policy_env import env_of
from spikerl.seeding import seed_for
from spikerl.snn.encoders import Encoder, PopulationEncoder
from spikerl.training.evaluator import Evaluator
from spikerl.types import Task

LEAST, MOST = 1000, 3000  # observations compared: at least, and at first at most
MOST_RECORDED = 12_000  # bound of observations tried until LEAST are not decided by rounding
MOST_EPISODES = 2048  # bound of the episodes run for them
TOLERANCE = 1e-6  # of actions, relative to the larger bound
MOST_TOLERANCE = 1e-4  # bound for dense actors, whose tolerance follows from their rounding
# If a voltage is closer than this to its threshold, relative to the layer's largest voltage, the
# order of float32 additions decides the spike; it differs between the policy's own kernels too.
ROUNDING = 2.0**-18
PIECE = 128  # observations whose spikes are counted at once


class ProofFailed(RuntimeError):
    """The file does not act as the policy does."""


class Interpreter(Protocol):
    """Runs an exported file."""

    def spikes(self, obs_BO: np.ndarray) -> list[np.ndarray]:
        """Spikes, (T, B, N) each: of the encoder unless it gives currents, then of each layer."""

    def actions(self, obs_BO: np.ndarray) -> np.ndarray:
        """Actions in the environment's units, float32 (B, A)."""


@dataclass
class Recorded:
    """The policy's spikes and actions, without observations for which rounding decides a spike.

    Actions are computed in float64 from the spikes (for a dense actor, from the observations).
    """

    obs_BO: np.ndarray  # float32
    spikes: list[np.ndarray]
    act_BA: np.ndarray
    set_aside: int
    tolerance: float = TOLERANCE


# Computes what a file must reproduce on raw observations, float32 (B, O).
Reference = Callable[[Policy, np.ndarray], "Recorded"]


def prove(
    policy: Policy,
    file: Interpreter,
    env: EnvConfig | None,
    episodes: int,
    seed: int,
    emulated: Reference | None = None,
) -> dict[str, Any]:
    """Compare the file with the policy; returns the results for the contract. Raises ProofFailed
    with the first difference.

    `env`: None if the environment is unknown; observations are then drawn. `emulated`: for a format
    that only approximates the policy, computes what its file must do; the difference from the
    policy is then measured too.
    """
    recorded = record(policy, env, episodes, seed, emulated)
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
        "action_tolerance": recorded.tolerance,
        "episodes": episodes if env else 0,
        "seed": seed,
        "return_mean": None,
        "return_mean_of_policy": None,
    }
    if emulated is not None:
        proof |= {"return_change": None, **against_policy(policy, recorded, act_BA)}
    if env is not None:
        with closing(Evaluator(env, episodes, seed)) as evaluator:
            own = evaluator.run(FilePolicy(policy.task, file), 0).mean
            of_policy = evaluator.run(policy, 0).mean
        proof |= {"return_mean": own, "return_mean_of_policy": of_policy}
        if emulated is not None and of_policy != 0.0:
            proof["return_change"] = (own - of_policy) / abs(of_policy)
    return proof


@torch.no_grad()
def against_policy(policy: Policy, file: Recorded, act_BA: np.ndarray) -> dict[str, Any]:
    """How an approximation differs from the policy: share of differing spikes by layer, actions.

    Includes observations for which rounding decides a spike of the policy, since nothing is proven
    here.
    """
    assert isinstance(policy.actor, SpikingActor)
    x = policy.norm.normalize(torch.from_numpy(file.obs_BO))
    layers, _ = reference.record(policy.actor, x, None)
    pairs = zip([layer.bool().numpy() for layer in layers], file.spikes, strict=True)
    own = replace(file, act_BA=decoded(policy, layers[-1]))
    difference = difference_of(policy.task, own, act_BA)
    return {
        "spikes_unlike_policy": [float((ours != theirs).mean()) for ours, theirs in pairs],
        "mean_action_difference_from_policy": float(difference.mean()),
        "largest_action_difference_from_policy": float(difference.max()),
    }


class InUnits(Task):
    """A task whose actions are already in the environment's units."""

    def to_env(self, act: np.ndarray) -> np.ndarray:
        return self.typed(act.reshape(*act.shape[:-1], *self.act_shape))


class FilePolicy:
    """A policy that acts with an exported file alone; `task` describes its environment."""

    def __init__(
        self,
        task: Task,
        file: Interpreter,
        *,
        encoder_spikes: bool = True,
        exits_early: bool = False,
        trained_with: dict[str, str] | None = None,
    ) -> None:
        self.trained_with = trained_with or {}
        self.task: Task = InUnits(**{f.name: getattr(task, f.name) for f in fields(task)})
        self.file, self.encoder_spikes, self.exits_early = file, encoder_spikes, exits_early
        self.device = torch.device("cpu")

    def act(
        self,
        obs_BO: np.ndarray,
        generator: torch.Generator,
        carried: Carried | History | None = None,
    ) -> np.ndarray:
        """Actions (B, A), here in the environment's units."""
        act_BA = self.file.actions(obs_BO.astype(np.float32))
        if not np.isfinite(act_BA).all():
            raise NonFinite("the exported file gave an action that is a NaN or an infinity")
        return act_BA

    def carried(self) -> None:
        """None: a decision depends on a single observation."""

    def observe(self, obs_BO: np.ndarray) -> Tensor:
        """Raw observations, since the file itself normalises."""
        return torch.from_numpy(obs_BO.astype(np.float32))

    def activity(self, seen_BO: Tensor, generator: torch.Generator) -> Activity | None:
        """Firing statistics; None for a dense file, or if the number of steps taken is unknown."""
        if self.exits_early:
            return None
        counts: list[Tensor] = []
        for piece in seen_BO.split(PIECE):
            spikes = self.file.spikes(piece.numpy())
            sums = [torch.from_numpy(layer.sum((0, 1), np.float64)) for layer in spikes]
            counts = [a + b for a, b in zip(counts, sums, strict=True)] if counts else sums
        if not counts:
            return None
        samples = len(seen_BO) * len(spikes[0])
        if not self.encoder_spikes:
            counts.insert(0, torch.zeros(1, dtype=torch.float64))
        return Activity(counts, [], samples, len(seen_BO), self.encoder_spikes)


def record(
    policy: Policy,
    env: EnvConfig | None,
    episodes: int,
    seed: int,
    reference: Reference | None = None,
) -> Recorded:
    """Record at least LEAST observations, from as many steps and episodes as that takes."""
    most = MOST
    while True:
        obs_BO = observations(policy, env, episodes, seed)
        picked = obs_BO[np.linspace(0, len(obs_BO) - 1, min(len(obs_BO), most)).astype(int)]
        recorded = (reference or recorded_of)(policy, picked)
        if len(recorded.obs_BO) >= LEAST:
            return recorded
        if len(obs_BO) > most:
            most *= 2
        else:
            episodes *= 2
        if most > MOST_RECORDED or episodes > MOST_EPISODES:
            break
    raise ProofFailed(
        f"{len(recorded.obs_BO)} observations were recorded, {LEAST} are needed;"
        f" {recorded.set_aside} more lie so near to a threshold that rounding decides"
    )


def observations(policy: Policy, env: EnvConfig | None, episodes: int, seed: int) -> np.ndarray:
    """Raw observations, float32 (B, O)."""
    if env is None:
        rng = np.random.default_rng(seed_for(seed, "eval"))
        drawn = rng.standard_normal((MOST_RECORDED + 1, policy.task.obs_dim))
        mean, std = policy.norm.mean_std.numpy()
        return (mean + std * drawn).astype(np.float32)
    with closing(Evaluator(env, episodes, seed)) as evaluator:
        return evaluator.observations(policy).astype(np.float32)


@torch.no_grad()
def recorded_of(policy: Policy, obs_BO: np.ndarray) -> Recorded:
    actor = policy.actor
    x = policy.norm.normalize(torch.from_numpy(obs_BO))
    exact = deepcopy(actor).double()  # so that differences are due to the file's rounding alone
    if not isinstance(actor, SpikingActor) or not isinstance(exact, SpikingActor):
        exact.dtype = torch.float64
        recorded = Recorded(obs_BO, [], in_units(policy, exact(x.double())), 0)
        # With the actor's kernel and the reference: if sums cancel, errors depend on their order.
        acts = [in_units(policy, act) for act in (actor(x), reference.dense_actions(actor, x))]
        rounded = max(float(difference_of(policy.task, recorded, act).max()) for act in acts)
        tolerance = min(max(TOLERANCE, 2.0 * rounded), MOST_TOLERANCE)
        return replace(recorded, tolerance=tolerance)
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


def decoded(policy: Policy, spikes_TBN: Tensor) -> np.ndarray:
    """Actions (B, A) from the last layer's spikes, in float64, so that differences are due to the
    file's rounding.
    """
    assert isinstance(policy.actor, SpikingActor)
    decoder = deepcopy(policy.actor.decoder).double()
    return in_units(policy, decoder(spikes_TBN.double()).tanh())


def decided(actor: SpikingActor, spikes_TBN: Tensor, taken_TB1: Tensor) -> tuple[Tensor, Tensor]:
    """Actions in [-1, 1], and a mask (B,) where rounding decides the spike step of the exit."""
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
    return act_TBA[last_B, torch.arange(len(last_B), dtype=torch.int64)], near


def in_units(policy: Policy, act_BA: Tensor) -> np.ndarray:
    task = replace(policy.task, act_dtype="float32")  # the type of actions from files
    return task.to_env(act_BA.numpy()).reshape(act_BA.shape)


def encoder_near(encoder: Encoder, x_BO: Tensor, spike_steps: int) -> Tensor:
    """Mask (B,) where an encoder's voltage comes within rounding of its threshold."""
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
    """Largest difference, relative to the larger bound of its entry; ProofFailed if too large."""
    if act_BA.shape != recorded.act_BA.shape:
        raise ProofFailed(f"its actions are {act_BA.shape}")
    difference = difference_of(task, recorded, act_BA)
    if not (within := difference <= recorded.tolerance).all():
        b, a = np.unravel_index(int(np.argmin(within)), difference.shape)
        raise ProofFailed(
            f"first action that differs: observation {b}, entry {a}: {act_BA[b, a]:.9g} for"
            f" {recorded.act_BA[b, a]:.9g}"
        )
    return float(difference.max())


def difference_of(task: Task, recorded: Recorded, act_BA: np.ndarray) -> np.ndarray:
    scale_A = np.maximum(np.abs(task.act_low), np.abs(task.act_high))
    difference: np.ndarray = np.abs(act_BA.astype(np.float64) - recorded.act_BA) / scale_A
    return difference


def known_env(policy: Policy, run: str, env_id: str | None) -> EnvConfig | None:
    """The policy's environment, None if it is not registered here."""
    try:
        env, probe = env_of(policy.task, run, env_id)
    except BadRequest as error:
        if env_id is None and UNREGISTERED in error.args[2]:
            return None
        raise
    probe.close()
    return env
