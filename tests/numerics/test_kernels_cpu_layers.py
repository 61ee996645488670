"""Networks that run layer by layer on the C++ kernel, against the reference."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from builders import (
    CUBA_LIF,
    POISSON,
    POPULATION,
    RATE,
    alif_config,
    care_bn_config,
    lif_config,
    membrane_config,
    plif_config,
    popsan,
)
from builders import neuron_of as built
from sequences import contexts, network
from torch import Tensor

from spikerl import kernels
from spikerl.kernels import build as native
from spikerl.kernels import cpu, reference
from spikerl.kernels.coverage import events
from spikerl.kernels.gradient import Gradient
from spikerl.kernels.prepared import fused
from spikerl.models.actor import SpikingActor
from spikerl.models.spikeformer import Spikeformer
from spikerl.snn.batchnorm import ROWS
from spikerl.snn.decoders import DecoderConfig, ILCDecoder
from spikerl.snn.encoders import EncoderConfig
from spikerl.snn.linear import ListOf
from spikerl.snn.neurons import CubaLIF, NeuronConfig, State

PATHS = native.supported_paths()
TANH = replace(POPULATION, name="tanh_population", mean_range=[-1.0, 1.0], var=0.05)
MEMBRANE, ILC = membrane_config(), membrane_config(name="ilc")
ACTORS = {
    "membrane": (POPULATION, CUBA_LIF, MEMBRANE),
    "poisson": (POISSON, alif_config(reset="soft"), MEMBRANE),
    "tanh": (TANH, lif_config(), DecoderConfig(name="linear")),
    "ilc": (POPULATION, plif_config(), ILC),
    "currents": (
        EncoderConfig(name="learned"), lif_config(surrogate="atan"), DecoderConfig(name="learned"),
    ),
}  # fmt: skip


def directions(actor: SpikingActor, kernel: str, batch: int = 21) -> dict[str, Tensor]:
    """The actions, and the gradient of each parameter."""
    draw = torch.Generator().manual_seed(2)
    obs, direction = torch.randn(batch, 4, generator=draw), torch.randn(batch, 2, generator=draw)
    actor.kernel = kernel
    act, pull = actor.vjp(obs, torch.Generator().manual_seed(1))
    into = Gradient(list(actor.parameters()))
    pull(direction, into)
    names = [name for name, p in actor.named_parameters() if p.requires_grad]
    return {"actions": act, **dict(zip(names, into.slots, strict=True))}


def close(ours: Tensor, theirs: Tensor) -> bool:
    return float((ours - theirs).norm()) <= 2e-5 * float(theirs.norm())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ACTORS)
def test_networks(path: str, kind: str) -> None:
    encoder, neuron, decoder = ACTORS[kind]
    torch.manual_seed(3)
    actor = popsan(4, 2, [37, 18], encoder=encoder, neuron=neuron, decoder=decoder)
    with torch.no_grad():
        for layer in actor.layers:
            layer.weight_IN.mul_(2.0)
    assert not fused(actor)
    ours = directions(copy.deepcopy(actor), f"cpu/{path}")
    for name, theirs in directions(actor, "reference").items():
        assert float(theirs.norm()) > 0.0, name
        assert close(ours[name], theirs), name
    obs = torch.randn(3, 4)  # few samples, and no gradient
    with torch.no_grad():
        acts = []
        for kernel in ("reference", f"cpu/{path}"):
            actor.kernel = kernel
            acts.append(actor(obs, torch.Generator().manual_seed(1)))
    torch.testing.assert_close(acts[1], acts[0], rtol=0, atol=1e-6)


def test_normalised_drives() -> None:
    """A bias before a normalisation has a gradient of 0, apart from rounding."""
    torch.manual_seed(3)
    actor = SpikingActor(4, 2, care_bn_config([37, 18]), TANH, CUBA_LIF, RATE)
    twin = copy.deepcopy(actor)
    theirs, ours = directions(actor, "reference"), directions(twin, f"cpu/{PATHS[0]}")
    for name, grad in theirs.items():
        if name.startswith("layers") and name.endswith("bias_N"):
            assert float(ours[name].abs().max()) < 1e-4
        else:
            assert close(ours[name], grad), name
    for norm, other in zip(twin.norms, actor.norms, strict=True):
        assert other.mean_N.any()
        torch.testing.assert_close(norm.mean_N, other.mean_N)
        torch.testing.assert_close(norm.var_N, other.var_N)


@pytest.mark.parametrize("path", PATHS)
def test_rows_of_a_normalisation(path: str) -> None:
    rows = cpu.kernel(path).parts.rows
    x, grad, normal = torch.randn(3, 5, 7, 19)
    mean, inverse, gamma, beta = torch.rand(4, 19) + 0.5
    means = torch.randn(2, 19)
    pairs = [
        (rows.sums(x), ROWS.sums(x)),
        (rows.affine(x, mean, inverse, beta), ROWS.affine(x, mean, inverse, beta)),
        (rows.gradient_sums(grad, normal), ROWS.gradient_sums(grad, normal)),
        (
            rows.gradient(grad, normal, gamma, means),
            ROWS.gradient(grad, normal, gamma, means),
        ),
        *zip(
            rows.normalise(x, mean, inverse, gamma, beta),
            ROWS.normalise(x, mean, inverse, gamma, beta),
            strict=True,
        ),
    ]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)
    wide = x.double()  # C++ does not take float64
    assert torch.equal(rows.affine(wide, *wide[0, :3]), ROWS.affine(wide, *wide[0, :3]))
    assert torch.equal(rows.sums(wide), ROWS.sums(wide))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["pssa", "tssa"])
def test_a_spikeformer(path: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training and acting use the kernel's products, neurons and normalisations."""
    made, steps, normalised = network(kind, layers=2), contexts(6), []
    assert isinstance(made, Spikeformer)
    made.schedule(1.0)  # batch normalisation alone
    fast = copy.deepcopy(made)
    fast.kernel, kernel = f"cpu/{path}", kernels.named(f"cpu/{path}")

    def normalise(*given: Tensor) -> tuple[Tensor, Tensor]:
        normalised.append(given)
        return ROWS.normalise(*given)

    def in_pytorch(*given: object) -> Tensor:
        raise AssertionError(given)

    monkeypatch.setattr(reference, "drive", in_pytorch)  # `made` does not look it up any more
    rows = kernel.parts.rows._replace(normalise=normalise)
    monkeypatch.setattr(kernel, "parts", kernel.parts._replace(rows=rows))
    results = []
    for net in (made, fast):
        act = net(steps, torch.Generator())
        params = [p for name, p in net.named_parameters() if p.requires_grad and ".ln." not in name]
        results.append((act, *torch.autograd.grad(act.square().sum(), params), net(steps)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    assert len(normalised) == 2 * 6 + 1


@pytest.mark.parametrize("neuron", [CUBA_LIF, plif_config(reset="soft"), alif_config()])
def test_connected_neurons(neuron: NeuronConfig) -> None:
    """The results are equal, as all numbers are binary fractions that fit 24 bits for two steps."""
    decoder = ILCDecoder(membrane_config(name="ilc", pop_size=3), 2, 0, 2)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in decoder.parameters():
            p.copy_(torch.randint(-3, 4, p.shape, generator=draw) / 4.0)
    made = built(replace(neuron, voltage_decay=0.5))  # type: ignore[call-arg]
    drive = torch.randint(-1, 4, (2, 9, 6), generator=draw) / 4.0
    weight = torch.randint(-3, 4, drive.shape, generator=draw) / 2.0
    found = []
    for scan in (reference.connected_scan, cpu.kernel(PATHS[0]).connected_scan):
        x = drive.clone().requires_grad_()
        spikes = scan(made, x, decoder)
        inputs = [x, decoder.lateral_APP, decoder.lateral_bias_N, *made.parameters()]
        found.append((spikes.detach(), *torch.autograd.grad((spikes * weight).sum(), inputs)))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)
        assert theirs.any()


def test_the_same_bits_for_any_number_of_threads() -> None:
    torch.manual_seed(3)
    actor = popsan(4, 2, [37, 18], decoder=membrane_config())
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append([t.clone() for t in directions(actor, f"cpu/{PATHS[0]}", 70).values()])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_second_way_back_fails() -> None:
    """The memory that a gradient needs is released after the first one."""
    actor = popsan(4, 2, [9], decoder=membrane_config())
    actor.kernel = f"cpu/{PATHS[0]}"
    loss = actor(torch.randn(5, 4)).sum()
    params = list(actor.parameters())
    assert torch.autograd.grad(loss, params, retain_graph=True)[2].any()
    with pytest.raises(AttributeError):
        torch.autograd.grad(loss, params)


def test_more_spike_steps_than_a_word_has_bits_run_in_pytorch() -> None:
    torch.manual_seed(3)
    actor = popsan(4, 2, [9], spike_steps=33)
    ours = directions(copy.deepcopy(actor), f"cpu/{PATHS[0]}", 3)
    assert torch.equal(ours["actions"], directions(actor, "reference", 3)["actions"])


class Doubled(CubaLIF):
    """A neuron as a user may write, whose spikes are 0 or 2."""

    def step(self, drive_BN: Tensor, state: State) -> State:
        after = super().step(drive_BN, state)
        return after._replace(spikes_BN=2.0 * after.spikes_BN)


def test_what_is_no_spike_runs_in_pytorch() -> None:
    """Outputs of a neuron that the kernel does not know; and weights of float64."""
    torch.manual_seed(3)
    actor = popsan(4, 2, [9, 8], decoder=membrane_config())
    wide = copy.deepcopy(actor).double()
    first, second, _ = actor.layers
    assert events(first, actor.encoder, 5, torch.float32)
    assert events(second, actor.neurons[0], 5, torch.float32)
    assert not events(second, actor.neurons[0], 5, torch.bfloat16)
    actor.neurons = ListOf(Doubled(CUBA_LIF) for _ in actor.layers)
    assert not events(second, actor.neurons[0], 5, torch.float32)
    with torch.no_grad():
        for layer in actor.layers:
            layer.weight_IN.mul_(4.0)
    ours = directions(copy.deepcopy(actor), f"cpu/{PATHS[0]}")
    for name, theirs in directions(actor, "reference").items():
        assert close(ours[name], theirs), name
    obs = torch.randn(3, 4, dtype=torch.float64)
    acts = []
    for kernel in ("reference", f"cpu/{PATHS[0]}"):
        wide.kernel = kernel
        acts.append(wide(obs))
    assert torch.equal(*acts)
