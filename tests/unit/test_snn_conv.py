"""Convolutions against torch's own, images of both layouts, and networks with convolutions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import plain
import pytest
import torch
from builders import CUBA_LIF, POPULATION, RATE, lif_config, voltage_config
from shell import SHORT, refusal, spikerl
from torch import Tensor, nn
from transitions_env import registered

import spikerl as library
from spikerl.config.build import why_layered
from spikerl.config.together import check_image
from spikerl.energy import operations
from spikerl.export import support
from spikerl.kernels import build as native
from spikerl.kernels import reference
from spikerl.models.actor import SpikingActor
from spikerl.models.actor_config import ActorConfig, CNNConfig, ConvSANConfig
from spikerl.models.networks import build_actor
from spikerl.snn.conv import Conv
from spikerl.snn.encoders import EncoderConfig
from spikerl.snn.linear import product
from spikerl.types import Task

CPU = f"cpu/{native.supported_paths()[0]}"
SHAPE: dict[str, Any] = {
    "image": [5, 6],
    "channels_first": False,
    "filters": [4, 3],
    "kernel_sizes": [3, 2],
    "strides": [1, 2],
    "hidden_sizes": [7],
    "lr": 1e-3,
}


def config(kind: str, **changes: Any) -> ActorConfig:
    given = SHAPE | changes
    if kind == "cnn":
        cnn = CNNConfig(name="cnn", **given)
        return ActorConfig(actor=cnn, encoder=None, neuron=None, decoder=None)
    return ActorConfig(
        actor=ConvSANConfig(name="conv", spike_steps=4, **given),
        encoder=EncoderConfig(name="direct"),
        neuron=lif_config(),
        decoder=voltage_config(),
    )


def torchs(layer: Conv, stride: int) -> nn.Conv2d:
    """The layer as torch's Conv2d."""
    size = (layer.kernel, layer.kernel)
    conv = nn.Conv2d(layer.channels, layer.weight_IN.shape[1], size, stride)
    conv.weight.data = layer.weight_IN.detach().T.reshape(conv.weight.shape).clone()
    conv.bias.data = layer.bias_N.detach().clone()  # type: ignore[union-attr]
    return conv


def test_pixels_are_scaled_once() -> None:
    torch.manual_seed(0)
    pixels = torch.randint(256, (7, 60)).float()
    scaled = build_actor(config("cnn", pixel_max=255.0), 60, 3)
    plain = build_actor(config("cnn"), 60, 3)
    plain.load_state_dict(scaled.state_dict())
    torch.testing.assert_close(scaled(pixels, squash=False), plain(pixels / 255.0, squash=False))


@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (2, 2), (3, 2), (5, 1)])
def test_a_layer_is_torchs(kernel: int, stride: int, channels_first: bool) -> None:
    """Output, flat (height, width, filters), and gradients are those of torch's Conv2d."""
    torch.manual_seed(0)
    layer = Conv(4, 3, (5, 6), kernel, stride, channels_first=channels_first)
    conv, image = torchs(layer, stride), torch.randn(7, 4, 5, 6)
    flat = image if channels_first else image.permute(0, 2, 3, 1)
    ours, theirs = layer(flat.flatten(1)), conv(image).permute(0, 2, 3, 1).flatten(1)
    assert ours.shape == (7, layer.outputs)
    torch.testing.assert_close(ours, theirs)
    by = torch.randn_like(ours)
    weight, bias = torch.autograd.grad((ours * by).sum(), [layer.weight_IN, layer.bias_N])
    wanted, wanted_bias = torch.autograd.grad((theirs * by).sum(), list(conv.parameters()))
    torch.testing.assert_close(weight.T.reshape(wanted.shape), wanted)
    torch.testing.assert_close(bias, wanted_bias)
    narrow = product(flat.flatten(1), layer, torch.bfloat16)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow, theirs, rtol=0.05, atol=0.05)


def by_torch(x: Tensor, convs: list[nn.Conv2d]) -> list[Tensor]:
    """Activations after each ReLU, flat (height, width, F) of each row."""
    found = []
    for conv in convs:
        x = torch.relu(conv(x))
        found.append(x.permute(0, 2, 3, 1).flatten(1))
    return found


@pytest.mark.parametrize("kernel", ["reference", CPU])
def test_a_dense_network_is_torchs(kernel: str) -> None:
    torch.manual_seed(0)
    actor = build_actor(config("cnn"), 60, 3, kernel=kernel)
    first, second, hidden, last = actor.layers
    assert [layer.outputs for layer in actor.layers] == [3 * 4 * 4, 1 * 2 * 3, 7, 3]
    obs = torch.randn(9, 60)
    convs = [torchs(first, 1), torchs(second, 2)]  # type: ignore[arg-type]
    x = by_torch(obs.unflatten(1, (5, 6, 2)).permute(0, 3, 1, 2), convs)[-1]
    x = torch.relu(x @ hidden.weight_IN + hidden.bias_N) @ last.weight_IN + last.bias_N
    torch.testing.assert_close(actor(obs, squash=False), x)
    output, _ = actor.vjp(obs, None, squash=False)
    torch.testing.assert_close(output, x.detach())


@pytest.mark.parametrize("kernel", ["reference", CPU])
def test_spikes_by_hand(kernel: str) -> None:
    """One place and one filter, driven by the sum of nine entries; decay .75, threshold .5.

    A drive of .3 gives voltages .3, .525 (a spike), .3, .525; each spike drives the hidden neuron
    with 1, which fires as often. The output is V = V / 2 + o / 2: 0, .5, .25, .625.
    """
    one = {"image": [3, 3], "filters": [1], "kernel_sizes": [3], "strides": [1]}
    net = build_actor(config("conv", **one, hidden_sizes=[1]), 9, 1, kernel=kernel)
    assert isinstance(net, SpikingActor)
    for name, p in net.named_parameters():
        p.data.fill_(0.0 if "bias" in name else 1.0)
    obs = torch.full((2, 9), 0.3 / 9.0)
    obs[1] = 0.0
    assert net(obs, squash=False).tolist() == [[0.625], [0.0]]
    assert net.activity(obs).layers == [None, 0.25, 0.25]


@pytest.mark.parametrize("kind", ["cnn", "conv"])
def test_a_gradient_reaches_every_layer(kind: str) -> None:
    torch.manual_seed(0)
    actor = build_actor(config(kind, channels_first=True), 60, 3)
    actor(10.0 * torch.randn(32, 60), squash=False).square().sum().backward()
    for name, p in actor.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().sum() > 0.0, name


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"image": [5]}, "actor.image=[5]: give height and width, 1 to"),
        ({"strides": [1]}, "actor.strides=[1]: give one for each layer"),
        ({"filters": []}, "actor.filters=[]: give one for each layer"),
        ({"filters": [4, 0]}, "actor.filters=[4, 0]: give one for each layer, 1 to"),
        ({"pixel_max": 0.0}, "actor.pixel_max=0.0: give 1 or 255, or what else"),
        ({"kernel_sizes": [3, 5]}, "actor.kernel_sizes=[3, 5]: a layer sees 3 x 4 positions"),
    ],
)
def test_what_is_no_stack(changes: dict[str, Any], line: str) -> None:
    assert str(refusal(config, "conv", **changes)).startswith(line)


@pytest.mark.parametrize(
    ("shape", "first", "line"),
    [
        ((5, 6, 2), False, None),
        ((5, 6), False, None),
        ((5, 6, 3, 4), False, None),
        ((2, 5, 6), True, None),
        ((4, 3, 5, 6), True, None),
        ((60,), True, None),
        ((2, 5, 6), False, "actor.channels_first=false: observations are (2, 5, 6); give true"),
        ((5, 6, 2), True, "actor.channels_first=true: observations are (5, 6, 2); give false"),
        (
            (4, 5, 6, 3),
            False,
            "actor.image=[5, 6]: observations are (4, 5, 6, 3); height and width must be their"
            " first two numbers",
        ),
    ],
)
def test_where_height_and_width_stand(shape: tuple[int, ...], first: bool, line: Any) -> None:
    task = Task("x", shape, (1,), -np.ones(1), np.ones(1), 9)
    made = config("cnn", channels_first=first)
    if line is None:
        check_image(made, task)
    else:
        assert str(refusal(check_image, made, task)) == line


@pytest.mark.parametrize("kind", ["cnn", "conv"])
def test_operations_are_counted_at_every_place(kind: str) -> None:
    """Products: 3 x 4 places of 2 x 9 inputs by 4 filters, 1 x 2 of 4 x 4 by 3, 6 x 7 and 7 x 3.

    Effective ones are counted by torch's convolution of 1 for each number that is not 0.
    """
    torch.manual_seed(0)
    actor = build_actor(config(kind, pixel_max=4.0), 60, 3)
    plain.cut_weights([layer.weight_IN for layer in actor.layers], torch.Generator())
    obs = torch.randint(3, (9, 60)).float()  # a third are 0
    ops = operations.count(actor, obs)
    steps = 1 if kind == "cnn" else 4
    assert [part.synapses.dense for part in ops.layers[:2]] == [864.0, steps * 96.0]
    assert ops.twin.sizes == [60, 48, 6, 7, 3]
    assert (ops.twin.macs, ops.twin.footprint_bytes) == (
        864 + 96 + 42 + 21,
        4 * (76 + 51 + 49 + 24),
    )

    first = torchs(actor.layers[0], 1)  # type: ignore[arg-type]
    first.weight.data = (first.weight != 0).float()
    first.bias = None
    there = (obs != 0).float().unflatten(1, (5, 6, 2)).permute(0, 3, 1, 2)
    assert ops.layers[0].synapses.macs == pytest.approx(first(there).sum().item() / 9)
    if kind == "conv":
        assert isinstance(actor, SpikingActor)
        spikes_TBN = reference.record(actor, obs, None)[0][1]
        second = torchs(actor.layers[1], 2)  # type: ignore[arg-type]
        second.weight.data = (second.weight != 0).float()
        second.bias = None
        images = spikes_TBN.flatten(0, 1).unflatten(1, (3, 4, 4)).permute(0, 3, 1, 2)
        acs = ops.layers[1].synapses.acs
        assert acs == pytest.approx(second(images).sum().item() / 9)
        assert 0 < acs < ops.layers[1].synapses.most_acs < 4 * 96


@pytest.mark.parametrize("kind", ["cnn", "conv"])
def test_what_does_not_know_them_says_so(kind: str) -> None:
    line = f"format=onnx: cannot hold actor={kind}: no format has its convolutions here"
    assert str(refusal(support.check, "onnx", config(kind))) == line
    made = replace(config(kind), encoder=POPULATION, neuron=CUBA_LIF, decoder=RATE)
    assert why_layered(made, torch.float32) == "convolutions, which run in PyTorch"


class Stripes(gym.Env[np.ndarray, int]):
    """A row or a column of the image is lit; the action must tell which. Episodes have one step."""

    observation_space = gym.spaces.Box(0.0, 1.0, (5, 5, 2), bool)
    action_space: Any = gym.spaces.Discrete(2)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.obs = np.zeros((5, 5, 2), bool)
        self.column, at = self.np_random.integers(2), self.np_random.integers(5)
        self.obs[:, at, 0] = self.column
        self.obs[at, :, 1] = not self.column
        return self.obs, {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        return self.obs, float(action == self.column), True, False, {}


registered("Stripes", Stripes)

OWN = [word for word in SHORT if "critic" not in word and not word.startswith("env")]
OWN += ["env=gym", "env.id=Stripes-v0", "algo=dqn", "actor.image=[5,5]", "actor.filters=[4]"]
OWN += ["logger=[]"]
SPIKING = ["encoder=direct", "neuron=lif", "decoder=voltage", "actor.spike_steps=4"]


@pytest.mark.parametrize("kind", ["conv", "cnn"])
def test_a_run_and_its_policy(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run learns the task, can be resumed, and its loaded policy acts well on raw images."""
    monkeypatch.chdir(tmp_path)
    own = [*OWN, f"actor={kind}", "actor.lr=1e-2", "run_dir=run", "algo.epsilon_steps=100"]
    own += SPIKING if kind == "conv" else []
    said = spikerl("train", *own)
    assert said.status == 0, said
    assert spikerl("train", "resume=run", "total_steps=350").status == 0
    policy, env = library.load_policy("run"), Stripes()
    right = 0
    for seed in range(50):
        right += int(policy(env.reset(seed=seed)[0]) == env.column)
    assert right >= 45
    wrong = [*own, "run_dir=other", "actor.image=[5,4]"]
    line = "actor.image=[5, 4]: 50 inputs are not images of 5 x 4; give height and width"
    assert spikerl("train", *wrong).line == line
    turned = [*own, "run_dir=other", "actor.channels_first=true"]
    line = "actor.channels_first=true: observations are (5, 5, 2); give false"
    assert spikerl("train", *turned).line == line
    assert not Path("other").exists()
