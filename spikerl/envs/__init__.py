"""Environments: vectors of them with true successors, and their exact state."""

import os

from spikerl.errors import BadRequest

try:
    import mujoco  # noqa: F401
except RuntimeError:  # raised only for a bad value of MUJOCO_GL
    remedy = "MuJoCo takes egl, osmesa or glfw; give one of them, or unset it"
    raise BadRequest("MUJOCO_GL", os.environ.get("MUJOCO_GL"), remedy) from None
