"""Videos of episodes: one MP4 for each, rendered without a screen.

MuJoCo renders through OpenGL, which without a screen is provided by EGL or, in software, by OSMesa.
Rendering does not change an episode.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from spikerl.children import PYTHON
from spikerl.envs.checked import CheckedEnv
from spikerl.errors import BadRequest, EnvironmentFailed, first_line
from spikerl.files import make_folder
from spikerl.models.actor import SpikingActor
from spikerl.models.policy import Policy

BACKENDS = {"egl": "libegl1", "osmesa": "libosmesa6"}  # with Debian's package for each
PROBE = "from mujoco.{0} import GLContext as C; c = C(8, 8); c.make_current(); c.free()"
PATIENCE_S = 60.0
FRAMES_PER_S = 30  # if an environment does not specify it
BAR = 120  # length in pixels of the bar for a firing rate of 1
ROW = 16  # height in pixels of a line

Rates = Callable[[np.ndarray], list[float | None]]


def choose_backend() -> str:
    """Choose the backend that renders MuJoCo's frames, and put it into MUJOCO_GL."""
    asked = os.environ.get("MUJOCO_GL", "").lower()
    if asked == "glfw":  # on a screen
        return asked
    reasons = []
    for name in [asked] if asked else BACKENDS:
        reason = why_not(name)
        if reason is None:
            os.environ["MUJOCO_GL"] = name
            return name
        package = BACKENDS.get(name)
        hint = f"; Debian's package is {package}" if package else ""
        reasons.append(f"{name}: {reason}{hint}")
    remedy = "nothing draws without a screen here"
    raise BadRequest("video", "true", f"{remedy} ({'. '.join(reasons)})")


def why_not(name: str) -> str | None:
    """Why a backend does not work here, or None. Tried in a process of its own, because after a
    failure no other backend can be tried in the same process.
    """
    if name not in BACKENDS:
        return f"MUJOCO_GL is {name}, which is none of {', '.join(BACKENDS)}"
    command = [*PYTHON, "-c", PROBE.format(name)]
    variables = {**os.environ, "MUJOCO_GL": name, "PYOPENGL_PLATFORM": name}
    try:
        done = subprocess.run(
            command, env=variables, capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no answer in {PATIENCE_S:.0f} s"
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if line and line[0] != " "]
    return lines[-1][:200] if lines else f"ended with status {done.returncode}"


def check_video(env: CheckedEnv) -> None:
    """Raise BadRequest if the environment cannot be rendered, before an episode is run."""
    if find_spec("imageio_ffmpeg") is None:
        raise BadRequest("video", "true", "imageio-ffmpeg is missing; pip install 'spikerl[video]'")
    name = env.spec.id if env.spec else "this environment"
    if "rgb_array" not in env.metadata.get("render_modes", []):
        raise BadRequest("video", "true", f"{name} draws no pictures")
    if hasattr(env.unwrapped, "mujoco_renderer"):
        choose_backend()
    try:
        draws(env)
        env.reset(seed=0)
        picture = env.render()
    except Exception as error:  # a missing library or driver
        reason = first_line(error)
        raise BadRequest("video", "true", f"{name} cannot be drawn here: {reason}") from error
    if not isinstance(picture, np.ndarray) or picture.ndim != 3 or picture.shape[2] != 3:
        raise BadRequest("video", "true", f"{name} draws no pictures of red, green and blue")


def draws(env: CheckedEnv) -> None:
    """Make an environment render frames as arrays."""
    inner: Any = env.unwrapped
    inner.render_mode = "rgb_array"
    if not {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys():
        # SDL, with which Gymnasium's own tasks render through pygame, would print an error when it
        # finds no screen.
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")


def rates_of(policy: Policy) -> Rates:
    """A function from an observation to each layer's firing rate; empty for a dense policy."""

    def rates(obs: np.ndarray) -> list[float | None]:
        actor = policy.actor
        if not isinstance(actor, SpikingActor):
            return []
        # A generator of its own, so that filming does not change actions.
        generator = torch.Generator(policy.device).manual_seed(0)
        return actor.activity(policy.observe(obs[None]), generator).layers

    return rates


class Filmed(gym.Wrapper[np.ndarray, Any, Any, Any]):
    """An environment that films episodes to files, each of which is complete or absent."""

    def __init__(self, env: CheckedEnv, paths: Sequence[Path], rates: Rates | None) -> None:
        """`paths`: one for each of the first episodes; `rates`: also draw these and the return."""
        super().__init__(env)
        draws(env)
        self.paths, self.rates = list(paths), rates
        self.film: Any = None
        self.partial, self.total, self.pictures = Path(), 0.0, 0

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        result = self.env.reset(**kwargs)
        self.total = 0.0
        if self.paths:
            self.add(result[0])
        return result

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        obs, rew, terminated, truncated, info = self.env.step(action)
        self.total += float(rew)
        if self.paths:
            self.add(obs)
            if terminated or truncated:
                self.finish()
        return obs, float(rew), terminated, truncated, info

    def add(self, obs: np.ndarray) -> None:
        picture: Any = self.env.render()
        if self.rates is not None:
            picture = annotated(picture, self.total, self.rates(obs))
        if self.film is None:
            import imageio_ffmpeg

            path = self.paths[0]
            make_folder(path.parent)
            self.partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
            height, width, _ = picture.shape
            self.film = imageio_ffmpeg.write_frames(
                str(self.partial), (width, height), macro_block_size=2,
                fps=self.env.metadata.get("render_fps", FRAMES_PER_S),
                ffmpeg_log_level="error", output_params=["-f", "mp4"],
            )  # fmt: skip
            self.film.send(None)
            self.pictures = 0
        self.film.send(np.ascontiguousarray(picture))
        self.pictures += 1

    def finish(self) -> None:
        self.film.close()
        self.film = None
        path = self.paths.pop(0)
        if pictures_in(self.partial) != self.pictures:
            self.partial.unlink(missing_ok=True)
            raise EnvironmentFailed(f"was not filmed: {path} was cut as it was written, on a disk"
                                    " that is full or by who killed ffmpeg")  # fmt: skip
        os.replace(self.partial, path)

    def close(self) -> None:
        if self.film is not None:  # the episode did not end
            self.film.close()
            with suppress(OSError):
                self.partial.unlink()
        super().close()


def pictures_in(path: Path) -> int:
    """The number of frames in a file; the writer does not report a full disk."""
    import imageio_ffmpeg

    try:
        return int(imageio_ffmpeg.count_frames_and_secs(str(path))[0])
    except RuntimeError:
        return 0


def annotated(picture: np.ndarray, total: float, rates: Sequence[float | None]) -> np.ndarray:
    """Draw the return so far and a bar for each layer's firing rate; layer 0 is the encoder."""
    from PIL import Image, ImageDraw

    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, BAR + 110, ROW * (len(rates) + 1) + 4), fill=(0, 0, 0))
    draw.text((4, 2), f"return {total:.1f}", fill=(255, 255, 255))
    for layer, rate in enumerate(rates):
        top = ROW * (layer + 1) + 2
        shown = "currents" if rate is None else f"{rate:.3f}"
        draw.text((4, top), f"layer {layer} {shown}", fill=(255, 255, 255))
        draw.rectangle((100, top, 100 + BAR, top + ROW - 4), outline=(90, 90, 90))
        if rate:
            draw.rectangle((100, top, 100 + round(BAR * rate), top + ROW - 4), fill=(255, 160, 0))
    return np.asarray(image)
