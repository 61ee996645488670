"""Videos of evaluations: a file for each episode; filming does not change the episode."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import builders
import gymnasium as gym
import numpy as np
import pytest
import torch
from shell import Said, refusal, spikerl

from spikerl.commands.eval import EvalRequest, film_names
from spikerl.envs import video
from spikerl.models.actor_config import ActorConfig
from spikerl.models.networks import build_actor
from spikerl.models.normalizer import RunningNorm
from spikerl.models.policy import Policy
from spikerl.training import evaluator
from spikerl.types import Task

WIDTH, HEIGHT, STEPS = 320, 240, 5


class Painted(gym.Env[np.ndarray, np.ndarray]):
    """The brightness of its picture grows with the number of steps made."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    observation_space = gym.spaces.Box(-10.0, 10.0, (3,))
    action_space = gym.spaces.Box(-1.0, 1.0, (1,))
    render_mode: str | None = None
    steps = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, Any]:
        super().reset(seed=seed)
        self.steps = 0
        return self.np_random.normal(size=3).astype(np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, Any]:
        self.steps += 1
        obs = np.full(3, 0.5 * self.steps, np.float32)
        return obs, float(action[0]), False, False, {}

    def render(self) -> Any:
        if self.render_mode is None:
            return None
        return np.full((HEIGHT, WIDTH, 3), 40 * self.steps, np.uint8)


class Unpainted(Painted):
    metadata = {"render_modes": ["human"]}  # noqa: RUF012


class Broken(Painted):
    def render(self) -> Any:
        raise ImportError("libpaint.so: no such file\nand more")


@pytest.fixture(autouse=True)
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a policy for Painted."""
    monkeypatch.chdir(tmp_path)
    for kind in (Painted, Unpainted, Broken):
        gym.register(f"{kind.__name__}-v0", f"{__name__}:{kind.__name__}", max_episode_steps=STEPS)
    task = Task("Painted-v0", (3,), (1,), -np.ones(1), np.ones(1), STEPS)
    config = ActorConfig(
        actor=builders.popsan_config([6]),
        encoder=builders.POPULATION,
        neuron=builders.CUBA_LIF,
        decoder=builders.RATE,
    )
    folder = tmp_path / "run"
    folder.mkdir()
    Policy(task, config, build_actor(config, 3, 1), RunningNorm(3, 3.0)).save(folder)
    yield folder
    for kind in (Painted, Unpainted, Broken):
        del gym.registry[f"{kind.__name__}-v0"]


def evaluate(*args: str) -> Said:
    return spikerl("eval", "run=run", *args)


def pictures(path: Path) -> tuple[dict[str, Any], np.ndarray]:
    """A film's metadata and its pictures (T, H, W, 3)."""
    import imageio_ffmpeg

    reader = imageio_ffmpeg.read_frames(str(path))
    facts = next(reader)
    frames = [np.frombuffer(f, np.uint8).reshape(HEIGHT, WIDTH, 3) for f in reader]
    return facts, np.stack(frames)


def test_a_file_for_each_episode(run: Path) -> None:
    plain = json.loads(evaluate("episodes=12", "json=true").out)
    filmed = json.loads(evaluate("episodes=12", "json=true", "video=true").out)
    assert filmed.pop("videos") == [f"{run}/videos/seed0_episode{i}.mp4" for i in range(12)]
    assert filmed == plain
    assert sorted(os.listdir("run/videos")) == sorted(f"seed0_episode{i}.mp4" for i in range(12))
    facts, frames = pictures(Path("run/videos/seed0_episode11.mp4"))
    assert (facts["codec"], facts["fps"], facts["size"]) == ("h264", 10.0, (WIDTH, HEIGHT))
    brightness = frames.reshape(len(frames), -1).mean(1)
    np.testing.assert_allclose(brightness, 40.0 * np.arange(STEPS + 1), atol=4.0)


def test_a_stop_leaves_whole_films_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 12 episodes the first 10 run side by side; the stop comes during the other two."""
    looks = iter(range(1, 99))
    look = evaluator.StopWatch.look

    def striking(watch: evaluator.StopWatch) -> None:
        if next(looks) == STEPS + 3:
            signal.raise_signal(signal.SIGTERM)
        look(watch)

    monkeypatch.setattr(evaluator, "ASK_S", 0.0)
    monkeypatch.setattr(evaluator.StopWatch, "look", striking)
    said = evaluate("episodes=12", "video=true")
    assert (said.status, said.out) == (75, "")
    assert said.err == "spikerl: stopped on SIGTERM; the evaluation has no result\n"
    assert sorted(os.listdir("run/videos")) == sorted(f"seed0_episode{i}.mp4" for i in range(10))


def test_no_screen_is_looked_for() -> None:
    """Without a display nothing looks for one: C code would print an error."""
    program = (
        "import gymnasium as gym\n"
        "from spikerl.envs.video import check_video\n"
        "check_video(gym.make('Pendulum-v1'))\n"
    )
    screens = ("DISPLAY", "WAYLAND_DISPLAY", "XDG_RUNTIME_DIR", "SDL_VIDEODRIVER")
    environ = {name: value for name, value in os.environ.items() if name not in screens}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environ, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_what_is_said() -> None:
    said = evaluate("episodes=2", "seed=3", "video=true")
    assert "videos: run/videos/seed3_episode0.mp4 to seed3_episode1.mp4" in said.out
    assert "videos" not in evaluate("episodes=1").out


def test_films_of_other_episodes_have_other_names(run: Path) -> None:
    assert evaluate("episodes=1", "video=true").status == 0
    said = evaluate("episodes=1", "video=true", "env_id=Painted-v0")
    assert "videos: run/videos/seed0_episode0_Painted-v0.mp4\n" in said.out
    assert len(os.listdir(run / "videos")) == 2
    request = EvalRequest(
        run="r", policy="best", episodes=2, seed=3, env_id="ALE/Pong-v5", video="spikes",
        target_return=-21.0, ops=False, json=False, device="cpu", sha256=None, plugins=[],
    )  # fmt: skip
    assert film_names(request) == [
        f"best_seed3_episode{i}_ALE%2FPong-v5_return-21_spikes.mp4" for i in (0, 1)
    ]
    request.target_return = 1234567.5  # the name has every digit
    assert "_return1234567.5_" in film_names(request)[0]


def test_spikes_are_drawn_in() -> None:
    plain = json.loads(evaluate("episodes=1", "json=true", "video=true").out)
    before = pictures(Path("run/videos/seed0_episode0.mp4"))[1]
    drawn = json.loads(evaluate("episodes=1", "json=true", "video=spikes").out)
    after = pictures(Path("run/videos/seed0_episode0_spikes.mp4"))[1]
    assert drawn.pop("videos") == [
        name.replace(".mp4", "_spikes.mp4") for name in plain.pop("videos")
    ]
    assert drawn == plain
    changed = np.abs(after.astype(int) - before.astype(int)).max(-1) > 60
    rows, columns = np.nonzero(changed.any(0))
    assert rows.max() < 5 * video.ROW
    assert columns.max() < video.BAR + 120


def test_bars_are_as_long_as_layers_fire() -> None:
    picture = np.full((HEIGHT, WIDTH, 3), 200, np.uint8)
    image = video.annotated(picture, 12.5, [None, 0.5, 1.0])
    orange = (image == (255, 160, 0)).all(-1)
    lengths = [orange[video.ROW * (i + 1) + 6].sum() for i in range(3)]
    assert lengths == [0, video.BAR // 2 + 1, video.BAR + 1]
    np.testing.assert_array_equal(image[100:], picture[100:])


def test_an_episode_that_fails_leaves_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Painted, action: np.ndarray) -> Any:
        raise RuntimeError("a motor burnt")

    monkeypatch.setattr(Painted, "step", fails)
    said = evaluate("episodes=1", "video=true")
    assert said.status == 1
    assert os.listdir("run/videos") == []


def test_a_film_that_the_disk_did_not_take_is_none() -> None:
    """Files are limited to 1 KiB, so ffmpeg fails; closing its input alone would not show that."""
    unlimited = resource.RLIM_INFINITY
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 10, unlimited))
    try:
        said = evaluate("episodes=1", "video=true")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited, unlimited))
        signal.signal(signal.SIGXFSZ, handler)
    assert said.status == 1
    assert said.err.startswith(f"spikerl: evaluation, step {STEPS}: Painted-v0 was not filmed: ")
    assert os.listdir("run/videos") == []


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["video=maybe"], "video=maybe: give true, false or spikes"),
        (["video=true", "env_id=Unpainted-v0"], "video=true: Unpainted-v0 draws no pictures"),
        (["video=true", "env_id=Broken-v0"],
         "video=true: Broken-v0 cannot be drawn here: libpaint.so: no such file"),
    ],
)  # fmt: skip
def test_refused(args: list[str], line: str) -> None:
    assert evaluate(*args).line == line
    assert not Path("run/videos").exists()


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "find_spec", lambda name: None)
    line = evaluate("video=true").line
    assert line == "video=true: imageio-ffmpeg is missing; pip install 'spikerl[video]'"


# --- who draws ----------------------------------------------------------------------------------


def test_the_first_that_works_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(video, "why_not", {"egl": "no device", "osmesa": None}.get)
    monkeypatch.setenv("MUJOCO_GL", "")  # so that monkeypatch restores it
    assert video.choose_backend() == "osmesa"
    assert os.environ["MUJOCO_GL"] == "osmesa"


def test_nobody_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "")
    monkeypatch.setattr(video, "why_not", {"egl": "no device", "osmesa": "no library"}.get)
    assert str(refusal(video.choose_backend)) == (
        "video=true: nothing draws without a screen here (egl: no device; Debian's package is"
        " libegl1. osmesa: no library; Debian's package is libosmesa6)"
    )
    monkeypatch.setenv("MUJOCO_GL", "egl")  # a named choice is not changed
    assert str(refusal(video.choose_backend)) == (
        "video=true: nothing draws without a screen here (egl: no device; Debian's package is"
        " libegl1)"
    )


def test_a_backend_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "PROBE", "raise ImportError('no lib{0}')")
    assert video.why_not("egl") == "ImportError: no libegl"
    monkeypatch.setattr(video, "PROBE", "pass")
    assert video.why_not("egl") is None
    assert video.why_not("metal") == "MUJOCO_GL is metal, which is none of egl, osmesa"


def test_mujoco() -> None:
    """Runs in its own process, so that the libraries that EGL loads stay out of the tests'."""
    program = """
import gymnasium, numpy
from spikerl.envs.config import EnvConfig
from spikerl.envs.make import make_env
from spikerl.envs import video
name = dict(name="InvertedPendulum", version="v5", id="InvertedPendulum-v5")
env = make_env(EnvConfig(**name, max_episode_steps=None, vectorizer="sync"))
video.check_video(env)
first = env.render()
env.step(numpy.ones(1))
print(first.shape, (first != env.render()).any())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    if "nothing draws without a screen here" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.stdout == "(480, 480, 3) True\n", done.stderr


def test_firing_is_of_what_the_policy_sees() -> None:
    """Around 1e9 a float32 has steps of 64, so the policy normalises observations in float64; the
    rates in a video must be of the same numbers.
    """
    task = Task("Nowhere-v0", (3,), (1,), np.full(1, -1.0), np.full(1, 1.0), 9)
    config, norm = builders.spiking(builders.POPULATION), RunningNorm(3, 3.0)
    obs = 1e9 + np.random.default_rng(0).normal(0.0, 1.0, (100, 3))
    norm.add(obs)
    norm.merge([norm.collect()])
    torch.manual_seed(0)
    policy = Policy(task, config, build_actor(config, 3, 1), norm)
    rates = video.rates_of(policy)
    generator = torch.Generator().manual_seed(0)
    for one in obs[:5]:
        seen = torch.from_numpy((one[None] - norm.mean_O) / np.sqrt(norm.var_O)).float()
        activity = policy.activity(seen.clamp(-3.0, 3.0), generator)
        assert activity is not None
        assert rates(one) == activity.layers
