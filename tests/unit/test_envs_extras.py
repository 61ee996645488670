"""Tasks that need optional packages: the message without them, and their spaces with them."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from shell import SHORT, spikerl
from transitions_env import registered

from spikerl.commands import doctor
from spikerl.config.yaml_file import group_options, option_file, read_config
from spikerl.envs import extras
from spikerl.envs.config import EnvConfig
from spikerl.envs.make import make_env, task_of

GAMES = [option for option in group_options("env") if option.startswith("MinAtar/")]
WITHOUT = {
    "ALE/Pong": "env.id=ALE/Pong-v5: ale_py is not installed; pip install 'spikerl[atari]'",
    "MinAtar/Breakout": "env.id=MinAtar/Breakout-v1: minatar is not installed; pip install"
    " 'spikerl[minatar]'",
    "LunarLander": "env.id=LunarLander-v3: Box2D is not installed; pip install 'spikerl[box2d]'",
}


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda module: None)


@pytest.mark.parametrize("option", WITHOUT)
def test_what_brings_a_task_is_said(
    option: str, bare: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own = [word for word in SHORT if "critic" not in word and not word.startswith("env")]
    said = spikerl("train", *own, f"env={option}", "algo=dqn")
    assert said.line == WITHOUT[option]
    assert not any(tmp_path.iterdir())


def test_training_can_run_without_them(bare: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "group_options", lambda group: [*WITHOUT, "CartPole"])
    found = [finding[:3] for finding in doctor.environments()]
    assert found == [
        ("extra", "ALE/Pong-v5", False),
        ("extra", "MinAtar/Breakout-v1", False),
        ("extra", "LunarLander-v3", False),
        ("environment", "CartPole-v1", True),
    ]


def test_each_game_has_a_file_and_a_name() -> None:
    assert len(GAMES) == 5
    for option in GAMES:
        given = read_config(option_file("env", option))
        name = option.removeprefix("MinAtar/")
        assert (given["name"], given["version"]) == (f"MinAtar/{name}", "v1")
        assert {f"MinAtar/{name}-v0", f"MinAtar/{name}-v1"} <= gym.registry.keys()


class Picture(gym.Env[np.ndarray, int]):
    """Observations as MinAtar's: a bool for each place and channel, alternating after a reset."""

    observation_space = gym.spaces.Box(0.0, 1.0, (2, 2, 3), bool)
    action_space: Any = gym.spaces.Discrete(3)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return np.arange(12).reshape(2, 2, 3) % 2 == 1, {}


def test_pictures_of_bools_are_numbers_in_their_order() -> None:
    with closing(make_env(registered("Picture", Picture))) as env:
        obs, _ = env.reset(seed=0)
        assert obs.dtype == np.float64
        assert obs.tolist() == [0.0, 1.0] * 6
        task = task_of(env)
    assert (task.obs_shape, task.obs_dim, task.act_dim) == ((2, 2, 3), 12, 3)


def made(option: str) -> Any:
    given = read_config(option_file("env", option))
    name, version = given["name"], given["version"]
    return make_env(
        EnvConfig(
            name=name,
            version=version,
            id=f"{name.removesuffix('_pixels')}-{version}",
            max_episode_steps=given.get("max_episode_steps"),
            vectorizer="sync",
            kwargs=given.get("kwargs"),
            wrappers=given.get("wrappers"),
        )
    )


def test_the_memory_of_an_atari_game(capfd: pytest.CaptureFixture[str]) -> None:
    with closing(made("ALE/Pong")) as env:
        task = task_of(env)
        obs, _ = env.reset(seed=0)
        assert (obs.min(), obs.max()) == (0.0, 255.0)
    assert (task.obs_shape, task.obs_dim, task.act_dim) == ((128,), 128, 6)
    assert task.max_episode_steps == 27000
    assert capfd.readouterr() == ("", "")  # the emulator prints nothing


def test_the_screen_of_an_atari_game() -> None:
    """Four grey pictures of 84 x 84 bytes, the newest last."""
    with closing(made("ALE/Pong_pixels")) as env:
        task = task_of(env)
        first, _ = env.reset(seed=0)
        second = env.step(0)[0]
    assert (task.obs_shape, task.obs_dim, task.obs_bytes) == ((4, 84, 84), 28224, True)
    assert (task.act_dim, task.max_episode_steps) == (6, 108000)
    pictures, following = first.reshape(4, 84, 84), second.reshape(4, 84, 84)
    assert (following[:3] == pictures[1:]).all()
    assert 0.0 <= pictures.min() < pictures.max() <= 255.0
    assert (pictures % 1.0 == 0.0).all()


@pytest.mark.parametrize("option", [*GAMES, "LunarLander", "ALE/Pong"])
def test_an_episode_follows_from_its_seed_alone(option: str) -> None:
    """It does not depend on what was played before, even with sticky actions."""
    seen = []
    for before in (0, 1, 7):
        with closing(made(option)) as env:
            draw, n = np.random.default_rng(1), env.action_space.n
            env.reset(seed=before)
            for _ in range(before):
                env.step(n - 1)
            rows = [env.reset(seed=5)[0]]
            for _ in range(60):
                obs, rew, terminated, _, _ = env.step(int(draw.integers(n)))
                rows.append(np.append(obs, rew))
                if terminated:
                    rows.append(env.reset()[0])
        seen.append(np.concatenate(rows))
    assert np.array_equal(seen[0], seen[1])
    assert np.array_equal(seen[0], seen[2])


def test_a_run_of_a_game_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resume works although the text of the game's state is not as long as after a reset."""
    monkeypatch.chdir(tmp_path)
    short = ["env=MinAtar/Seaquest", "actor=mlp", "algo=dqn", "actor.hidden_sizes=[8]",
             "algo.learning_starts=30", "algo.batch_size=8", "algo.update_interval=10",
             "steps_per_epoch=40", "eval_episodes=0", "device=cpu", "energy=none", "logger=[]",
             "threads=1"]  # fmt: skip
    assert spikerl("train", *short, "total_steps=41", "run_dir=r").status == 0
    said = spikerl("train", "resume=r", "total_steps=60")
    assert said.status == 0, said.err
    assert "resumed at step 41 of 60" in said.out


def test_the_first_action_is_not_the_last_of_the_episode_before() -> None:
    """All actions are sticky: the first one must not repeat one of the last episode, so the
    paddle stays.
    """
    with closing(made("MinAtar/Breakout")) as env:
        game = env.unwrapped.game
        for action in (1, 2):  # left, right
            game.sticky_action_prob = 0.0
            env.reset(seed=0)
            env.step(action)
            game.sticky_action_prob = 1.0
            env.reset(seed=0)
            at = game.env.pos
            env.step(action)
            assert game.env.pos == at
