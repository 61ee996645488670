"""Inputs of the C++ library. It trusts the sizes that it is given, so shapes, types and devices are
checked before it is called; inputs that it does not take run in PyTorch, with the same results.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from builders import membrane_config, popsan
from torch import Tensor, nn

from spikerl import kernels
from spikerl.kernels import build as native
from spikerl.kernels import coverage, reference
from spikerl.kernels.cpu.blocks import BlockCache
from spikerl.kernels.cpu.network import OneAction
from spikerl.kernels.gradient import Gradient
from spikerl.kernels.prepared import fused
from spikerl.models.actor import MLPActor, SpikingActor
from spikerl.models.actor_config import MLPConfig
from spikerl.models.critic import Critics
from spikerl.snn.decoders import ILCDecoder
from spikerl.snn.early_exit import EarlyExit
from spikerl.snn.encoders import Encoder
from spikerl.snn.neurons import Neuron
from spikerl.types import Batch, Task

KERNEL = f"cpu/{native.supported_paths()[0]}"
CPU: Any = kernels.named(KERNEL)


def an_actor(**kwargs: Any) -> SpikingActor:
    torch.manual_seed(0)
    actor = popsan(4, 2, [24, 16], **kwargs)
    with torch.no_grad():
        for layer in actor.layers:
            layer.weight_IN.mul_(3.0)
    actor.kernel = KERNEL
    return actor


def a_dense_net() -> MLPActor:
    torch.manual_seed(0)
    net = MLPActor(4, 2, MLPConfig(name="mlp", hidden_sizes=[16], lr=1e-3))
    net.kernel = KERNEL
    return net


def some_critics() -> tuple[Critics, Batch]:
    torch.manual_seed(0)
    obs, act, rew = torch.randn(6, 3), torch.rand(6, 2) * 2 - 1, torch.randn(6)
    return Critics(3, 2, [8, 8], kernel=KERNEL), Batch(
        obs, act, rew, torch.randn(6, 3), torch.arange(6) % 3 == 0, torch.full((6,), 0.9)
    )


# --- wrong shapes raise a ValueError; they are not broadcast as in PyTorch ------------------------


@pytest.mark.parametrize("shape", [(4,), (6, 3), (6, 5), (6, 1), (2, 6, 4)], ids=str)
@pytest.mark.parametrize("made", [an_actor, a_dense_net])
def test_observations(made: Callable[[], SpikingActor | MLPActor], shape: tuple[int, ...]) -> None:
    net = made()
    with torch.no_grad(), pytest.raises(ValueError, match="is due"):
        net(torch.randn(shape))
    with pytest.raises(ValueError, match="is due"):
        net.vjp(torch.randn(shape), None)


def test_observations_of_a_network_that_runs_layer_by_layer() -> None:
    actor = an_actor(decoder=membrane_config())
    assert not fused(actor)
    with torch.no_grad(), pytest.raises(ValueError, match="is due"):
        actor(torch.randn(6, 1))


@pytest.mark.parametrize("made", [an_actor, a_dense_net])
def test_gradients_of_actions(made: Callable[[], SpikingActor | MLPActor]) -> None:
    """A gradient of another type is converted; after a refused call, a correct one still works."""
    net, obs, found = made(), torch.randn(6, 4), []
    for direction in (torch.ones(6, 2), torch.ones(6, 2, dtype=torch.float64)):
        into = Gradient(list(net.parameters()))
        _, pull = net.vjp(obs, None)
        for shape in ((1, 2), (6, 1), (6,)):
            with pytest.raises(ValueError, match="is due"):
                pull(torch.ones(shape), into)
        pull(direction, into)
        found.append(into.vector)
    assert found[0].any()
    assert torch.equal(*found)


@pytest.mark.parametrize("shape", [(5, 2), (6, 1), (6,)], ids=str)
def test_goals_of_a_regression(shape: tuple[int, ...]) -> None:
    net = a_dense_net()
    with pytest.raises(ValueError, match="is due"):
        CPU.mse_backward(
            net, torch.randn(6, 4), torch.randn(shape), Gradient(list(net.parameters()))
        )


def test_rows_of_critics() -> None:
    critic, b = some_critics()
    into, target = Gradient(list(critic.parameters())), torch.randn(6)
    for odd in ((b.obs[:, :2], b.act), (b.obs, b.act[:5]), (b.obs[:5], b.act), (b.obs[:1], b.act)):
        with torch.no_grad(), pytest.raises(ValueError, match="is due"):
            critic(*odd)
        with pytest.raises(ValueError, match="is due"):
            critic.critic_backward(*odd, target, into)
        with pytest.raises(ValueError, match="is due"):
            critic.actor_loss_grad(*odd, into)
    with pytest.raises(ValueError, match="is due"):
        critic.critic_backward(b.obs, b.act, target.unsqueeze(1), into)
    for name in ("rew", "discount", "terminated"):
        odd_batch = b._replace(**{name: getattr(b, name).unsqueeze(1)})
        with torch.no_grad(), pytest.raises(ValueError, match="is due"):
            CPU.td_target(critic, odd_batch, b.act)
    with torch.no_grad(), pytest.raises(ValueError, match="is due"):
        CPU.td_target(critic, b, b.act, torch.zeros(1))


def test_a_refused_call_changes_no_later_one() -> None:
    critic, b = some_critics()
    with torch.no_grad(), pytest.raises(ValueError, match="is due"):
        critic(b.obs, torch.randn(6, 1))
    fresh = copy.deepcopy(critic)
    with torch.no_grad():
        assert torch.equal(critic(b.obs, b.act), fresh(b.obs, b.act))
    assert CPU.critics[critic].fused


def test_gradients_of_samples() -> None:
    mean, log_std, noise = torch.randn(3, 6, 2)
    _, _, pull = CPU.squashed_vjp(mean, log_std, noise, -5.0, 2.0)
    with pytest.raises(ValueError, match="is due"):
        pull(torch.ones(6, 1), torch.ones(6))
    with pytest.raises(ValueError, match="is due"):
        pull(torch.ones(6, 2), torch.ones(1))


# --- inputs that run in PyTorch instead -----------------------------------------------------------


@pytest.mark.parametrize("name", ["rew", "discount"])
def test_bools_are_zeros_and_ones(name: str) -> None:
    critic, b = some_critics()
    bools = torch.arange(6) % 2 == 0
    as_bools, as_numbers = b._replace(**{name: bools}), b._replace(**{name: bools.float()})
    with torch.no_grad():
        found = CPU.td_target(critic, as_bools, b.act)
        torch.testing.assert_close(found, CPU.td_target(critic, as_numbers, b.act))


def test_numbers_do_not_say_which_rows_are_terminated() -> None:
    critic, b = some_critics()
    with torch.no_grad(), pytest.raises(RuntimeError, match="bool"):
        CPU.td_target(critic, b._replace(terminated=b.terminated.float()), b.act)


def test_targets_of_another_format() -> None:
    critic, b = some_critics()
    into, theirs = (Gradient(list(critic.parameters())) for _ in range(2))
    target = torch.arange(6)
    critic.critic_backward(b.obs, b.act, target, into)
    reference.critic_backward(critic, b.obs, b.act, target, theirs)
    torch.testing.assert_close(into.vector, theirs.vector)


def test_samples_of_one_deviation_for_all_rows() -> None:
    mean, noise, log_std = torch.randn(6, 2), torch.randn(6, 2), torch.randn(2)
    with torch.no_grad():
        ours = CPU.squashed(mean, log_std, noise, -5.0, 2.0)
        theirs = reference.squashed(mean, log_std, noise, -5.0, 2.0)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)
    with torch.no_grad(), pytest.raises(RuntimeError):
        CPU.squashed(mean, torch.randn(6, 2), noise[:3], -5.0, 2.0)


@pytest.mark.parametrize(
    "noise",
    [torch.linspace(-1.0, 1.0, 2), torch.linspace(-1.0, 1.0, 12).view(2, 6).T,
     torch.linspace(-1.0, 1.0, 12, dtype=torch.float64).view(6, 2)],
    ids=["of one row", "strided", "float64"],
)  # fmt: skip
def test_noise(noise: Tensor) -> None:
    act = torch.zeros(6, 2)
    theirs = reference.add_clipped_noise(act, noise.clone(), 0.2, 0.1)
    assert torch.equal(CPU.add_clipped_noise(act, noise.clone(), 0.2, 0.1), theirs)


def test_averages() -> None:
    """The result is written into the target; with tau = 1 / 2 it is the mean of both."""
    masked = torch.zeros(())
    online = torch.arange(8.0)
    target = torch.zeros(4)
    CPU.polyak(target, online[::2], 0.5, masked)
    assert target.tolist() == [0.0, 1.0, 2.0, 3.0]
    strided = torch.zeros(8)
    CPU.polyak(strided[::2], online[:4], 0.5, masked)
    assert strided.tolist() == [0.0, 0.0, 0.5, 0.0, 1.0, 0.0, 1.5, 0.0]
    with pytest.raises(RuntimeError):
        CPU.polyak(torch.zeros(4), online[:3], 0.5, masked)
    with pytest.raises(RuntimeError):
        CPU.polyak(torch.zeros(4), online[:4].double(), 0.5, masked)


@pytest.mark.parametrize("made", [an_actor, a_dense_net])
def test_tensors_that_are_elsewhere(made: Callable[[], SpikingActor | MLPActor]) -> None:
    with torch.no_grad(), pytest.raises((RuntimeError, NotImplementedError)):
        made()(torch.empty(6, 4, device="meta"))


def strided(param: nn.Parameter) -> nn.Parameter:
    """The same numbers in memory with a gap after each, so not contiguous."""
    return nn.Parameter(torch.stack([param.data, torch.zeros_like(param)], -1)[..., 0])


@pytest.mark.parametrize(
    "owner", [lambda a: (a.encoder, "mean_OP"), lambda a: (a.layers[1], "weight_IN"),
              lambda a: (a.decoder, "weight_AP")],
    ids=["encoder", "layer", "decoder"],
)  # fmt: skip
def test_parameters_under_other_strides(owner: Callable[[Any], tuple[nn.Module, str]]) -> None:
    actor, obs = an_actor(), torch.randn(6, 4)
    with torch.no_grad():
        expected = actor(obs)
        module, name = owner(actor)
        setattr(module, name, strided(getattr(module, name)))
        assert not getattr(module, name).is_contiguous()
        torch.testing.assert_close(actor(obs), expected)


def test_connections_under_other_strides() -> None:
    actor, obs = an_actor(decoder=membrane_config(name="ilc")), torch.randn(6, 4)
    decoder = actor.decoder
    assert isinstance(decoder, ILCDecoder)
    with torch.no_grad():
        decoder.lateral_APP.normal_()
        expected = actor(obs)
        decoder.lateral_APP = strided(decoder.lateral_APP)
        assert not decoder.lateral_APP.is_contiguous()
        torch.testing.assert_close(actor(obs), expected)


def test_rows_of_a_normalisation_under_other_strides() -> None:
    x, factor = torch.randn(3, 5, 8), torch.rand(16)[::2]
    zeros = torch.zeros(8)
    torch.testing.assert_close(CPU.row_affine(x, zeros, factor, zeros), x * factor)


@pytest.mark.parametrize(
    "owner", [lambda a: (a.layers[1], "weight_IN"), lambda a: (a.layers[2], "bias_N"),
              lambda a: (a.decoder, "weight_AP")],
    ids=["weight", "bias", "decoder"],
)  # fmt: skip
def test_a_parameter_that_was_replaced(owner: Callable[[Any], tuple[nn.Module, str]]) -> None:
    """The kernel uses the new one, though it is not the first parameter of its network."""
    actor, obs = an_actor(), torch.randn(6, 4)
    with torch.no_grad():
        before = actor(obs)
        module, name = owner(actor)
        setattr(module, name, nn.Parameter(2.0 * getattr(module, name) + 0.1))
        after = actor(obs)
        actor.kernel = "reference"
        torch.testing.assert_close(after, actor(obs))
    assert not torch.equal(after, before)


def test_a_critics_parameter_that_was_replaced() -> None:
    critic, b = some_critics()
    with torch.no_grad():
        before = critic(b.obs, b.act)
        critic.weights_CIN[1] = nn.Parameter(2.0 * critic.weights_CIN[1])
        after = critic(b.obs, b.act)
        torch.testing.assert_close(after, reference.values(critic, b.obs, b.act))
    assert not torch.equal(after, before)


def test_a_layers_drive_for_fewer_steps_than_the_networks() -> None:
    actor = an_actor()
    spikes = (torch.rand(2, 6, 24) > 0.5).float()  # of 5 steps
    with torch.no_grad():
        given = actor.layers[1], actor.neurons[0], spikes, torch.float32
        torch.testing.assert_close(CPU.drive(*given), reference.drive(*given))


def test_an_early_exit_that_is_learned_through() -> None:
    """The gradient of an action is of the spike steps that it took; an update uses all steps."""
    actor, obs, found = an_actor(), torch.randn(6, 4), []
    actor.early_exit = EarlyExit(threshold=0.3, steps=1)
    for kernel in ("reference", KERNEL):
        actor.kernel = kernel
        act = actor(obs)
        grads = torch.autograd.grad(act.sum(), list(actor.parameters()), retain_graph=True)
        way, pull = actor.vjp(obs, None)
        into = Gradient(list(actor.parameters()))
        pull(torch.ones_like(way), into)
        found.append([act.detach(), *grads, way, into.vector])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert not torch.equal(act, way)


def test_one_action_of_a_network_that_is_covered_no_more() -> None:
    actor = an_actor()
    one = OneAction(CPU, actor, Task("Toy-v0", (4,), (2,), -np.ones(2), np.ones(2), 10))
    norm = torch.stack([torch.zeros(4), torch.ones(4)])
    assert one(np.zeros(4), norm, 5.0) is not None
    actor.layers[1].weight_IN = strided(actor.layers[1].weight_IN)
    assert one(np.zeros(4), norm, 5.0) is None


def test_more_inputs_than_a_list_can_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of spikes has 24 bits for the number of an input."""
    assert coverage.MAX_INPUTS << 8 <= 1 << 31
    actor = an_actor()
    assert fused(actor)
    monkeypatch.setattr(coverage, "MAX_INPUTS", 20)
    assert coverage.why_layered(actor) == "more than 20 inputs"
    sources: list[Encoder | Neuron] = [actor.encoder, actor.neurons[0], actor.neurons[1]]
    pairs = zip(actor.layers, sources, strict=True)
    listed = [coverage.events(layer, source, 5, torch.float32) for layer, source in pairs]
    assert listed == [False, False, True]


def test_blocks_of_each_thread() -> None:
    cache, given = BlockCache(), []
    cache.release(cache.acquire(64))
    own = cache.acquire(64)
    cache.release(own)
    thread = threading.Thread(target=lambda: given.append(cache.acquire(64)))
    thread.start()
    thread.join()
    assert given[0].data_ptr() != own.data_ptr()
    assert cache.acquire(64).data_ptr() == own.data_ptr()
