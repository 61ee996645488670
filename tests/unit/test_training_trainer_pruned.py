"""actor.prune: weights that are 0 at the first step are 0 at the last, on all paths."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from builders import small_config
from shell import refusal
from torch import Tensor
from trainers import Workers

from spikerl.config.build import Config
from spikerl.models.actor import Actor, connections
from spikerl.models.actor_config import PopSANConfig
from spikerl.models.networks import build_actor
from spikerl.models.normalizer import RunningNorm
from spikerl.models.policy import Policy
from spikerl.runs.policies import load_policy
from spikerl.training.trainer import Trainer


def pruned(share: float) -> Config:
    config = small_config(num_envs=2)
    assert isinstance(config.actor.actor, PopSANConfig)
    actor = replace(config.actor.actor, prune=share)
    return replace(config, actor=replace(config.actor, actor=actor))


def zeros(actor: Actor) -> dict[str, Tensor]:
    return {name: (w == 0).clone() for name, w in connections(actor).items()}


def test_zeros_stay(tmp_path: Path) -> None:
    """Zeros are the same in two workers, after a resume, and in the policy's file."""
    config = pruned(0.9)
    workers = Workers(config, 2)
    first = {name: p.detach().clone() for name, p in workers.first.algo.actor.named_parameters()}
    learned = workers.first.algo.actor
    assert isinstance(learned, Actor)
    gone = zeros(learned)
    for name, zero in gone.items():
        share = 0.0 if name == "decoder.weight_AP" else 0.9
        assert int(zero.sum()) == round(share * zero.numel())
    workers.train(60)
    workers.save(tmp_path)
    again = Workers(config, 2)
    again.load(tmp_path)
    for each in (workers, again):
        each.train(80)
    states = [t.learner_state() for w in (workers, again) for t in w.trainers]
    assert states[0]["actor.kept"].sum() < len(states[0]["actor.weights"])
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(tensor, states[0][name]) for name, tensor in state.items())
    trained = again.first.algo.actor
    for name, p in trained.named_parameters():
        still = gone.get(name, torch.zeros_like(p, dtype=torch.bool))
        assert (p[still] == 0).all()
        assert (p[~still] != first[name][~still]).any()
    again.first.policy.save(tmp_path)
    for name, zero in zeros(load_policy(tmp_path).actor).items():
        assert torch.equal(zero, gone[name])
    for each in (workers, again):
        each.close()


def test_nothing_or_all_of_a_matrix() -> None:
    """Refused: the first matrix has 40 x 16 weights, and a share of 0.0001 rounds to none."""
    line = str(refusal(Workers, pruned(1e-4), 1))
    assert line.startswith("actor.prune=0.0001: of the 640 weights of layers.0.weight_IN that is")


def test_a_policy_that_was_pruned_more_stays_so(tmp_path: Path) -> None:
    """Nine tenths of the initial matrix are 0 and stay so, although only half is asked for."""
    config, plain = pruned(0.5), small_config()
    workers = Workers(plain, 1)
    task = workers.first.task
    workers.close()
    actor = build_actor(plain.actor, task.obs_dim, task.act_dim)
    with torch.no_grad():
        flat = actor.get_parameter("layers.0.weight_IN").view(-1)
        flat.copy_(torch.arange(1, len(flat) + 1) / len(flat))
        flat[: 9 * len(flat) // 10] = 0.0
    init = Policy(task, plain.actor, actor, RunningNorm(task.obs_dim, 3.0))
    trainer = Trainer(config, task, init=init)
    names = [name for name, _ in actor.named_parameters()]
    sizes = [p.numel() for p in actor.parameters()]
    kept = trainer.learner_state()["actor.kept"].split(sizes)[names.index("layers.0.weight_IN")]
    assert int(kept.sum()) == len(flat) - 9 * len(flat) // 10
    trainer.close()


def test_of_trained_weights_the_smallest(tmp_path: Path) -> None:
    """The smallest weights of the policy that a run starts from are pruned, not of its own."""
    config = pruned(0.5)
    plain = small_config()
    workers = Workers(plain, 1)
    task = workers.first.task
    workers.close()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        actor = build_actor(plain.actor, task.obs_dim, task.act_dim)
    init = Policy(task, plain.actor, actor, RunningNorm(task.obs_dim, 3.0))
    trainer = Trainer(config, task, init=init)
    weight, own = (a.get_parameter("layers.0.weight_IN") for a in (actor, trainer.algo.actor))
    middle = weight.abs().flatten().sort().values[len(weight.view(-1)) // 2]
    assert torch.equal(own, torch.where(weight.abs() < middle, 0.0, weight))
    trainer.close()
