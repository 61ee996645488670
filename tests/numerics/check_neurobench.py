"""NeuroBench's own package counts the same operations, sparsity and footprint as spikerl, on the
same networks built of plain torch modules.

The suite does not collect this file, because installing NeuroBench brings many packages.
`pip install neurobench` beside this program, then `pytest tests/numerics/check_neurobench.py`.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import plain
import pytest
import torch
from torch import Tensor, nn

from spikerl import load_policy
from spikerl.energy import operations
from spikerl.energy.synapses import add
from spikerl.models.actor import Actor, MLPActor, SpikingActor, connections
from spikerl.models.compression import prune

benchmarks: Any = import_module("neurobench.benchmarks")

TRAINED = Path(__file__).parents[2] / "outputs/reproduced/popsan_table1"
OBSERVATIONS = 200


def measured(net: nn.Module, obs_BO: Tensor) -> dict[str, Any]:
    from neurobench.metrics.static import ConnectionSparsity, Footprint
    from neurobench.metrics.workload import ActivationSparsity, SynapticOperations
    from neurobench.models import TorchModel

    model = TorchModel(net)
    model.add_activation_module(plain.Fire)
    rows = torch.utils.data.TensorDataset(obs_BO, torch.zeros(len(obs_BO)))
    loader = torch.utils.data.DataLoader(rows, batch_size=50)
    metrics = [[ConnectionSparsity, Footprint], [ActivationSparsity, SynapticOperations]]
    found: dict[str, Any] = benchmarks.Benchmark(model, loader, [], [], metrics).run(quiet=True)
    print(found)
    return found


def check(actor: Actor, net: nn.Module, obs_BO: Tensor) -> None:
    theirs, ours = measured(net, obs_BO), operations.count(actor, obs_BO)
    parts = [ours.network, *([ours.decoder.synapses] if ours.decoder else [])]
    synapses, counted = add(*parts), theirs["SynapticOperations"]
    for name, value in (
        ("Dense", synapses.dense),
        ("Effective_MACs", synapses.macs),
        ("Effective_ACs", synapses.acs),
    ):
        assert value == pytest.approx(float(counted[name]), rel=1e-9)
    assert ours.activation_sparsity == pytest.approx(theirs["ActivationSparsity"], rel=1e-9)
    assert round(ours.connection_sparsity, 4) == theirs["ConnectionSparsity"]  # rounded
    assert ours.footprint_bytes == theirs["Footprint"]


@pytest.mark.parametrize("share", [None, 0.9])
def test_a_trained_spiking_policy(share: float | None) -> None:
    actor = load_policy(TRAINED / "popsan_td3/InvertedDoublePendulum/seed0").actor
    assert isinstance(actor, SpikingActor)
    obs = torch.randn(OBSERVATIONS, actor.obs_dim, generator=torch.Generator().manual_seed(0))
    if share is not None:
        prune(actor, share)
    twin = plain.Spiking(actor)
    torch.testing.assert_close(twin(obs), actor(obs), rtol=0, atol=1e-4)
    check(actor, twin, obs)


def test_a_trained_dense_policy() -> None:
    actor = load_policy(TRAINED / "dense_td3/InvertedDoublePendulum/seed0").actor
    assert isinstance(actor, MLPActor)
    draw = torch.Generator().manual_seed(1)
    obs = torch.randn(OBSERVATIONS, actor.obs_dim, generator=draw)
    plain.cut_weights(list(connections(actor).values()), draw)
    check(actor, plain.dense(actor), obs)
