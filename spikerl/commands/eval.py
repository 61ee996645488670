"""`spikerl eval`: deterministic episodes of a saved policy."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spikerl.config.yaml_file import check_confirmed
from spikerl.energy import modelled, operations
from spikerl.envs.make import EnvConfig, make_env, task_of
from spikerl.errors import BadRequest
from spikerl.files import shown
from spikerl.machine import versions
from spikerl.models.policy import Policy, check_shapes, load_policy
from spikerl.output import answer
from spikerl.reporting.operations import lines
from spikerl.schema import parse
from spikerl.training.evaluator import Evaluator
from spikerl.training.video import Filmed, check_video, rates_of


@dataclass(kw_only=True)
class EvalRequest:
    run: str
    policy: str  # last, best
    episodes: int
    seed: int
    env_id: str | None
    video: str  # false; true; spikes: with the return and every layer's firing drawn in
    ops: bool
    json: bool
    device: str
    plugins: list[str]

    def __post_init__(self) -> None:
        if self.episodes < 1:
            raise BadRequest("episodes", self.episodes, "give at least 1")
        self.video = self.video.lower()
        if self.video not in ("false", "true", "spikes"):
            raise BadRequest("video", self.video, "give true, false or spikes")
        if not 0 <= self.seed < 2**63:
            raise BadRequest("seed", self.seed, "give 0 or more, below 2^63")


def main(data: dict[str, Any], argv: Sequence[str]) -> int:
    """`spikerl eval`."""
    request = parse(EvalRequest, data)
    policy = load_policy(request.run, request.device, policy=request.policy)
    if request.ops:
        operations.check(policy.actor)
    env_id = request.env_id or policy.task.env_id
    check_confirmed(request.run, env_id, dict(policy.task.env_kwargs), request.env_id)
    env = EnvConfig(
        name="gym",
        version=None,
        id=env_id,
        max_episode_steps=policy.task.max_episode_steps,
        vectorizer="sync",
        kwargs=dict(policy.task.env_kwargs),
        wrappers=list(policy.task.env_wrappers),
    )
    key = "env_id" if request.env_id else "run"
    value = request.env_id or request.run
    try:
        probe = make_env(env)
    except BadRequest as error:
        remedy = error.args[2]
        if key == "run" and "is no registered environment" in remedy:
            remedy += "; env_id=MODULE:NAME imports the module that registers it"
        raise BadRequest(key, value, remedy) from error
    task = task_of(probe)
    probe.close()
    check_shapes(key, value, policy.task, task)
    evaluator = Evaluator(env, request.episodes, request.seed)
    if evaluator.note:
        print(evaluator.note, file=sys.stderr)
    videos = film(request, evaluator, policy) if request.video != "false" else []
    try:
        result = evaluator.run(policy, 0)
    finally:
        evaluator.close()
    counted = None
    if request.ops:
        bits = policy.compression.bits if policy.compression else None
        counted = operations.count(policy.actor, result.probed, policy.generator, bits)
    now = versions()
    moved = [
        f"{name} {version} (here {now[name]})"
        for name, version in policy.trained_with.items()
        if name in ("mujoco", "gymnasium") and now.get(name) != version
    ]
    if request.json:
        facts = {
            "return_mean": result.mean,
            "return_std": result.std,
            "returns": result.returns,
            "lengths": result.lengths,
            "episodes": len(result.returns),
            "env_id": env_id,
            "firing_rate": result.activity.firing_rate if result.activity else None,
            "spike_steps": result.activity.spike_steps if result.activity else None,
            "seed": request.seed,
            **({"videos": [str(path) for path in videos]} if videos else {}),
            "versions": now,
            "trained_with": policy.trained_with,
            **(modelled.facts(counted) if counted else {}),
        }
        answer(facts)
        return 0
    for i, (ret, length) in enumerate(zip(result.returns, result.lengths, strict=True)):
        print(f"episode {i}  return {ret:.1f}  length {length}")
    print(
        f"{env_id}: return {result.mean:.1f} +- {result.std:.1f}"
        f" over {len(result.returns)} episodes"
    )
    if result.activity:
        layers = ", ".join("-" if r is None else f"{r:.3f}" for r in result.activity.layers)
        print(f"firing rate {result.activity.firing_rate:.3f} (encoder and layers: {layers})")
        if policy.compression and policy.compression.early_exit:
            steps = result.activity.spike_steps
            print(f"spike steps {steps:.2f} of {policy.actor.spike_steps}, mean over decisions")
    if videos:
        print(f"videos: {shown(videos[0])}" + (f" to {videos[-1].name}" if len(videos) > 1 else ""))
    if counted:
        print("\n" + "\n".join(lines(counted)))
    if moved:
        print(f"note: trained with {', '.join(moved)}; physics differ between versions")
    return 0


def film(request: EvalRequest, evaluator: Evaluator, policy: Policy) -> list[Path]:
    """Have the evaluator's environments film their episodes; the files that there will be."""
    folder = Path(request.run) / "videos"
    if not folder.parent.is_dir():
        raise BadRequest("video", request.video, "videos are put into a run folder; give run=RUN")
    check_video(evaluator.envs[0])
    prefix = "best_" if request.policy == "best" else ""
    paths = [folder / f"{prefix}seed{request.seed}_episode{i}.mp4" for i in range(request.episodes)]
    rates = rates_of(policy) if request.video == "spikes" else None
    side_by_side = len(evaluator.envs)
    filmed: list[Any] = [
        Filmed(env, paths[i::side_by_side], rates) for i, env in enumerate(evaluator.envs)
    ]
    evaluator.envs = filmed
    return paths
