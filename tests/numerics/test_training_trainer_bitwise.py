"""On a CPU the seed decides every bit, and only training changes the state of a trainer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import (
    CARTPOLE,
    INVERTED_PENDULUM,
    POISSON,
    POPULATION,
    care_bn_config,
    dqn_config,
    plif_config,
    popsan_config,
    ppo_config,
    proxy_td3_config,
    sac_config,
    small_config,
    voltage_config,
    with_run,
)
from torch import Tensor

from spikerl.config.build import Config
from spikerl.distributed.world import ALONE
from spikerl.envs.config import EnvConfig
from spikerl.envs.make import make_env, task_of
from spikerl.runs.checkpoint import Shard, save_checkpoint, verified
from spikerl.snn.encoders import EncoderConfig, PopulationConfig
from spikerl.training.evaluator import Evaluation, Evaluator
from spikerl.training.state import load_checkpoint, shard_of
from spikerl.training.trainer import Trainer

HOPPER = EnvConfig(
    name="Hopper", version="v5", id="Hopper-v5", max_episode_steps=40, vectorizer="sync"
)
ENVS = {"InvertedPendulum": INVERTED_PENDULUM, "Hopper": HOPPER}
# Fields that depend on clocks and meters; all others follow from the seed.
MEASURED = ("cpu_s", "env_steps_per_s", "updates_per_s", "power_w")


@dataclass
class Outcome:
    learner: dict[str, Tensor]  # weights, targets, optimisers, normaliser
    replay: Tensor
    worker: Mapping[str, Tensor]  # streams, environments, observations waiting to be merged
    rows: list[dict[str, Any]]


def short(**settings: Any) -> Config:
    return small_config(updates_per_step=0.25, **settings)


def new_trainer(training: Config) -> Trainer:
    with closing(make_env(training.env)) as env:
        return Trainer(training, task_of(env))


def state(trainer: Trainer) -> tuple[dict[str, Tensor], Tensor, Mapping[str, Tensor]]:
    shard: Shard = shard_of(trainer)
    assert shard.notes["exact"]
    held = trainer.replay.between(trainer.replay.added - trainer.replay.size, trainer.replay.added)
    return copy.deepcopy((trainer.learner_state(), held, shard.tensors))


def train(training: Config, upto: int | None = None) -> Outcome:
    """Train to the end, or for `upto` epochs."""
    with closing(new_trainer(training)) as trainer:
        return finish(trainer, upto)


def finish(trainer: Trainer, upto: int | None = None) -> Outcome:
    rows = []
    for row in trainer.epochs():
        kept = {k for k in row if k not in MEASURED and not k.startswith("energy_")}
        rows.append({k: v for k, v in row.items() if k in kept})
        if len(rows) == upto:
            break
    return Outcome(*state(trainer), rows)


def differing(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> set[str]:
    assert one.keys() == other.keys()
    return {name for name in one if not same_bits(one[name], other[name])}


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Unlike torch.equal, this tells -0.0 from 0.0."""
    a, b = one.numpy(), other.numpy()
    return (a.dtype, a.shape) == (b.dtype, b.shape) and a.tobytes() == b.tobytes()


def check_same_training(one: Outcome, other: Outcome) -> None:
    assert differing(one.learner, other.learner) == set()
    assert same_bits(one.replay, other.replay)
    assert differing(one.worker, other.worker) == set()


def disturb() -> None:
    """Change the global random generators, whose states must not matter."""
    torch.manual_seed(int(torch.randint(1 << 30, ())) + 1)
    torch.rand(7)
    np.random.seed(int(torch.randint(1 << 30, ())))


@pytest.mark.parametrize("encoder", [POPULATION, POISSON], ids=lambda e: e.name)
@pytest.mark.parametrize("env", ENVS.values(), ids=ENVS.keys())
def test_a_seed_decides_every_bit(env: EnvConfig, encoder: PopulationConfig) -> None:
    """Environments, random actions and noise included; another seed changes all that is random."""
    training = small_config(
        env=env,
        encoder=encoder,
        num_envs=2,
        total_steps=150,
        steps_per_epoch=100,
        eval_episodes=2,
        replay_capacity=100,  # it wraps
    )
    one = train(training)
    disturb()
    again = train(training)
    check_same_training(one, again)
    assert one.rows == again.rows
    assert [row["step"] for row in one.rows] == [100, 150]
    assert one.rows[-1]["updates"] > 50

    other = train(with_run(training, seed=1))
    same = set(one.learner) - differing(one.learner, other.learner)
    # What may be equal was never random: counts, fresh biases, fixed settings.
    assert all(one.learner[name].numel() == 1 or "bias" in name for name in same), same
    assert not (one.replay == other.replay)[:, : one.replay.shape[1] - 2].all(1).any()
    assert one.rows[0]["eval_return"] != other.rows[0]["eval_return"]


REPLAYING: dict[str, Any] = {
    "batch_size": 10,
    "critic_hidden_sizes": [16],
    "random_steps": 40,
    "learning_starts": 40,
    "update_interval": 10,
    "updates_per_step": 0.5,
    "norm_interval": 10,
    "replay_capacity": 80,
}
DQN = {key: value for key, value in REPLAYING.items() if "critic" not in key}
# For each rule, changes of the Config, and of its actor.
RULES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sac": ({"algo": sac_config(**REPLAYING, learn_temperature=True)}, {}),
    "ppo": ({"algo": ppo_config(rollout_steps=60, norm_interval=60, batch_size=20)}, {}),
    "ppo_discrete": (
        {
            "algo": ppo_config(rollout_steps=60, norm_interval=60, batch_size=20),
            "env": CARTPOLE,
        },
        {},
    ),
    "proxy_td3": ({"algo": proxy_td3_config(**REPLAYING, proxy_hidden_sizes=[8])}, {}),
    "dqn": (
        {"algo": dqn_config(**DQN, duelling=True, double=True, n_step=3), "env": CARTPOLE},
        {"encoder": EncoderConfig(name="direct"), "decoder": voltage_config("max")},
    ),
    "plif": ({}, {"neuron": plif_config()}),
    "care_bn": ({}, {"actor": replace(care_bn_config([16]), recalibration_interval=40)}),
    "spike_cost": (
        {},
        {"actor": popsan_config([16], spike_cost=0.5, spike_cost_start=60, spike_cost_warmup=50)},
    ),
}


def under(rule: str) -> Config:
    """Two environments, 120 steps in epochs of 50, which end in the middle of PPO's rollouts."""
    own, parts = RULES[rule]
    training = short(num_envs=2, total_steps=120, steps_per_epoch=50, eval_episodes=1)
    return replace(training, actor=replace(training.actor, **parts), **own)


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_repeats_itself_and_resumes(rule: str, tmp_path: Path) -> None:
    """It resumes from a checkpoint of the second epoch, which ends in mid-rollout for PPO."""
    training = under(rule)
    whole = train(training)
    disturb()
    with closing(new_trainer(training)) as first:
        part = finish(first, upto=2)
        facts = {"step": first.step, "world_size": 1, "reset_seed_bits": first.seed_bits}
        save_checkpoint(
            tmp_path, ALONE, shard_of(first), first.learner_state(), facts, first.policy.files()
        )
    disturb()
    with closing(new_trainer(training)) as second:
        assert load_checkpoint(second, verified(tmp_path, lambda damage: None)) == []
        rest = finish(second)
    check_same_training(whole, rest)
    assert whole.rows == part.rows + rest.rows
    assert [row["step"] for row in whole.rows] == [50, 100, 120]
    assert whole.rows[-1]["updates"] > 10
    weights = {"actor.weights", "critic.weights"} & whole.learner.keys()
    assert weights <= differing(whole.learner, part.learner)


@pytest.mark.parametrize("encoder", [POPULATION, POISSON], ids=lambda e: e.name)
@pytest.mark.parametrize(
    "change",
    [{"eval_episodes": 7}, {"eval_episodes": 13}, {"steps_per_epoch": 30}],
    ids=lambda change: "-".join(map(str, *change.items())),
)
def test_how_often_and_how_long_it_evaluates_changes_no_weight(
    change: dict[str, int], encoder: PopulationConfig
) -> None:
    """Evaluations share neither random streams nor environments with training."""
    training = short(encoder=encoder, num_envs=2, total_steps=120, eval_episodes=1)
    plain, changed = train(training), train(with_run(training, **change))
    check_same_training(plain, changed)
    assert len(changed.rows) == (4 if "steps_per_epoch" in change else 2)
    assert changed.rows[-1]["updates"] == plain.rows[-1]["updates"]


def seen(evaluation: Evaluation) -> list[Any]:
    activity = evaluation.activity
    assert activity is not None
    counts = [tensor.tolist() for tensor in (*activity.spikes, *activity.inside)]
    return [evaluation.returns, evaluation.lengths, activity.samples, counts]


@pytest.mark.parametrize("encoder", [POPULATION, POISSON], ids=lambda e: e.name)
@pytest.mark.parametrize("env", ENVS.values(), ids=ENVS.keys())
def test_an_evaluation_moves_nothing_and_repeats_itself(
    env: EnvConfig, encoder: PopulationConfig
) -> None:
    """It changes neither the normaliser, random streams, environments and replay, nor the global
    random generators.
    """
    training = small_config(env=env, encoder=encoder, num_envs=2, total_steps=95)
    with closing(new_trainer(training)) as trainer:
        while trainer.step < 86:  # within a norm_interval, so that observations are pending
            step = trainer.step
            trainer.act()
            if trainer.step // 10 > step // 10:
                trainer.synchronise(0)
            trainer.make_updates(step)
        assert len(trainer.norm.pending_rows()) > 0

        def everything() -> tuple[Any, ...]:
            drawn = torch.get_rng_state(), trainer.policy.generator.get_state()
            return (*state(trainer), trainer.norm.mean_std.clone(), *drawn)

        before = everything()
        numpy_before = np.random.get_state(legacy=False)["state"]["key"].tolist()
        first = trainer.evaluator.run(trainer.policy, 1)
        second = trainer.evaluator.run(trainer.policy, 2)
        again = trainer.evaluator.run(trainer.policy, 1)
        after = everything()
        assert differing(before[0], after[0]) == set()
        assert differing(before[2], after[2]) == set()
        assert all(map(same_bits, (before[1], *before[3:]), (after[1], *after[3:])))
        assert np.random.get_state(legacy=False)["state"]["key"].tolist() == numpy_before
        assert seen(first) == seen(again)
        assert seen(first) != seen(second)  # other episodes
        assert first.activity is not None

        # The first episodes are the same ones however many follow, and however many run at once.
        with closing(Evaluator(env, 2, training.run.seed)) as fewer:
            few = fewer.run(trainer.policy, 1)
        if encoder is POPULATION:  # Poisson's draws are shared between episodes that run together
            np.testing.assert_allclose(few.returns, first.returns[:2], rtol=1e-4)
            assert few.lengths == first.lengths[:2]


@pytest.mark.parametrize("env", ENVS.values(), ids=ENVS.keys())
def test_async_environments_train_to_the_same_bits(env: EnvConfig) -> None:
    outcomes = []
    for vectorizer in ("sync", "async"):
        kind = replace(env, vectorizer=vectorizer)
        outcomes.append(train(short(env=kind, num_envs=3, total_steps=120)))
    check_same_training(*outcomes)
    assert outcomes[0].rows == outcomes[1].rows


def test_stopping_to_look_changes_nothing() -> None:
    """If the caller leaves the loop over epochs early, training ended where the last row says."""
    training = short(total_steps=120, steps_per_epoch=40)
    whole, part = train(training), train(training, upto=2)
    assert part.rows == whole.rows[:2]
    shorter = train(with_run(training, total_steps=80))
    check_same_training(part, shorter)


def run_only(training: Config, look: Callable[[Trainer], None]) -> dict[str, Tensor]:
    with closing(new_trainer(training)) as trainer:
        list(trainer.epochs(on_updates=lambda progress: look(trainer)))
        return copy.deepcopy(trainer.learner_state())


def test_saving_and_showing_in_between_changes_no_bit() -> None:
    """A live view and a checkpoint read the state with which training goes on."""
    training = short(total_steps=100, encoder=POISSON)

    def look(trainer: Trainer) -> None:
        shard_of(trainer)
        trainer.learner_state()
        trainer.policy(np.zeros(4))

    assert differing(run_only(training, lambda trainer: None), run_only(training, look)) == set()
