"""What the proof compares and refuses; the table of what each format can hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from builders import dense_config, lif_config
from exports import DENSE, DIRECT, config, policy_of, saved, task
from hand_worked import rate_decoded
from shell import spikerl
from torch import Tensor

from spikerl.commands.export import publish
from spikerl.envs.config import EnvConfig
from spikerl.export import contract, proof, support
from spikerl.export.contract import DECODERS, ENCODERS, NEURONS
from spikerl.export.formats import FORMATS
from spikerl.models.actor import MLPActor, SpikingActor
from spikerl.models.actor_config import CareBNConfig
from spikerl.models.normalizer import RunningNorm
from spikerl.models.policy import Policy
from spikerl.seeding import RESET_BITS, reset_seed
from spikerl.snn import decoders, encoders, neurons
from spikerl.snn.decoders import DecoderConfig
from spikerl.snn.early_exit import EarlyExit
from spikerl.snn.encoders import PopulationConfig
from spikerl.training.evaluator import Evaluator

ROOT = Path(__file__).resolve().parents[2]
PENDULUM = EnvConfig(
    name="gym", version=None, id="Pendulum-v1", max_episode_steps=20, vectorizer="sync"
)


class Constant:
    """An exported file with a constant action."""

    def spikes(self, obs_BO: np.ndarray) -> list[np.ndarray]:
        return []

    def actions(self, obs_BO: np.ndarray) -> np.ndarray:
        return np.full((len(obs_BO), 1), 1.5, np.float32)


def test_the_return_is_the_files() -> None:
    policy = policy_of(config(), task(3, 1, "Pendulum-v1"))
    evaluator = Evaluator(PENDULUM, 1, 0)
    result = evaluator.run(proof.FilePolicy(policy.task, Constant()), 0)
    evaluator.close()
    env = gym.make("Pendulum-v1", max_episode_steps=20)
    env.reset(seed=reset_seed(RESET_BITS, 0, "eval", 0, 0))
    push = np.array([1.5], np.float32)
    assert result.returns == [pytest.approx(sum(float(env.step(push)[1]) for _ in range(20)))]


def test_the_first_spike_that_differs() -> None:
    """The first in the order of observation, then spike step, then layer, then neuron."""
    ours = [np.zeros((5, 3, 4), bool), np.zeros((5, 3, 2), bool)]
    theirs = [layer.copy() for layer in ours]
    recorded = proof.Recorded(np.zeros((3, 1)), ours, np.zeros((3, 1)), 0)
    proof.compare_spikes(recorded, theirs)
    theirs[0][0, 2, 0] = theirs[0][4, 1, 3] = theirs[1][3, 1, 1] = True
    with pytest.raises(proof.ProofFailed, match=(
        "observation 1, spike step 3, layer 1 of 2, neuron 1: the file's fires"
    )):  # fmt: skip
        proof.compare_spikes(recorded, theirs)
    with pytest.raises(proof.ProofFailed, match="its layers' spikes are"):
        proof.compare_spikes(recorded, theirs[:1])


@pytest.mark.parametrize("value", [2.1e-6, -2.1e-6, np.nan])
def test_actions_to_a_millionth_of_the_larger_bound(value: float) -> None:
    """The bounds are -0.5 and 2, so a difference of 2e-6 is allowed."""
    recorded = proof.Recorded(np.zeros((2, 3)), [], np.zeros((2, 2)), 0)
    act = np.array([[0.0, 0.0], [1.9e-6, 0.0]])
    assert proof.compare_actions(task(), recorded, act) == pytest.approx(0.95e-6)
    act[1, 1] = value
    with pytest.raises(proof.ProofFailed, match="observation 1, entry 1"):
        proof.compare_actions(task(), recorded, act)


def test_a_dense_file_may_round_as_its_policy_does(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of(dense_config([64, 64]), task())
    with torch.no_grad():
        for name, p in policy.actor.named_parameters():
            p.mul_(3.0 if "weight" in name else 1.0)
    obs = np.random.default_rng(0).normal(size=(500, 3)).astype(np.float32)
    recorded = proof.recorded_of(policy, obs)
    own = policy.task.to_env(policy.act(obs, policy.generator))
    difference = np.abs(own - recorded.act_BA).max() / 2.0  # relative to the larger bound
    assert difference > 1e-6
    assert recorded.tolerance == pytest.approx(2.0 * difference, rel=1e-3)
    proof.compare_actions(policy.task, recorded, own)
    with pytest.raises(proof.ProofFailed):
        proof.compare_actions(policy.task, recorded, recorded.act_BA + 2.1 * recorded.tolerance)
    assert proof.recorded_of(policy_of(dense_config([4]), task()), obs).tolerance == 1e-6
    monkeypatch.setattr(proof, "MOST_TOLERANCE", 1.5e-6)
    assert proof.recorded_of(policy, obs).tolerance == 1.5e-6


def test_a_kernel_that_rounds_less_than_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tolerance also covers the rounding of the reference, which a file may have."""
    policy = policy_of(dense_config([64, 64]), task())
    with torch.no_grad():
        for name, p in policy.actor.named_parameters():
            p.mul_(3.0 if "weight" in name else 1.0)
    obs = np.random.default_rng(0).normal(size=(500, 3)).astype(np.float32)
    tolerance = proof.recorded_of(policy, obs).tolerance
    assert tolerance > 2e-6

    def exact(actor: MLPActor, x: Tensor, *args: Any) -> Tensor:
        layers = [(layer.weight_IN.double(), layer.bias_N.double()) for layer in actor.layers]
        y = x.double()
        for weight, bias in layers[:-1]:
            y = torch.relu(y @ weight + bias)
        return torch.tanh(y @ layers[-1][0] + layers[-1][1]).to(x.dtype)

    monkeypatch.setattr(MLPActor, "forward", exact)
    assert proof.recorded_of(policy, obs).tolerance == pytest.approx(tolerance, rel=1e-3)


def test_what_rounding_decides_is_set_aside() -> None:
    """One neuron whose voltage is the observation; the threshold is 0.5, rounding is within e."""
    parts = config(
        [1], encoder=DIRECT, neuron=lif_config(), decoder=DecoderConfig(name="linear")
    )  # fmt: skip
    policy = policy_of(parts, task(1, 1))
    policy.norm.mean_std = torch.tensor([[0.0], [1.0]])
    with torch.no_grad():
        policy.actor.get_parameter("layers.0.weight_IN").fill_(1.0)
        policy.actor.get_parameter("layers.0.bias_N").fill_(0.0)
    e = proof.ROUNDING
    obs = np.array([[0.5], [0.5 - 0.9 * e], [0.5 + 0.9 * e], [0.5 + 1.1 * e]], np.float32)
    recorded = proof.recorded_of(policy, obs)
    assert recorded.set_aside == 3
    np.testing.assert_array_equal(recorded.obs_BO, obs[3:])


def test_an_encoder_that_rounding_decides() -> None:
    """At the centre of its field the neuron's drive is 1, a tie with its threshold of 1."""
    fields = PopulationConfig(
        name="population", pop_size=1, mean_range=[0.0, 0.0], var=0.5, threshold=1.0
    )
    policy = policy_of(config(encoder=fields), task(1, 1))
    policy.norm.mean_std = torch.tensor([[0.0], [1.0]])
    obs = np.array([[0.0], [0.3]], np.float32)
    assert isinstance(policy.actor, SpikingActor)
    near = proof.encoder_near(policy.actor.encoder, torch.from_numpy(obs), 1)
    assert near.tolist() == [True, False]
    assert proof.recorded_of(policy, obs).obs_BO.tolist() in ([], obs[1:].tolist())


def test_more_are_recorded_where_rounding_decides_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """A third of the observations is usable: 500 of 1500 are too few, 1000 of 3000 enough."""
    monkeypatch.setattr(proof, "MOST", 1500)

    def third(policy: Policy, obs_BO: np.ndarray) -> proof.Recorded:
        return proof.Recorded(obs_BO[::3], [], obs_BO[::3], len(obs_BO) - len(obs_BO[::3]))

    recorded = proof.record(policy_of(config(), task(3, 1)), None, 1, 0, third)
    assert (len(recorded.obs_BO), recorded.set_aside) == (1000, 2000)
    monkeypatch.setattr(proof, "MOST_RECORDED", 2000)
    with pytest.raises(proof.ProofFailed, match=r"^500 observations were .* 1000 more lie so near"):
        proof.record(policy_of(config(), task(3, 1)), None, 1, 0, third)


def test_too_few_observations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three episodes have 60 steps, and six, which are the most, 120."""
    monkeypatch.setattr(proof, "MOST_EPISODES", 6)
    policy = policy_of(config(), task(3, 1, "Pendulum-v1"))
    with pytest.raises(proof.ProofFailed, match=r"^1[0-2]\d observations were .* 1000 are needed"):
        proof.record(policy, PENDULUM, 3, 0)


def test_both_files_or_none(tmp_path: Path) -> None:
    (tmp_path / "policy.c").mkdir()  # a folder, which no file can replace
    with pytest.raises(OSError, match=r"policy\.c"):
        publish(tmp_path / "policy.c", b"x", tmp_path / "policy.c.json", b"{}")
    assert [path.name for path in tmp_path.iterdir()] == ["policy.c"]


def test_a_sweep_that_is_started_again_does_what_is_missing(tmp_path: Path) -> None:
    run = saved(policy_of(config(), task()), tmp_path / "run")
    typed = ["export", "-m", f"run={run}", "format=nir,loihi"]
    assert spikerl(*typed).status == 0
    for file in (run / "policy.loihi", run / "policy.loihi.json"):
        file.unlink()
    before = (run / "policy.nir").read_bytes()
    said = spikerl(*typed)
    assert (said.status, said.err) == (0, "")
    assert said.out.count("done already") == 1
    assert (run / "policy.nir").read_bytes() == before
    assert (run / "policy.loihi").is_file()
    refusal = "it exists already; remove it, or give another file"
    said = spikerl(*typed, "seed=1")  # a different request
    assert (said.status, said.err.count(refusal)) == (2, 2)
    (run / "policy.nir").write_bytes(b"damaged")
    said = spikerl(*typed)
    assert (said.status, said.err.count(refusal), said.out.count("done already")) == (1, 1, 1)
    policy_of(config(), task(), seed=1).save(run)  # it trained on
    said = spikerl(*typed)
    assert (said.status, said.err.count(refusal)) == (2, 2)


def test_a_normaliser_that_needs_more_than_float32(tmp_path: Path) -> None:
    policy = policy_of(config(), task())
    policy.norm = RunningNorm(3, 3.0)
    policy.norm.add(np.random.default_rng(0).normal(1e5, 1.0, (1000, 3)))
    policy.norm.merge([policy.norm.collect()])
    line = spikerl("export", f"run={saved(policy, tmp_path / 'run')}", "format=c").line
    assert "an observation entry lies so far from 0" in line


def test_a_file_without_a_name(tmp_path: Path) -> None:
    run = saved(policy_of(config(), task()), tmp_path / "run")
    line = spikerl("export", f"run={run}", "format=nir", "file=/").line
    assert line == "file=/: give the name of a file"


@pytest.mark.parametrize("length", [300, 245])  # 245: the contract's name is too long
def test_a_name_that_is_too_long(
    length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name is refused before the policy is run."""
    monkeypatch.setattr("spikerl.commands.export.proof.known_env", None)
    run = saved(policy_of(config(), task()), tmp_path / "run")
    file = tmp_path / ("x" * length)
    line = spikerl("export", f"run={run}", "format=loihi", f"file={file}").line
    assert line == f"file={file}: File name too long; give another file"


def test_batch_normalisation_that_is_not_folded(tmp_path: Path) -> None:
    actor = CareBNConfig(
        name="care_bn", hidden_sizes=[12], spike_steps=5, lr=1e-4,
        recalibration_interval=None, recalibration_batches=1,
    )  # fmt: skip
    run = saved(policy_of(replace(config(), actor=actor), task()), tmp_path / "run")
    assert spikerl("export", f"run={run}", "format=c").line == (
        f"run={run}: its batch normalisation is not folded into weights; give a policy that acts"
    )


def test_every_part_has_an_equation() -> None:
    assert {"lif", "cuba_lif", "plif", "alif", "dynamic"} <= set(NEURONS)
    for known, registry in (
        (NEURONS, neurons.NEURONS), (ENCODERS, encoders.ENCODERS), (DECODERS, decoders.DECODERS),
    ):  # fmt: skip
        ours = {n for n, (_, part) in registry.options.items() if part.__module__[:7] == "spikerl"}
        assert set(known) == ours


def test_a_plugin_is_refused() -> None:
    verdicts = [f("onnx", "other") for f in (support.encoder_verdict, support.decoder_verdict)]
    verdicts.append(support.neuron_verdict("onnx", "other", "hard"))
    assert {verdict.level for verdict in verdicts} == {support.REFUSED}


def table_of_support() -> list[str]:
    """The support of all parts by all formats, as lines of Markdown."""
    rows: list[tuple[str, list[support.Verdict]]] = []
    for name in NEURONS:
        for reset in {"dynamic": ("hard",), "residual_if": ("soft",)}.get(name, ("hard", "soft")):
            row = [support.neuron_verdict(format, name, reset) for format in FORMATS]
            rows.append((f"neuron `{name}`, {reset} reset", row))
    row = [support.neuron_verdict(format, "lif", "hard", (1.0,)) for format in FORMATS]
    rows.append(("neuron `lif` or `cuba_lif` with a decay of 1", row))
    for group, names, verdict in (
        ("encoder", ENCODERS, support.encoder_verdict),
        ("decoder", DECODERS, support.decoder_verdict),
    ):
        rows += [(f"{group} `{name}`", [verdict(f, name) for f in FORMATS]) for name in names]
    rows.append(("early exit", [support.early_exit_verdict(format) for format in FORMATS]))
    rows.append(("dense actor (`mlp`)", [support.dense_verdict(format) for format in FORMATS]))
    plugin = [support.neuron_verdict(format, "", "hard") for format in FORMATS]
    rows.append(("parts of a plugin", plugin))
    lines = [f"| | {' | '.join(f'`{format}`' for format in FORMATS)} |"]
    lines.append("|---" * (1 + len(FORMATS)) + "|")
    return lines + [f"| {name} | {' | '.join(map(str, row))} |" for name, row in rows]


def test_the_page_has_the_table() -> None:
    page = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    assert "\n".join(table_of_support()) in page


def test_the_page_has_every_key_of_a_contract() -> None:
    page = (ROOT / "docs" / "export.md").read_text(encoding="utf-8").partition("## The contract")[2]
    spiking, dense = (policy_of(actor, task()) for actor in (config(), DENSE))
    assert isinstance(spiking.actor, SpikingActor)
    spiking.actor.early_exit = EarlyExit(threshold=0.1, steps=1)
    keys = {"made_from", "support", "proof", "file", "sha256", "bytes"}  # added by the command
    for format, policy in (("c", spiking), ("loihi", spiking), ("c", dense)):
        keys |= {*contract.describe(format, policy, None), *FORMATS[format].facts(policy)}
    assert {key for key in keys if f"`{key}`" not in page} == set()


def test_spikes_are_counted_over_all_pieces() -> None:
    """The first 100 of 200 observations fire, all in the first piece of 128."""

    class Fires(Constant):
        def spikes(self, obs_BO: np.ndarray) -> list[np.ndarray]:
            return [(obs_BO > 0.0)[None]] * 2

    policy = proof.FilePolicy(task(1, 1), Fires())
    seen = torch.cat([torch.ones(100, 1), -torch.ones(100, 1)])
    found = policy.activity(seen, torch.Generator())
    assert found is not None
    assert found.firing_rate == 0.5


@pytest.mark.parametrize(("threshold", "near"), [(5e-7, True), (0.1, False)])
def test_an_early_exit_that_rounding_decides(threshold: float, near: bool) -> None:
    """Without spikes actions do not change: only a threshold as small as rounding is in doubt."""
    actor = rate_decoded(spike_steps=4)
    actor.early_exit = EarlyExit(threshold=threshold, steps=1)
    taken = torch.ones(4, 1, 1, dtype=torch.bool)
    assert proof.decided(actor, torch.zeros(4, 1, 3), taken)[1].tolist() == [near]
