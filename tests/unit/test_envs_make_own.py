"""Users' own environments: what they raise, how they are made, and what they are given."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import own_envs
import pytest
import torch
from builders import small_config
from shell import refusal

from spikerl.envs.config import EnvConfig
from spikerl.envs.make import make_env, task_of
from spikerl.envs.vector import make_envs
from spikerl.errors import BadRequest, EnvironmentFailed, Interrupted
from spikerl.runs.policies import load_policy
from spikerl.training.evaluator import Evaluator
from spikerl.training.state import shard_of
from spikerl.training.trainer import Trainer
from spikerl.types import Task

RAISED = ["SystemExit", "KeyboardInterrupt", "GeneratorExit", "unprintable"]


def own(name: str, **settings: Any) -> EnvConfig:
    given: dict[str, Any] = {"max_episode_steps": None, "vectorizer": "sync"} | settings
    return EnvConfig(name="gym", version=None, id=f"own_envs:{name}-v0", **given)


@contextmanager
def trainer_of(env: EnvConfig, **settings: Any) -> Iterator[Trainer]:
    with closing(make_env(env)) as one:
        task = task_of(one)
    config = small_config(env=env, **({"eval_episodes": 1, "learning_starts": 5} | settings))
    with closing(Trainer(config, task)) as trainer:
        yield trainer


# --- what they raise ------------------------------------------------------------------------------


@pytest.mark.parametrize("what", RAISED)
@pytest.mark.parametrize("where", ["reset", "step"])
def test_whatever_is_raised_is_a_failed_environment(where: str, what: str) -> None:
    env = own("Raises", kwargs={"where": where, "what": what})
    step = 1 if where == "reset" else own_envs.LATE + 1
    raised = "Unprintable" if what == "unprintable" else what
    with (
        pytest.raises(EnvironmentFailed, match=rf"^step {step}: Raises-v0 raised {raised} \(.*:\d"),
        trainer_of(env) as trainer,
    ):
        list(trainer.epochs())


@pytest.mark.parametrize("what", RAISED)
def test_what_is_raised_in_another_process(what: str) -> None:
    env = own("Raises", kwargs={"where": "step", "what": what}, vectorizer="async")
    raised = "Unprintable" if what == "unprintable" else what
    with (
        pytest.raises(EnvironmentFailed, match=rf"^step 61: Raises-v0 raised {raised}") as failed,
        trainer_of(env, num_envs=2) as trainer,
    ):
        list(trainer.epochs())
    assert "own_envs.py" in str(failed.value.__cause__)  # the environment's traceback


@pytest.mark.parametrize("what", RAISED)
def test_what_is_raised_while_it_is_made_or_closed(what: str) -> None:
    raised = "raised Unprintable" if what == "unprintable" else f"raised {what}"
    env = own("Raises", kwargs={"where": "make", "what": what})
    assert raised in refusal(make_env, env).args[2]
    one = make_env(own("Raises", kwargs={"where": "close", "what": what}))
    with pytest.raises(EnvironmentFailed, match=f"^close: Raises-v0 {raised}"):
        one.close()


@pytest.mark.parametrize("what", RAISED)
@pytest.mark.parametrize("where", ["reset", "step"])
def test_what_is_raised_in_an_evaluation(where: str, what: str) -> None:
    with trainer_of(own("Base")) as trainer:
        env = own("Raises", kwargs={"where": where, "what": what})
        with closing(Evaluator(env, 2, 0)) as evaluator:
            place = "reset" if where == "reset" else f"step {own_envs.LATE + 1}"
            with pytest.raises(EnvironmentFailed, match=f"^evaluation, {place}: Base-v0 raised"):
                evaluator.run(trainer.policy, 1)


def test_a_failure_is_said_once_though_closing_fails_too() -> None:
    one = make_env(own("Raises", kwargs={"where": "step", "what": "SystemExit"}))
    one.reset(seed=0)
    one.unwrapped.t = own_envs.LATE  # type: ignore[attr-defined]
    with pytest.raises(EnvironmentFailed):
        one.step(np.zeros(2, np.float32))
    one.unwrapped.where = "close"  # type: ignore[attr-defined]
    one.close()


def test_ctrl_c_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def press(self: Any, action: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    def interrupt(number: int, frame: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        with trainer_of(own("Base")) as trainer:
            monkeypatch.setattr(own_envs.Base, "step", press)
            with pytest.raises(Interrupted):
                trainer.advance()
    finally:
        signal.signal(signal.SIGINT, before)


# --- processes of their own -----------------------------------------------------------------------


def test_torch_runs_in_processes_whose_parent_has_threads() -> None:
    """Processes must not be forked from one with a pool of threads: they would hang in torch."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.ones(500, 500) @ torch.ones(500, 500)
        env = own("Learned", vectorizer="async")
        with closing(make_env(env)) as one:
            task = task_of(one)
        with closing(make_envs(env, 2, task)) as envs:
            envs.reset([0, 1])
            steps = envs.step(np.zeros((2, 2), np.float32))
            assert steps.next_obs.shape == (2, 3)
            parents = envs.vector.call("parent")  # type: ignore[attr-defined]
        assert os.getpid() not in parents
        assert len(set(parents)) == 1
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGUSR1, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
        signal.SIGINT,
    ],
)
def test_signals_to_all_processes_are_for_the_run_alone(number: int) -> None:
    forkserver._forkserver._stop()  # type: ignore[attr-defined]  # started by other tests
    env = own("Base", vectorizer="async")
    with closing(make_env(env)) as one:
        task = task_of(one)
    with closing(make_envs(env, 1, task)) as envs:
        envs.reset([0])
        process = envs.vector.processes[0]  # type: ignore[attr-defined]
        server = envs.vector.call("parent")[0]  # type: ignore[attr-defined]
        for pid in (process.pid, server):
            os.kill(pid, number)
        assert len(envs.step(np.zeros((1, 2), np.float32)).rew) == 1
        os.kill(server, 0)


LEAVES = """
import sys
sys.path.append(sys.argv[1])
from spikerl.envs.config import EnvConfig
from spikerl.envs.make import make_env, task_of
from spikerl.envs.vector import make_envs
env = EnvConfig(name="gym", version=None, id="own_envs:Base-v0", max_episode_steps=None,
                vectorizer="async")
kept = make_envs(env, 1, task_of(make_env(env)))
kept.reset([0])
"""


@pytest.mark.slow
def test_a_program_that_leaves_them_open_ends() -> None:
    """A program ends although its environments' processes ignore SIGTERM, which multiprocessing
    sends before it waits for them.
    """
    where = str(Path(own_envs.__file__).parent)
    ended = subprocess.run(
        [sys.executable, "-c", LEAVES, where], timeout=100, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stderr) == (0, "")


def test_an_environment_that_only_this_process_has_registered() -> None:
    gym.registry.pop("Here-v0", None)
    made: Any = own_envs.Takes
    gym.register("Here-v0", entry_point=made, kwargs={"mass": 3.0})
    env = EnvConfig(name="gym", version=None, id="Here-v0", max_episode_steps=9, vectorizer="async")
    with closing(make_env(env)) as one:
        task = task_of(one)
    with closing(make_envs(env, 1, task)) as envs:
        envs.reset([0])
        assert np.array_equal(envs.obs, [[0.0, 3.0, 0.0]])


# --- what they are given and give -----------------------------------------------------------------


def test_arguments_reach_training_evaluation_and_the_policy(tmp_path: Path) -> None:
    env = own("Takes", kwargs={"mass": 2.0, "others": [1, {"deep": "x"}]})
    with trainer_of(env) as trainer:
        assert np.array_equal(trainer.envs.obs, [[0.0, 2.0, 0.0]])
        assert trainer.evaluator.envs[0].reset()[0].tolist() == [0.0, 2.0, 0.0]
        trainer.policy.save(tmp_path)
    task = load_policy(tmp_path).task
    assert task.env_kwargs == {"mass": 2.0, "others": [1, {"deep": "x"}]}
    for key in ("max_episode_steps", "id"):
        assert refusal(own, "Takes", kwargs={key: 1}).args[0] == "env.kwargs"
    assert refusal(make_env, own("Takes", kwargs={"weight": 1})).args[0] == "env.kwargs"
    for kwargs in ({"mass": math.inf}, {"others": [1, {"deep": math.nan}]}):
        assert "give finite numbers" in str(refusal(own, "Takes", kwargs=kwargs))
    wrappers = [{"name": "ClipReward", "min_reward": -math.inf, "max_reward": 1.0}]
    assert refusal(own, "Takes", wrappers=wrappers).args[0] == "env.wrappers"
    assert "env.kwargs={...} gives it" in refusal(make_env, own("Takes")).args[2]


def test_wrappers_by_name(tmp_path: Path) -> None:
    wrappers: list[Any] = [
        {"name": "RescaleAction", "min_action": -2.0, "max_action": [2.0, 4.0]},
        "FlattenObservation",
        {"name": "FrameStackObservation", "stack_size": 2},
    ]
    with trainer_of(own("Base", wrappers=wrappers)) as trainer:
        task = trainer.task
        assert task.obs_shape == (2, 3)
        assert (task.act_low.tolist(), task.act_high.tolist()) == ([-2.0, -2.0], [2.0, 4.0])
        trainer.policy.save(tmp_path)
    assert load_policy(tmp_path).task.env_wrappers == tuple(wrappers)


def test_frames_of_a_step_that_an_episode_ends_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of four frames gives the larger of the last two; a shorter step uses no frame of an
    earlier step or episode.
    """
    skipping = {"name": "MaxAndSkipObservation", "skip": 4}
    env = make_env(own("Base", wrappers=[skipping], max_episode_steps=5))
    act = np.zeros(2, np.float32)
    env.reset(seed=0)
    whole, cut = env.step(act), env.step(act)
    assert whole[0].tolist() == [np.sin(3), np.cos(4), 4 / 50]
    assert cut[0].tolist() == [np.sin(5), np.cos(5), 5 / 50]
    assert (whole[2:4], cut[2:4]) == ((False, False), (False, True))
    monkeypatch.setattr(own_envs.Base, "limit", 1)
    env.reset()
    assert env.step(act)[0].tolist() == [np.sin(1), np.cos(1), 1.0]


@pytest.mark.parametrize(("wrappers", "said"), [
    (["NormalizeObservation"], "algo.norm_interval"),
    ([{"name": "RecordVideo", "video_folder": "x"}], "not accepted"),
    (["HumanRendering"], "not accepted"),
    (["TransformReward"], "not accepted"),
    (["os.system"], "not accepted"),
    (["TimeLimit"], "env.max_episode_steps"),
    ([{"min_action": 1}], "give a list"),
    ([{"name": "FrameStackObservation", "stack_size": 10**9}], "give stack_size of at most"),
    ([{"name": "ResizeObservation", "shape": [10**9, 1]}], "give shape of at most 10000"),
    ([{"name": "ResizeObservation", "shape": [9999, 9999]}], "give shape of at most 4000000 val"),
])  # fmt: skip
def test_wrappers_that_are_refused(wrappers: Any, said: str) -> None:
    refused = refusal(own, "Base", wrappers=wrappers)
    assert refused.args[0] == "env.wrappers"
    assert said in refused.args[2]


def test_a_wrapper_that_does_not_fit() -> None:
    refused = refusal(make_env, own("Base", wrappers=["RescaleAction"]))
    assert refused.args[:2] == ("env.wrappers", "RescaleAction")
    assert "min_action" in refused.args[2]


def test_rescaled_tasks_resume_exactly() -> None:
    wrappers = [{"name": "RescaleAction", "min_action": -1.0, "max_action": 1.0}]
    env = EnvConfig(name="gym", version=None, id="Pendulum-v1", max_episode_steps=9,
                    vectorizer="sync", wrappers=wrappers)  # fmt: skip
    one, other = make_env(env), make_env(env)
    one.reset(seed=3)
    state = one.snapshot
    assert state is not None
    other.snapshot = state
    act = np.array([0.3], np.float32)
    assert one.step(act)[0].tobytes() == other.step(act)[0].tobytes()


def test_dictionary_observations(tmp_path: Path) -> None:
    flags = [1.0, 0.0, 0.0, 1.0, 0.0]  # the last three: 6 of 5, 6, 7, at the first step
    with trainer_of(own("Goal")) as trainer:
        trainer.advance()
        layout = [(entry.path, entry.shape, entry.start) for entry in trainer.task.layout]
        trainer.policy.save(tmp_path)
        seen = trainer.envs.obs[0]
    names = [".".join(map(str, path)) for path, _, _ in layout]
    places = {"observation": [1.0, -1.0], "goal": [7.0, 7.0], "flags": flags}
    assert sorted(names) == ["flags.0", "flags.1", "goal", "observation"]
    assert seen.tolist() == [x for name in dict.fromkeys(n[:4] for n in names)
                             for key, xs in places.items() if key.startswith(name)
                             for x in xs]  # fmt: skip
    policy = load_policy(tmp_path)
    assert [(e.path, e.shape, e.start) for e in policy.task.layout] == layout
    env = own_envs.Goal()
    env.t = 1
    assert policy(env.obs()).tobytes() == policy(seen).tobytes()
    both = {"observation": np.ones((2, 2)), "goal": np.ones((2, 1, 2)),
            "flags": (np.ones((2, 2)), np.array([5, 7]))}  # fmt: skip
    assert policy(both).shape == (2, 2)


@pytest.mark.parametrize(("change", "said"), [
    ({"goal": np.zeros(2)}, r"whose goal is \(2,\); its space says \(1, 2\)"),
    ({"goal": np.array([["a", "b"]])}, "whose goal is of <U1"),
    ({"flags": (np.zeros(2), 9)}, r"whose flags\.1 is none of its 3 values"),
    ({"flags": None}, r"without flags\.0"),
])  # fmt: skip
def test_a_dictionary_that_its_space_does_not_say(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], said: str
) -> None:
    good = own_envs.Goal().obs()
    with trainer_of(own("Goal")) as trainer:
        monkeypatch.setattr(own_envs.Goal, "obs", lambda self: good | change)
        with pytest.raises(EnvironmentFailed, match=f"^step 1: Goal-v0 returned an obs.* {said}"):
            trainer.advance()


def test_float16_actions(tmp_path: Path) -> None:
    with trainer_of(own("Half"), total_steps=60, steps_per_epoch=60) as trainer:
        list(trainer.epochs())  # the environment checks the dtype
        trainer.policy.save(tmp_path)
    policy = load_policy(tmp_path)
    assert policy(np.zeros(3)).dtype == np.float16
    assert policy(np.zeros((2, 3))).dtype == np.float16
    task = Task("x", (1,), (2,), np.array([-0.1, -0.3]), np.array([0.1, 0.3]), 9)
    assert task.to_env(np.ones(2, np.float32)).dtype == np.float32


def test_spaces_of_one_number_without_a_shape(tmp_path: Path) -> None:
    with trainer_of(own("Scalars"), total_steps=60, steps_per_epoch=60) as trainer:
        assert (trainer.task.obs_shape, trainer.task.obs_dim) == ((), 1)
        assert (trainer.task.act_shape, trainer.task.act_dim) == ((), 1)
        list(trainer.epochs())
        trainer.policy.save(tmp_path)
    policy = load_policy(tmp_path)
    assert policy(0.5).shape == ()
    assert policy(np.zeros(4)).shape == (4,)
    assert refusal(make_env, own("NothingToSee")).args[2] == "its observations are empty"


def test_reward_scale_is_for_learning_alone() -> None:
    rewards, returns = [], []
    for scale in (1.0, 4.0):
        env = own("Base", reward_scale=scale)
        with trainer_of(env, random_steps=1000) as trainer:
            for _ in range(own_envs.Base.limit):
                trainer.act()
            rewards.append(trainer.replay.rows[: own_envs.Base.limit, -4].double())
            returns.append((trainer.progress.returns, trainer.evaluator.run(trainer.policy, 1)))
    assert torch.equal(rewards[1], 4.0 * rewards[0])
    assert rewards[0].abs().sum() > 0.0
    assert returns[0][0] == returns[1][0]
    assert returns[0][1].returns == returns[1][1].returns
    assert refusal(own, "Base", reward_scale=0.0).args[0] == "env.reward_scale"


def test_an_environment_that_there_is_once() -> None:
    with trainer_of(own("Only"), eval_episodes=0, total_steps=50, steps_per_epoch=25) as trainer:
        rows = list(trainer.epochs())
    assert [row["eval_return"] for row in rows] == [None, None]
    assert [row["eval_length"] for row in rows] == [None, None]
    assert rows[-1]["updates"] > 0
    with pytest.raises(BadRequest, match=r"eval_episodes=3.*the robot is taken.*0 trains without"):
        trainer_of(own("Only"), eval_episodes=3).__enter__()
    assert own_envs.Only.alive == 0
    with trainer_of(own("Base")) as other, closing(Evaluator(own("Only"), 3, 0)) as evaluator:
        assert evaluator.note is not None
        assert "1 episodes at a time" in evaluator.note
        assert len(evaluator.run(other.policy, 0).returns) == 3
    assert own_envs.Only.alive == 0


def test_it_finds_itself_in_its_folder_and_we_in_ours(tmp_path: Path) -> None:
    here = Path.cwd()
    with trainer_of(own("Wanders", kwargs={"folder": str(tmp_path)})) as trainer:
        assert Path.cwd() == here
        trainer.advance()
        assert Path.cwd() == here


def test_a_generator_of_the_older_kind_does_not_hinder_a_commit() -> None:
    with trainer_of(own("OldGenerator")) as trainer:
        trainer.advance()
        assert shard_of(trainer).notes["exact"] is False
