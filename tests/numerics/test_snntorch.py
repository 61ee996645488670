"""Membranes compared with snnTorch's, which resets right after a spike; ours, before the next step.

With `reset_delay=False` snnTorch's membrane is our voltage after the reset, and the gradient passes
through the reset: `lif` is `Leaky`, `plif` a `Leaky` whose beta is learned, `cuba_lif` is
`Synaptic`, a hard reset is "zero", a soft one "subtract". Soft resets agree only below twice the
threshold: if a voltage still exceeds the threshold after the reset, snnTorch subtracts once more.

By default snnTorch resets one step later. A hard `lif` then has the same spikes, but its gradient
does not pass through the reset; with "subtract" the amount subtracted does not decay, and the
"zero" of `Synaptic` drops a current.
"""

from __future__ import annotations

from typing import Any

import pytest
import snntorch
import torch
from builders import CUBA_LIF, lif_config, neuron_of, plif_config
from snntorch import surrogate
from torch import Tensor, nn

from spikerl.snn.neurons import CubaLIFConfig, Neuron, NeuronConfig

SURROGATE = {
    "sigmoid": surrogate.sigmoid(4.0),
    "atan": surrogate.atan(4.0),
    "rect": surrogate.straight_through_estimator(),  # a window that holds every voltage
}
MECHANISM = {"hard": "zero", "soft": "subtract"}


def make(name: str, **changes: Any) -> Neuron:
    settings = {"surrogate_window": 100.0, "surrogate_slope": 4.0, "voltage_decay": 0.8} | changes
    if name == "cuba_lif":
        return neuron_of(CubaLIFConfig(**(vars(CUBA_LIF) | settings)))
    return neuron_of(lif_config(**settings) if name == "lif" else plif_config(**settings))


def theirs(config: NeuronConfig, beta: Tensor, *, reset_delay: bool = False) -> nn.Module:
    common: dict[str, Any] = {
        "beta": beta,
        "threshold": config.threshold,
        "spike_grad": SURROGATE[config.surrogate],
        "reset_mechanism": MECHANISM[config.reset],
        "reset_delay": reset_delay,
        "learn_beta": True,
    }
    if isinstance(config, CubaLIFConfig):
        return snntorch.Synaptic(alpha=config.current_decay, **common)
    return snntorch.Leaky(**common)


def random_drive(high: float) -> Tensor:
    """Drives for 40 steps and 4 x 8 neurons, uniform from -0.6 `high` to `high`."""
    draw = torch.Generator().manual_seed(0)
    low = -0.6 * high
    return (low + (high - low) * torch.rand(40, 4, 8, generator=draw)).requires_grad_()


def our_run(neuron: Neuron, drive_TBN: Tensor, *, cut: bool = False) -> tuple[Tensor, Tensor]:
    """Spikes, and voltages after the reset; with `cut`, no gradient passes through the reset."""
    state, spikes, kept = neuron.initial(drive_TBN[0]), [], []
    for drive_BN in drive_TBN:
        state = neuron.step(drive_BN, state)
        spikes.append(state.spikes_BN)
        kept.append(neuron.kept(state))
        if cut:
            state = state._replace(spikes_BN=state.spikes_BN.detach())
    return torch.stack(spikes), torch.stack(kept)


def their_run(neuron: nn.Module, drive_TBN: Tensor) -> tuple[Tensor, Tensor]:
    memory, spikes, voltages = (), [], []
    for drive_BN in drive_TBN:
        spike, *memory = neuron(drive_BN, *memory)
        spikes.append(spike)
        voltages.append(memory[-1])
    return torch.stack(spikes), torch.stack(voltages)


def backward(spikes_TBN: Tensor) -> None:
    draw = torch.Generator().manual_seed(1)
    (spikes_TBN * torch.randn(spikes_TBN.shape, generator=draw)).sum().backward()


@pytest.mark.parametrize("kind", SURROGATE)
@pytest.mark.parametrize("reset", MECHANISM)
@pytest.mark.parametrize("name", ["lif", "plif", "cuba_lif"])
def test_spikes_membranes_and_gradients(name: str, reset: str, kind: str) -> None:
    """Spikes and membranes are equal to the bit, gradients up to rounding."""
    ours = make(name, reset=reset, surrogate=kind)
    logit = dict(ours.named_parameters()).get("decay_logit")
    beta = torch.tensor(0.8) if logit is None else torch.sigmoid(logit.detach())
    other = theirs(ours.config, beta.clone())
    # The current of cuba_lif can reach twice its drive. At most, a voltage is 0.8 * 0.5 + 0.59,
    # which is below twice the threshold.
    drive = random_drive(0.295 if name == "cuba_lif" else 0.59)
    theirs_drive = drive.detach().clone().requires_grad_()

    spikes, kept = our_run(ours, drive)
    their_spikes, voltages = their_run(other, theirs_drive)
    assert torch.equal(spikes, their_spikes)
    assert torch.equal(kept, voltages)
    assert 0.05 < spikes.mean() < 0.5

    backward(spikes)
    backward(their_spikes)
    torch.testing.assert_close(drive.grad, theirs_drive.grad, rtol=1e-4, atol=1e-5)
    if logit is not None:
        by_logit = other.get_parameter("beta").grad * beta * (1.0 - beta)  # type: ignore[operator]
        torch.testing.assert_close(logit.grad, by_logit, rtol=1e-4, atol=1e-5)


def test_its_default_cuts_the_reset_from_the_gradient() -> None:
    ours = make("lif", reset="hard", surrogate="atan")
    drive = random_drive(0.59)
    theirs_drive = drive.detach().clone().requires_grad_()
    spikes, _ = our_run(ours, drive, cut=True)
    other = theirs(ours.config, torch.tensor(0.8), reset_delay=True)
    their_spikes, _ = their_run(other, theirs_drive)
    assert torch.equal(spikes, their_spikes)
    backward(spikes)
    backward(their_spikes)
    torch.testing.assert_close(drive.grad, theirs_drive.grad, rtol=1e-4, atol=1e-5)
