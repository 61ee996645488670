"""`spikerl collect` as it is typed, and trainings on its datasets."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
from collections.abc import Iterator
from contextlib import chdir
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from builders import CARTPOLE, INVERTED_PENDULUM
from exports import config, policy_of
from recorded import episode, task_for, write
from shell import SHORT, spikerl, tree

import spikerl as library
from spikerl.commands import collect
from spikerl.envs.checked import CheckedEnv
from spikerl.envs.config import EnvConfig
from spikerl.envs.dataset import Dataset
from spikerl.envs.make import make_env
from spikerl.errors import EnvironmentFailed
from spikerl.runs import folder as run_folder
from spikerl.seeding import RESET_BITS, reset_seed
from spikerl.types import Task

h5py: Any = import_module("h5py")
OFFLINE = [
    *(
        word
        for word in SHORT
        if not word.startswith(("algo.learn", "algo.random", "total", "steps"))
    ),
    *(
        "algo=td3_bc",
        "total_steps=30",
        "steps_per_epoch=20",
        "logger=[]",
        "env.max_episode_steps=50",
    ),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders with a policy: on InvertedPendulum with at most 50 steps, and on CartPole."""
    root = tmp_path_factory.mktemp("runs")
    for name, env in (("run", INVERTED_PENDULUM), ("cart", CARTPOLE)):
        (root / name).mkdir()
        policy_of(config(), task_for(env)).save(root / name)
    return root


@pytest.fixture(autouse=True)
def folder(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(made)
    return made


def numbers(dataset: str) -> list[dict[str, np.ndarray]]:
    with h5py.File(f"{dataset}/data/main_data.hdf5") as file:
        groups = [file[f"episode_{i}"] for i in range(len(file))]
        return [{name: values[()] for name, values in group.items()} for group in groups]


def facts(dataset: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(dataset, "data/metadata.json").read_text())
    return found


def test_spaces_of_one_number_without_a_shape() -> None:
    env = EnvConfig(
        name="gym", version=None, id="own_envs:Scalars-v0", max_episode_steps=5, vectorizer="sync"
    )
    Path("scalars").mkdir()
    task = task_for(env)
    policy_of(config(), task).save(Path("scalars"))
    line = ["collect", "run=scalars", "dataset=single", "steps=8", "env_id=own_envs:Scalars-v0"]
    assert spikerl(*line).status == 0
    space = json.loads(facts("single")["action_space"])
    assert (space["shape"], space["low"], space["high"]) == ([], -2.0, 3.0)
    one, other = Dataset.open(Path("single"), task, 1 << 30).episodes()
    assert one.obs.tolist() == [[float(t)] for t in range(6)]
    assert (one.act.shape, other.act.shape) == ((5, 1), (3, 1))


def test_what_the_policy_does() -> None:
    """Taking the recorded actions again in the environment gives the recorded rows."""
    said = spikerl("collect", "run=run", "dataset=own", "episodes=3", "seed=5")
    assert said.status == 0, said
    policy, env = library.load_policy("run"), make_env(INVERTED_PENDULUM)
    found = numbers("own")
    assert len(found) == 3
    with h5py.File("own/data/main_data.hdf5") as file:
        seeds = [int(file[f"episode_{i}"].attrs["seed"]) for i in range(3)]
    for one, seed in zip(found, seeds, strict=True):
        obs, _ = env.reset(seed=seed)
        for t, act in enumerate(one["actions"]):
            assert np.array_equal(one["observations"][t], obs)
            np.testing.assert_allclose(act, policy(obs), rtol=1e-5)
            obs, rew, terminated, truncated, _ = env.step(act)
            assert one["rewards"][t] == rew
            assert (one["terminations"][t], one["truncations"][t]) == (terminated, truncated)
        assert np.array_equal(one["observations"][-1], obs)
        assert terminated or truncated
    returns = [one["rewards"].sum() for one in found]
    steps = sum(len(one["rewards"]) for one in found)
    assert said.out.splitlines() == [
        f"InvertedPendulum-v5: {steps} transitions, return {np.mean(returns):.1f}"
        f" +- {np.std(returns):.1f} over 3 whole episodes",
        "dataset: own",
    ]
    assert len(set(seeds)) == 3


def test_what_is_recorded_of_it(folder: Path) -> None:
    keys = ["noise=0.5", "random_share=0.25", "steps=70", "seed=3"]
    assert spikerl("collect", "run=run", "dataset=told-v3", *keys).status == 0
    found, recipe = facts("told-v3"), facts("told-v3")["recipe"]
    digests = {
        name: hashlib.sha256((folder / "run" / name).read_bytes()).hexdigest()
        for name in ("policy.json", "policy.safetensors")
    }
    main = (folder / "told-v3/data/main_data.hdf5").read_bytes()
    assert found["sha256"] == hashlib.sha256(main).hexdigest()
    assert (found["dataset_id"], found["total_steps"]) == ("told-v3", 70)
    assert json.loads(found["env_spec"])["id"] == "InvertedPendulum-v5"
    assert (recipe["noise"], recipe["random_share"], recipe["seed"]) == (0.5, 0.25, 3)
    assert recipe["policy_sha256"] == digests
    assert {"mujoco", "gymnasium", "torch"} <= recipe["versions"].keys()
    last = numbers("told-v3")[-1]
    assert last["terminations"][-1] or last["truncations"][-1]  # cut off at 70 steps
    assert sum(len(one["rewards"]) for one in numbers("told-v3")) == 70


def test_a_seed_decides_every_number() -> None:
    keys = ["run=run", "steps=40", "noise=0.1", "random_share=0.5"]
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert spikerl("collect", f"dataset=seed_{name}", f"seed={seed}", *keys).status == 0
    digests = [facts(f"seed_{name}")["sha256"] for name in "abc"]
    first, again, other = ([one["actions"].tolist() for one in numbers(f"seed_{n}")] for n in "abc")
    assert first == again != other
    assert digests[0] != digests[2]


def test_less_than_an_episode() -> None:
    asked = ["policy=random", "steps=1"]
    said = spikerl("collect", "run=run", "dataset=short", *asked)
    assert said.out.splitlines()[0] == "InvertedPendulum-v5: 1 transitions, no whole episode"
    (one,) = numbers("short")
    assert (one["terminations"].tolist(), one["truncations"].tolist()) == ([False], [True])


def test_random_actions_are_uniform_within_their_bounds() -> None:
    """Uniform actions in [-3, 3] have mean 0 and variance 3^2 / 3."""
    asked = ["policy=random", "steps=800"]
    assert spikerl("collect", "run=run", "dataset=random", *asked).status == 0
    acts = np.concatenate([one["actions"] for one in numbers("random")])
    assert np.abs(acts).max() <= 3.0
    assert abs(acts.mean()) < 4 * (3.0 / 800) ** 0.5
    assert acts.var() == pytest.approx(3.0, rel=0.12)


def test_shares_and_sizes_of_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy's action is 0: half of the actions are uniform, half have deviation 0.2 * 3."""
    monkeypatch.setattr(
        "spikerl.models.policy.Policy.act", lambda self, obs, *others: np.zeros((len(obs), 1))
    )
    asked = ["noise=0.2", "random_share=0.5", "steps=800"]
    assert spikerl("collect", "run=run", "dataset=shares", *asked).status == 0
    acts = np.concatenate([one["actions"] for one in numbers("shares")])
    assert acts.var() == pytest.approx(0.5 * 3.0 + 0.5 * 0.6**2, rel=0.15)
    # Beyond 1.8, which is three deviations, lie 2 in 5 of the uniform actions.
    assert (np.abs(acts) > 1.8).mean() == pytest.approx(0.2, abs=0.05)


def test_images_stay_bytes() -> None:
    """Also the first observation, as a single float64 one would make the whole episode float64."""
    bounds = np.ones(1)
    task = Task("Nowhere-v0", (2,), (1,), -bounds, bounds, 3, obs_bytes=True)
    policy, given = policy_of(config(), task), list[np.ndarray]()
    seen = np.array([0.0, 255.0])  # float64, as `CheckedEnv` returns it
    env: Any = SimpleNamespace(
        reset=lambda seed: (seen, {}), step=lambda act: (seen, 1.0, False, True, {})
    )

    def add(seed: int, obs: np.ndarray, *others: Any) -> None:
        given.append(obs)
        writer.episodes += 1

    writer: Any = SimpleNamespace(episodes=0, steps=0, add=add)
    request = collect.CollectRequest(
        run="r", dataset="d", policy="last", episodes=1, steps=None, noise=0.0, random_share=0.0,
        seed=0, env_id=None, plugins=[],
    )  # fmt: skip
    assert collect.record(request, policy, env, writer, lambda: 0) == [1.0]
    (obs,) = given
    assert obs.dtype == np.uint8
    assert obs.tolist() == [[0, 255], [0, 255]]


def test_discrete_actions() -> None:
    asked = ["steps=30", "random_share=0.5"]
    assert spikerl("collect", "run=cart", "dataset=cart-v0", *asked).status == 0
    acts = np.concatenate([one["actions"] for one in numbers("cart-v0")])
    assert acts.dtype == np.int64
    assert set(acts.tolist()) == {0, 1}
    assert json.loads(facts("cart-v0")["action_space"]) == {
        "type": "Discrete", "dtype": "int64", "start": 0, "n": 2,
    }  # fmt: skip


def test_what_environments_do_with_an_action() -> None:
    """One environment takes the action as a plain number; one changes the array in place, which
    must not change the recorded action.
    """
    for name, rewards in (("Moves", {0: -1.0, 1: -4.0}), ("Doubles", None)):
        env = EnvConfig(name="gym", version=None, id=f"own_envs:{name}-v0", max_episode_steps=None,
                        vectorizer="sync")  # fmt: skip
        Path(name).mkdir()
        policy_of(config(), task_for(env)).save(Path(name))
        dataset = f"dataset={name}-data"
        said = spikerl("collect", f"run={name}", dataset, "steps=40", "policy=random")
        assert said.status == 0, said
        (one,) = numbers(f"{name}-data")
        acts = one["actions"]
        earned = [rewards[a] for a in acts] if rewards else -4.0 * np.square(acts).sum(1)
        np.testing.assert_allclose(one["rewards"], earned, rtol=1e-6)


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ("run=run", "episodes=null: give either episodes=N or steps=N"),
        ("run=run episodes=1 steps=1", "episodes=1: give either episodes=N or steps=N"),
        ("run=run steps=0", "steps=0: give at least 1"),
        ("run=run steps=1 noise=-1", "noise=-1.0: give 0 or more"),
        ("run=run steps=1 noise=nan", "noise=nan: give a finite number"),
        ("run=run steps=1 random_share=1.1", "random_share=1.1: give a value in [0, 1]"),
        ("run=run steps=1 policy=random noise=1", "noise=1.0: policy=random acts at random"),
        ("run=run steps=1 policy=first", "policy=first: give last, best, random or replay"),
        ("run=run steps=1 policy=replay", "steps=1: policy=replay takes what the run did while"),
        ("run=run noise=1 policy=replay", "noise=1.0: policy=replay takes what the run did while"),
        (
            "run=run policy=replay",
            "run=run: is not a run folder (it has no readable manifest.json)",
        ),
        ("run=run steps=1 env_id=CartPole-v1", "env_id=CartPole-v1: its policy maps (4,) to"),
        (
            "run=run steps=1 env_id=InvertedPendulum-v4",
            "env_id=InvertedPendulum-v4: the policy was trained on InvertedPendulum-v5, and that",
        ),
        ("run=run steps=1 policy=best", "run=run: no best policy there"),
        ("run=run policy=replay seed=7", "seed=7: policy=replay takes what the run did while it"),
        ("run=nowhere steps=1", "run=nowhere: no policy there"),
        ("run=cart steps=1 noise=1", "noise=1.0: the actions of CartPole-v1 are discrete; use ran"),
        ("run=run steps=1 dataset=run", "dataset=run: it exists already; give another dataset"),
        ("run=run steps=1 dataset=run/policy.json/d", "dataset="),
    ],
)
def test_refused(asked: str, line: str, folder: Path) -> None:
    before = tree(folder)
    assert spikerl("collect", "dataset=new", *asked.split()).line.startswith(line)
    assert tree(folder) == before


def test_what_is_refused_late_leaves_no_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: Any) -> None:
        raise ValueError("it cannot be written down")

    before = tree(folder)
    monkeypatch.setattr(collect, "Writer", refused)
    said = spikerl("collect", "run=run", "dataset=one/two/three", "steps=2")
    assert said.line == "run=run: it cannot be written down"
    assert tree(folder) == before


def test_a_run_may_go_on_meanwhile(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recorded checksums are of the policy that acted, although the run was removed since."""
    shutil.copytree("run", "goes_on")
    record = collect.record
    acted = {name: Path("run", name).read_bytes() for name in ("policy.json", "policy.safetensors")}

    def overtaken(*args: Any) -> list[float]:
        shutil.rmtree("goes_on")
        return record(*args)

    monkeypatch.setattr(collect, "record", overtaken)
    said = spikerl("collect", "run=goes_on", "dataset=meanwhile", "steps=2")
    assert said.status == 0, said
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in acted.items()}
    assert facts("meanwhile")["recipe"]["policy_sha256"] == sums


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ctrl-C at the third step of recording."""
    behave, calls = collect.behave, []

    def acting(*args: Any) -> Any:
        calls.append(0)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return behave(*args)

    monkeypatch.setattr(collect, "behave", acting)
    yield
    assert len(calls) == 3


@pytest.mark.usefixtures("interrupted")
def test_stopped_halfway_it_leaves_nothing(folder: Path) -> None:
    before = tree(folder)
    said = spikerl("collect", "run=run", "dataset=new", "steps=1000")
    assert said.status == 130
    assert said.err == "spikerl: stopped on SIGINT; nothing was kept\n"
    assert tree(folder) == before


@pytest.mark.parametrize("odd", ["reward", "observation", "reset"])
def test_what_no_dataset_may_hold(odd: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = CheckedEnv.step

    def overflowing(self: CheckedEnv, action: np.ndarray) -> Any:
        obs, rew, *others = step(self, action)
        return (obs, np.nan, *others) if odd == "reward" else (obs * 1e39, rew, *others)

    before = tree(folder)
    if odd == "reset":
        monkeypatch.setattr(CheckedEnv, "reset", lambda self, seed: (np.full(4, np.nan), {}))
    else:
        monkeypatch.setattr(CheckedEnv, "step", overflowing)
    said = spikerl("collect", "run=run", "dataset=new", "steps=9")
    assert said.status == 1
    where = f"episode 0, {'reset' if odd == 'reset' else 'step 1'}: InvertedPendulum-v5"
    assert said.err == f"spikerl: {where} gave a NaN or infinity\n"
    assert tree(folder) == before


@pytest.mark.parametrize(
    ("call", "where"), [("reset", "episode 0, reset"), ("step", "episode 0, step 1")]
)
def test_where_an_environment_raised(
    call: str, where: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: CheckedEnv, *args: Any, **settings: Any) -> Any:
        raise EnvironmentFailed("raised ValueError: no wheels")

    before = tree(folder)
    monkeypatch.setattr(CheckedEnv, call, broken)
    said = spikerl("collect", "run=run", "dataset=new", "steps=9")
    assert said.status == 1
    assert said.err == f"spikerl: {where}: InvertedPendulum-v5 raised ValueError: no wheels\n"
    assert tree(folder) == before


def test_training_on_it(folder: Path) -> None:
    assert spikerl("collect", "run=run", "dataset=learn", "steps=60", "noise=0.3").status == 0
    said = spikerl("train", *OFFLINE, "dataset=learn", "run_dir=learned")
    assert said.status == 0, said
    digest = facts("learn")["sha256"]
    assert (
        f"dataset=learn: 60 transitions of {len(numbers('learn'))} episodes, sha256 {digest}"
        in (said.out)
    )
    manifest = json.loads((folder / "learned/manifest.json").read_text())
    assert manifest["dataset"] == {"folder": "learn", "sha256": digest}
    rows = [json.loads(line) for line in (folder / "learned/metrics.jsonl").open()]
    assert [(row["step"], row["updates"]) for row in rows] == [(20, 20), (30, 30)]
    assert rows[0]["env_steps_per_s"] is rows[0]["train_return"] is None
    assert rows[0]["updates_per_s"] > 0
    # A resumed run does not need the dataset: its checkpoint has the transitions.
    (folder / "learn").rename(folder / "moved")
    said = spikerl("train", "resume=learned", "total_steps=45")
    assert said.status == 0, said
    assert "normaliser, 60 transitions, random streams" in said.out
    assert "done: 45 steps, 45 updates" in said.out


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ("", "dataset=null: algo=td3_bc learns from recorded transitions; give a folder"),
        ("dataset=none", "dataset=none: no dataset there; give a folder that holds data/main"),
        (
            "dataset=hand algo=td3",
            "dataset=hand: algo=td3 learns from steps of its own; use algo=bc",
        ),
        (
            "dataset=hand env=Pendulum",
            "dataset=hand: it was recorded on InvertedPendulum-v5, and this is Pendulum-v1",
        ),
        ("dataset=hand env=CartPole", "algo=td3_bc: the actions of CartPole-v1 are discrete; use"),
        ("dataset=odd", "dataset=odd: /episode_0 has actions outside the bounds of"),
        ("dataset=odd world_size=2", "dataset=odd: /episode_0 has actions outside the bounds of"),
        ("dataset=hand algo.alpha=-1", "algo.alpha=-1.0: give 0 or more"),
        ("dataset=hand algo.explore_noise=1", "algo.explore_noise=1: no such key"),
        ("dataset=hand world_size=4", "dataset=hand: it has 3 transitions; num_envs=4 "),
    ],
)
def test_training_refused(asked: str, line: str, folder: Path) -> None:
    if not (folder / "hand").exists():
        write(folder / "hand", [episode(3)])
        odd = episode(3)
        odd["actions"][0] = 4.0
        write(folder / "odd", [odd])
    before = tree(folder)
    said = spikerl("train", *OFFLINE, *asked.split())
    assert said.line.startswith(line)
    assert tree(folder) == before


LEARNS = ["env.max_episode_steps=20", "total_steps=120", "steps_per_epoch=60", "eval_episodes=0",
          "num_envs=2", "logger=[]", "seed=3"]  # fmt: skip


def taken_again(seed: int, env_number: int, acts: list[np.ndarray]) -> dict[str, np.ndarray]:
    """The rows of environment `env_number` of a run with this seed for these actions."""
    env = make_env(replace(INVERTED_PENDULUM, max_episode_steps=20))
    obs, _ = env.reset(seed=reset_seed(RESET_BITS, seed, "env", env_number))
    rows: list[tuple[Any, ...]] = []
    for act in acts:
        next_obs, rew, terminated, truncated, _ = env.step(act)
        rows.append((obs, next_obs, rew, terminated, truncated))
        obs = env.reset()[0] if terminated or truncated else next_obs
    names = ("obs", "next_obs", "rew", "terminated", "truncated")
    return {k: np.array(v) for k, v in zip(names, zip(*rows, strict=True), strict=True)}


@pytest.fixture(scope="module")
def learned(made: Path) -> Path:
    """A run of two environments, 60 steps of each, that learns from rewards scaled by 0.05."""
    keys = ["env.reward_scale=0.05", "run_dir=replaying"]
    with chdir(made):
        assert spikerl("train", *SHORT, *LEARNS, *keys).status == 0
    return made / "replaying"


@pytest.mark.usefixtures("learned")
def test_what_a_run_did_itself() -> None:
    """A run's replay becomes episodes of one environment after the other, with unscaled rewards."""
    said = spikerl("collect", "run=replaying", "dataset=replay-v0", "policy=replay")
    assert said.status == 0, said
    found = numbers("replay-v0")
    lengths = [len(one["rewards"]) for one in found]
    assert sum(lengths) == 120
    border = next(i for i in range(len(lengths)) if sum(lengths[:i]) == 60)
    whole = []
    for number, own in enumerate((found[:border], found[border:])):
        acts = [act for one in own for act in one["actions"]]
        again, at = taken_again(3, number, acts), 0
        assert again["terminated"].any()
        for one in own:
            steps = slice(at, at := at + len(one["rewards"]))
            seen = np.concatenate([again["obs"][steps], again["next_obs"][steps][-1:]])
            assert np.array_equal(one["observations"], seen.astype(np.float32))
            assert np.array_equal(one["rewards"], again["rew"][steps])
            assert np.array_equal(one["terminations"], again["terminated"][steps])
            ended = bool((again["terminated"] | again["truncated"])[steps][-1])
            assert ended or at == 60  # where the run ended
            assert one["terminations"][-1] != one["truncations"][-1]
            whole += [one["rewards"].sum()] * ended
        assert at == 60
    recipe = facts("replay-v0")["recipe"]
    assert (recipe["policy"], recipe["seed"], recipe["num_envs"]) == ("replay", 3, 2)
    assert recipe["whole_episodes"] == len(whole)
    assert recipe["return_mean"] == pytest.approx(np.mean(whole))
    segments = {str(p.relative_to("replaying")): hashlib.sha256(p.read_bytes()).hexdigest()
                for p in Path("replaying").rglob("*.f32")}  # fmt: skip
    assert recipe["replay_sha256"] == segments
    learns = [*OFFLINE, "env.max_episode_steps=20", "dataset=replay-v0", "run_dir=from_replay"]
    assert spikerl("train", *learns).status == 0


def test_a_replay_that_has_overwritten_its_beginning() -> None:
    keys = ["algo.replay_capacity=40", "run_dir=ring"]
    assert spikerl("train", *SHORT, *LEARNS, *keys).status == 0
    assert spikerl("collect", "run=ring", "dataset=ring-v0", "policy=replay").status == 0
    found = numbers("ring-v0")
    lengths = [len(one["rewards"]) for one in found]
    assert sum(lengths) == 40
    border = next(i for i in range(len(lengths)) if sum(lengths[:i]) == 20)
    ends = [bool(one["terminations"][-1]) for one in found]
    # Each environment's first episode lacks its beginning, the last its end unless it terminated.
    count = facts("ring-v0")["recipe"]["whole_episodes"]
    assert count <= len(found) - 2
    with h5py.File("ring-v0/data/main_data.hdf5") as file:
        assert sum("whole" not in episode.attrs for episode in file.values()) == count
    assert border >= 1
    assert any(ends)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"freed": "then"}, "run=changed: its replay was removed on then"),
        ({"num_envs": 7}, "run=changed: 7 environments did not fill replay/worker_0_of_1/rows_"),
        ({"num_envs": 0}, "run=changed: its manifest.json has no num_envs"),
    ],
)
@pytest.mark.usefixtures("learned")
def test_a_replay_that_cannot_be_one(change: dict[str, Any], line: str, folder: Path) -> None:
    run = folder / "changed"
    shutil.copytree(folder / "replaying", run, symlinks=True)
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | change))
    try:
        said = spikerl("collect", "run=changed", "dataset=new", "policy=replay")
        assert said.line.startswith(line)
        assert not (folder / "new").exists()
    finally:
        shutil.rmtree(run)


@pytest.mark.usefixtures("learned")
def test_a_run_that_goes_on_is_left_alone(folder: Path) -> None:
    with run_folder.lock(folder / "replaying"):
        said = spikerl("collect", "run=replaying", "dataset=new", "policy=replay")
    assert said.line.startswith("run=replaying: a process trains it")


@pytest.mark.usefixtures("learned")
def test_a_replay_that_is_removed_meanwhile(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resume or `runs clean=true` removes the replay before the second environment is read."""
    run = folder / "overtaken"
    shutil.copytree(folder / "replaying", run, symlinks=True)
    add = collect.Writer.add

    def overtaken(*args: Any) -> None:
        shutil.rmtree(run / "replay", ignore_errors=True)
        add(*args)

    monkeypatch.setattr(collect.Writer, "add", overtaken)
    said = spikerl("collect", "run=overtaken", "dataset=new", "policy=replay")
    why = "its replay was removed meanwhile; collect again once no process trains it"
    assert said.line == f"run=overtaken: {why}"
    assert not (folder / "new").exists()


def test_an_offline_run_has_no_replay_of_its_own(folder: Path) -> None:
    write(folder / "given", [episode(30)])
    keys = ["dataset=given", "run_dir=offline"]
    assert spikerl("train", *OFFLINE, *keys).status == 0
    said = spikerl("collect", "run=offline", "dataset=new", "policy=replay")
    assert said.line.startswith("policy=replay: algo=td3_bc keeps no replay of its own steps")


def test_a_sweep_that_is_started_again_does_what_is_missing() -> None:
    typed = ["collect", "-m", "run=run", "dataset=again0,again1", "episodes=1"]
    assert spikerl(*typed).status == 0
    assert facts("again0")["recipe"]["command"] == (
        "spikerl collect run=run dataset=again0 episodes=1"
    )
    shutil.rmtree("again1")
    said = spikerl(*typed)
    assert (said.status, said.err) == (0, "")
    assert said.out.count("done already") == 1
    assert facts("again1")["total_episodes"] == 1
    said = spikerl(*typed[:-1], "episodes=2")  # a different request
    assert (said.status, said.err.count("it exists already; give another dataset")) == (2, 2)
