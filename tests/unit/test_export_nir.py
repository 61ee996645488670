"""The NIR file, run by the equations of these tests and by snnTorch."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import (
    CUBA_LIF,
    NEURON,
    alif_config,
    dynamic_config,
    lif_config,
    membrane_config,
    plif_config,
)
from exports import DENSE, DIRECT, config, policy_of, population, saved, task
from shell import refusal, spikerl

from spikerl.export import contract, nir, proof
from spikerl.files import json_bytes
from spikerl.models.actor_config import ActorConfig
from spikerl.models.policy import Policy
from spikerl.snn.decoders import DecoderConfig
from spikerl.snn.encoders import EncoderConfig
from spikerl.snn.neurons import CubaLIFConfig

reader: Any = import_module("nir")


def interpreter(policy: Policy, folder: Path) -> nir.Interpreter:
    file = folder / "policy.nir"
    nir.write(policy, file)
    described = json.loads(json_bytes(contract.describe("nir", policy, nir.DT)))
    return nir.Interpreter(file, described, folder)


SLOW = CubaLIFConfig(name="cuba_lif", current_decay=0.3, voltage_decay=0.9, **NEURON)
POLICIES: dict[str, ActorConfig] = {
    "popsan": config(),
    "decays that are not binary fractions": config(neuron=SLOW),
    "direct linear": config(
        encoder=DIRECT, neuron=lif_config(), decoder=DecoderConfig(name="linear")
    ),
    "tanh plif mean": config(
        encoder=population("tanh_population"), neuron=plif_config(),
        decoder=membrane_config(read="mean"),
    ),
    "analog last": config(encoder=population("analog"), decoder=membrane_config()),
    "max": config(decoder=membrane_config(read="max", voltage_decay=0.5)),
}  # fmt: skip


@pytest.mark.parametrize("name", POLICIES)
def test_it_acts_as_the_policy(name: str, tmp_path: Path) -> None:
    policy = policy_of(POLICIES[name], task())
    proven = proof.prove(policy, interpreter(policy, tmp_path), None, 1, 0)
    assert proven["observations"] >= 1000


def test_a_width_below_0_is_its_square(tmp_path: Path) -> None:
    """A trained width can be negative, since the encoder only uses its square."""
    policy = policy_of(config(), task())
    with torch.no_grad():
        policy.actor.get_parameter("encoder.std_OP")[1, 2] *= -1.0
    proven = proof.prove(policy, interpreter(policy, tmp_path), None, 1, 0)
    assert proven["observations"] >= 1000


def test_published_constants(tmp_path: Path) -> None:
    """PopSAN's decays 1/2 and 3/4 at dt = 1e-4 s are time constants of 0.2 ms and 0.4 ms."""
    nir.write(policy_of(config(), task()), tmp_path / "policy.nir")
    graph = reader.read(tmp_path / "policy.nir")
    cells = graph.nodes["neurons_0"]
    expected = {"tau_syn": 2e-4, "tau_mem": 4e-4, "w_in": 2.0, "r": 4.0, "v_leak": 0.0}
    expected |= {"v_threshold": 0.5, "v_reset": 0.0}
    for key, value in expected.items():
        np.testing.assert_array_equal(getattr(cells, key), np.full(12, value, np.float32))
    assert graph.metadata == {"dt": 1e-4, "spike_steps": 5}


def test_snntorch_fires_the_same(tmp_path: Path) -> None:
    from snntorch.import_nir import import_from_nir

    policy = policy_of(config(), task())
    ours = interpreter(policy, tmp_path)
    recorded = proof.record(policy, None, 1, 0)
    net = import_from_nir(reader.read(tmp_path / "policy.nir"))
    state, fired = None, []
    encoded = torch.from_numpy(ours.host.encode(recorded.obs_BO)).float()
    with torch.no_grad():
        for spikes in encoded:
            out, state = net(spikes, state)
            fired.append(out)
    theirs = torch.stack(fired).bool().numpy()
    assert 0.01 < theirs.mean() < 0.99
    np.testing.assert_array_equal(theirs, recorded.spikes[-1])


REFUSED = {
    "neuron=cuba_lif: NIR neurons reset to v_reset, not by the threshold": config(
        neuron=CubaLIFConfig(**(vars(CUBA_LIF) | {"reset": "soft"}))
    ),
    "neuron=lif: a decay of 1 would need an infinite time constant": config(
        neuron=lif_config(voltage_decay=1.0)
    ),
    "neuron=alif: no NIR primitive has a threshold that adapts": config(neuron=alif_config()),
    "neuron=dynamic: no NIR primitive is of second order": config(neuron=dynamic_config()),
    "decoder=ilc: NIR leaves the delay of a recurrent connection open": config(
        decoder=membrane_config(name="ilc")
    ),
    "encoder=learned: its matrix belongs to no layer, and the contract holds none": config(
        encoder=EncoderConfig(name="learned")
    ),
    "actor=mlp: a dense actor has no neurons; give c or onnx": DENSE,
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_nir_cannot_hold(line: str, tmp_path: Path) -> None:
    run = saved(policy_of(REFUSED[line], task()), tmp_path / "run")
    said = spikerl("export", f"run={run}", "format=nir")
    assert said.line == f"format=nir: cannot hold {line}"
    assert not list(run.glob("policy.nir*"))


def test_a_trained_decay_of_1(tmp_path: Path) -> None:
    policy = policy_of(config(neuron=plif_config()), task())
    with torch.no_grad():
        policy.actor.get_parameter("neurons.0.decay_logit").fill_(18.0)  # 1 in float32
    assert str(refusal(nir.write, policy, tmp_path / "policy.nir")) == (
        "format=nir: cannot hold neuron=plif: a trained decay of 1 has no finite time constant"
    )


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nir, "find_spec", lambda package: None)
    assert str(refusal(nir.check_here)) == (
        "format=nir: nir is not installed; pip install 'spikerl[nir]'"
    )


def test_export(tmp_path: Path) -> None:
    run = saved(policy_of(config(), task()), tmp_path / "run")
    said = spikerl("export", f"run={run}", "format=nir")
    assert said.status == 0, said
    data = json.loads((run / "policy.nir.json").read_text())
    assert data["dt"] == 1e-4
    assert np.shape(data["encoder"]["mean"]) == (3, 10)
    assert data["proof"]["return_mean"] is None
