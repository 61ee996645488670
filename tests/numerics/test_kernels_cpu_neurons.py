"""Every neuron, reset and surrogate in C++ against the reference, in one call and as a scan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from builders import (
    CUBA_LIF,
    NEURON,
    POPULATION,
    alif_config,
    dynamic_config,
    lif_config,
    plif_config,
    popsan,
)
from builders import neuron_of as built
from torch import Tensor

from spikerl.kernels import build as native
from spikerl.kernels import cpu, reference
from spikerl.kernels.coverage import EQUATIONS, triton_scans, why_layered
from spikerl.kernels.prepared import fused
from spikerl.models.actor import SpikingActor
from spikerl.snn.neurons import NEURONS, NeuronConfig, ResidualIFConfig
from spikerl.snn.surrogates import SURROGATES

PATHS = native.supported_paths()
ANALOG = replace(POPULATION, name="analog")
RESIDUAL_IF = ResidualIFConfig(
    name="residual_if", start=0.5, alpha=0.0, **(NEURON | {"reset": "soft"})
)
HARD: list[NeuronConfig] = [CUBA_LIF, lif_config(), plif_config(), alif_config(), dynamic_config()]
SOFT = [*(replace(config, reset="soft") for config in HARD[:4]), RESIDUAL_IF]


def name(config: NeuronConfig) -> str:
    return f"{config.name}-{config.reset}"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def made(config: NeuronConfig, analog: bool, steps: int = 6) -> SpikingActor:
    """An actor with odd widths, and weights large enough that every layer fires."""
    torch.manual_seed(steps)
    encoder = ANALOG if analog else POPULATION
    actor = popsan(5, 2, [37, 18], spike_steps=steps, encoder=encoder, neuron=config)
    with torch.no_grad():
        for layer in actor.layers:
            layer.weight_IN.mul_(2.0)
    return actor


def gradients(actor: SpikingActor, kernel: str, batch: int) -> tuple[Tensor, dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(2)
    obs, direction = torch.randn(batch, 5, generator=draw), torch.randn(batch, 2, generator=draw)
    actor.kernel = kernel
    act = actor(obs)
    found = torch.autograd.grad(act, list(actor.parameters()), direction)
    return act.detach(), dict(zip(dict(actor.named_parameters()), found, strict=True))


def compare(actor: SpikingActor, path: str, batch: int) -> None:
    act, ours = gradients(actor, f"cpu/{path}", batch)
    expected, theirs = gradients(actor, "reference", batch)
    torch.testing.assert_close(act, expected, rtol=0, atol=2e-6)
    for key, grad in theirs.items():
        assert float(grad.norm()) > 0.0, key
        assert float((ours[key] - grad).norm() / grad.norm()) < 2e-5, key


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("config", [*HARD, *SOFT], ids=name)
def test_in_one_call(config: NeuronConfig, surrogate: str) -> None:
    """With an encoder that gives spikes, and with the analog one, which gives currents."""
    for analog in (False, True):
        actor = made(replace(config, surrogate=surrogate), analog)
        assert fused(actor)
        compare(actor, PATHS[0], batch=21)


@pytest.mark.parametrize("path", PATHS[1:])
@pytest.mark.parametrize("config", [plif_config(surrogate="atan"), alif_config(), dynamic_config()])
def test_on_the_other_paths(path: str, config: NeuronConfig) -> None:
    compare(made(config, analog=True), path, batch=21)


@pytest.mark.parametrize("batch", [1, 3, 16, 33])
@pytest.mark.parametrize("steps", [1, 9, 32])
def test_currents_of_any_number_of_samples_and_steps(batch: int, steps: int) -> None:
    actor = made(plif_config(surrogate="sigmoid", surrogate_slope=1.0), analog=True, steps=steps)
    act, ours = gradients(actor, f"cpu/{PATHS[0]}", batch)
    expected, theirs = gradients(actor, "reference", batch)
    torch.testing.assert_close(act, expected, rtol=0, atol=2e-6)
    for key, grad in theirs.items():
        torch.testing.assert_close(ours[key], grad, rtol=1e-3, atol=2e-5 * float(grad.norm()))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("surrogate", ["rect", "triangle"])
@pytest.mark.parametrize("config", [*HARD, *SOFT], ids=name)
def test_exact_where_nothing_rounds(path: str, surrogate: str, config: NeuronConfig) -> None:
    """Constants, drives and gradients are binary fractions, which fit 24 bits after few steps."""
    given: dict[str, Any] = {"surrogate": surrogate, "surrogate_slope": 1.0}
    if hasattr(config, "voltage_decay"):
        given["voltage_decay"] = 0.5
    neuron, steps = built(replace(config, **given)), 2 if config.name == "dynamic" else 3
    draw = torch.Generator().manual_seed(4)
    drive = torch.randint(-2, 5, (steps, 5, 7), generator=draw) / 4.0
    weight = torch.randint(-3, 4, drive.shape, generator=draw) / 2.0
    found = []
    for scan in (reference.scan, cpu.kernel(path).scan):
        x = drive.clone().requires_grad_()
        spikes = scan(neuron, x)
        inputs = [x, *neuron.parameters()]
        found.append((spikes.detach(), *torch.autograd.grad((spikes * weight).sum(), inputs)))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)
        assert theirs.any()
    assert not found[0][0].all()


@pytest.mark.parametrize("steps", [1, 32])
@pytest.mark.parametrize("config", [*HARD[2:], *SOFT[2:]], ids=name)
def test_one_layers_scan(steps: int, config: NeuronConfig) -> None:
    """With constants that no other test uses."""
    if config.name == "dynamic":
        config = replace(config, threshold=0.7, theta_r=0.03, theta_s=0.4, theta_u=0.3)  # type: ignore[call-arg]
    neuron = built(replace(config, surrogate="sigmoid", surrogate_slope=3.0))
    draw = torch.Generator().manual_seed(steps)
    drive = 0.4 * torch.randn(steps, 7, 13, generator=draw) + 0.1
    weight = torch.randn(drive.shape, generator=draw)
    found = []
    for scan in (reference.scan, cpu.kernel(PATHS[0]).scan):
        x = drive.clone().requires_grad_()
        spikes = scan(neuron, x)
        inputs = [x, *neuron.parameters()]
        grads = torch.autograd.grad((spikes * weight).sum(), inputs, allow_unused=steps == 1)
        found.append([spikes.detach(), *(g for g in grads if g is not None and g.any())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert 0.0 < float(found[0][0].mean()) < 1.0


def test_an_adaptive_neuron_by_hand() -> None:
    """Threshold 0.5, adaptation 0.5, both decays 0.5, slope 1 of `triangle`, drives 1, 1, 0.25.

    Adaptations are 0, 1, 0.5; thresholds 0.5, 1, 0.75; voltages 1, 1 (after a reset), 0.75: only
    the first step spikes. Voltages are 1/2, 0 and 0 above their thresholds, so the derivatives of
    spikes are 1/2, 1, 1. The sum of all spikes has these gradients by the spike s, the voltage v
    and the adaptation a, from the last step back: step 3: s 1, v 1, a -1/2; step 2: s 1 - 1/2 (by
    a) - 1/2 (by the reset) = 0, v 1/2, a -1/4; step 1: s 1 - 1/4 - 1/4 = 1/2, v 1/2 * 1/2 = 1/4,
    as the neuron fired and none of its voltage is kept.
    """
    config = alif_config(surrogate="triangle", surrogate_slope=1.0)
    x = torch.tensor([1.0, 1.0, 0.25]).view(3, 1, 1).requires_grad_()
    spikes = cpu.kernel(PATHS[0]).scan(built(config), x)
    assert spikes.flatten().tolist() == [1.0, 0.0, 0.0]
    (grad,) = torch.autograd.grad(spikes.sum(), x)
    assert grad.flatten().tolist() == [0.25, 0.5, 1.0]


@pytest.mark.parametrize("analog", [False, True])
def test_the_same_bits_for_any_number_of_threads(analog: bool) -> None:
    actor = made(plif_config(surrogate="atan"), analog)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        act, grads = gradients(actor, f"cpu/{PATHS[0]}", batch=70)
        results.append([act, *grads.values()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_slope_that_a_schedule_changes_is_noticed() -> None:
    actor = made(lif_config(surrogate="atan", surrogate_slope_end=8.0), analog=False)
    for step in (0, 50, 100):
        actor.schedule(step, 100)
        compare(actor, PATHS[0], batch=9)


def test_a_learned_decay_is_read_anew() -> None:
    actor = made(plif_config(), analog=False)
    compare(actor, PATHS[0], batch=9)
    with torch.no_grad():
        for i, neuron in enumerate(actor.neurons):
            neuron.get_parameter("decay_logit").fill_(i - 1.5)
    compare(actor, PATHS[0], batch=9)


def test_what_is_covered() -> None:
    """Every registered neuron runs in one call, unless residuals go over to the next decision."""
    configs = {config.name: config for config in (*SOFT, *HARD)}
    assert sorted(configs) == sorted(NEURONS.options)
    assert sorted(set(EQUATIONS.values())) == list(range(7))
    assert all(why_layered(made(config, analog=False)) is None for config in (*HARD, *SOFT))
    carrying = made(replace(RESIDUAL_IF, alpha=0.2), analog=False)
    assert why_layered(carrying) == "residuals that a decision leaves to the next"
    of_triton = [name(c) for c in (*HARD, *SOFT) if triton_scans(built(c))]
    assert of_triton == ["cuba_lif-hard", "lif-hard"]
    assert not triton_scans(built(replace(CUBA_LIF, surrogate="atan")))
