"""Learners of `spikerl train KEY=VALUE...` that can make updates at once, to be timed."""

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
from spikerl.training.start import task_for
from spikerl.training.trainer import Trainer

RANDOM_STEPS = 2000


def trainer_of(keys: list[str]) -> Trainer:
    """With one thread, and with this many transitions of random actions in its replay."""
    first = RANDOM_STEPS + 1
    own = [f"algo.learning_starts={first}", f"algo.random_steps={first}", "threads=1", "device=cpu"]
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        composed = compose("train", [*own, "energy=none", *keys])
    data: Any = OmegaConf.to_container(composed, resolve=True)
    config = build(data)
    torch.set_num_threads(1)
    trainer = Trainer(config, task_for(config))
    for _ in range(RANDOM_STEPS):
        trainer.advance()
    return trainer


def fire_as_trained(trainer: Trainer) -> None:
    """The actor fires, and the critics' units are active, as often as trained ones."""
    seen = trainer.sampler.batch(256).obs
    if isinstance(trainer.algo.actor, SpikingActor):
        set_firing_rates(trainer.algo.actor, TRAINED_RATES, seen)
    set_active_shares(trainer.algo.critic, TRAINED_ACTIVE_SHARES, seen)
