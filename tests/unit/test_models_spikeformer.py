"""Decision SpikeFormer: it acts as it was trained, and sees neither later steps nor padding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from plain import float64
from sequences import LIF, PlainSpikeformer, contexts, network, spikeformer_config

from spikerl.models.spikeformer import Spikeformer
from spikerl.snn.neurons import Neuron


def trained(kind: str, dtype: torch.dtype = torch.float64) -> Spikeformer:
    """A Spikeformer whose running moments are those of some batches."""
    made = network(kind)
    assert isinstance(made, Spikeformer)
    made = made.to(dtype)
    made.schedule(0.1)
    for seed in range(20):
        made(contexts(8, dtype, seed), torch.Generator())
    return made


@pytest.mark.parametrize("kind", ["pssa", "tssa"])
@torch.no_grad()
def test_folded_it_acts_the_same(kind: str) -> None:
    with float64():
        made, steps = trained(kind), contexts(16, torch.float64, 99)
        small = made.inference()
    assert not any("norm." in name for name in small.state_dict() if "embed" not in name)
    torch.testing.assert_close(small(steps), made(steps), rtol=1e-9, atol=1e-9)
    assert float(small(steps).std()) > 0.05
    spikes, _ = small.counts(steps)
    assert all(float(counts.sum()) > 0.0 for counts in spikes)


@pytest.mark.parametrize("kind", ["pssa", "tssa"])
@pytest.mark.parametrize("theta", [0.8, 0.0])
def test_actions_are_those_of_plain_pytorch(kind: str, theta: float) -> None:
    made = network(kind)
    assert isinstance(made, Spikeformer)
    plain, steps = PlainSpikeformer(made), contexts(6)
    made.schedule(0.5 * (1.0 - theta))  # theta reaches 0 at norm_share = 1/2
    plain.theta = theta
    torch.testing.assert_close(made(steps, torch.Generator()), plain(steps), rtol=1e-4, atol=1e-5)


def test_what_acts_has_the_slopes_of_what_is_trained() -> None:
    moving = replace(LIF, surrogate="triangle", surrogate_slope=2.0, surrogate_slope_end=8.0)
    made = Spikeformer(3, 2, spikeformer_config(), moving)
    made.schedule(0.5)
    neurons = [part for part in made.inference().modules() if isinstance(part, Neuron)]
    assert {neuron.scale for neuron in neurons} == {5.0}


def test_theta_falls_evenly() -> None:
    made = network()
    assert isinstance(made, Spikeformer)
    assert made.norm is not None
    found = []
    for share in (0.0, 0.125, 0.25, 0.5, 1.0):
        made.schedule(share)
        found.append(made.norm.theta)
    assert found == [1.0, 0.75, 0.5, 0.0, 0.0]


@pytest.mark.parametrize("kind", ["pssa", "tssa", "dense"])
@torch.no_grad()
def test_a_decision_sees_neither_what_follows_nor_padding(kind: str) -> None:
    made = network(kind).inference()
    steps = contexts(4)  # the last context has two steps
    acts = made(steps)
    later = steps._replace(obs=steps.obs.clone(), act=steps.act.clone(), togo=steps.togo.clone())
    later.obs[:, 4], later.togo[:, 4], later.act[:, 3:] = 9.0, 9.0, 0.5
    changed = made(later)
    before_it = steps.there[:, :4]
    torch.testing.assert_close(changed[:, :4][before_it], acts[:, :4][before_it])
    assert not torch.equal(changed[:, 4], acts[:, 4])
    before = steps._replace(obs=steps.obs.clone())
    before.obs[3, :2] = 9.0  # padding
    torch.testing.assert_close(made(before)[3, 3:], acts[3, 3:])
    for field in ("obs", "act", "togo"):
        other = steps._replace(**{field: getattr(steps, field) * 3.0 + 0.5})
        assert not torch.equal(made(other)[:, 4], acts[:, 4]), field


def test_counts_by_hand() -> None:
    """The first layer's drive is the embedding, constant over three spike steps."""
    made = network()
    assert isinstance(made, Spikeformer)
    made, steps = made.inference(), contexts(4)
    before = torch.nn.functional.pad(steps.act[:, :-1], (0, 0, 1, 0))
    token = torch.cat([steps.obs, before, steps.togo.unsqueeze(2)], 2)[steps.there]
    drive = made.embed_norm(made.embed(token)).detach()
    expected, voltage, fired = torch.zeros(8), torch.zeros_like(drive), torch.zeros_like(drive)
    inside = torch.zeros(8)
    for _ in range(3):
        voltage = 0.25 * voltage * (1.0 - fired) + drive
        fired = (voltage > 0.5).float()
        expected += fired.sum(0)
        inside += ((voltage - 0.5).abs() < 0.5).sum(0)
    spikes, near = made.counts(steps)
    assert len(spikes) == len(near) == 14
    torch.testing.assert_close(spikes[0], expected.double())
    torch.testing.assert_close(near[0], inside.double())
