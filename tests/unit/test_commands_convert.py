"""A dense policy as spikes: residuals by hand, thresholds of each neuron, and the run folder."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import NEURON, fill, popsan, popsan_config
from exports import policy_of, saved, task
from shell import SHORT, spikerl

import spikerl as library
from spikerl.commands.convert import convert
from spikerl.envs.config import EnvConfig
from spikerl.files import checksum_of
from spikerl.kernels import reference
from spikerl.kernels.reference import Carried
from spikerl.machine import versions
from spikerl.models.actor import MLPActor, SpikingActor
from spikerl.models.actor_config import ActorConfig, MLPConfig
from spikerl.reporting.page import command_of
from spikerl.reporting.records import Run
from spikerl.snn.decoders import DecoderConfig
from spikerl.snn.encoders import EncoderConfig
from spikerl.snn.neurons import ResidualIF, ResidualIFConfig
from spikerl.training.evaluator import Evaluator
from spikerl.types import Task

DIRECT, LINEAR = EncoderConfig(name="direct"), DecoderConfig(name="linear")


def residual_if(**changes: Any) -> ResidualIFConfig:
    own = {"name": "residual_if", "threshold": 1.0, "reset": "soft", "start": 0.5, "alpha": 0.5}
    return ResidualIFConfig(**(NEURON | own | changes))


def one_neuron(spike_steps: int = 2, **changes: Any) -> SpikingActor:
    """An actor of one neuron whose current is the observation; its rate is the output."""
    parts: dict[str, Any] = {"encoder": DIRECT, "decoder": LINEAR}
    actor = popsan(1, 1, [1], neuron=residual_if(**changes), spike_steps=spike_steps, **parts)
    fill(actor, {"layers.0.weight_IN": [[1.0]], "layers.0.bias_N": [0.0]})
    fill(actor, {"decoder.map.weight_IN": [[1.0]], "decoder.map.bias_N": [0.0]})
    return actor


def decisions(actor: SpikingActor, *currents: float) -> list[tuple[float, float]]:
    """Count of spikes and the carried residual of each of several consecutive decisions."""
    carried, found = Carried(), []
    for x in currents:
        act = reference.decide(actor, torch.tensor([[x]]), None, carried)
        assert carried.fired_B is not None
        fired = float(carried.fired_B)
        assert float(act) == pytest.approx(np.tanh(fired / actor.spike_steps))
        found.append((fired, float(carried.residuals[0])))
    return found


def test_residuals_by_hand() -> None:
    """Threshold 1, two spike steps, alpha = 1/2; voltages start at 1/2 plus the carried residual.
    Current 0.75: 1.25 fires, 0.25 is left; 1 does not fire (a tie). 1/2 of 1 - 0.5 is carried.
    0.75 from 0.75: 1.5 fires, 0.5; 1.25 fires, 0.25 is left. 1/2 of 0.25 - 0.75 is carried.
    -3 from 0.25: without a spike no negative residual is carried, as a ReLU gives no less than 0.
    5 from 0.5: 5.5 and 9.5 fire, 8.5 is left; 1/2 of 8.5 - 0.5 is clipped to half the threshold.
    -0.5 from 1: 0.5, then 0, no spike.
    """
    expected = [(1.0, 0.25), (2.0, -0.25), (0.0, 0.0), (2.0, 0.5), (0.0, 0.0)]
    assert decisions(one_neuron(), 0.75, 0.75, -3.0, 5.0, -0.5) == expected


def test_residuals_are_of_the_threshold() -> None:
    """Twice the threshold and current give twice the residual; alpha = 0 carries nothing."""
    expected = [(1.0, 0.5), (2.0, -0.5), (0.0, 0.0), (2.0, 1.0)]
    assert decisions(one_neuron(threshold=2.0), 1.5, 1.5, -6.0, 10.0) == expected
    assert decisions(one_neuron(alpha=0.0), 0.75, 0.75) == [(1.0, 0.0), (1.0, 0.0)]
    assert decisions(one_neuron(alpha=0.0, start=0.0), 0.75, 1.0) == [(1.0, 0.0), (1.0, 0.0)]


def test_a_negative_residual_is_no_more_than_what_was_fired() -> None:
    """Threshold 4: from 2 by 4 to 6, a spike, then from 2 by -9 to -7, which is 9 below the start.
    One spike accounts for 4 of them; a ReLU would not give the rest. 1/4 of -4 is carried.
    """
    neuron = one_neuron(alpha=0.25, threshold=4.0).neurons[0]
    assert isinstance(neuron, ResidualIF)
    begin = neuron.initial(torch.tensor([[4.0]]))
    states = [neuron.step(torch.tensor([[4.0]]), begin)]
    states.append(neuron.step(torch.tensor([[-9.0]]), states[0]))
    assert [float(s.spikes_BN) for s in states] == [1.0, 0.0]
    assert float(neuron.residual(begin, states)) == -1.0


def test_without_residuals_batches_act_as_ever() -> None:
    """With alpha = 0 there is no carried state, so the batch kernels act as `decide` does."""
    actor = one_neuron(alpha=0.0)
    obs = torch.tensor([[0.75], [0.2], [5.0], [-1.0]])
    assert torch.equal(actor(obs), reference.decide(actor, obs, None, Carried()))


def test_thresholds_of_each_neuron() -> None:
    """First-layer activations (2, 8) and (4, 1): at most 4 and 8 by neuron, 8 by layer. The second
    layer's are at most 9.
    """
    dense = MLPActor(2, 1, MLPConfig(name="mlp", hidden_sizes=[2, 1], lr=1e-3))
    fill(dense, {"layers.0.weight_IN": [[2.0, 0.0], [0.0, 1.0]], "layers.0.bias_N": [0.0, 1.0]})
    fill(dense, {"layers.1.weight_IN": [[0.25], [1.0]], "layers.1.bias_N": [0.5]})
    fill(dense, {"layers.2.weight_IN": [[3.0]], "layers.2.bias_N": [0.125]})
    obs = torch.tensor([[1.0, 7.0], [2.0, 0.0]])  # second layer: 0.5 + 8 + 0.5 = 9 and 2.5
    spiking = popsan(2, 1, [2, 1], encoder=DIRECT, decoder=LINEAR, neuron=residual_if())
    assert convert(dense, spiking, obs, 100.0, own=True) == [8.0, 9.0]
    first, second = spiking.layers
    assert first.weight_IN.tolist() == [[0.5, 0.0], [0.0, 0.125]]
    assert first.bias_N.tolist() == [0.0, 0.125]
    torch.testing.assert_close(second.weight_IN, torch.tensor([[1.0 / 9.0], [8.0 / 9.0]]))
    torch.testing.assert_close(second.bias_N, torch.tensor([0.5 / 9.0]))
    assert dict(spiking.decoder.named_parameters())["map.weight_IN"].tolist() == [[27.0]]
    assert convert(dense, spiking, obs, 100.0) == [8.0, 9.0]
    assert first.weight_IN.tolist() == [[0.25, 0.0], [0.0, 0.125]]


@pytest.fixture
def dense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with a dense actor."""
    monkeypatch.chdir(tmp_path)
    said = spikerl("train", *SHORT, "actor=mlp", "actor.hidden_sizes=[6]", "run_dir=dense",
                   "total_steps=120", "eval_episodes=0")  # fmt: skip
    assert said.status == 0, said
    return tmp_path / "dense"


def test_what_is_compared_and_kept(dense: Path) -> None:
    """Every pair is in the table; the run folder has the best, and converting a pair alone gives
    the table's return.
    """
    own = ["threshold=neuron", "start=0.5", "episodes=2", "percentile=100"]
    said = spikerl(
        "convert", "run=dense", "run_dir=new", "spike_steps=[2,6]", "alpha=[0,0.3]", *own
    )
    assert said.status == 0, said
    header, whole, *lines, last = said.out.splitlines()
    assert header.split() == ["spike_steps", "alpha", "return", "+-", "spikes"]
    assert whole.split()[:2] == ["dense", "-"]
    assert [line.split()[:2] for line in lines] == [
        ["2", "0"], ["2", "0.3"], ["6", "0"], ["6", "0.3"]
    ]  # fmt: skip
    tried = json.loads(Path("new/manifest.json").read_text())["tried"]
    best = max(tried, key=lambda choice: choice["return_mean"])
    assert last.startswith(f"InvertedPendulum-v5: {best['spike_steps']} spike steps, alpha")
    policy = library.load_policy("new")
    neuron = policy.config.neuron
    assert (neuron.alpha, neuron.start) == (best["alpha"], 0.5)  # type: ignore[union-attr]
    for choice in tried:  # convert with each pair alone
        more = [f"spike_steps={choice['spike_steps']}", f"alpha={choice['alpha']}"]
        folder = f"run_dir=one_{choice['spike_steps']}_{choice['alpha']}"
        assert spikerl("convert", "run=dense", folder, *more, *own).status == 0
    env = EnvConfig(name="gym", version=None, id="InvertedPendulum-v5", max_episode_steps=30,
                    vectorizer="sync")  # fmt: skip
    evaluator = Evaluator(env, 2, 0)
    again = evaluator.run(library.load_policy("one_6_0.3"), 1)
    evaluator.close()
    assert (again.mean, again.carried_spikes) == (tried[3]["return_mean"], tried[3]["spikes"])
    assert again.activity is None
    said = spikerl("eval", "run=one_6_0.3", "episodes=1", "json=true")
    facts = json.loads(said.out)
    assert facts["firing_rate"] is None
    assert facts["spikes_per_decision"] > 0.0
    assert "leave ops out" in spikerl("eval", "run=one_6_0.3", "ops=true").line
    assert "cannot hold neuron=residual_if" in spikerl("export", "run=one_6_0.3", "format=c").line
    line = spikerl("train", "config=one_6_0.3/config.yaml", "run_dir=on").line
    assert line.startswith("neuron.alpha=0.3: a replayed decision has none before it")


def test_defaults_are_the_plain_conversion(dense: Path) -> None:
    """The source run was trained on a GPU and with another version of MuJoCo."""
    for file, old, new in (
        ("config.yaml", "device: cpu", "device: cuda:7"),
        ("policy.json", f'"mujoco": "{versions()["mujoco"]}"', '"mujoco": "9.9.9"'),
    ):
        text = (dense / file).read_text()
        assert old in text
        (dense / file).write_text(text.replace(old, new))
    assert spikerl("convert", "run=dense", "run_dir=new", "episodes=1").status == 0
    policy, source = library.load_policy("new"), library.load_policy("dense")
    assert policy.config.neuron is not None
    assert policy.config.neuron.name == "lif"
    assert policy.trained_with["mujoco"] == "9.9.9"
    manifest = json.loads(Path("new/manifest.json").read_text())
    assert "tried" not in manifest
    assert manifest["converted_from"] == "dense"  # no absolute path
    assert "\nrun_dir: new\n" in Path("new/config.yaml").read_text()
    (most,) = manifest["activations_reached"]
    ours, theirs = (p.actor.layers[0].weight_IN for p in (policy, source))
    assert torch.equal(ours, theirs * (1.0 / most))


def test_a_policy_that_carries_on(tmp_path: Path) -> None:
    """A decision depends on those before, so calling the policy without `carried` is an error."""
    config = ActorConfig(
        actor=popsan_config([4], 3),
        encoder=DIRECT,
        neuron=residual_if(alpha=1.0),
        decoder=LINEAR,
    )
    made = policy_of(config, task())
    with torch.no_grad():
        # Voltages 0.5, 0.95, 1.4 (fires), 0.85; next decision: 1.3 (fires), 0.75, 1.2 (fires).
        made.actor.layers[0].weight_IN.zero_()
        made.actor.layers[0].bias_N.fill_(0.45)
    policy = library.load_policy(saved(made, tmp_path / "run"))
    obs = np.array([0.4, -0.2, 0.9])
    with pytest.raises(ValueError, match="a decision depends on the one before: give carried"):
        policy(obs)
    carried = policy.carried()
    acts = [policy(obs, carried) for _ in range(2)]
    assert not np.array_equal(acts[0], acts[1])
    again, state = policy.predict(obs)
    assert np.array_equal(again, acts[0])
    again, state = policy.predict(obs, state, np.array([False]))
    assert np.array_equal(again, acts[1])
    again, _ = policy.predict(obs, state, np.array([True]))
    assert np.array_equal(again, acts[0])


def test_discrete_actions_that_carry_on(tmp_path: Path) -> None:
    """Values 100 and 200 are compared without tanh, which would make both 1."""
    config = ActorConfig(
        actor=popsan_config([4], 3),
        encoder=DIRECT,
        neuron=residual_if(alpha=1.0),
        decoder=LINEAR,
    )
    none = np.empty(0)
    discrete = Task("Nowhere-v0", (3,), (), none, none, 20, choices=range(2))
    made = policy_of(config, discrete)
    with torch.no_grad():
        made.actor.get_parameter("decoder.map.weight_IN").zero_()
        made.actor.get_parameter("decoder.map.bias_N").copy_(torch.tensor([100.0, 200.0]))
    policy = library.load_policy(saved(made, tmp_path / "run"))
    obs = np.zeros((1, 3))
    assert policy.act(obs, policy.generator, policy.carried()).tolist() == [[100.0, 200.0]]
    assert policy(obs[0], policy.carried()) == 1


@pytest.mark.parametrize(
    ("request_", "line"),
    [
        ("alpha=1.5", "alpha=[1.5]: give a value in [0, 1], or a list of them"),
        ("alpha=[]", "alpha=[]: give a value in [0, 1], or a list of them"),
        ("spike_steps=0", "spike_steps=[0]: give 1 to 1000"),
        ("spike_steps=[5,x]", "spike_steps=[5, 'x']: give a whole number, or a list of them"),
        ("start=-0.5", "start=-0.5: give a value in [0, 1]"),
        ("threshold=all", "threshold=all: give layer or neuron"),
        ("'alpha=0.5' reset=hard", "reset=hard: start and alpha need a soft reset"),
    ],
)
def test_refused_requests(request_: str, line: str, tmp_path: Path) -> None:
    words = request_.replace("'", "").split()
    said = spikerl("convert", f"run={tmp_path}", f"run_dir={tmp_path / 'new'}", *words)
    assert said.line.startswith(line)


def test_a_folder_that_is_there_has_no_dated_other(dense: Path) -> None:
    said = spikerl("convert", "run=dense", "run_dir=dense")
    assert said.line == "run_dir=dense: it exists already; give another run_dir"


def test_a_sweep_keeps_what_it_makes(dense: Path) -> None:
    typed = ["run=dense", "run_dir=one,two", "spike_steps=2", "episodes=1"]
    said = spikerl("convert", "-m", *typed)
    assert said.status == 0, said
    made = [library.load_policy(name).actor for name in ("one", "two")]
    assert [actor.spike_steps for actor in made if isinstance(actor, SpikingActor)] == [2, 2]
    for name in ("one", "two"):
        assert f"│ run_dir={name} │ done   │ -                │ {name} " in said.out
        command = f"spikerl convert run=dense run_dir={name} spike_steps=2 episodes=1"
        assert command_of(Run.read(Path(name))) == command


def test_a_run_that_goes_on_meanwhile(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest has the checksum of the policy that was read, although its checkpoint moved."""
    first = dense / "checkpoints/step_0000000000"
    for file in dense.glob("policy.*"):
        file.replace(first / file.name)
    for other in dense.glob("checkpoints/*"):
        if other != first:
            other.unlink() if other.is_symlink() else shutil.rmtree(other)
    digest = checksum_of(first / "policy.safetensors")
    converting = Evaluator.observations

    def later(*args: Any) -> Any:
        first.rename(first.with_name("step_0000000120"))
        return converting(*args)

    monkeypatch.setattr(Evaluator, "observations", later)
    said = spikerl("convert", "run=dense", "run_dir=new", "episodes=1")
    assert said.status == 0, said
    assert json.loads(Path("new/manifest.json").read_text())["converted_sha256"] == digest


def test_a_config_imports_nothing(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment is made by the policy's task; the module that the config names is ignored."""
    Path("named_by_a_file.py").write_text("")
    monkeypatch.syspath_prepend(".")
    config = dense / "config.yaml"
    text = config.read_text()
    own = "id: InvertedPendulum-v5"
    assert text.count(own) == 1
    config.write_text(text.replace(own, "id: named_by_a_file:InvertedPendulum-v5"))
    said = spikerl("convert", "run=dense", "run_dir=converted", "spike_steps=2", "episodes=1")
    assert said.status == 0, said
    assert "named_by_a_file" not in sys.modules


def test_the_environment_of_another_policy(dense: Path) -> None:
    """Refused even if it has the same observations and actions."""
    said = spikerl("convert", "run=dense", "run_dir=new", "env_id=InvertedPendulum-v4")
    line = "the policy was trained on InvertedPendulum-v5; give that, or leave it out"
    assert said.line == f"env_id=InvertedPendulum-v4: {line}"
    assert not Path("new").exists()
