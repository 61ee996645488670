"""Decisions before the last spike step, compared with a plain numpy loop, in every kernel."""

from __future__ import annotations

from typing import Any

import builders
import numpy as np
import pytest
import torch
from exports import DIRECT, POLICIES, policy_of, task
from hand_worked import rate_decoded
from shell import refusal

from spikerl.energy import operations
from spikerl.energy.synapses import Count, Synapses, Update
from spikerl.kernels import build as native
from spikerl.kernels import reference
from spikerl.models.actor import SpikingActor
from spikerl.models.policy import Policy
from spikerl.snn.decoders import DecoderConfig
from spikerl.snn.early_exit import EarlyExit

STEPS = 6


def popsan(**parts: Any) -> SpikingActor:
    torch.manual_seed(3)
    actor = builders.popsan(3, 2, [12, 9], spike_steps=STEPS, **parts)
    with torch.no_grad():
        for layer in actor.layers:
            layer.weight_IN.mul_(2.0)
    return actor


def loop(actor: SpikingActor, obs: np.ndarray, threshold: float, k: int) -> tuple[Any, int]:
    """PopSAN with cuba_lif for one observation: the action, and the spike step that gave it."""
    p = {name: value.detach().double().numpy() for name, value in actor.state_dict().items()}
    mean, std = p["encoder.mean_OP"], p["encoder.std_OP"]
    activity = np.exp(-0.5 * ((obs[:, None] - mean) / std) ** 2).ravel()
    charge = np.zeros_like(activity)
    layers = range(len(actor.layers))
    current, voltage, fired = ([np.zeros(1) for _ in layers] for _ in range(3))
    total: Any = 0.0
    acts: list[Any] = []
    for t in range(1, STEPS + 1):
        charge = charge + activity
        x = (charge > 0.999).astype(float)
        charge = charge - 0.999 * x
        for i in layers:
            drive = x @ p[f"layers.{i}.weight_IN"] + p[f"layers.{i}.bias_N"]
            current[i] = 0.5 * current[i] + drive
            voltage[i] = 0.75 * voltage[i] * (1.0 - fired[i]) + current[i]
            fired[i] = x = (voltage[i] > 0.5).astype(float)
        total = total + x
        rates = (total / t).reshape(2, 10)
        acts.append(np.tanh((rates * p["decoder.weight_AP"]).sum(1) + p["decoder.bias_A"]))
        moves = [np.abs(acts[-1] - acts[-1 - j]).max() for j in range(1, min(k, t - 1) + 1)]
        if len(moves) == k and max(moves) < threshold:
            break
    return acts[-1], len(acts)


PATHS = ["reference", *(f"cpu/{path}" for path in native.supported_paths())]


@pytest.mark.parametrize(("threshold", "k"), [(0.02, 1), (0.1, 1), (0.1, 2), (0.3, 3), (2.5, 5)])
def test_beside_a_plain_loop(threshold: float, k: int) -> None:
    actor = popsan()
    obs = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
    wanted = [loop(actor, row.astype(float), threshold, k) for row in obs]
    ends = {step for _, step in wanted}
    assert len(ends) > 1 or k == 5  # some end early, some late
    actor.early_exit = EarlyExit(threshold=threshold, steps=k)
    rows = torch.from_numpy(obs)
    act = np.stack([act for act, _ in wanted])
    for kernel in PATHS:
        actor.kernel = kernel
        with torch.no_grad():
            np.testing.assert_allclose(actor(rows), act, rtol=0, atol=2e-6, err_msg=kernel)
    activity = actor.activity(rows)
    assert activity.spike_steps == pytest.approx(np.mean([step for _, step in wanted]), abs=1e-9)


def test_each_observation_by_itself() -> None:
    actor = popsan()
    actor.early_exit = EarlyExit(threshold=0.1, steps=1)
    obs = torch.randn(20, 3)
    with torch.no_grad():
        alone = torch.cat([actor(row[None]) for row in obs])
        torch.testing.assert_close(actor(obs), alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kernel", PATHS)
def test_one_raw_observation(kernel: str) -> None:
    """One observation acts as in a batch, and a policy made after early_exit was set uses it."""
    policy = policy_of(POLICIES["popsan"], task())
    actor = policy.actor
    assert isinstance(actor, SpikingActor)
    actor.kernel = kernel
    obs = np.random.default_rng(1).normal(size=(30, 3))
    late = [Policy(policy.task, policy.config, actor, policy.norm)(row) for row in obs]
    actor.early_exit = EarlyExit(threshold=0.5, steps=1)
    early = Policy(policy.task, policy.config, actor, policy.norm)
    alone = np.stack([early(row) for row in obs])
    np.testing.assert_allclose(alone, early(obs), rtol=0, atol=1e-5)
    assert np.abs(alone - np.stack(late)).max() > 0.05


def test_every_decoder_that_reads_any_number_of_steps() -> None:
    """Actions equal those that the decoder reads from the spike steps taken."""
    for name in ("converted", "tanh", "plif mean", "alif last", "ilc max"):
        actor = policy_of(POLICIES[name], task()).actor
        assert isinstance(actor, SpikingActor)
        actor.early_exit = EarlyExit(threshold=0.2, steps=1)
        obs = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            act = actor(obs)
            spikes_TBN = reference.record(actor, obs, None)[0][-1]
            last_B = reference.taken(actor, spikes_TBN).sum(0).flatten()
            wanted = [
                torch.tanh(actor.decoder(spikes_TBN[: int(n), b : b + 1]))[0]
                for b, n in enumerate(last_B)
            ]
        torch.testing.assert_close(act, torch.stack(wanted), rtol=0, atol=1e-6)
        assert 1 < float(last_B.double().mean()) < 5, name


def test_operations_by_hand() -> None:
    """Entries far from all receptive fields: no spikes, so the action settles at step 2 of 4."""
    actor = rate_decoded(spike_steps=4)
    actor.early_exit = EarlyExit(threshold=0.1, steps=1)
    ops = operations.count(actor, torch.tensor([[50.0, 50.0]]))
    assert ops.parts == [
        Count("encoder", Synapses(4, 4), 4, Update(0, 2, 1), spikes=0, functions=2),
        Count("hidden 1", Synapses(8, 0, 0, 6), 4, Update(1, 1, 1)),
        Count("output", Synapses(12, 0, 0, 10), 6, Update(1, 1, 1)),
        Count("decoder", Synapses(3, 0), 0, Update(0, 1, 1), functions=1),
        # One additional readout of the action, and one distance.
        Count("early exit", Synapses(3, 0), 1, Update(0, 2, 0), functions=1),
    ]
    assert (ops.spike_steps, ops.steps_taken) == (4, 2.0)


def test_operations_of_an_exit_that_never_comes() -> None:
    """As without an early exit, with three readouts and two distances (k = 2) more."""
    actor = rate_decoded(spike_steps=4)
    # The third output neuron fires at every other spike step.
    builders.fill(actor, {"decoder.weight_AP": [[2.0, 1.0, 1.0]]})
    obs = torch.tensor([[0.0, 50.0]])
    whole = operations.count(actor, obs)
    actor.early_exit = EarlyExit(threshold=1e-9, steps=2)
    ops = operations.count(actor, obs)
    assert ops.parts[:-1] == whole.parts
    assert ops.early_exit is not None
    assert (ops.early_exit.functions, ops.early_exit.updates) == (3, 2 * 1)
    assert ops.activation_sparsity == whole.activation_sparsity


def test_refusals() -> None:
    assert "threshold" not in str(refusal(EarlyExit, threshold=0.1, steps=0))
    assert str(refusal(EarlyExit, threshold=0.0, steps=1)).startswith("early_exit=0.0: give a")
    actor = popsan()
    error = refusal(EarlyExit(threshold=0.1, steps=6).check, actor.decoder, 6)
    assert str(error) == "exit_steps=6: the policy has 6 spike steps; give less than that"
    error = refusal(EarlyExit(threshold=0.1, steps=1).check, actor.decoder, 1)
    assert str(error) == (  # no value of exit_steps would help
        "early_exit=0.1: the policy has a single spike step, which nothing ends earlier; leave it"
        " out"
    )
    learned = popsan(encoder=DIRECT, decoder=DecoderConfig(name="learned"))
    error = refusal(EarlyExit(threshold=0.1, steps=1).check, learned.decoder, 6)
    assert "decoder=learned reads all spike steps at once" in str(error)
