from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
import pytest
from episodes import make, random_actions, rows, through_file
from gymnasium.envs.classic_control import PendulumEnv
from gymnasium.envs.mujoco.hopper_v5 import HopperEnv
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from spikerl.envs.checked import CheckedEnv
from spikerl.envs.snapshot import SLEEP, Snapshot, restore, snapshot
from spikerl.errors import EnvironmentFailed

TASKS = ["Hopper-v5", "Ant-v5", "Pendulum-v1", "CartPole-v1", "Acrobot-v1", "MountainCar-v0"]
LIMIT = 30


def started(env_id: str, steps: int = 17, seed: int = 5) -> CheckedEnv:
    env = make(env_id, LIMIT)
    env.reset(seed=seed)
    rows(env, random_actions(env.action_space, steps, seed))
    return env


def taken(env: CheckedEnv) -> Snapshot:
    state = snapshot(env.env)
    assert state is not None
    return state


def ahead(env: CheckedEnv, steps: int = 80) -> list[tuple[bytes, bool, bool]]:
    return rows(env, random_actions(env.action_space, steps, seed=9))


@pytest.mark.parametrize("env_id", TASKS)
def test_fresh_and_used_environments_go_on_bit_for_bit(env_id: str) -> None:
    env = started(env_id)
    state = taken(env)
    expected = ahead(env)
    assert any(terminated or truncated for _, terminated, truncated in expected)
    for other in (make(env_id, LIMIT), started(env_id, steps=41, seed=6)):
        restore(other.env, through_file(state))
        assert ahead(other) == expected


@pytest.mark.parametrize("env_id", TASKS)
def test_taking_a_snapshot_changes_nothing_and_it_stays_as_it_was(env_id: str) -> None:
    env, untouched = started(env_id), started(env_id)
    state = taken(env)
    copy = {name: array.copy() for name, array in state.items()}
    assert ahead(env) == ahead(untouched)
    restore(untouched.env, state)
    ahead(untouched)
    for name, array in copy.items():
        np.testing.assert_array_equal(state[name], array)


def test_a_snapshot_shares_no_memory_with_an_environment() -> None:
    env, other = started("Pendulum-v1"), make("Pendulum-v1", LIMIT)
    state = taken(env)
    restore(other.env, state)
    for one in (env, other):
        assert not np.shares_memory(state["state"], one.unwrapped.state)  # type: ignore[attr-defined]


@pytest.mark.parametrize("env_id", TASKS)
def test_arrays_may_be_views_that_cannot_be_written(env_id: str) -> None:
    env, other = started(env_id), make(env_id, LIMIT)
    views = {name: np.repeat(array, 2, axis=0)[::2] for name, array in taken(env).items()}
    for view in views.values():
        view.flags.writeable = False
    restore(other.env, views)
    assert ahead(other) == ahead(env)


def test_every_time_limit_counts() -> None:
    def limited() -> gym.Env[Any, Any]:
        return gym.wrappers.TimeLimit(make("Pendulum-v1", LIMIT + 5).env, LIMIT)

    env, other = limited(), limited()
    env.reset(seed=1)
    env.step(np.zeros(1, np.float32))
    state = snapshot(env)
    assert state is not None
    assert state["elapsed"].tolist() == [1, 1]
    restore(other, {**state, "elapsed": np.array([2, 4])})
    again = snapshot(other)
    assert again is not None
    assert again["elapsed"].tolist() == [2, 4]


@pytest.mark.parametrize("env_id", TASKS)
def test_only_types_that_files_hold(env_id: str) -> None:
    assert {array.dtype.name for array in taken(started(env_id)).values()} == {
        "uint8",
        "int64",
        "float64",
    }


def test_a_used_simulation_is_a_fresh_one_again() -> None:
    state = taken(started("Ant-v5"))
    fresh, used = make("Ant-v5", LIMIT), started("Ant-v5", steps=41, seed=6)
    found = []
    for env in (fresh, used):
        restore(env.env, state)
        data = env.unwrapped.data  # type: ignore[attr-defined]
        arrays = {name: getattr(data, name) for name in dir(data) if not name.startswith("_")}
        found.append({n: a.copy() for n, a in arrays.items() if isinstance(a, np.ndarray)})
    assert found[0].keys() == found[1].keys()
    for name, array in found[0].items():
        np.testing.assert_array_equal(array, found[1][name], err_msg=name)


def test_the_random_generator_to_its_last_bit() -> None:
    env = started("Pendulum-v1")
    generator = env.unwrapped.np_random
    generator.integers(9, dtype=np.uint32)  # the other half of a 64-bit draw is kept
    whole = generator.bit_generator.state
    assert whole["has_uint32"] == 1
    assert whole["state"]["state"] >> 64
    other = make("Pendulum-v1", LIMIT)
    restore(other.env, taken(env))
    assert other.unwrapped.np_random.bit_generator.state == whole


class OwnHopper(HopperEnv):
    """A user's subclass of Gymnasium's task, which may have more state."""


class OwnPendulum(PendulumEnv):
    pass


XML = """<mujoco>
<extension><plugin plugin="mujoco.pid"/></extension>
<option timestep="0.02"/>
<worldbody><body>
  <joint name="slider" type="slide" axis="1 0 0"/><geom size="0.1"/>
  <body><joint type="hinge" axis="0 1 0"/><geom size="0.05" pos="0 0 0.6"/></body>
</body>{body}</worldbody>
<actuator>{actuator}</actuator></mujoco>"""
MOTOR = '<motor joint="slider" ctrlrange="-3 3"/>'
PID = '<plugin joint="slider" plugin="mujoco.pid" ctrlrange="-3 3" actdim="0"/>'
FLEX = '<flexcomp name="f" type="grid" count="3 3 1" spacing=".1 .1 .1" dim="2" pos="5 0 1"/>'


def own_model(folder: Path, body: str = "", actuator: str = MOTOR) -> gym.Env[Any, Any]:
    path = folder / "model.xml"
    path.write_text(XML.format(body=body, actuator=actuator))
    return gym.make("InvertedPendulum-v5", xml_file=str(path), disable_env_checker=True)


def unknown_kinds() -> dict[str, Callable[[Path], gym.Env[Any, Any]]]:
    def limited(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
        return gym.wrappers.TimeLimit(env, LIMIT)

    def sleeping(_: Path) -> gym.Env[Any, Any]:
        env = make("Hopper-v5").env
        env.unwrapped.model.opt.enableflags |= SLEEP  # type: ignore[attr-defined]
        return env

    return {
        "another's MuJoCo task": lambda _: limited(OwnHopper()),
        "another's pendulum": lambda _: limited(OwnPendulum()),
        "another task": lambda _: make("MountainCarContinuous-v0").env,
        "a wrapper": lambda _: gym.wrappers.RecordEpisodeStatistics(make("Hopper-v5").env),
        "no time limit": lambda _: PendulumEnv(),
        "sleep": sleeping,
        "a flex": lambda folder: own_model(folder, body=FLEX),
        "a plugin": lambda folder: own_model(folder, actuator=PID),
    }


@pytest.mark.parametrize("kind", unknown_kinds())
def test_what_is_not_known_is_not_guessed(kind: str, tmp_path: Path) -> None:
    mujoco.set_mju_user_warning(lambda _: None)  # type: ignore[attr-defined]
    env = unknown_kinds()[kind](tmp_path)
    env.reset(seed=1)
    assert snapshot(env) is None
    with pytest.raises(ValueError, match="cannot be restored"):
        restore(env, taken(started("Hopper-v5")))


def test_nothing_to_take_before_the_first_reset_or_of_another_generator() -> None:
    env = make("Hopper-v5")
    assert snapshot(env.env) is None
    env.reset(seed=1)
    assert snapshot(env.env) is not None
    env.unwrapped.np_random = np.random.Generator(np.random.Philox(1))
    assert snapshot(env.env) is None


def changed(state: Snapshot, **arrays: np.ndarray | None) -> Snapshot:
    return {name: array for name, array in {**state, **arrays}.items() if array is not None}


def misfits(state: Snapshot) -> dict[str, Snapshot]:
    return {
        "snapshot lacks xpos": changed(state, xpos=None),
        "snapshot lacks kind, random": changed(state, kind=None, random=None),
        "has spin, which .*HopperEnv has not": changed(state, spin=np.zeros(1)),
        "another MuJoCo model": changed(state, model=state["model"] + 1),
        "integration is float32": changed(
            state, integration=state["integration"].astype(np.float32)
        ),
        "xipos is .*, not float64": changed(state, xipos=state["xipos"][1:]),
        "counts steps below 0": changed(state, elapsed=np.array([-1])),
        r"elapsed is int64 \(2,\)": changed(state, elapsed=np.zeros(2, np.int64)),
        "random is uint64": changed(state, random=state["random"].view(np.uint64)),
        "is of .*AntEnv, the environment is .*HopperEnv": taken(started("Ant-v5")),
        "is of .*PendulumEnv, the environment": taken(started("Pendulum-v1")),
        # The arrays have the same sizes; only the class differs.
        "is of .*hopper_v4": taken(started("Hopper-v4")),
    }


@pytest.mark.filterwarnings("ignore:.*out of date")
def test_a_state_that_does_not_fit_is_refused_before_anything_changes() -> None:
    state = taken(started("Hopper-v5", seed=8))
    for reason, misfit in misfits(state).items():
        env = started("Hopper-v5")
        with pytest.raises(ValueError, match=reason):
            restore(env.env, misfit)
        assert ahead(env) == ahead(started("Hopper-v5")), reason


def game(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8).copy()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda text: text[:-1], "delimiter"),
        (lambda text: "[" * 100_000, "nested too deep"),
        (lambda text: "[]", "of another game"),
        (lambda text: text.replace('"pos"', '"place"'), "of another game"),
        (lambda text: text.replace('"pos": ', '"pos": 1e9'), "pos is not a state"),
        (lambda text: text.replace('"pos": ', '"pos": "left", "x": '), "of another game"),
        (lambda text: text.replace('"strike": false', '"strike": 0'), "strike is not a state"),
        (lambda text: text.replace("[[", "[[[", 1).replace("]]", "]]]", 1), "brick_map is no"),
        (lambda text: text.replace("[[", "[[1.0,", 1), "brick_map is no"),
        (lambda text: text.replace("[[0.0", "[[NaN", 1), "brick_map is no"),
        (lambda text: text.replace("[[0.0", "[[null", 1), "brick_map is no"),
    ],
)
def test_a_state_of_a_game_may_be_untrusted(change: Callable[[str], str], reason: str) -> None:
    env = started("MinAtar/Breakout-v1", 2)
    before = taken(env)
    text = bytes(before["game"]).decode()
    assert change(text) != text
    with pytest.raises(ValueError, match=reason):
        restore(env.env, {**before, "game": game(change(text))})
    for index, number in ((-1, -1), (-1, 625), (0, -1), (623, 1 << 32)):
        words = before["mersenne"].copy()
        words[index] = number
        with pytest.raises(ValueError, match="random state"):
            restore(env.env, {**before, "mersenne": words})
    after = taken(env)
    assert all(np.array_equal(after[name], before[name]) for name in before)


def test_a_fresh_environment_that_refused_still_wants_a_reset() -> None:
    env = make("Hopper-v5")
    with pytest.raises(ValueError, match="lacks xpos"):
        restore(env.env, changed(taken(started("Hopper-v5")), xpos=None))
    with pytest.raises(EnvironmentFailed, match="ResetNeeded"):
        env.step(np.zeros(3, np.float32))


def test_another_model_of_the_same_class_does_not_fit(tmp_path: Path) -> None:
    env = own_model(tmp_path)
    env.reset(seed=1)
    state = snapshot(env)
    assert state is not None
    with pytest.raises(ValueError, match="another MuJoCo model"):
        restore(make("InvertedPendulum-v5").env, state)


class Restorable(CheckedEnv):
    """Has the snapshot as a property: only `set_attr` passes each environment its own value."""

    @property
    def snapshot(self) -> Snapshot | None:
        return snapshot(self.env)

    @snapshot.setter
    def snapshot(self, state: Snapshot) -> None:
        restore(self.env, state)


def vector(kind: str, env_id: str = "Hopper-v5", num_envs: int = 3) -> Any:
    config = make(env_id, LIMIT).config
    makers: list[Any] = [lambda: Restorable(make(env_id, LIMIT).env, config)] * num_envs
    made = SyncVectorEnv if kind == "sync" else AsyncVectorEnv
    return made(makers, autoreset_mode=AutoresetMode.SAME_STEP)


def vector_rows(envs: VectorEnv[Any, Any, Any], seed: int, steps: int) -> list[list[bytes]]:
    found = []
    for action in random_actions(envs.action_space, steps, seed):
        obs, rew, terminated, truncated, info = envs.step(action)
        final = [last.tobytes() for last in info.get("final_obs", []) if last is not None]
        found.append([array.tobytes() for array in (obs, rew, terminated, truncated)] + final)
    return found


@pytest.mark.parametrize(("before", "after"), [("sync", "async"), ("async", "sync")])
def test_vector_environments_take_and_set_by_name(before: str, after: str) -> None:
    envs, other = vector(before), vector(after)
    try:
        envs.reset(seed=[1, 2, 3])
        vector_rows(envs, seed=1, steps=37)
        states = envs.call("snapshot")
        expected = vector_rows(envs, seed=2, steps=60)
        assert any(len(row) > 4 for row in expected)
        other.set_attr("snapshot", [through_file(state) for state in states])
        assert vector_rows(other, seed=2, steps=60) == expected
    finally:
        envs.close()
        other.close()


@pytest.mark.filterwarnings("ignore:.*ERROR")
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_vector_environments_pass_the_reason_on(kind: str) -> None:
    envs = vector(kind, num_envs=2)
    try:
        with pytest.raises(ValueError, match=r"is of .*AntEnv"):
            envs.set_attr("snapshot", [taken(started("Ant-v5"))] * 2)
    finally:
        envs.close()
