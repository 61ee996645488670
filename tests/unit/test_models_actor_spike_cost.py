"""The cost of spikes in an actor's loss: by hand, against autograd, and in every algorithm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import (
    care_bn_config,
    ddpg_config,
    fill,
    lif_config,
    membrane_config,
    popsan,
    popsan_config,
    ppo_config,
    proxy_td3_config,
    sac_config,
    td3_config,
)
from plain import doubled, float64, transitions
from shell import SHORT, refusal, spikerl
from torch import Tensor

from spikerl.algos import ALGOS
from spikerl.algos.ppo import PPO, Rows
from spikerl.kernels import build as native
from spikerl.kernels.gradient import Gradient
from spikerl.models.actor import SpikingActor
from spikerl.models.critic import Critics
from spikerl.snn.decoders import DecoderConfig
from spikerl.snn.encoders import EncoderConfig

KERNELS = ["reference", f"cpu/{native.supported_paths()[0]}"]
DIRECT, LINEAR = EncoderConfig(name="direct"), DecoderConfig(name="linear")


@pytest.mark.parametrize("kernel", KERNELS)
def test_two_neurons_by_hand(kernel: str) -> None:
    """Two spike steps of v = 0.75 v (1 - o) + x, o = [v > 0.5], every voltage inside the window.

    One neuron has x = 0.75: v = 0.75, 0.75, and fires twice. The other has 0.25: v = 0.25, 0.4375.
    2 of 4 possible spikes at a cost of 3 are a loss of 1.5, with a gradient of 3 / 4 by each.
    Back through time that is 0.75 * 0.75 = 0.5625 through the decay, unless the spike reset v,
    and -0.5625 v through the reset:
    0.75 + (0.75 - 0.5625 * 0.75) = 1.078125 for the first neuron, which is reset;
    0.75 + (0.75 - 0.5625 * 0.25) + 0.5625 = 1.921875 for the second.
    """
    parts: dict[str, Any] = {"encoder": DIRECT, "neuron": lif_config(), "decoder": LINEAR}
    actor = popsan(1, 1, [2], spike_steps=2, spike_cost=3.0, **parts)
    fill(actor, {"layers.0.weight_IN": [[0.75, 0.25]], "layers.0.bias_N": [0.0, 0.0]})
    actor.kernel = kernel
    actor.schedule(0, 1)
    act, pull = actor.vjp(torch.ones(1, 1), None)
    into = Gradient(list(actor.parameters()), weight=0.5)
    into.loss.fill_(10.0)
    assert pull(torch.zeros_like(act), into)["spike_loss"] == 1.5
    assert into.loss == 10.75
    weight, bias, *decoder = into.slots
    assert (2.0 * weight).tolist() == [[1.078125, 1.921875]]
    assert (2.0 * bias).tolist() == [1.078125, 1.921875]
    assert not any(slot.any() for slot in decoder)


def fired(v: Tensor) -> Tensor:
    """A step at 0.5 whose derivative is 1 for v in (0, 1), and 0 elsewhere."""
    through = torch.where((v - 0.5).abs() < 0.5, v, v.detach())
    return (v > 0.5).to(v.dtype) + through - through.detach()


def rates(actor: SpikingActor, obs: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Rates (B, N) of the last layer of cuba_lif neurons, and the mean rate of each layer."""
    layers = list(actor.layers)
    c = [torch.zeros(len(obs), len(layer.bias_N)) for layer in layers]
    v, o = [x.clone() for x in c], [x.clone() for x in c]
    history: list[list[Tensor]] = [[] for _ in layers]
    for x in actor.encoder(obs, actor.spike_steps, None):
        for i, layer in enumerate(layers):
            c[i] = 0.5 * c[i] + x @ layer.weight_IN + layer.bias_N
            v[i] = 0.75 * v[i] * (1.0 - o[i]) + c[i]
            x = o[i] = fired(v[i])
            history[i].append(x)
    each = [torch.stack(spikes).mean(0) for spikes in history]
    return each[-1], [rate.sum() / rate.numel() for rate in each]


def test_against_autograd() -> None:
    """Gradients of the whole loss in float64, with a cost for each layer; one cost is 0."""
    with float64():
        torch.manual_seed(0)
        costs = [0.7, 0.0, 1.9]
        actor = popsan(3, 2, [9, 7], dtype=torch.float64, spike_cost=costs).double()
        actor.schedule(0, 1)
        obs, direction = torch.randn(11, 3), torch.randn(11, 2)
        last, means = rates(actor, obs)
        out, weight, bias = last.view(11, 2, 10), *actor.decoder.parameters()
        act = torch.tanh((out * weight).sum(-1) + bias)
        cost = sum(c * m for c, m in zip(costs, means, strict=True))
        expected = torch.autograd.grad((act * direction).sum() + cost, list(actor.parameters()))
        ours, pull = actor.vjp(obs, None)
        into = Gradient(list(actor.parameters()))
        loss = pull(direction, into)["spike_loss"]
    torch.testing.assert_close(ours, act.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(loss, torch.as_tensor(cost).detach(), rtol=1e-12, atol=1e-14)
    for slot, grad in zip(into.slots, expected, strict=True):
        torch.testing.assert_close(slot, grad, rtol=1e-9, atol=1e-12)
        assert grad.any()


RULES = {
    "ddpg": ddpg_config(),
    "td3": td3_config(),
    "proxy_td3": proxy_td3_config(proxy_steps=1),
    "sac, separate": sac_config(),
    "sac, shared": sac_config(log_std="shared"),
    "ppo": ppo_config(),
}


@pytest.mark.parametrize("rule", RULES)
def test_every_algorithm_adds_it_to_its_own_loss(rule: str) -> None:
    """First updates with and without a cost differ in loss and gradient by those of the cost."""
    config: Any = RULES[rule]
    found: list[tuple[Any, list[Tensor]]] = []
    with float64():
        rows = transitions(20, torch.float64)
        for cost in (0.0, 2.0):
            torch.manual_seed(0)
            outputs = config.outputs(2)
            actor = popsan(3, outputs, [8], dtype=torch.float64, spike_cost=cost).double()
            actor.schedule(0, 1)
            networks, acts = config.critics, 0 if config.name == "ppo" else 2
            critic = Critics(3, acts, [8], networks=networks, dtype=torch.float64)
            generator = torch.Generator().manual_seed(0)
            learner: Any = ALGOS.part(config)(
                actor, critic, config, actor_lr=1e-3, generator=generator
            )
            learner = doubled(learner)
            expected = 2.0 * torch.stack(rates(actor, rows.obs)[1]).sum()
            spiking = torch.autograd.grad(expected, list(actor.parameters()), allow_unused=True)
            if isinstance(learner, PPO):
                logp = torch.full((20, 2), -1.0)
                metrics = learner.update(Rows(rows.obs, rows.act, logp, rows.rew, rows.rew))
            else:
                (metrics,) = learner.run_updates(rows, 1)
            gradient = learner.actor_optimizer.gradient
            found.append((metrics, [slot.clone() for slot in gradient.slots]))
    (without, plain), (metrics, ours) = found
    assert "spike_loss" not in without
    torch.testing.assert_close(metrics["spike_loss"], expected.detach(), rtol=1e-12, atol=1e-14)
    added = metrics["actor_loss"] - without["actor_loss"]
    torch.testing.assert_close(added, metrics["spike_loss"], rtol=1e-12, atol=1e-14)
    for one, other, own in zip(ours, plain, spiking, strict=True):
        difference = torch.zeros_like(one) if own is None else own  # the decoder has none
        torch.testing.assert_close(one - other, difference, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("warmup", "expected"),
    [
        (0, {99: 0.0, 100: 1.0, 101: 1.0, 900: 1.0}),
        (50, {0: 0.0, 99: 0.0, 100: 0.0, 125: 0.5, 150: 1.0, 151: 1.0, 900: 1.0}),
    ],
)
def test_schedule(warmup: int, expected: dict[int, float]) -> None:
    """Costs begin at step 100. Their tensor stays at one address, where CUDA graphs read it."""
    actor = popsan(1, 1, [2], spike_cost=[4.0, 8.0], spike_cost_start=100, spike_cost_warmup=warmup)
    places = set()
    for step, share in expected.items():
        actor.schedule(step, 1000)
        assert actor.spike_cost_L is not None
        assert actor.spike_cost_L.tolist() == [4.0 * share, 8.0 * share]
        places.add(actor.spike_cost_L.data_ptr())
    assert len(places) == 1


def test_layers_that_there_are() -> None:
    """Each layer has a cost, and so has an output population; a linear decoder has none."""
    for changes, layers in (({}, 3), ({"decoder": membrane_config()}, 3), ({"decoder": LINEAR}, 2)):
        actor = popsan(1, 1, [2, 2], spike_cost=0.5, **changes)
        assert actor.spike_costs == [0.5] * layers
        said = refusal(popsan, 1, 1, [2, 2], spike_cost=[0.5] * (layers + 1), **changes)
        assert said.args[0] == "actor.spike_cost"
        assert f"has {layers} spiking layers" in said.args[2]
    assert popsan(1, 1, [2], spike_cost=[0, 0]).spike_costs == []
    assert care_bn_config([2]).spike_cost == 0.0


@pytest.mark.parametrize("value", [-0.1, [0.1, -1.0], [], "much", True, None, float("nan")])
def test_costs_without_a_meaning(value: Any) -> None:
    said = refusal(popsan_config, [2], spike_cost=value)
    assert said.args[0] == "actor.spike_cost"
    assert said.args[2] == "give a number of 0 or more, or a list of one for each layer"


@pytest.mark.parametrize(
    ("request_", "line"),
    [
        ("actor.spike_cost=-1", "actor.spike_cost=-1: give a number of 0 or more"),
        ("actor.spike_cost=[1,2,3]", "actor.spike_cost=[1, 2, 3]: the actor has 2 spiking layers"),
        ("actor.spike_cost_start=-1", "actor.spike_cost_start=-1: give 0 or more"),
        ("actor.spike_cost_warmup=1.5", "actor.spike_cost_warmup=1.5: expected int"),
    ],
)
def test_refused_requests(request_: str, line: str, tmp_path: Path) -> None:
    said = spikerl("train", *SHORT, f"run_dir={tmp_path / 'run'}", request_)
    assert said.line.startswith(line)
    assert not list(tmp_path.iterdir())


def test_a_dense_actor_has_no_spikes(tmp_path: Path) -> None:
    said = spikerl("train", *SHORT, f"run_dir={tmp_path}", "actor=mlp", "actor.spike_cost=1")
    assert said.line.startswith("actor.spike_cost=1: ")


def test_a_run(tmp_path: Path) -> None:
    """The metric is null before the first update; the policy's file does not have the cost."""
    run = tmp_path / "run"
    said = spikerl(
        "train", *SHORT, f"run_dir={run}", "algo.learning_starts=160", "actor.spike_cost=0.5"
    )
    assert said.status == 0, said
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    before, *after = [row["spike_loss"] for row in rows]
    assert before is None
    assert all(0.0 < loss < 1.0 for loss in after)  # at most 0.5 for each of two layers
    policy = json.loads((run / "policy.json").read_text())
    assert policy["actor"].keys() == {"name", "hidden_sizes", "spike_steps", "lr"}
