"""Format `c`: one C99 file, `void policy(const float *obs, float *act)`.

Event-driven: a layer's drive is its bias plus the weight rows of the inputs that fired. Weights are
constants in the file, and neurons' states are static arrays, so nothing is allocated.

Shape legend   T spike steps, B observations, N neurons of a layer, O observation entries, A action
entries.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spikerl.errors import BadRequest, first_line
from spikerl.export.c_actor import DenseSource, SpikingSource, array, number
from spikerl.models.actor import MLPActor, SpikingActor
from spikerl.models.policy import Policy

FLAGS = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", "-O2"]
SECONDS = 600  # time limit for the compiler

HEAD = """\
/* The policy of {env_id}, written by spikerl.

   policy() maps {obs} raw observation entries to {act} action entries in the environment's units.
   {network}
   It allocates nothing and keeps nothing between calls, but works in static arrays: call it from
   one thread at a time. C99 with its standard library; compile with -lm. */

#include <math.h>
"""

# Sizes of the caller's arrays, and numbers of spike steps and neurons that POLICY_SPIKES reports.
SIZES = """
#define POLICY_OBS {obs}
#define POLICY_ACT {act}
#define POLICY_STEPS {steps}
#define POLICY_NEURONS {neurons}
"""

# A hook, called with the spikes of a layer at a spike step if it is defined before this file.
TRACE = """
#ifndef POLICY_SPIKES
#define POLICY_SPIKES(layer, step, spikes, n)
#endif
"""

# Functions by name; a file contains only those that it calls.
HELPERS = {
    "add": """
static void add(float *sum, const float *row, int n)
{
    int i;
    for (i = 0; i < n; i++) sum[i] += row[i];
}
""",
    "add_scaled": """
static void add_scaled(float *sum, float factor, const float *row, int n)
{
    int i;
    if (factor == 0.0f) return;
    for (i = 0; i < n; i++) sum[i] += factor * row[i];
}
""",
    "add_some": """
static void add_some(float *sum, const int *index, const float *value, int n)
{
    int i;
    for (i = 0; i < n; i++) sum[index[i]] += value[i];
}
""",
    "add_some_scaled": """
static void add_some_scaled(float *sum, float factor, const int *index, const float *value, int n)
{
    int i;
    if (factor == 0.0f) return;
    for (i = 0; i < n; i++) sum[index[i]] += factor * value[i];
}
""",
    "set": """
static void set(float *to, const float *from, int n)
{
    int i;
    for (i = 0; i < n; i++) to[i] = from[i];
}
""",
}


def check_here() -> None:
    """Raise BadRequest if there is no C compiler for the proof."""
    compiler()


def compiler() -> list[str]:
    said = os.environ.get("CC", "")
    try:
        named = shlex.split(said)
    except ValueError as error:  # an unclosed quotation
        remedy = f"CC={said}: {first_line(error).lower()}; give it a command"
        raise BadRequest("format", "c", remedy) from None
    for candidate in [named] if named else [["cc"], ["gcc"], ["clang"]]:
        if shutil.which(candidate[0]):
            return candidate
    wanted = named[0] if named else "cc, gcc or clang"
    remedy = f"its proof needs a C compiler ({wanted}); install one, or name it with CC=COMMAND"
    raise BadRequest("format", "c", remedy)


def write(policy: Policy, path: Path) -> None:
    path.write_text(source(policy), encoding="ascii")


def source(policy: Policy) -> str:
    task, actor = policy.task, policy.actor
    low, half_range, least, most = task.units
    mean, std = policy.norm.mean_std
    spiking = isinstance(actor, SpikingActor)
    network = f"{actor.spike_steps} spike steps." if isinstance(actor, SpikingActor) else "Dense."
    # The id may be untrusted: one that ended the C comment would continue as code.
    env_id = "".join(c for c in task.env_id if c.isascii() and (c.isalnum() or c in "-_.: "))
    head = HEAD.format(env_id=env_id, obs=task.obs_dim, act=task.act_dim, network=network)
    steps, neurons = size_of(actor)
    sizes = SIZES.format(obs=task.obs_dim, act=task.act_dim, steps=steps, neurons=neurons)
    parts = [head, sizes, TRACE if spiking else "", "\n"]
    parts += [array("norm_mean", mean), array("norm_std", std)]
    parts += [array("act_low", low, "double"), array("act_half_range", half_range, "double")]
    parts += [array("act_least", least), array("act_most", most)]
    body = [
        "int i;",
        f"for (i = 0; i < {task.obs_dim}; i++) {{",
        "    float z = (obs[i] - norm_mean[i]) / norm_std[i];",
        f"    z = z < {number(-policy.norm.clip)} ? {number(-policy.norm.clip)} : z;",
        f"    x[i] = z > {number(policy.norm.clip)} ? {number(policy.norm.clip)} : z;",
        "}",
    ]
    state = [f"static float x[{task.obs_dim}];\n", f"static float y[{task.act_dim}];\n"]
    writer = SpikingSource(actor) if isinstance(actor, SpikingActor) else DenseSource(actor)
    body += writer.body
    body += [
        f"for (i = 0; i < {task.act_dim}; i++) {{",
        "    float a = tanhf(y[i]);",
        "    a = (float)(act_low[i] + (double)(a + 1.0f) * act_half_range[i]);",
        "    a = a < act_least[i] ? act_least[i] : a;",
        "    act[i] = a > act_most[i] ? act_most[i] : a;",
        "}",
    ]
    text = "\n    ".join(body)
    signature = "void policy(const float *obs, float *act)"
    function = f"\n{signature};\n\n{signature}\n{{\n    {text}\n}}\n"
    helpers = [code for name, code in HELPERS.items() if f" {name}(" in function]
    return "".join([*parts, *writer.constants, "\n", *state, *writer.state, *helpers, function])


def size_of(actor: MLPActor | SpikingActor) -> tuple[int, int]:
    """Number of spike steps, and of neurons reported at each; zeros for a dense actor."""
    if not isinstance(actor, SpikingActor):
        return 0, 0
    encoder = actor.encoder.outputs if actor.encoder.spikes else 0
    return actor.spike_steps, encoder + sum(layer.bias_N.numel() for layer in actor.layers)


# C code that includes the exported file unchanged and runs it on many observations.
HARNESS = """\
#include <stddef.h>

static unsigned char *trace;

static void note(const unsigned char *spikes, int n)
{{
    int i;
    if (!trace) return;
    for (i = 0; i < n; i++) *trace++ = spikes[i];
}}

#define POLICY_SPIKES(layer, step, spikes, n) note(spikes, n)
#include "{file}"

#if POLICY_OBS != {obs} || POLICY_ACT != {act}
#error "the contract has other observations or actions"
#endif
#if POLICY_STEPS != {steps} || POLICY_NEURONS != {neurons}
#error "the contract has other spike steps or neurons"
#endif

void run(int count, const float *obs, float *act, unsigned char *spikes);

void run(int count, const float *obs, float *act, unsigned char *spikes)
{{
    int i;
    for (i = 0; i < count; i++) {{
        trace = spikes ? spikes + (size_t){trace} * (size_t)i : 0;
        policy(obs + {obs} * i, act + {act} * i);
    }}
    if (!trace) note(0, 0);
}}
"""


class Interpreter:
    """Compiles the file with the harness and calls it."""

    def __init__(self, path: Path, contract: dict[str, Any], scratch: Path) -> None:
        self.obs = int(np.prod(contract["obs_shape"]))
        self.act = int(np.prod(contract["act_shape"]))
        self.steps = contract.get("spike_steps", 0)
        sizes = contract["sizes"]
        self.sizes = list(sizes["layers"]) if self.steps else []
        if self.steps and contract["encoder"]["name"] in ("population", "tanh_population"):
            self.sizes.insert(0, sizes["encoder"])
        harness = scratch / "harness.c"
        sizes_of = {"obs": self.obs, "act": self.act, "steps": self.steps}
        neurons = sum(self.sizes)
        sizes_of |= {"neurons": neurons, "trace": self.steps * neurons}
        harness.write_text(HARNESS.format(file=path, **sizes_of))
        library = scratch / "harness.so"
        compile_c([str(harness), "-shared", "-fPIC", "-o", str(library), "-lm"])
        try:
            self.run = ctypes.CDLL(str(library)).run
        except OSError as error:
            said = f"what {compiler()[0]} made cannot be loaded: {first_line(error)}"
            remedy = "set CC to a compiler for this machine"
            remedy += ", TMPDIR to a folder that may hold programs"
            raise BadRequest("format", "c", f"{said}; {remedy}") from None
        self.run.restype = None

    def spikes(self, obs_BO: np.ndarray) -> list[np.ndarray]:
        rows = np.zeros((len(obs_BO), self.steps, sum(self.sizes)), np.uint8)
        self._call(obs_BO, rows)
        ends = np.cumsum(self.sizes)[:-1]
        return [part.astype(bool).swapaxes(0, 1) for part in np.split(rows, ends, axis=2)][
            : len(self.sizes)
        ]

    def actions(self, obs_BO: np.ndarray) -> np.ndarray:
        return self._call(obs_BO, None)

    def _call(self, obs_BO: np.ndarray, rows: np.ndarray | None) -> np.ndarray:
        obs = np.ascontiguousarray(obs_BO, np.float32)
        act = np.empty((len(obs), self.act), np.float32)
        pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (obs, act)]
        spikes = None if rows is None or not rows.size else rows.ctypes.data_as(ctypes.c_void_p)
        self.run(ctypes.c_int(len(obs)), *pointers, spikes)
        return act


def compile_c(args: Sequence[str]) -> None:
    command = [*compiler(), *FLAGS, *args]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        raise BadRequest("format", "c", f"{command[0]} cannot be run: {error}") from None
    if done.returncode:
        line = next((s for s in done.stderr.splitlines() if "error" in s), done.stderr[:200])
        said = line.strip() or f"status {done.returncode}"
        remedy = "set CC to a C99 compiler"
        raise BadRequest("format", "c", f"{command[0]} refused the file: {said}; {remedy}")
