"""The integers of a Loihi file, by hand; what fits on one chip; the proof."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import (
    CUBA_LIF,
    RATE,
    alif_config,
    dynamic_config,
    lif_config,
    membrane_config,
    plif_config,
)
from exports import DENSE, DIRECT, config, exported, policy_of, population, saved, task
from published import MODEL, STATS, needs_published_policy
from safetensors.numpy import load_file
from shell import refusal, spikerl

from spikerl.commands.export import print_approximation
from spikerl.export import loihi, loihi_chip, proof, reading, support
from spikerl.export.formats import FORMATS
from spikerl.files import checksum_of
from spikerl.models.actor import SpikingActor
from spikerl.models.actor_config import ActorConfig
from spikerl.snn.decoders import DecoderConfig
from spikerl.snn.encoders import EncoderConfig, PopulationConfig
from spikerl.snn.neurons import CubaLIFConfig

POLICIES: dict[str, ActorConfig] = {
    "popsan": config(),
    "tanh lif linear": config(
        encoder=population("tanh_population"), neuron=lif_config(voltage_decay=1.0),
        decoder=DecoderConfig(name="linear"),
    ),
    "plif mean": config(neuron=plif_config(), decoder=membrane_config(read="mean")),
    "ilc max": config(decoder=membrane_config(name="ilc", read="max", pop_size=5)),
    "four layers": config([9, 8, 7]),
}  # fmt: skip


@pytest.mark.parametrize("name", POLICIES)
def test_the_file_acts_as_its_emulation(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "MOST", 1100)
    policy = policy_of(POLICIES[name], task())
    file = exported(policy, "loihi", tmp_path)
    described = json.loads((tmp_path / "policy.loihi.json").read_text())
    chip = loihi_chip.Interpreter(file, described, tmp_path)
    proven = proof.prove(policy, chip, None, 1, 0, loihi.emulated)
    assert proven["observations"] >= 1000
    encoder, *layers = proven["spikes_unlike_policy"]
    assert encoder == 0.0
    assert all(0.0 < share < 0.1 for share in layers)  # differs, but only a little
    assert 0.0 < proven["mean_action_difference_from_policy"] < 0.05
    rates = [layer.mean() for layer in proof.record(policy, None, 1, 0).spikes]
    assert all(0.01 < rate < 0.99 for rate in rates)


def test_integers_by_hand() -> None:
    """Threshold 1/2 and largest weight 1/2 both become 254; odd integers are not available."""
    policy = policy_of(config([2]), task(1, 1))
    actor = policy.actor
    assert isinstance(actor, SpikingActor)
    with torch.no_grad():
        actor.layers[0].weight_IN.zero_()
        actor.layers[0].weight_IN[0] = torch.tensor([0.5, -0.25])
        actor.layers[0].weight_IN[1] = torch.tensor([0.0979, -0.003])
        actor.layers[0].bias_N.copy_(torch.tensor([0.4, -0.0008]))
    layer = loihi.quantised(actor)[0]
    assert (layer.vth, layer.du, layer.dv, layer.scale) == (254, 2047, 1024, 508.0)
    # Times 508: weights 254, -127 (a tie), 49.7, -1.5; biases 203.2, -0.4
    assert layer.weight_IN[:2].tolist() == [[254, -128], [50, -2]]
    assert layer.bias_N.tolist() == [204, 0]
    halves = layer.tensors(0)
    assert halves["0.weight"].dtype == np.int8
    assert halves["0.weight"][:2].tolist() == [[127, -64], [25, -1]]


def test_small_weights_are_limited_by_the_threshold() -> None:
    """The threshold has 17 bits: 1/2 becomes 131071 at most, so 0.0001 becomes 26."""
    actor = policy_of(config([2]), task(1, 1)).actor
    assert isinstance(actor, SpikingActor)
    with torch.no_grad():
        actor.layers[0].weight_IN.fill_(0.0001)
        actor.layers[0].bias_N.zero_()
        actor.layers[1].weight_IN.zero_()
        actor.layers[1].bias_N.zero_()
    first, second = loihi.quantised(actor)
    assert (first.vth, second.vth) == (131071, 131071)
    assert np.unique(first.weight_IN).tolist() == [26]
    assert not second.weight_IN.any()


def test_weights_of_many_thresholds() -> None:
    actor = policy_of(config(neuron=lif_config(threshold=0.01)), task()).actor
    assert isinstance(actor, SpikingActor)
    with torch.no_grad():
        actor.layers[0].weight_IN[3, 4] = -2.54
        assert loihi.quantised(actor)[0].vth == 1
        actor.layers[0].weight_IN[3, 4] = -2.6
    assert str(refusal(loihi.quantised, actor)) == (
        "format=loihi: layer 1 has weights of 260 thresholds, of which its integers hold 254"
    )


@pytest.mark.parametrize(
    ("current", "voltage", "registers"),
    [
        (0.5, 0.75, (2047, 1024)),
        (0.0, 1.0, (4095, 0)),
        (1.0, 0.0, (0, 4095)),
        (0.3, 0.9, (2866, 410)),
    ],
)
def test_decays(current: float, voltage: float, registers: tuple[int, int]) -> None:
    """The decays are (4095 - du) / 4096 and (4096 - dv) / 4096; 0.3 is 1228.8 / 4096, 0.9 is
    3686.4 / 4096.
    """
    neuron = replace(CUBA_LIF, current_decay=current, voltage_decay=voltage)
    actor = policy_of(config(neuron=neuron), task()).actor
    assert isinstance(actor, SpikingActor)
    assert loihi.decays(actor.neurons[0]) == registers


def test_lif_has_no_current_to_keep() -> None:
    actor = policy_of(config(neuron=lif_config(voltage_decay=0.5)), task()).actor
    assert isinstance(actor, SpikingActor)
    assert loihi.decays(actor.neurons[0]) == (4095, 2048)


def test_lateral_inputs_count_in_the_contract_too() -> None:
    """490 neurons of 257 inputs fit on a core; with 490 lateral inputs more (747) only 175 do: 3
    cores, and one each for the encoder and the hidden layer.
    """
    lateral = membrane_config(name="ilc", read="last", pop_size=490)
    policy = policy_of(config([256], decoder=lateral), task(3, 1))
    assert loihi.facts(policy)["chip"]["cores"] == 5


def test_biases_are_no_inputs_of_a_core(tmp_path: Path) -> None:
    """17 populations of 256 have more biases than a core has inputs, yet the policy can be read."""
    policy = policy_of(config(decoder=replace(RATE, pop_size=256)), task(3, 17))
    acts = reading.read(exported(policy, "loihi", tmp_path)).policy()
    assert acts.act(np.zeros((1, 3)), torch.Generator()).shape == (1, 17)


def test_cores_by_hand() -> None:
    # One core per layer: 510 neurons of 257 inputs fit into 2^17 synapses.
    assert loihi.cores([170, 256, 256, 60]) == 4
    # 127 neurons of 1025 inputs fit: 9 cores; 455 neurons can send to 9 cores: 3; the encoder: 1.
    assert loihi.cores([10, 1024, 1024]) == 13
    # With 1018 lateral inputs more, 64 neurons fit on a core: 16 cores.
    assert loihi.cores([10, 1024, 1024], 1018) == 16 + 4 + 1
    assert loihi.cores([4095, 1]) == 5
    assert str(refusal(loihi.cores, [4096, 1])) == (
        "format=loihi: the chip is too small: layer 1 has 4097 inputs, its bias's among them; a"
        " core has 4096"
    )
    assert str(refusal(loihi.cores, [10, 4000, 4000])) == (
        "format=loihi: the chip is too small: its layers of [10, 4000, 4000] neurons take more than"
        " 128 cores"
    )


REFUSED = {
    "cannot hold neuron=cuba_lif: the chip's neurons reset to 0, not by the threshold": config(
        neuron=CubaLIFConfig(**(vars(CUBA_LIF) | {"reset": "soft"}))
    ),
    "cannot hold neuron=alif: no neuron of the chip has a threshold that adapts": config(
        neuron=alif_config()
    ),
    "cannot hold neuron=dynamic: no neuron of the chip is of second order": config(
        neuron=dynamic_config()
    ),
    "cannot hold encoder=direct: it gives currents, and the chip takes spikes": config(
        encoder=DIRECT
    ),
    "cannot hold encoder=learned: it gives currents, and the chip takes spikes": config(
        encoder=EncoderConfig(name="learned")
    ),
    "cannot hold decoder=learned: its matrix over all spike steps belongs to no layer": config(
        decoder=DecoderConfig(name="learned")
    ),
    "cannot hold actor=mlp: a dense actor has no neurons; give c or onnx": DENSE,
    "the chip is too small: layer 1 has 6001 inputs, its bias's among them; a core has 4096": (
        config([2], encoder=PopulationConfig(
            name="population", pop_size=2000, mean_range=[-1.0, 1.0], var=0.5, threshold=0.999
        ))
    ),
}  # fmt: skip


@pytest.mark.parametrize("line", REFUSED)
def test_what_the_chip_cannot_hold(line: str) -> None:
    policy = policy_of(REFUSED[line], task())

    def check() -> None:
        support.check("loihi", policy.config)
        FORMATS["loihi"].check_policy(policy)

    assert str(refusal(check)) == f"format=loihi: {line}"


def test_a_policy_that_is_too_large_leaves_nothing(tmp_path: Path) -> None:
    line = next(line for line in REFUSED if line.startswith("the chip is too small"))
    run = saved(policy_of(REFUSED[line], task()), tmp_path / "run")
    assert spikerl("export", f"run={run}", "format=loihi").line == f"format=loihi: {line}"
    assert not list(run.glob("policy.loihi*"))


def test_export(tmp_path: Path) -> None:
    run = saved(policy_of(config(), task(3, 1, "Pendulum-v1", 200)), tmp_path / "run")
    said = spikerl("export", f"run={run}", "format=loihi", "episodes=8")
    assert said.status == 0, said
    lines = said.out.splitlines()
    assert lines[2].startswith("reproduced is the emulation of the target. Of the policy's own")
    assert lines[3].endswith(" what is published of PopSAN on the chip, -2.1% to -14.3%")
    assert lines[3].startswith("return: ")
    data = json.loads((run / "policy.loihi.json").read_text())
    ours, theirs = (data["proof"][key] for key in ("return_mean", "return_mean_of_policy"))
    assert data["proof"]["return_change"] == pytest.approx((ours - theirs) / -theirs)
    assert data["support"]["neuron"] == "approximate: weights of 8 bits, decays of 1/4096"
    assert (data["chip"]["chip_steps"], data["chip"]["cores"]) == (8, 4)
    tensors = load_file(run / "policy.loihi")
    assert tensors["0.weight"].shape == (30, 12)
    assert {name for name in tensors if name[0] == "2"} == {
        "2.weight", "2.bias", "2.vth", "2.du", "2.dv"
    }  # fmt: skip


def test_a_policy_whose_every_decision_rounding_decides(tmp_path: Path) -> None:
    """A neuron's first voltage equals its threshold: it does not fire, in integers neither."""
    policy = policy_of(config(neuron=lif_config(threshold=0.5)), task())
    with torch.no_grad():
        policy.actor.layers[0].weight_IN[:, 0] = 0.0
        policy.actor.layers[0].bias_N[0] = 0.5
    obs = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    assert proof.recorded_of(policy, obs).set_aside == 50
    run = saved(policy, tmp_path / "run")
    said = spikerl("export", f"run={run}", "format=loihi")
    assert said.status == 0, said
    unlike = json.loads((run / "policy.loihi.json").read_text())["proof"]["spikes_unlike_policy"]
    assert len(unlike) == 4
    assert unlike[0] == 0.0
    assert 0.0 < unlike[1] < 0.1


def test_a_run_that_goes_on_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The contract has the checksum of the policy that was read, although its checkpoint was
    removed since.
    """
    steps, known_env = tmp_path / "run/checkpoints", proof.known_env
    steps.mkdir(parents=True)
    first = saved(policy_of(config(), task()), steps / "step_1")
    digest = checksum_of(first / "policy.safetensors")

    def later(*args: Any) -> Any:
        saved(policy_of(config(), task(), 1), steps / "step_2")
        shutil.rmtree(first)
        return known_env(*args)

    monkeypatch.setattr(proof, "known_env", later)
    said = spikerl("export", f"run={tmp_path / 'run'}", "format=loihi")
    assert said.status == 0, said
    made_from = json.loads((tmp_path / "run/policy.loihi.json").read_text())["made_from"]
    assert made_from["sha256"] == digest


@pytest.mark.parametrize(
    ("change", "word"),
    [(0.0, "better than"), (-0.021, "within"), (-0.143, "within"), (-0.2, "worse than")],
)
def test_a_return_beside_what_is_published(
    change: float, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    print_approximation({
        "spikes_unlike_policy": [0.0], "mean_action_difference_from_policy": 0.0,
        "largest_action_difference_from_policy": 0.0, "return_change": change,
    })  # fmt: skip
    said = capsys.readouterr().out.splitlines()[1]
    assert said.startswith(f"return: {change:+.1%}, {word} what is published")


def test_a_file_that_differs_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lowest bit of the file's weights is flipped."""
    run = saved(policy_of(config(), task()), tmp_path / "run")

    def tensors(layer: loihi.Layer, k: int, own: object = loihi.Layer.tensors) -> object:
        named = own(layer, k)  # type: ignore[operator]
        if k == 1:
            named["1.weight"] ^= 1
        return named

    monkeypatch.setattr(loihi.Layer, "tensors", tensors)
    said = spikerl("export", f"run={run}", "format=loihi")
    assert said.status == 1
    assert said.err.startswith(
        "spikerl: format=loihi: the file does not act as its emulation, and is not kept: first"
        " spike that differs: observation "
    )
    assert not list(run.glob("policy.loihi*"))


@needs_published_policy
def test_the_published_policy(tmp_path: Path) -> None:
    """The published loss of return on the chip is 2.1 %."""
    run = tmp_path / "run"
    args = [f"popsan={MODEL}", f"stats={STATS}", "env=HalfCheetah", f"run_dir={run}"]
    assert spikerl("import", *args).status == 0
    assert spikerl("export", f"run={run}", "format=loihi", "episodes=2").status == 0
    assert json.loads((run / "policy.loihi.json").read_text())["proof"]["return_change"] > -0.143
