"""What a run starts from: its task, its device, its dataset, its first weights and its folder."""

from __future__ import annotations

import os
import re
from datetime import datetime
from pathlib import Path

import torch

from spikerl.config.build import Config
from spikerl.config.memory import memory
from spikerl.config.together import check_actions
from spikerl.distributed.launchers import several
from spikerl.envs.dataset import Dataset
from spikerl.envs.make import UNREGISTERED, make_env, task_of
from spikerl.errors import BadRequest
from spikerl.files import shown
from spikerl.machine import current_device
from spikerl.models.normalizer import RunningNorm
from spikerl.models.policy import Policy, check_shapes, read_policy
from spikerl.models.sequence import SequenceConfig
from spikerl.runs.policies import find_policy
from spikerl.types import Task


def task_for(config: Config) -> Task:
    try:
        env = make_env(config.env)
    except BadRequest as error:
        key, value, remedy = error.args
        if key == "env.id" and UNREGISTERED in remedy and ":" not in str(value):
            remedy += f"; env.id=MODULE:{value} imports the module that registers it"
        raise BadRequest(key, value, remedy) from error.__cause__
    env_task = task_of(env)
    env.close()
    check_actions(config.algo, env_task)
    return env_task


def own_device(choice: str) -> torch.device:
    """The device of the calling worker; several on CUDA take the devices in turn."""
    if not choice.startswith("cuda") or not several():
        return current_device(choice)
    index = int(os.environ.get("LOCAL_RANK", os.environ["RANK"])) % torch.cuda.device_count()
    return current_device(f"cuda:{index}")


def dataset_of(config: Config, task: Task) -> Dataset | None:
    """The dataset of an offline run, or None: a resumed run has its rows in the checkpoint."""
    if config.run.dataset is None or config.run.resume:
        return None
    dataset = Dataset.open(Path(config.run.dataset), task, memory())
    if dataset.transitions < config.num_envs:
        remedy = (
            f"it has {dataset.transitions} transitions; num_envs={config.num_envs} needs as many"
        )
        raise BadRequest("dataset", dataset.folder, remedy)
    return dataset


def read_init(source: str, config: Config, task: Task) -> Policy:
    """The policy that training starts from; it must have the shapes that this run has."""
    policy = read_policy(
        find_policy(Path(source), config.run.init_policy, key="init_from"), key="init_from"
    )
    check_shapes("init_from", source, policy.task, task)
    if isinstance(config.actor.actor, SequenceConfig):
        remedy = "a saved policy over sequences has its normalisation in its weights, and cannot be"
        raise BadRequest("init_from", source, f"{remedy} trained on; leave it out")
    if config.algo.inputs(task.obs_dim, task.act_dim) != task.obs_dim:
        remedy = f"the actor of algo={config.algo.name} acts on no observation alone; leave it out"
        raise BadRequest("init_from", source, remedy)
    if policy.config.shape() != config.actor.shape():
        remedy = f"its actor is {policy.config.shape()}, this run's is {config.actor.shape()}"
        raise BadRequest("init_from", source, remedy)
    own, theirs = (getattr(c.actor, "pixel_max", None) for c in (config.actor, policy.config))
    if own != theirs:
        remedy = f"the policy of {shown(Path(source))} divides observations by another"
        raise BadRequest("actor.pixel_max", own, f"{remedy}; give {theirs}")
    if not policy.norm.count and (interval := config.algo.norm_interval) is not None:
        remedy = f"the policy of {shown(Path(source))} acts on raw observations; give null"
        raise BadRequest("algo.norm_interval", interval, remedy)
    bound = config.algo.norm_clip
    if RunningNorm(1, bound).clip != policy.norm.clip:
        theirs = "null" if policy.norm.clip == RunningNorm(1, None).clip else policy.norm.clip
        remedy = f"the policy of {shown(Path(source))} clips observations at another; give {theirs}"
        raise BadRequest("algo.norm_clip", bound, remedy)
    return policy


def default_folder(config: Config, kind: str | None = None) -> str:
    """A dated folder; `kind` takes the place of the algorithm, where none trained the policy."""
    env = config.env  # its id may be of another task than its option is named after
    own = env.name.startswith(re.sub(r"-v\d+$", "", env.id))
    name = env.name if own else env.id
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", name)
    return f"outputs/{safe}/{kind or config.algo.name}/{stamp}_seed{config.run.seed}"
