"""What each command does once its config is composed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from spikerl.errors import BadRequest


def call_command(command: str, composed: DictConfig, args: Sequence[str]) -> int:
    """Run `command` on plain data; the exit status."""
    data: dict[str, Any] = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    if command == "train":
        from spikerl import config, runs

        return runs.train(config.build(data), ["spikerl", command, *args])
    if command == "import":
        from spikerl import importers

        return importers.import_popsan(data, ["spikerl", command, *args])
    if command == "doctor":
        from spikerl import doctor

        return doctor.main(as_json=bool(data["json"]))
    return evaluate(data)


def evaluate(data: dict[str, Any]) -> int:
    """`spikerl eval`: deterministic episodes of a saved policy."""
    from spikerl.envs import EnvConfig, make_env, task_of
    from spikerl.evaluate import Evaluator
    from spikerl.hardware import resolve_device
    from spikerl.policy import load_policy
    from spikerl.versions import versions

    if not isinstance(data["episodes"], int) or data["episodes"] < 1:
        raise BadRequest("episodes", data["episodes"], "give at least 1")
    if not isinstance(data["seed"], int) or data["seed"] < 0:
        raise BadRequest("seed", data["seed"], "give 0 or more")
    if data["video"]:
        raise BadRequest("video", data["video"], "this version writes no videos; leave it out")
    policy = load_policy(Path(str(data["run"])), resolve_device(str(data["device"])).choice)
    env_id = data["env_id"] or policy.task.env_id
    if ":" in env_id and not data["env_id"]:
        remedy = f"its environment {env_id} names a module to import; confirm with env_id={env_id}"
        raise BadRequest("run", data["run"], remedy)
    env = EnvConfig(
        name="gym",
        version=None,
        id=str(env_id),
        max_episode_steps=policy.task.max_episode_steps,
        vectorizer="sync",
    )
    probe = make_env(env)
    task = task_of(probe)
    probe.close()
    ours, theirs = (task.obs_shape, task.act_shape), (policy.task.obs_shape, policy.task.act_shape)
    if ours != theirs:
        remedy = (
            f"the policy maps {theirs[0]} to {theirs[1]}, {env_id} needs {ours[0]} to {ours[1]}"
        )
        raise BadRequest("run" if not data["env_id"] else "env_id", env_id, remedy)
    evaluator = Evaluator(env, data["episodes"], data["seed"])
    try:
        result = evaluator.run(policy, 0)
    finally:
        evaluator.close()
    now = versions()
    moved = [
        f"{name} {version} (here {now[name]})"
        for name, version in policy.trained_with.items()
        if name in ("mujoco", "gymnasium") and now.get(name) != version
    ]
    if data["json"]:
        answer = {
            "return_mean": result.mean,
            "return_std": result.std,
            "returns": result.returns,
            "lengths": result.lengths,
            "episodes": len(result.returns),
            "env_id": env_id,
            "firing_rate": result.activity.firing_rate if result.activity else None,
            "seed": data["seed"],
            "versions": now,
            "trained_with": policy.trained_with,
        }
        print(json.dumps(answer, allow_nan=False))
        return 0
    for i, (ret, length) in enumerate(zip(result.returns, result.lengths, strict=True)):
        print(f"episode {i}  return {ret:.1f}  length {length}")
    print(
        f"{env_id}: return {result.mean:.1f} +- {result.std:.1f}"
        f" over {len(result.returns)} episodes"
    )
    if result.activity:
        layers = ", ".join(f"{rate:.3f}" for rate in result.activity.layers)
        print(f"firing rate {result.activity.firing_rate:.3f} (encoder and layers: {layers})")
    if moved:
        print(f"note: trained with {', '.join(moved)}; physics differ between versions")
    return 0
