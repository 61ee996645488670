"""`spikerl eval`: deterministic episodes of a saved policy, or of an exported file."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from spikerl.config.yaml_file import check_confirmed
from spikerl.energy import modelled, operations
from spikerl.envs.video import Filmed, check_video, rates_of
from spikerl.errors import DONE, BadRequest, Stopped, stop_status
from spikerl.export import reading
from spikerl.export.proof import FilePolicy
from spikerl.files import shown
from spikerl.machine import versions
from spikerl.models.policy import Policy
from spikerl.models.proposals import Proposer
from spikerl.output import add_results, answer, several
from spikerl.reporting.operations import lines
from spikerl.runs.policies import load_policy
from spikerl.runs.policy_env import env_of
from spikerl.schema import check_seed, parse
from spikerl.signals import signal_name, stop_signals
from spikerl.training.evaluator import Evaluation, Evaluator


@dataclass(kw_only=True)
class EvalRequest:
    run: str
    policy: str  # last, best
    episodes: int
    seed: int
    env_id: str | None
    video: str  # false; true; spikes: with the return and every layer's firing drawn in
    target_return: float | None  # null: the one that training evaluated with
    ops: bool
    json: bool
    device: str
    sha256: str | None  # that an exported file must have; C, which runs as code, needs it
    plugins: list[str]

    def __post_init__(self) -> None:
        if self.episodes < 1:
            raise BadRequest("episodes", self.episodes, "give at least 1")
        self.video = self.video.lower()
        if self.video not in ("false", "true", "spikes"):
            raise BadRequest("video", self.video, "give true, false or spikes")
        check_seed(self.seed)


def main(data: dict[str, Any], argv: Sequence[str]) -> int:
    """`spikerl eval`: the exit status."""
    request = parse(EvalRequest, data)
    try:
        with stop_signals() as stop_signal:
            done = evaluate(request, stop_signal)
    except Stopped as stopped:
        name = signal_name(stopped.number)
        print(f"spikerl: stopped on {name}; the evaluation has no result", file=sys.stderr)
        return stop_status(stopped.number)
    return report(request, *done)


def evaluate(
    request: EvalRequest, stop_signal: Callable[[], int]
) -> tuple[Policy | FilePolicy, str, Evaluation, list[Path]]:
    """The policy, the environment's id, the evaluation, and the videos of its episodes."""
    policy = file_policy(request) if os.path.isfile(request.run) else run_policy(request)
    env_id = request.env_id or policy.task.env_id
    if not request.env_id:
        check_confirmed(request.run, policy.task, None)
    env, probe = env_of(policy.task, request.run, request.env_id)
    probe.close()
    with closing(Evaluator(env, request.episodes, request.seed)) as evaluator:
        if evaluator.note:
            print(evaluator.note, file=sys.stderr)
        videos = []
        if request.video != "false" and isinstance(policy, Policy):
            videos = film(request, evaluator, policy)
        return policy, env_id, evaluator.run(policy, 0, stop_signal), videos


def report(
    request: EvalRequest,
    policy: Policy | FilePolicy,
    env_id: str,
    result: Evaluation,
    videos: list[Path],
) -> int:
    add_results(env_id=env_id, eval_return=result.mean)
    now = versions()
    moved = [
        f"{name} {version} (here {now[name]})"
        for name, version in policy.trained_with.items()
        if name in ("mujoco", "gymnasium") and now.get(name) != version
    ]
    if request.json:
        spikes = result.carried_spikes
        carried = {} if spikes is None else {"spikes_per_decision": spikes}
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
            **aim_of(policy),
            **carried,
            **({"videos": [str(path) for path in videos]} if videos else {}),
            "versions": now,
            "trained_with": policy.trained_with,
            **(modelled.facts(result.operations) if result.operations else {}),
        }
        answer(facts)
        return DONE
    for i, (ret, length) in enumerate(zip(result.returns, result.lengths, strict=True)):
        print(f"episode {i}  return {ret:.1f}  length {length}")
    print(
        f"{env_id}: return {result.mean:.1f} +- {result.std:.1f}"
        f" over {several(len(result.returns), 'episode')}"
    )
    if aim := aim_of(policy):
        print(f"aimed at a return of {aim['target_return']:.6g}")
    if result.carried_spikes is not None:
        print(f"{result.carried_spikes:.1f} spikes per decision")
    if result.activity:
        layers = ", ".join("-" if r is None else f"{r:.3f}" for r in result.activity.layers)
        print(f"firing rate {result.activity.firing_rate:.3f} (encoder and layers: {layers})")
        if isinstance(policy, Policy) and policy.compression and policy.compression.early_exit:
            steps = result.activity.spike_steps
            print(f"spike steps {steps:.2f} of {policy.actor.spike_steps}, mean over decisions")
    if videos:
        print(f"videos: {shown(videos[0])}" + (f" to {videos[-1].name}" if len(videos) > 1 else ""))
    if request.ops and result.operations:
        print("\n" + "\n".join(lines(result.operations)))
    if moved:
        print(f"note: trained with {', '.join(moved)}; physics differ between versions")
    return DONE


def aim_of(policy: Policy | FilePolicy) -> dict[str, float]:
    """The return that a policy aims at, if it is conditioned on one."""
    aim = policy.config.conditioning if isinstance(policy, Policy) else None
    return {"target_return": aim.target_return} if aim else {}


def run_policy(request: EvalRequest) -> Policy:
    """The policy of a run folder."""
    if request.sha256 is not None:
        remedy = "it is an exported file's, and run names none; leave it out"
        raise BadRequest("sha256", request.sha256, remedy)
    policy = load_policy(request.run, request.device, policy=request.policy)
    if request.target_return is not None:
        policy.aim(request.target_return)
    if request.ops:
        operations.check(policy.actor)
    return policy


def file_policy(request: EvalRequest) -> FilePolicy:
    """The policy of an exported file, which the interpreter of its format runs."""
    for key, plain, remedy in (
        ("target_return", None, "an exported file aims at none; leave it out"),
        ("policy", "last", "an exported file holds one policy; leave it out"),
        ("video", "false", "videos are put into a run folder; give run=RUN"),
        ("ops", False, "operations are counted of a run folder's policy; give run=RUN"),
        ("device", "cpu", "exported files run on the CPU; leave it out"),
    ):
        if (value := getattr(request, key)) != plain:
            raise BadRequest(key, str(value).lower(), remedy)
    exported = reading.read(Path(request.run))
    if request.sha256 is None and exported.format == "c":
        remedy = "C is compiled and runs as code of yours; if you trust who wrote it, confirm with"
        raise BadRequest("run", request.run, f"{remedy} sha256={exported.sha256}")
    if request.sha256 not in (None, exported.sha256):
        raise BadRequest("sha256", request.sha256, f"{request.run} has {exported.sha256}")
    return exported.policy()


def film(request: EvalRequest, evaluator: Evaluator, policy: Policy) -> list[Path]:
    """Have the evaluator's environments film their episodes; the paths of the videos to come."""
    folder = Path(request.run) / "videos"
    if not folder.parent.is_dir():
        raise BadRequest("video", request.video, "videos are put into a run folder; give run=RUN")
    if request.video == "spikes" and (policy.carried() or isinstance(policy.network, Proposer)):
        remedy = "no network alone makes its decisions; give true, for a film without spikes"
        raise BadRequest("video", request.video, remedy)
    check_video(evaluator.envs[0])
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise BadRequest("video", request.video, f"{folder}: {error.strerror}") from None
    paths = [folder / name for name in film_names(request)]
    rates = rates_of(policy) if request.video == "spikes" else None
    side_by_side = len(evaluator.envs)
    filmed: list[Any] = [
        Filmed(env, paths[i::side_by_side], rates) for i, env in enumerate(evaluator.envs)
    ]
    evaluator.envs = filmed
    return paths


def film_names(request: EvalRequest) -> list[str]:
    """Names of video files, different for different episodes of a sweep or of later calls."""
    env_id, aim = request.env_id, request.target_return
    best = "best_" if request.policy == "best" else ""
    of = f"_{quote(env_id, safe='')}" if env_id else ""
    of += "" if aim is None else f"_return{repr(aim).removesuffix('.0')}"
    of += "_spikes" if request.video == "spikes" else ""
    return [f"{best}seed{request.seed}_episode{i}{of}.mp4" for i in range(request.episodes)]
