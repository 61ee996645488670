"""Policies over sequences: an episode's history, their files, and commands that refuse them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import INVERTED_PENDULUM
from recorded import episode, task_for, write
from sequences import actor_config
from shell import refusal, spikerl

from spikerl.commands.collect import CollectRequest, behave
from spikerl.models.networks import build_sequence
from spikerl.models.normalizer import RunningNorm
from spikerl.models.policy import Policy
from spikerl.models.sequence import ConditionConfig, History
from spikerl.runs.policies import load_policy
from spikerl.types import Contexts

AIM = ConditionConfig(target_return=7.0, return_scale=2.0)


def policy(kind: str = "pssa") -> Policy:
    torch.manual_seed(1)
    config = actor_config(kind)
    config.conditioning = AIM
    task = task_for(INVERTED_PENDULUM)
    network = build_sequence(config, task.obs_dim, task.act_dim, folded=True)
    with torch.no_grad():  # so that neurons fire
        for p in network.parameters():
            p.mul_(3.0)
    return Policy(task, config, network, RunningNorm(task.obs_dim, 3.0))


def rows(field: torch.Tensor) -> list[list[float]]:
    return [[float(x) for x in row.flatten()] for row in field]


def test_the_history_of_two_episodes_by_hand() -> None:
    history = History(3, AIM)
    history.see(torch.tensor([[1.0], [10.0]]), 1)
    history.acted(torch.tensor([[0.1], [0.2]]))
    history.reward([1.0, -3.0])
    steps = history.see(torch.tensor([[2.0], [20.0]]), 1)
    assert rows(steps.obs) == [[0.0, 1.0, 2.0], [0.0, 10.0, 20.0]]
    assert rows(steps.togo) == [[0.0, 3.5, 3.0], [0.0, 3.5, 5.0]]  # halves of 7, 7 - 1 and 7 + 3
    assert steps.time.tolist() == [[0, 0, 1], [0, 0, 1]]
    assert steps.there.tolist() == [[False, True, True]] * 2
    torch.testing.assert_close(steps.act[:, :, 0], torch.tensor([[0.0, 0.1, 0], [0, 0.2, 0]]))
    for n in (3, 4, 5):
        history.acted(torch.zeros(2, 1))
        history.reward(np.array([1.0, 0.0]))
        steps = history.see(torch.full((2, 1), float(n)), 1)
    assert rows(steps.obs) == [[3.0, 4.0, 5.0]] * 2
    assert steps.time.tolist() == [[2, 3, 4]] * 2
    assert rows(steps.togo)[0] == [2.5, 2.0, 1.5]
    history.acted(torch.ones(2, 1))
    history.reward([0.0, 0.0])
    history.restart(torch.tensor([False, True]))
    steps = history.see(torch.full((2, 1), 6.0), 1)
    assert steps.there.tolist() == [[True] * 3, [False, False, True]]
    assert steps.time[1].tolist() == [0, 0, 0]
    assert rows(steps.togo)[1] == [0.0, 0.0, 3.5]
    assert rows(steps.obs)[1] == [0.0, 0.0, 6.0]


@pytest.mark.parametrize("kind", ["pssa", "tssa", "dense"])
def test_a_policy_acts_from_what_it_saw_before(kind: str) -> None:
    made, obs = policy(kind), np.linspace(-1.0, 1.0, 12).reshape(3, 4)
    carried = made.carried()
    assert isinstance(carried, History)
    acts = []
    for one in obs:
        acts.append(made(one, carried))
        carried.reward(1.5)
    togo = torch.tensor([0, 0, 7.0, 5.5, 4.0]) / 2.0
    before = torch.zeros(5, 1)
    before[2:4, 0] = torch.tensor(np.array(acts[:2]).ravel() / 3.0)  # scaled by the bounds of 3
    seen = torch.cat([torch.zeros(2, 4), made.observe(obs)])
    there = torch.tensor([False, False, True, True, True])
    steps = Contexts(seen, before, togo, torch.tensor([0, 0, 0, 1, 2]), there)
    with torch.no_grad():
        whole = made.network(Contexts(*(field.unsqueeze(0) for field in steps)))
    np.testing.assert_allclose(acts[2], 3.0 * whole[0, -1].numpy(), rtol=1e-4)
    alone = made(obs[2], made.carried())
    assert not np.allclose(alone, acts[2])


def test_what_a_decision_needs() -> None:
    made, obs = policy(), np.zeros(4)
    with pytest.raises(ValueError, match="give carried"):
        made(obs)
    carried = made.carried()
    assert carried is not None
    with pytest.raises(ValueError, match="1 rewards; 0 are due"):
        carried.reward(1.0)
    made(obs, carried)
    with pytest.raises(ValueError, match=r"tell carried\.reward"):
        made(obs, carried)
    with pytest.raises(ValueError, match="2 rewards; 1 are due"):
        carried.reward([1.0, 2.0])
    carried.reward(1.0)
    with pytest.raises(ValueError, match="3 observations; this is of 1 episodes"):
        made(np.zeros((3, 4)), carried)


def test_as_stable_baselines_calls_it() -> None:
    made = policy()
    act, state = made.predict(np.zeros(4))
    assert isinstance(state, History)
    np.testing.assert_array_equal(act, made(np.zeros(4), made.carried()))
    state.reward(2.0)
    again, same = made.predict(np.zeros(4), state, np.array([True]))
    assert same is state
    np.testing.assert_array_equal(again, act)


@pytest.mark.parametrize("kind", ["pssa", "tssa", "dense"])
def test_saved_and_loaded_it_acts_the_same(kind: str, tmp_path: Path) -> None:
    made, obs = policy(kind), np.linspace(-1.0, 1.0, 8).reshape(2, 4)
    made.save(tmp_path)
    loaded = load_policy(tmp_path)
    assert loaded.config.conditioning == AIM
    theirs, ours = loaded.carried(), made.carried()
    assert theirs is not None
    assert ours is not None
    for _ in range(3):
        np.testing.assert_allclose(loaded(obs, theirs), made(obs, ours), rtol=1e-4, atol=1e-6)
        for one in (theirs, ours):
            one.reward([1.0, 2.0])
    loaded.aim(3.0)
    carried = loaded.carried()
    assert isinstance(carried, History)
    assert carried.see(loaded.observe(obs), 1).togo[0, -1] == 1.5


@pytest.mark.parametrize(
    ("place", "value", "line"),
    [
        ("conditioning", None, "lacks or garbles 'conditioning'"),
        ("conditioning.return_scale", 0.0, "give a value above 0"),
        ("conditioning.target_return", "x", "expected float"),
        ("actor.heads", 3, "give a number that divides"),
        ("actor.context", 7, "does not fit the shapes"),
        ("actor.dim", 1 << 14, "does not fit the shapes"),
        ("actor.layers", 10**9, "give 1 to 100"),
        ("actor.attention", "softmax", "one of pssa, tssa"),
        ("neuron", None, "one of"),
        ("conditioning", 3, "lacks or garbles"),
        ("compression", {"bits": {}}, "garbles"),
    ],
)
def test_a_garbled_file_is_refused(place: str, value: object, line: str, tmp_path: Path) -> None:
    policy().save(tmp_path)
    path = tmp_path / "policy.json"
    data = json.loads(path.read_text())
    group, _, key = place.partition(".")
    if key:
        data[group][key] = value
    elif value is None:
        del data[group]
    else:
        data[group] = value
    path.write_text(json.dumps(data))
    assert line in str(refusal(load_policy, tmp_path))


TINY = ["env=InvertedPendulum", "env.max_episode_steps=30", "actor.dim=8", "actor.layers=1",
        "actor.context=4", "algo.batch_size=4", "total_steps=12", "steps_per_epoch=6",
        "eval_episodes=1", "logger=[]", "dataset=d", "threads=1", "device=cpu",
        "energy=none"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset, and a run of each kind of network."""
    made = tmp_path_factory.mktemp("sequences")
    write(made / "d", [episode(30), episode(8, 100.0)])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        for name in ("dsformer/pssa", "dsformer/tssa", "dense/decision_transformer"):
            run = f"run_dir={name.rpartition('/')[2]}"
            said = spikerl("train", f"experiment={name}", *TINY, run)
            assert said.status == 0, said
            # 100 + 101 + ... + 107 = 828
            assert "aim at a return of 828 (the best of the dataset)" in said.out
    return made


@pytest.mark.parametrize("run", ["pssa", "tssa", "decision_transformer"])
def test_a_trained_one_is_evaluated(
    run: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    row = json.loads((folder / run / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["actor_loss"] > 0.0
    assert row["critic_loss"] is None
    spiking = run != "decision_transformer"
    assert (row["firing_rate"] is None) is not spiking
    assert row["layer_firing_rates"] is None or len(row["layer_firing_rates"]) == 8
    facts = json.loads(spikerl("eval", f"run={run}", "episodes=2", "json=true").out)
    assert facts["target_return"] == 828.0
    assert (facts["firing_rate"] is None) is not spiking
    said = spikerl("eval", f"run={run}", "episodes=1", "target_return=-5")
    assert "aimed at a return of -5\n" in said.out
    line = spikerl("eval", f"run={run}", "episodes=1", "target_return=1e31").line
    assert line == "target_return=1e+31: give a number of at most 1e30"


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ("export run=pssa format=c", "actor=spikeformer: its decisions depend on an episode's"),
        ("compress run=pssa prune=0.5 run_dir=small", "actor=spikeformer: its decisions depend"),
        ("convert run=decision_transformer run_dir=new", "actor=transformer: its decisions depend"),
        ("eval run=pssa ops=true", "actor=spikeformer: its decisions depend"),
        ("eval run=pssa video=spikes", "video=spikes: no network alone makes its decisions"),
        ("train algo=td3 init_from=pssa", "init_from=pssa: its actor is spikeformer of 1 layers"),
        ("train TINY init_from=pssa", "init_from=pssa: a saved policy over sequences has its"),
        ("train TINY encoder=poisson", "encoder=poisson: has no effect with experiment=dsformer/"),
        ("train actor=spikeformer decoder.pop_size=3", "decoder.pop_size=3: has no effect with"),
        ("train actor=transformer neuron=lif", "neuron=lif: has no effect with actor=transf"),
        ("train TINY dataset=null", "dataset=null: algo=decision_transformer learns from recorded"),
        ("train TINY env=CartPole", "algo=decision_transformer: the actions of CartPole-v1 are"),
    ],
)
def test_refused(asked: str, line: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    command, *words = asked.split()
    if "TINY" in words:
        words = ["experiment=dsformer/pssa", *TINY, *words[1:]]
    elif command == "train":
        words += ["env=InvertedPendulum", "env.max_episode_steps=30"]
    assert spikerl(command, *words).line.startswith(line)
    assert not {"small", "new", "outputs"} & {path.name for path in folder.iterdir()}


def test_a_dense_policy_aims_at_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    words = [w for w in TINY if not w.startswith("actor.")]
    bc = ["algo=bc", "actor=mlp", "actor.hidden_sizes=[8]", "run_dir=bc"]
    assert spikerl("train", *words, *bc).status == 0
    line = spikerl("eval", "run=bc", "target_return=5").line
    assert line.startswith("target_return=5.0: its policy does not depend on a return")


@pytest.mark.parametrize("changes", [{"random_share": 1.0}, {"noise": 0.5}, {}])
def test_what_is_recorded_is_what_later_decisions_see(changes: dict[str, float]) -> None:
    """Later decisions see the recorded actions, with the noise that `collect` added."""
    fields = {"noise": 0.0, "random_share": 0.0} | changes
    request = CollectRequest(run="r", dataset="d", policy="last", episodes=1, steps=None, seed=0,
                             env_id=None, plugins=[], **fields)  # fmt: skip
    made, draws = policy(), np.random.default_rng(0)
    carried = made.carried()
    assert isinstance(carried, History)
    acts = []
    for _ in range(3):
        acts.append(behave(request, made, np.zeros(4), draws, carried))
        carried.reward(0.0)
    assert carried.steps is not None
    np.testing.assert_allclose(carried.steps.act[0, 2:], np.stack(acts), rtol=1e-6)
    if changes:
        assert len({round(float(act[0]), 6) for act in acts}) > 1


def test_collect_goes_on_with_rewards(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    asked = ["run=pssa", "dataset=again", "episodes=2", "noise=0.2", "random_share=0.5"]
    assert spikerl("collect", *asked).status == 0
    assert spikerl("collect", "run=pssa", "dataset=any", "episodes=1", "policy=random").status == 0
    said = spikerl("collect", "run=pssa", "dataset=no", "policy=replay")
    assert said.line.startswith("policy=replay: algo=decision_transformer keeps no replay of its")
