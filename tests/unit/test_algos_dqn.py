"""DQN against numbers worked by hand, and two workers against one process."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import dqn_config, fill, lif_config, popsan, voltage_config
from plain import transitions
from shell import SHORT, refusal, spikerl
from threads import run_in_threads, worlds

import spikerl as library
from spikerl.algos.dqn import DQN
from spikerl.config.together import check_actions
from spikerl.distributed.world import World
from spikerl.kernels import build as native
from spikerl.models.actor import Actor, MLPActor, SpikingActor
from spikerl.models.actor_config import MLPConfig
from spikerl.models.policy import check_shapes
from spikerl.snn.encoders import EncoderConfig
from spikerl.types import Batch, Task

CPU = f"cpu/{native.supported_paths()[0]}"


def dense(outputs: int, obs_dim: int = 3, hidden: int = 12, kernel: str = "reference") -> MLPActor:
    torch.manual_seed(0)
    config = MLPConfig(name="mlp", hidden_sizes=[hidden], lr=1e-3)
    return MLPActor(obs_dim, outputs, config, kernel=kernel)


def learner(actor: Actor, **settings: Any) -> DQN:
    parts = {key: settings.pop(key) for key in ("world", "weight") if key in settings}
    generator = torch.Generator().manual_seed(0)
    return DQN(actor, None, dqn_config(**settings), actor_lr=1e-2, generator=generator, **parts)


def by_hand(last: list[float], target: list[float], **settings: Any) -> DQN:
    """A DQN whose values of an observation s > 0 are s times `last`, the target's s * `target`."""
    net = dense(len(last), obs_dim=1, hidden=1)
    weights = {"layers.0.weight_IN": [[1.0]], "layers.0.bias_N": [0.0]}
    zero = {"layers.1.bias_N": [0.0] * len(last)}
    fill(net, weights | zero | {"layers.1.weight_IN": [last]})
    made = learner(net, **settings)
    fill(made.actor_target, {"layers.1.weight_IN": [target]})
    return made


def one_row(terminated: bool = False) -> Batch:
    """A transition from 1 to 2 by the first of two actions: reward 0.5, discount 0.5."""
    obs, act, rew = torch.tensor([[1.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([0.5])
    return Batch(obs, act, rew, 2.0 * obs, torch.tensor([terminated]), torch.tensor([0.5]))


@pytest.mark.parametrize(
    ("settings", "last", "target", "terminated", "q", "loss"),
    [
        # y = .5 + .5 max(6, 2)
        ({}, [1.0, 2.0], [3.0, 1.0], False, 1.0, 2.5 - 0.5),
        # the online network prefers the second action: y = .5 + .5 2
        ({"double": True}, [1.0, 2.0], [3.0, 1.0], False, 1.0, 0.5 * 0.5**2),
        ({"double": True}, [1.0, 2.0], [3.0, 1.0], True, 1.0, 0.5 * 0.5**2),  # y = .5
        # q = 4 + (1 - (1 + 2) / 2); y = .5 + .5 (2 + 6 - (6 + 2) / 2)
        ({"duelling": True}, [1.0, 2.0, 4.0], [3.0, 1.0, 1.0], False, 3.5, 1.0 - 0.5),
        # the online network prefers the second: y = .5 + .5 (2 + 2 - 4)
        ({"duelling": True, "double": True}, [1.0, 2.0, 4.0], [3.0, 1.0, 1.0], False, 3.5, 2.5),
    ],
)
def test_loss_and_target_by_hand(
    settings: dict[str, Any],
    last: list[float],
    target: list[float],
    terminated: bool,
    q: float,
    loss: float,
) -> None:
    (found,) = by_hand(last, target, **settings).run_updates(one_row(terminated), 1)
    assert float(found["q_mean"]) == q
    assert float(found["critic_loss"]) == loss


def test_a_gradient_by_hand() -> None:
    """d loss / d Q is -1 where the error is beyond 1, and only for the action that was taken."""
    made = by_hand([1.0, 2.0], [3.0, 1.0])
    gradients: list[torch.Tensor] = []
    step = made.actor_optimizer.step

    def noting() -> torch.Tensor:
        gradients.extend(slot.clone() for slot in made.actor_optimizer.gradient.slots)
        return step()

    made.actor_optimizer.step = noting  # type: ignore[method-assign]
    made.run_updates(one_row(), 1)
    weights, biases = [[-1.0]], [-1.0]  # of the first layer, through the weight 1
    assert [g.tolist() for g in gradients] == [weights, biases, [[-1.0, 0.0]], [-1.0, 0.0]]


@pytest.mark.parametrize("kernel", ["reference", CPU])
def test_spikes_cost_what_is_said(kernel: str) -> None:
    """The loss grows by spike_cost = 0.5 times the firing rate of the only layer."""
    found = []
    for cost in (0.0, 0.5):
        net = spiking(2, kernel, spike_cost=cost)
        net.schedule(0, 1)
        rows = transitions(32, torch.float32)
        rate = net.activity(rows.obs).firing_rate
        found.append(learner(net).run_updates(rows, 1)[0])
    without, metrics = found
    assert "spike_loss" not in without
    assert rate > 0.1
    assert float(metrics["spike_loss"]) == pytest.approx(0.5 * rate, rel=1e-5)
    added = float(metrics["critic_loss"] - without["critic_loss"])
    assert added == pytest.approx(0.5 * rate, rel=1e-4)


@pytest.mark.parametrize(("interval", "tau"), [(3, 1.0), (1, 0.25)])
def test_when_and_how_the_target_changes(interval: int, tau: float) -> None:
    made = learner(dense(2), target_interval=interval, tau=tau)
    rows = transitions(8, torch.float32)
    for number in range(1, 8):
        before = made.targets["actor"].clone()
        made.run_updates(rows, 1)
        online = made.actor_optimizer.flat
        wanted = before + tau * (online - before) if number % interval == 0 else before
        torch.testing.assert_close(made.targets["actor"], wanted)
        assert not torch.equal(made.targets["actor"], online) or (tau, number % interval) == (1, 0)
    assert made.updates == 7


def test_several_updates_at_once_are_as_many_alone() -> None:
    """Seven updates in one call equal seven calls, across copies to the target every 3 updates."""
    rows = transitions(7 * 8, torch.float32)
    batched, alone = (learner(dense(2), target_interval=3, double=True) for _ in range(2))
    losses = [float(m["critic_loss"]) for m in batched.run_updates(rows, 7)]
    each = zip(*(field.split(8) for field in rows), strict=True)
    assert losses == [float(alone.run_updates(Batch(*part), 1)[0]["critic_loss"]) for part in each]
    assert torch.equal(batched.actor_optimizer.flat, alone.actor_optimizer.flat)
    assert torch.equal(batched.targets["actor"], alone.targets["actor"])


def spiking(outputs: int, kernel: str, **changes: Any) -> SpikingActor:
    torch.manual_seed(0)
    parts: dict[str, Any] = {"encoder": EncoderConfig(name="direct"), "decoder": voltage_config()}
    net = popsan(3, outputs, [12], spike_steps=4, neuron=lif_config(), **parts, **changes)
    net.kernel = kernel
    return net


@pytest.mark.parametrize("kind", ["dense", "spiking"])
@pytest.mark.parametrize("kernel", ["reference", CPU])
def test_two_workers_are_one_with_both_batches(kind: str, kernel: str) -> None:
    def made(world: World | None = None) -> DQN:
        net = dense(3, kernel=kernel) if kind == "dense" else spiking(3, kernel)
        own = {} if world is None else {"world": world, "weight": 0.5}
        return learner(net, duelling=True, double=True, max_grad_norm=0.1, **own)

    whole = made()
    both = [made(world) for world in worlds(2)]
    rows = transitions(32, torch.float32)
    for _ in range(3):
        whole.run_updates(rows, 1)
        parts = [Batch(*(field[i::2] for field in rows)) for i in range(2)]
        run_in_threads(
            [partial(own.run_updates, part, 1) for own, part in zip(both, parts, strict=True)]
        )
    first, second = (own.actor_optimizer.flat for own in both)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, whole.actor_optimizer.flat, rtol=1e-4, atol=1e-5)
    assert not torch.equal(first, made().actor_optimizer.flat)


@pytest.mark.parametrize(
    ("step", "epsilon"), [(0, 0.8), (50, 0.5), (99, 0.206), (100, 0.2), (9999, 0.2)]
)
def test_epsilon_by_hand(step: int, epsilon: float) -> None:
    made = learner(dense(3), epsilon_start=0.8, epsilon_end=0.2, epsilon_steps=100)
    made.step = step
    assert made.epsilon == pytest.approx(epsilon)
    found = made.run_updates(transitions(4, torch.float32), 1)
    assert float(found[0]["epsilon"]) == pytest.approx(epsilon)


def test_actions_are_greedy_but_for_epsilon_of_them() -> None:
    """With 3 actions and epsilon .6, the greedy one has a share of .4 + .2, each other one .2."""
    made = by_hand([1.0, 3.0, 2.0], [0.0] * 3, epsilon_start=0.6, epsilon_end=0.0)
    obs, draw = torch.ones(9000, 1), torch.Generator().manual_seed(0)
    act = made.explore(obs, draw)
    assert act.shape == (9000, 3)
    assert torch.equal(act.sum(1), torch.ones(9000))
    assert sorted(set(act.flatten().tolist())) == [0.0, 1.0]
    counts = Counter(act.argmax(1).tolist())
    for action, share in enumerate([0.2, 0.6, 0.2]):
        deviation = (share * (1.0 - share) * 9000) ** 0.5
        assert abs(counts[action] - share * 9000) < 4.0 * deviation
    made.step = 10**6  # epsilon 0
    assert made.explore(obs, draw).argmax(1).unique().tolist() == [1]


def test_an_action_is_the_largest_entry_and_the_first_of_equals() -> None:
    task = Task("any", (1,), (), np.empty(0), np.empty(0), 9, choices=range(-1, 2))
    assert (task.act_dim, task.kind) == (3, "discrete")
    acts = task.to_env(np.array([[0.1, -2.0, 0.0], [0.0, 7.0, 7.0], [-3.0, -2.0, -1.0]]))
    assert acts.dtype == np.int64
    assert acts.tolist() == [-1, 0, 1]


def task(kind: str) -> Task:
    choices = range(2) if kind == "discrete" else None
    return Task("Toy-v0", (1,), (), np.empty(0), np.empty(0), 9, choices=choices)


def test_which_algorithms_fit_which_actions() -> None:
    assert str(refusal(check_actions, dqn_config(), task("continuous"))) == (
        "algo=dqn: the actions of Toy-v0 are continuous;"
        " use algo=ddpg or td3 or proxy_td3 or sac or ppo"
    )
    check_actions(dqn_config(), task("discrete"))


CARTPOLE = [
    *(word for word in SHORT if "critic" not in word and not word.startswith("env=")),
    *("env=CartPole", "algo=dqn", "encoder=direct", "neuron=lif", "decoder=voltage"),
]


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        (["algo=td3"], "algo=td3: the actions of CartPole-v1 are discrete; use algo=ppo or dqn"),
        (["env=Pendulum"], "algo=dqn: the actions of Pendulum-v1 are continuous; use algo="),
        (["env.action_bounds=first"], "env.action_bounds=first: its actions have no bounds"),
        (["algo.epsilon_end=1.5"], "algo.epsilon_end=1.5: give a value in [0, 1]"),
        (["algo.critic_lr=1"], "algo.critic_lr=1: no such key"),
        (["decoder.voltage_decay=1.0"], "decoder.voltage_decay=1.0: give a value in [0, 1)"),
        (["decoder.read=first"], "decoder.read=first: give last, mean or max"),
    ],
)
def test_refused(
    typed: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert spikerl("train", *CARTPOLE, *typed).line.startswith(line)
    assert not any(tmp_path.iterdir())


def test_other_numbers_of_actions_are_refused() -> None:
    """Both tasks have two actions, numbered from 0 in one and from 5 in the other."""
    none = np.empty(0)
    zero, five = (
        Task("Nowhere-v0", (4,), (), none, none, 9, choices=range(first, first + 2))
        for first in (0, 5)
    )
    check_shapes("run", "run", zero, zero)
    line = str(refusal(check_shapes, "run", "run", five, zero))
    assert "one of 2 actions from 5 on (Nowhere-v0), but Nowhere-v0 needs (4,) to one of 2" in line


def test_a_run_its_policy_and_what_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own = ["algo.duelling=true", "algo.n_step=3", "run_dir=run", "logger=[]", "total_steps=150"]
    assert spikerl("train", *CARTPOLE, *own).status == 0
    policy = library.load_policy("run")
    assert policy.task.choices == range(2)
    obs = np.random.default_rng(0).normal(size=(50, 4))
    many = policy(obs)
    assert many.dtype == np.int64
    assert many.shape == (50,)
    assert set(many.tolist()) == {0, 1}
    one, _ = policy.predict(obs[3])
    assert isinstance(one, np.int64)
    assert one == many[3]
    values = policy.act(obs, policy.generator)
    assert np.array_equal(values.argmax(1), many)
    said = spikerl("eval", "run=run", "episodes=2", "ops=true")
    assert said.status == 0, said
    assert "CartPole-v1: return " in said.out
    refused = spikerl("export", "run=run", "format=onnx").line
    assert refused.startswith("run=run: a file holds continuous actions, and its policy chooses")
    asked = ["train", "env=Pendulum", "algo=td3", "init_from=run", "env.max_episode_steps=9"]
    line = "init_from=run: its policy maps (4,) to one of 2 actions (CartPole-v1), but Pendulum-v1"
    assert spikerl(*asked).line.startswith(line)
