"""Trainers of `spikerl train KEY=VALUE...` whose next call can be an update, to be timed."""

from __future__ import annotations

from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from spikerl.commands.bench.baselines import set_active_shares, set_firing_rates
from spikerl.commands.bench.fixtures import TRAINED_ACTIVE_SHARES, TRAINED_RATES
from spikerl.config.build import build
from spikerl.config.yaml_file import conf_folder
from spikerl.models.actor import SpikingActor
from spikerl.training.start import dataset_of, task_for
from spikerl.training.trainer import Trainer

RANDOM_STEPS = 2000


def trainer_of(keys: list[str]) -> Trainer:
    """A trainer with one thread, whose replay holds RANDOM_STEPS transitions of random actions or,
    for an offline algorithm, the transitions of `dataset=`.
    """
    first, own = RANDOM_STEPS + 1, ["threads=1", "device=cpu", "energy=none"]
    offline = any(key.startswith("dataset=") for key in keys)
    if not offline:
        own += [f"algo.learning_starts={first}", f"algo.random_steps={first}"]
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        composed = compose("train", [*own, *keys])
    data: Any = OmegaConf.to_container(composed, resolve=True)
    config = build(data)
    torch.set_num_threads(1)
    task = task_for(config)
    trainer = Trainer(config, task, dataset=dataset_of(config, task))
    for _ in range(0 if offline else RANDOM_STEPS):
        trainer.advance()
    return trainer


def fire_as_trained(trainer: Trainer) -> None:
    """Make the actor's neurons fire, and the critics' units be active, as often as trained ones."""
    seen = trainer.sampler.batch(256).obs
    if isinstance(trainer.algo.actor, SpikingActor):
        set_firing_rates(trainer.algo.actor, TRAINED_RATES, seen)
    set_active_shares(trainer.algo.critic, TRAINED_ACTIVE_SHARES, seen)
