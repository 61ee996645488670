"""Pruning and quantising by hand, and their record in a policy's file."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import CUBA_LIF, fill
from exports import POLICIES, policy_of, task
from hand_worked import dense, rate_decoded
from shell import refusal

from spikerl.models.actor import connections
from spikerl.models.compression import (
    Compression,
    best_scale,
    bits_of,
    footprints,
    nonzero,
    on_grid,
    prune,
    quantise,
)
from spikerl.models.policy import Policy
from spikerl.runs.policies import load_policy
from spikerl.snn.early_exit import EarlyExit


def array(values: Any) -> np.ndarray:
    return np.array(values, np.float32)


def test_a_grid_by_hand() -> None:
    """Three bits are -3 to 3 quarters: -1.6 quarters become -2, 0.4 become 0, 3.6 are clipped."""
    w = array([[0.9, -0.4], [0.1, -5.0]])
    assert on_grid(w, 0.25, 3).tolist() == [[0.75, -0.5], [0.0, -0.75]]


def test_a_scale_by_hand() -> None:
    """For 1 and 99 times 0.3, at two bits, (1 - s)^2 + 99 (0.3 - s)^2 is least at s = 0.307."""
    w = array([1.0] + 99 * [0.3])
    assert best_scale(w, 2) == np.float32(0.31)
    assert best_scale(array([0.75, -0.5, 0.25]), 3) == 0.25  # exact, 3 steps to the largest
    assert best_scale(np.zeros(3, np.float32), 8) == 1.0
    # With eight bits the largest weight is 127 steps, with sixteen bits 32767.
    assert best_scale(array([127.0, 1.0, -64.0]), 8) == 1.0
    assert best_scale(array([-32767.0, 5.0]), 16) == 1.0


def test_weights_of_the_least_float() -> None:
    tiny = array([1e-45, 0.0])
    assert on_grid(tiny, best_scale(tiny, 8), 8).tolist() == [0.0, 0.0]


def test_quantise_takes_every_matrix() -> None:
    actor = rate_decoded()
    fill(actor, {"decoder.weight_AP": [[3.0, 1.25, 0.0]]})
    weights = connections(actor)
    biases = [layer.bias_N.clone() for layer in actor.layers]
    names = ["layers.0.weight_IN", "layers.1.weight_IN", "decoder.weight_AP"]
    bits = bits_of(actor, [2, 4, 3])
    assert bits == dict(zip(names, [2, 4, 3], strict=True))
    scales = quantise(actor, bits)
    assert list(scales) == names
    assert scales["layers.0.weight_IN"] == 1.0
    assert actor.layers[0].weight_IN.tolist() == [[1.0, 0.0], [1.0, 1.0]]
    # With a scale of f / 7 the error 4 (1 - f)^2 + (3 f / 7 - 0.375)^2 is 0.002870, 0.002828 and
    # 0.003625 at f = 1, 0.99 and 0.98.
    scale = np.float32(scales["layers.1.weight_IN"])
    assert scale == np.float32(0.99 / 7)
    assert actor.layers[1].weight_IN[0].tolist() == [7 * scale, 0.0, 3 * scale]
    assert weights["decoder.weight_AP"].tolist() == [[3.0, 1.0, 0.0]]
    assert all(torch.equal(layer.bias_N, b) for layer, b in zip(actor.layers, biases, strict=True))


def test_pruning_by_hand() -> None:
    """Half of four weights go: 0.5 and the first of the two of size 1."""
    actor = dense()
    fill(actor, {"layers.0.weight_IN": [[3.0, -1.0], [0.5, 1.0]]})
    fill(actor, {"layers.1.weight_IN": [[-2.0], [0.25]]})
    prune(actor, 0.5)
    assert actor.layers[0].weight_IN.tolist() == [[3.0, 0.0], [0.0, 1.0]]
    assert actor.layers[1].weight_IN.tolist() == [[-2.0], [0.0]]
    # In the order weights, biases, weights, bias.
    assert nonzero(actor).tolist() == [1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0]


def test_a_population_keeps_its_neurons() -> None:
    actor = rate_decoded()
    prune(actor, 0.5)
    assert actor.layers[1].weight_IN.tolist() == [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
    assert connections(actor)["decoder.weight_AP"].tolist() == [[2.0, 1.0, 0.0]]
    # Two layers' weights and biases, then the decoder's, which is not pruned: its 0 counts.
    kept = [0.0, 0.0, 1.0, 1.0, *[1.0] * 2, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, *[1.0] * 3, *[1.0] * 4]
    assert nonzero(actor).tolist()[-19:] == kept


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, 2.0])
def test_shares_that_are_none(share: float) -> None:
    error = refusal(prune, dense(), share)
    assert str(error) == f"prune={share}: give a share above 0 and below 1"


@pytest.mark.parametrize(("share", "count"), [(0.1, "none"), (0.9, "all")])
def test_nothing_or_all_of_a_matrix(share: float, count: str) -> None:
    error = refusal(prune, dense(), share)
    assert str(error) == (
        f"prune={share}: of the 4 weights of layers.0.weight_IN that is {count}; give another share"
    )


@pytest.mark.parametrize("bits", [1, 17, 0, -8, 8.0, True, "8", [8, 17], [8, None]])
def test_bits_that_are_none(bits: Any) -> None:
    error = refusal(bits_of, dense(), bits)
    assert str(error) == f"bits={bits}: give 2 to 16, or a list of such numbers"


def test_a_list_of_bits_that_does_not_fit() -> None:
    error = refusal(bits_of, dense(), [8, 8, 8])
    assert str(error).endswith("or one for each of layers.0.weight_IN, layers.1.weight_IN")


def test_footprints_by_hand() -> None:
    """Of 23 numbers 13 are weights, in matrices of 4, 6 and 3, of which 3, 5 and 2 are not 0."""
    actor = rate_decoded()
    others = 4 * 10
    assert footprints(actor, {}) == (others + 4 * 13, others + 4 * 10 + (1 + 1 + 1))
    # 24, 36 and 9 bits take 3, 5 and 2 bytes; packed, 18, 30 and 6 take 3, 4 and 1; and 3 scales.
    bits = bits_of(actor, [6, 6, 3])
    assert footprints(actor, bits) == (others + 10 + 12, others + 8 + 3 + 12)


# --- the file ---------------------------------------------------------------------------------


def compressed(name: str = "popsan") -> Policy:
    policy = policy_of(POLICIES[name], task())
    bits = bits_of(policy.actor, 4)
    done = Compression(prune=0.5, bits=bits, scales={}, early_exit=None)
    prune(policy.actor, 0.5)
    done.scales = quantise(policy.actor, bits)
    policy.compression = done
    return policy


@pytest.mark.parametrize("name", POLICIES)
def test_round_trip(name: str, tmp_path: Path) -> None:
    policy = compressed(name)
    policy.save(tmp_path)
    again = load_policy(tmp_path)
    assert again.compression == policy.compression
    assert again.compression is not None
    for key, weight in connections(again.actor).items():
        integers = weight.detach().double().numpy() / again.compression.scales[key]
        np.testing.assert_allclose(integers, np.round(integers), rtol=0, atol=1e-5)
        assert np.abs(np.round(integers)).max() <= 7
        if "weight_AP" not in key:
            assert int((weight == 0).sum()) >= round(0.5 * weight.numel())
    again.save(tmp_path)
    assert load_policy(tmp_path).compression == policy.compression


def test_an_early_exit_is_applied_on_loading(tmp_path: Path) -> None:
    policy = compressed()
    assert policy.compression is not None
    policy.compression.early_exit = EarlyExit(threshold=0.25, steps=2)
    policy.save(tmp_path)
    assert vars(load_policy(tmp_path).actor)["early_exit"] == EarlyExit(threshold=0.25, steps=2)


@pytest.mark.parametrize(
    "change",
    [
        {"act_shape": [], "act_low": [], "act_high": [], "act_choices": [0, 2]},
        {"neuron": {**asdict(CUBA_LIF), "name": "residual_if", "reset": "soft", "start": 0.5}},
    ],
    ids=["discrete", "carries"],
)
def test_early_exits_that_would_not_be_applied(change: dict[str, Any], tmp_path: Path) -> None:
    policy = compressed()
    assert policy.compression is not None
    policy.compression.early_exit = EarlyExit(threshold=0.25, steps=2)
    policy.save(tmp_path)
    file = tmp_path / "policy.json"
    data = json.loads(file.read_text()) | change
    if "neuron" in change:
        data["neuron"]["alpha"] = 0.5
        del data["neuron"]["current_decay"], data["neuron"]["voltage_decay"]
    file.write_text(json.dumps(data))
    line = str(refusal(load_policy, tmp_path))
    assert line == f"run={tmp_path}: policy.json garbles compression.early_exit"


NAME = "layers.0.weight_IN"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prune": 1.5}, "compression.prune"),
        ({"finetune": 0}, "compression.finetune"),
        ({"scales": {}}, "compression.scales"),
        ({"bits": {NAME: 17}, "scales": {NAME: 1.0}}, "compression.bits"),
        ({"bits": {"layers.0.bias_N": 8}, "scales": {"layers.0.bias_N": 1.0}}, "compression.bits"),
        ({"bits": {NAME: 8}, "scales": {NAME: -1.0}}, "compression.scales"),
        ({"bits": {NAME: 8}, "scales": {NAME: 0.1}}, "compression.scales"),
        ({"bits": {NAME: 4}, "scales": {NAME: 0.375}}, f"{NAME} does not lie on its grid"),
        ({"early_exit": {"threshold": 0.0, "steps": 1}}, "early_exit=0.0"),
        ({"early_exit": {"threshold": 0.1, "steps": 5}}, "exit_steps=5"),
        ({"bits": 8}, "compression.bits"),
        ({"other": 8}, "no such key"),
        ("8 bits", "compression"),
    ],
)
def test_what_a_file_may_not_say(change: Any, said: str, tmp_path: Path) -> None:
    compressed().save(tmp_path)
    file = tmp_path / "policy.json"
    data = json.loads(file.read_text())
    data["compression"] = data["compression"] | change if isinstance(change, dict) else change
    file.write_text(json.dumps(data))
    line = str(refusal(load_policy, tmp_path))
    assert line.startswith(f"run={tmp_path}: policy.json garbles ")
    assert said in line
    assert "\n" not in line
