"""Restored environments go on bit for bit, on every task; a snapshot has just what they need."""

from __future__ import annotations

from typing import Any

import mujoco
import numpy as np
import pytest
from episodes import make, random_actions, rows, through_file
from gymnasium.envs.mujoco import MujocoEnv

from spikerl.envs.checked import CheckedEnv
from spikerl.envs.snapshot import INTEGRATION, READ_BEFORE_STEP, restore, snapshot

NAMES = [
    "Ant",
    "HalfCheetah",
    "Hopper",
    "Humanoid",
    "HumanoidStandup",
    "InvertedDoublePendulum",
    "InvertedPendulum",
    "Pusher",
    "Reacher",
    "Swimmer",
    "Walker2d",
]
MUJOCO = [f"{name}-{version}" for name in NAMES for version in ("v5", "v4")]
MUJOCO.remove("Pusher-v4")  # Gymnasium refuses to make it with this MuJoCo
# Slow and less important: v5 did not change what the state of a task is, and one of the two
# humanoids is enough.
LONG = [name for name in MUJOCO if name.endswith("v4") or name == "HumanoidStandup-v5"]
TASKS = [
    *(pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in MUJOCO),
    "Pendulum-v1",
]
GAMES = ["Asterix", "Breakout", "Freeway", "Seaquest", "SpaceInvaders"]
LIMIT = 47  # so that every task is cut off and reset several times
AHEAD = 210

pytestmark = pytest.mark.filterwarnings("ignore:.*out of date")


class Run:
    """One run of a task: the rows of all steps, and snapshots taken before some of the steps."""

    def __init__(self, env_id: str, seed: int) -> None:
        self.env = make(env_id, LIMIT)
        self.actions = random_actions(self.env.action_space, 150 + AHEAD, seed)
        self.env.reset(seed=seed)
        states, self.rows = [], []
        for action in self.actions:
            states.append(snapshot(self.env.env))
            self.rows += rows(self.env, [action])
        ends = [step for step, row in enumerate(self.rows[:140]) if row[1] or row[2]]
        end = ends[seed % len(ends)]
        anywhere = int(np.random.default_rng(seed).integers(1, 150))
        # In the middle of an episode, before its last step, after the reset, and one step on.
        self.states = {step: states[step] for step in (anywhere, end, end + 1, end + 2)}

    def differs(self, env: CheckedEnv, step: int) -> bool:
        """Whether `env`, brought to just before `step`, goes on otherwise than this run did."""
        expected = self.rows[step : step + AHEAD]
        return rows(env, self.actions[step : step + AHEAD]) != expected


@pytest.mark.parametrize("env_id", [*TASKS, *(f"MinAtar/{game}-v1" for game in GAMES)])
def test_goes_on_bit_for_bit(env_id: str) -> None:
    used = make(env_id, LIMIT)
    used.reset(seed=99)
    for seed in (1, 2):
        run = Run(env_id, seed)
        for step, state in run.states.items():
            assert state is not None
            for env in (make(env_id, LIMIT), used):
                restore(env.env, through_file(state))
                assert not run.differs(env, step), (seed, step)


def inner(env: CheckedEnv) -> tuple[Any, Any]:
    base = env.unwrapped
    assert isinstance(base, MujocoEnv)
    return base.model, base.data


@pytest.mark.parametrize("env_id", TASKS[:-1])
def test_nothing_else_in_the_simulation_is_read(env_id: str) -> None:
    """All that a snapshot does not hold may be NaN: the next step overwrites it before reading."""
    run = Run(env_id, seed=3)
    env = make(env_id, LIMIT)
    for step, state in run.states.items():
        assert state is not None
        restore(env.env, state)
        model, data = inner(env)
        for name in dir(data):
            array = getattr(data, name, None)
            if isinstance(array, np.ndarray) and array.dtype == np.float64:
                array[...] = np.nan
        mujoco.mj_setState(model, data, state["integration"], INTEGRATION)  # type: ignore[attr-defined]
        for name in READ_BEFORE_STEP:
            getattr(data, name)[:] = state[name]
        assert not run.differs(env, step), step


@pytest.mark.parametrize("env_id", TASKS)
def test_nothing_else_in_python_changes(env_id: str) -> None:
    """Only the known attributes of an environment change; if a later version of Gymnasium adds one,
    a snapshot may need it too.
    """
    env = make(env_id, LIMIT)
    base = env.unwrapped

    def plain() -> dict[str, Any]:
        kinds = (int, float, str, tuple, list, dict, np.ndarray)
        return {name: repr(value) for name, value in vars(base).items() if isinstance(value, kinds)}

    env.reset(seed=1)
    before = plain()
    rows(env, random_actions(env.action_space, 60, seed=1))
    after = plain()
    changed = {name for name in after if after[name] != before.get(name)}
    # Each reset of Pusher draws init_qpos anew; cylinder_pos and goal are also in qpos.
    known = {"Pusher": {"init_qpos", "cylinder_pos"}, "Reacher": {"goal"}, "Pendulum": {"state"}}
    assert changed == known.get(env_id.split("-")[0], set())
    assert base.action_space._np_random is None
    assert base.observation_space._np_random is None


def without(part: str, env: CheckedEnv) -> None:
    """Undo what was restored of `part`."""
    base, state = env.unwrapped, snapshot(env.env)
    assert state is not None
    if part == "random":
        base.np_random = np.random.default_rng(0)
    elif part in state:
        restore(env.env, {**state, part: state[part] * 0})
    else:
        getattr(inner(env)[1], part)[...] = 0.0


# HalfCheetah, the pendulums, Reacher and Swimmer need no warm start, and tasks whose episodes all
# end early need no elapsed steps. Positions of bodies matter only to the tasks named here.
NEEDED = [
    ("random", "HalfCheetah-v5"),
    ("elapsed", "HalfCheetah-v5"),
    ("qpos", "HalfCheetah-v5"),
    ("qvel", "HalfCheetah-v5"),
    ("qacc_warmstart", "Hopper-v5"),
    ("qacc_warmstart", "Walker2d-v5"),
    ("xpos", "Ant-v5"),
    ("xpos", "Reacher-v4"),
    ("xipos", "Humanoid-v5"),
    ("random", "Pendulum-v1"),
    ("elapsed", "Pendulum-v1"),
    ("state", "Pendulum-v1"),
]


@pytest.mark.parametrize(("part", "env_id"), NEEDED)
def test_every_part_is_needed(part: str, env_id: str) -> None:
    run = Run(env_id, seed=4)
    env = make(env_id, LIMIT)
    differing = 0
    for step, state in run.states.items():
        assert state is not None
        restore(env.env, state)
        without(part, env)
        differing += run.differs(env, step)
    assert differing
