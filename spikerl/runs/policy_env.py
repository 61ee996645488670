"""Makes the environment that a policy was trained on."""

from __future__ import annotations

from spikerl.envs.checked import CheckedEnv
from spikerl.envs.config import EnvConfig
from spikerl.envs.make import UNREGISTERED, make_env, task_of
from spikerl.errors import BadRequest
from spikerl.models.policy import check_shapes
from spikerl.types import Task


def env_of(task: Task, run: str, env_id: str | None) -> tuple[EnvConfig, CheckedEnv]:
    """The config of the policy's environment, with `env_id` as its id if given, and one of these.

    A BadRequest names `run` or `env_id`, whichever of the two it is that cannot be made, or has
    other observations or actions.
    """
    config = EnvConfig(
        name="gym",
        version=None,
        id=env_id or task.env_id,
        max_episode_steps=task.max_episode_steps,
        vectorizer="sync",
        kwargs=dict(task.env_kwargs),
        wrappers=list(task.env_wrappers),
    )
    key, value = ("env_id", env_id) if env_id else ("run", run)
    try:
        env = make_env(config)
    except BadRequest as error:
        remedy = error.args[2]
        if env_id is None and UNREGISTERED in remedy:
            remedy += "; env_id=MODULE:NAME imports the module that registers it"
        raise BadRequest(key, value, remedy) from error
    check_shapes(key, value, task, task_of(env))
    return config, env
