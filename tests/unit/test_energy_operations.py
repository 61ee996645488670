"""Operations per decision: by hand on a network of a few neurons, and by NeuroBench's rules."""

from __future__ import annotations

from dataclasses import replace

import builders
import numpy as np
import plain
import pytest
import torch
from exports import DENSE, config, policy_of, task
from hand_worked import SEEN, UNSEEN, dense, encoder, rate_decoded, spiking
from torch import Tensor, nn

from spikerl.energy import operations
from spikerl.energy.synapses import Count, Synapses, Update, add
from spikerl.errors import BadRequest
from spikerl.models.actor import MLPActor
from spikerl.models.actor_config import ActorConfig, MLPConfig
from spikerl.snn.neurons import CubaLIF


def test_a_spiking_network_by_hand() -> None:
    ops = operations.count(rate_decoded(), torch.tensor([SEEN]))
    assert ops.parts == [
        Count("encoder", Synapses(4, 4), 4, Update(0, 2, 1), spikes=2, functions=2),
        # Two spikes pass one weight each; three weights that are not 0 count in two spike steps.
        Count("hidden 1", Synapses(8, 0, 2, 6), 4, Update(1, 1, 1), spikes=2),
        Count("output", Synapses(12, 0, 4, 10), 6, Update(1, 1, 1), spikes=3),
        # Spike counts 2, 0, 1 and weights 2, 1, 0: one product is not 0. Three spikes are counted.
        Count("decoder", Synapses(3, 1), 3, Update(0, 1, 1), functions=1),
    ]
    assert ops.rate == 6 / 16
    assert ops.activation_sparsity == 0.5  # 5 of 10 are silent
    assert ops.connection_sparsity == 3 / 13
    assert ops.footprint_bytes == 4 * 23
    assert (ops.observations, ops.spike_steps) == (1, 2)
    assert (ops.twin.sizes, ops.twin.macs, ops.twin.activations) == ([2, 2, 1], 6, 5)
    assert ops.twin.footprint_bytes == 4 * 9


def test_counts_are_means_over_observations() -> None:
    ops = operations.count(rate_decoded(), torch.tensor([SEEN, UNSEEN, UNSEEN, UNSEEN]))
    assert ops.network == Synapses(20, 0, 1.5, 16)
    assert [part.spikes for part in ops.parts] == [0.5, 0.5, 0.75, 0]
    assert [part.updates for part in ops.parts] == [4, 4, 6, 0.75]
    assert ops.decoder
    assert ops.decoder.synapses == Synapses(3, 0.25)
    assert ops.activation_sparsity == 1 - 5 / 40


def test_a_dense_network_by_hand() -> None:
    """(1, 0) reaches one weight that is not 0 and gives (1, 0); (0, 1) reaches two and gives
    relu(-1, 1).
    """
    ops = operations.count(dense(), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert ops.parts == [
        Count("hidden 1", Synapses(4, 1.5)),
        Count("output", Synapses(2, 1), functions=1),
    ]
    assert (ops.encoder, ops.decoder, ops.spike_steps, ops.rate) == (None, None, None, None)
    assert ops.activation_sparsity == 0.5
    assert ops.connection_sparsity == 1 / 6
    assert ops.footprint_bytes == ops.twin.footprint_bytes == 4 * 9
    assert ops.twin.sizes == [2, 2, 1]


@pytest.mark.parametrize("parts", [DENSE, config()], ids=["dense", "spiking"])
def test_values_are_compared_without_tanh(parts: ActorConfig) -> None:
    """Two action entries need two tanhs, the values of two discrete actions none."""
    none = np.empty(0)
    values = replace(task(3, 2), act_shape=(), act_low=none, act_high=none, choices=range(2))
    for own, tanhs in ((task(3, 2), 2), (values, 0)):
        policy = policy_of(parts, own)
        ops = operations.of_policy(policy, torch.zeros(1, 3), torch.Generator())
        assert ops
        assert ops.parts[-1].functions == tanhs


def test_parts_of_unknown_kind_are_refused() -> None:
    actor = spiking()

    class Mine(type(actor.encoder)):  # type: ignore[misc]
        """A subclass may compute anything."""

    actor.encoder = Mine(encoder(), 2, 2)
    with pytest.raises(BadRequest) as refused:
        operations.count(actor, torch.tensor([SEEN]))
    assert refused.value.args == (
        "ops",
        "true",
        "the operations of Mine are not known; leave ops out",
    )


def test_a_neuron_of_ones_own_with_the_config_of_lif_is_refused() -> None:
    class Own(CubaLIF):
        """A subclass may compute anything."""

    actor = spiking()
    actor.neurons[0] = Own(actor.neurons[0].config)
    with pytest.raises(BadRequest, match="the operations of Own are not known"):
        operations.check(actor)


# --- NeuroBench's rules, on plain modules -----------------------------------------------------
# tests/numerics/check_neurobench.py compares with NeuroBench itself.


class NeuroBench:
    """Counts products of nonzero inputs and weights: ACs if all inputs of a call are 0 or 1, else
    MACs.
    """

    def __init__(self, net: nn.Module) -> None:
        self.macs = self.acs = self.dense = 0.0
        for module in net.modules():
            if isinstance(module, nn.Linear | nn.Conv1d):
                module.register_forward_pre_hook(self.see)

    def see(self, module: nn.Module, inputs: tuple[Tensor]) -> None:
        (x,), weight = inputs, module.get_parameter("weight").detach()

        def apply(x: Tensor, weight: Tensor) -> float:
            if isinstance(module, nn.Conv1d):
                y = nn.functional.conv1d(x, weight, groups=module.groups)
            else:
                y = nn.functional.linear(x, weight)
            return float(y.double().sum())

        effective = apply((x != 0).float(), (weight != 0).float())
        self.dense += apply(torch.ones_like(x), torch.ones_like(weight))
        if bool(((x == 0) | (x == 1)).all()):
            self.acs += effective
        else:
            self.macs += effective


def test_a_spiking_actor_by_the_rules_of_neurobench() -> None:
    draw = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        actor = builders.popsan(3, 2, [16, 12])
    plain.cut_weights(
        [*(x.weight_IN for x in actor.layers), actor.decoder.get_parameter("weight_AP")], draw
    )
    obs = torch.randn(50, 3, generator=draw)
    twin = plain.Spiking(actor)
    bench = NeuroBench(twin)
    torch.testing.assert_close(twin(obs), actor(obs))
    ops = operations.count(actor, obs)
    assert ops.decoder
    ours = add(ops.network, ops.decoder.synapses)
    assert (ours.dense, ours.macs, ours.acs) == pytest.approx(
        (bench.dense / 50, bench.macs / 50, bench.acs / 50), rel=1e-12
    )
    assert 0 < ours.macs < ours.acs < ours.dense


def test_a_dense_actor_by_the_rules_of_neurobench() -> None:
    draw = torch.Generator().manual_seed(1)
    actor = MLPActor(3, 2, MLPConfig(name="mlp", hidden_sizes=[16, 12], lr=1e-3))
    plain.cut_weights([x.weight_IN for x in actor.layers], draw)
    obs = torch.randn(50, 3, generator=draw)
    obs[::2, 1] = 0.0
    twin = plain.dense(actor)
    bench = NeuroBench(twin)
    twin(obs)
    ours = operations.count(actor, obs).network
    assert (ours.dense, ours.macs, ours.acs) == pytest.approx(
        (bench.dense / 50, bench.macs / 50, 0.0), rel=1e-12
    )
    assert 0 < ours.macs < ours.dense
