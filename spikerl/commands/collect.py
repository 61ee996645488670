"""`spikerl collect`: transitions of a policy, or of a run, as a dataset for offline learning."""

from __future__ import annotations

import math
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spikerl.algos import ALGOS
from spikerl.algos.offpolicy import ReplayConfig
from spikerl.config.run import MOST
from spikerl.config.yaml_file import check_confirmed, read_config
from spikerl.envs.checked import CheckedEnv
from spikerl.envs.config import EnvConfig
from spikerl.envs.dataset import Writer, check_extra
from spikerl.envs.make import task_of
from spikerl.envs.vector import asked, check_finite
from spikerl.errors import DONE, BadRequest, Stopped, stop_status
from spikerl.files import absolute, checksum_of, hold, partial_of, shown, sync_folder
from spikerl.machine import git_state, versions
from spikerl.models.policy import Policy
from spikerl.models.sequence import History
from spikerl.output import add_results, several
from spikerl.runs import folder as run_folder
from spikerl.runs.checkpoint import Checkpoint, verified
from spikerl.runs.policies import CHOICES, find_policy, load_policy
from spikerl.runs.policy_env import env_of
from spikerl.runs.replayed import episodes
from spikerl.schema import check_seed, parse
from spikerl.seeding import RESET_BITS, reset_seed, seed_for
from spikerl.signals import signal_name, stop_signals
from spikerl.types import Task

LAST = {"random": "last", "replay": "last"}  # policies that only say what the task is


@dataclass(kw_only=True)
class CollectRequest:
    run: str
    dataset: str
    policy: str  # last, best, random, replay
    episodes: int | None
    steps: int | None
    noise: float
    random_share: float
    seed: int
    env_id: str | None  # confirms an environment that names a module, or is given paths
    plugins: list[str]

    def __post_init__(self) -> None:
        self.dataset = str(absolute(self.dataset))
        if self.policy not in (*CHOICES, "random", "replay"):
            raise BadRequest("policy", self.policy, "give last, best, random or replay")
        if self.policy == "replay":
            for key in ("episodes", "steps", "noise", "random_share", "seed"):
                if value := getattr(self, key):
                    remedy = "policy=replay takes what the run did while it learned; leave it out"
                    raise BadRequest(key, value, remedy)
        elif (self.episodes is None) == (self.steps is None):
            raise BadRequest("episodes", self.episodes, "give either episodes=N or steps=N")
        for key in ("episodes", "steps"):
            if (count := getattr(self, key)) is not None and count < 1:
                raise BadRequest(key, count, "give at least 1")
        if self.noise < 0.0:
            raise BadRequest("noise", self.noise, "give 0 or more")
        if not 0.0 <= self.random_share <= 1.0:
            raise BadRequest("random_share", self.random_share, "give a value in [0, 1]")
        if self.policy == "random":
            for key in ("noise", "random_share"):
                if getattr(self, key):
                    remedy = "policy=random acts at random already; leave it out"
                    raise BadRequest(key, getattr(self, key), remedy)
        check_seed(self.seed)


def main(data: dict[str, Any], argv: Sequence[str]) -> int:
    """`spikerl collect`: makes a whole dataset folder, or none; the exit status."""
    request = parse(CollectRequest, data)
    check_extra()
    # Found once: a run that goes on meanwhile saves other policies.
    folder = find_policy(Path(request.run), LAST.get(request.policy, request.policy), key="run")
    policy, made = load_policy(folder), acted(request, folder)
    if request.noise and policy.task.choices is not None:
        remedy = f"the actions of {policy.task.env_id} are discrete; use random_share"
        raise BadRequest("noise", request.noise, remedy)
    run_folder.check_free(request.dataset, named=True, key="dataset")
    check_confirmed(request.run, policy.task, request.env_id)
    env = environment(request, policy)
    try:
        stored = StoredSteps.of(request) if request.policy == "replay" else None
        with stop_signals() as stop_signal:
            made = {"command": shlex.join(argv), **(stored.facts() if stored else made)}
            returns, steps = collect(request, policy, env, stored, made, stop_signal)
    except Stopped as stopped:
        name = signal_name(stopped.number)
        print(f"spikerl: stopped on {name}; nothing was kept", file=sys.stderr)
        return stop_status(stopped.number)
    finally:
        env.close()
    whole = "no whole episode"
    if returns:
        spread = f"{np.mean(returns):.1f} +- {np.std(returns):.1f}"
        whole = f"return {spread} over {several(len(returns), 'whole episode')}"
    print(f"{policy.task.env_id}: {steps} transitions, {whole}")
    add_results(folder=request.dataset)
    print(f"dataset: {shown(Path(request.dataset))}")
    return DONE


def environment(request: CollectRequest, policy: Policy) -> CheckedEnv:
    """The environment that the policy was trained on; refuse another by env_id."""
    task = policy.task
    _, env = env_of(task, request.run, request.env_id)
    if task_of(env).env_id != task.env_id:
        remedy = f"the policy was trained on {task.env_id}, and that is what is recorded"
        raise BadRequest("env_id", request.env_id, remedy)
    return env


def collect(
    request: CollectRequest,
    policy: Policy,
    env: CheckedEnv,
    stored: StoredSteps | None,
    made: Mapping[str, Any],
    stop_signal: Callable[[], int],
) -> tuple[list[float], int]:
    """Record into a hidden folder and rename it; returns of whole episodes, and number of steps."""
    target = Path(request.dataset)
    partial = partial_of(target)
    run_folder.remove_abandoned(partial.parent)
    try:
        with run_folder.removed_after(partial):
            partial.mkdir(parents=True)
            held = hold(partial)
            assert not isinstance(held, str)  # nobody else has its name
            with held:
                try:
                    writer = Writer(partial, policy.task)
                except ValueError as error:
                    raise BadRequest("run", request.run, str(error)) from error
                if stored is None:
                    returns = record(request, policy, env, writer, stop_signal)
                else:
                    returns = stored.write(policy.task, writer, stop_signal)
                name = re.sub(r"[^A-Za-z0-9_-]", "_", target.name)
                named = name if re.search(r"-v\d+$", name) else f"{name}-v0"
                writer.finish(named, recipe(request, policy, made, returns))
                (partial / ".lock").unlink()
                run_folder.check_free(request.dataset, named=True, key="dataset")
                partial.rename(target)
                sync_folder(target.parent)
    except OSError as error:
        reason = error.strerror or str(error)
        raise BadRequest("dataset", request.dataset, f"{reason}; nothing was kept") from error
    return returns, writer.steps


def record(
    request: CollectRequest,
    policy: Policy,
    env: CheckedEnv,
    writer: Writer,
    stop_signal: Callable[[], int],
) -> list[float]:
    """Record new episodes, i from seed (seed, i); the undiscounted returns of whole ones."""
    draws = np.random.default_rng(seed_for(request.seed, "explore"))
    returns = []
    most_episodes, most_steps = request.episodes or math.inf, request.steps or math.inf
    while writer.episodes < most_episodes and writer.steps < most_steps:
        seed = reset_seed(RESET_BITS, request.seed, "env", writer.episodes)
        episode = f"episode {writer.episodes}"
        where = f"{episode}, reset: {policy.task.env_id}"
        with asked(where):
            first = env.reset(seed=seed)[0]
        check_finite(where, first)
        obs = [first.astype(policy.task.obs_dtype, copy=False)]
        acts, rewards = list[np.ndarray](), list[float]()
        terminated = truncated = False
        carried = policy.carried() if request.policy != "random" else None
        while not (terminated or truncated) and writer.steps + len(acts) < most_steps:
            if number := stop_signal():
                raise Stopped(number)
            act = policy.task.to_env(behave(request, policy, obs[-1], draws, carried)[None])[0]
            where = f"{episode}, step {len(acts) + 1}: {policy.task.env_id}"
            with asked(where):
                next_obs, rew, terminated, truncated, _ = env.step(act.copy())  # may write to it
            check_finite(where, next_obs, rew)
            if carried is not None:
                carried.reward(rew)
            obs.append(next_obs.astype(policy.task.obs_dtype, copy=False))
            acts.append(act)
            rewards.append(rew)
        whole = terminated or truncated
        ends = np.arange(1, len(acts) + 1) == len(acts)
        writer.add(seed, np.stack(obs), np.stack(acts), np.array(rewards), ends & terminated,
                   ends & (truncated or not whole), whole)  # fmt: skip
        returns += [sum(rewards)] * whole
    return returns


def behave(
    request: CollectRequest,
    policy: Policy,
    obs: np.ndarray,
    draws: np.random.Generator,
    carried: Any,
) -> np.ndarray:
    """(A,) in [-1, 1]: the policy's action with noise, or with `random_share` a uniform one."""
    size = policy.task.act_dim
    anything = request.policy == "random" or draws.random() < request.random_share
    if anything and not isinstance(carried, History):
        return draws.uniform(-1.0, 1.0, size)
    act = policy.act(obs[None], policy.generator, carried)[0]
    if anything:
        act = draws.uniform(-1.0, 1.0, size)
    elif request.noise:
        act = np.clip(act + request.noise * draws.standard_normal(size), -1.0, 1.0)
    if isinstance(carried, History):
        carried.acted(act[None])  # the action taken, which later decisions see
    return act


def recipe(
    request: CollectRequest, policy: Policy, made: Mapping[str, Any], returns: list[float]
) -> dict[str, Any]:
    """What the dataset was made from, and how to make it again."""
    return {
        "run": shown(Path(request.run)),
        "policy": request.policy,
        **made,
        "max_episode_steps": policy.task.max_episode_steps,
        "return_mean": float(np.mean(returns)) if returns else None,
        "return_std": float(np.std(returns)) if returns else None,
        "whole_episodes": len(returns),
        "versions": versions(),
        "git": git_state(),
    }


def acted(request: CollectRequest, folder: Path) -> dict[str, Any]:
    """What the recorded actions depend on: the policy's files in `folder`, and the request."""
    return {
        "policy_sha256": {
            name: checksum_of(folder / name) for name in ("policy.json", "policy.safetensors")
        },
        "noise": request.noise,
        "random_share": request.random_share,
        "seed": request.seed,
        "episodes": request.episodes,
        "steps": request.steps,
    }


@dataclass(frozen=True)
class StoredSteps:
    """The replay that a run stored while it learned from its own steps."""

    run: Path
    checkpoint: Checkpoint
    num_envs: int
    reward_scale: float  # of the rewards in it
    seed: int  # of the run

    @classmethod
    def of(cls, request: CollectRequest) -> StoredSteps:
        """The newest checkpoint's; BadRequest if there is none, or a process trains the run."""
        run = Path(request.run)
        manifest = run_folder.read_manifest(run, key="run")
        if freed := manifest.get("freed"):
            raise BadRequest("run", run, f"its replay was removed on {freed}; keep_replay=true")
        if run_folder.is_held(run):
            raise BadRequest("run", run, "a process trains it; collect once it has ended")
        config = read_config(run / "config.yaml")
        env = parse(EnvConfig, config.get("env") or {}, key="env")
        algo, seed = config.get("algo") or {}, config.get("seed")
        name = str(algo.get("name") if isinstance(algo, dict) else algo)
        if name not in ALGOS.options or not issubclass(ALGOS.options[name][0], ReplayConfig):
            remedy = f"algo={name} keeps no replay of its own steps; give last, best or random"
            raise BadRequest("policy", "replay", remedy)
        num_envs = manifest.get("num_envs")
        if type(num_envs) is not int or not 1 <= num_envs <= MOST or type(seed) is not int:
            raise BadRequest("run", run, "its manifest.json has no num_envs, or its config no seed")
        checkpoint = verified(run, lambda text: print(f"note: {text}", file=sys.stderr), key="run")
        return cls(run, checkpoint, num_envs, env.reward_scale, seed)

    def write(self, task: Task, writer: Writer, stop_signal: Callable[[], int]) -> list[float]:
        """Record every episode in the checkpoint; the undiscounted returns of whole ones."""
        returns = []
        try:
            for played, whole in episodes(self.checkpoint, task, self.num_envs):
                if number := stop_signal():
                    raise Stopped(number)
                rew = (played.rew / self.reward_scale).astype(np.float32)
                act = task.to_env(played.act)
                writer.add(None, played.obs, act, rew, played.terminated, played.truncated, whole)
                returns += [float(rew.sum())] * whole
        except ValueError as error:
            raise BadRequest("run", self.run, str(error)) from None
        except FileNotFoundError:  # the run was resumed or cleaned meanwhile
            remedy = "its replay was removed meanwhile; collect again once no process trains it"
            raise BadRequest("run", self.run, remedy) from None
        if not writer.steps:
            raise BadRequest("run", self.run, "it has stored no transition yet")
        return returns

    def facts(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "num_envs": self.num_envs,
            "checkpoint": self.checkpoint.folder.name,
            "replay_sha256": dict(self.checkpoint.manifest["segments"]),
        }
