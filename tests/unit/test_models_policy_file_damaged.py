"""Damaged or hostile files of a policy raise only a BadRequest that names the folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import builders
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from spikerl import load_policy
from spikerl.errors import BadRequest
from spikerl.models.actor_config import ActorConfig
from spikerl.models.networks import build_actor
from spikerl.models.normalizer import RunningNorm
from spikerl.models.policy import Policy
from spikerl.types import Task

pytestmark = pytest.mark.usefixtures("little_memory")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder with the policy of an environment of 2 observation entries and 1 action."""
    config = ActorConfig(
        actor=builders.popsan_config([4]),
        encoder=builders.POPULATION,
        neuron=builders.CUBA_LIF,
        decoder=builders.RATE,
    )
    task = Task("Toy-v0", (2,), (1,), np.array([-1.0]), np.array([2.0]), 10)
    Policy(task, config, build_actor(config, 2, 1), RunningNorm(2, 3.0)).save(tmp_path)
    return tmp_path


def refused(run: Path) -> str:
    with pytest.raises(BadRequest) as error:
        load_policy(run)
    line = str(error.value)
    assert line.startswith(f"run={run}: ")
    assert "\n" not in line
    return line


def test_sound(run: Path) -> None:
    assert load_policy(run)(np.zeros(2)).shape == (1,)


def test_a_policy_outlives_its_files(run: Path) -> None:
    policy = load_policy(run)
    before = policy(np.ones(2))
    for name in ("policy.json", "policy.safetensors"):
        with (run / name).open("r+b") as f:
            f.truncate(0)
    assert policy(np.ones(2)) == before
    assert policy.norm.count == 0


@pytest.mark.parametrize("name", ["policy.json", "policy.safetensors"])
def test_a_pipe_or_a_device(run: Path, name: str) -> None:
    (run / name).unlink()
    os.mkfifo(run / name)
    refused(run)
    (run / name).unlink()
    (run / name).symlink_to("/dev/zero")
    refused(run)


def test_missing(run: Path) -> None:
    (run / "policy.safetensors").unlink()
    refused(run)
    (run / "policy.json").unlink()
    assert "give a run folder" in refused(run)
    assert "give a run folder" in refused(run / "nowhere")


@pytest.mark.parametrize("name", ["policy.json", "policy.safetensors"])
def test_truncated(run: Path, name: str) -> None:
    whole = (run / name).read_bytes()
    for cut in range(0, len(whole) - 2, len(whole) // 29):
        (run / name).write_bytes(whole[:cut])
        refused(run)


@pytest.mark.parametrize("name", ["policy.json", "policy.safetensors"])
def test_flipped(run: Path, name: str) -> None:
    """A file with a flipped bit is refused, or loads and acts, as after a flip in a weight."""
    whole = (run / name).read_bytes()
    places = {*range(0, min(len(whole), 900), 7), *range(0, len(whole), len(whole) // 50)}
    for place in sorted(places):
        for bit in (0, 6, 7):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            (run / name).write_bytes(damaged)
            try:
                policy = load_policy(run)
            except BadRequest:
                continue
            assert np.isfinite(policy(np.zeros(policy.task.obs_shape))).all()


@pytest.mark.parametrize("name", ["policy.json", "policy.safetensors"])
@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 100, b"{}", b"[]", b"null", b"3", b"\xff" * 100, b"PK\x03\x04" * 9,
     b"[" * 100_000, b'{"schema": ' + b"9" * 10_000 + b"}", b"\xff\xff\xff\xff\0\0\0\0{}"],
    ids=range(11),
)  # fmt: skip
def test_foreign(run: Path, name: str, content: bytes) -> None:
    (run / name).write_bytes(content)
    refused(run)


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


JSON: dict[str, Any] = {
    "schema": [1, 0, None, "1", [1]],
    "obs_shape": [None, 2, [3], [-1, -2], [0], [10**30], [2**31, 2**31], ["a"], [[2]], deep(900)],
    "act_shape": [None, [2], [-1], [10**12]],
    "act_low": [None, [2.0], [0.0, 0.0], [float("nan")], [float("-inf")], ["x"], deep(90)],
    "act_high": [None, [], [-5.0], [float("inf")]],
    "max_episode_steps": [None, 0, -1, 10**6 + 1, 10**18, float("inf"), "x", []],
    "norm_clip": [None, 0, -1.0, float("nan"), float("inf"), [3.0]],
    "versions": [[1], 3, "abc"],
    "actor": [None, 3, {}, {"name": "os.system"}, {"name": deep(900)}],
    "actor.hidden_sizes": [None, 4, [], [5], [10**13], [2**70], [-4], ["x"], [4, 4], deep(900)],
    "actor.spike_steps": [0, 10**9, None, "x"],
    "actor.lr": [float("nan"), -1, "${oc.env:HOME}"],
    "actor._target_": ["os.system"],
    "encoder": [None, {"name": "population"}],
    "encoder.pop_size": [0, 11, 10**12, 10**18, 2**70, 1.5],
    "encoder.mean_range": [[], [1.0], [float("nan"), 1.0], [3.0, -3.0]],
    "neuron.threshold": [0.0, float("inf"), None],
    "decoder.pop_size": [0, 11, 10**15, True, "x"],
}
CASES = [(k, v) for k, values in JSON.items() for v in values]


@pytest.mark.parametrize(("key", "value"), CASES, ids=lambda v: str(v)[:30])
def test_json(run: Path, key: str, value: Any) -> None:
    data = json.loads((run / "policy.json").read_text())
    *groups, last = key.split(".")
    place = data
    for group in groups:
        place = place[group]
    place[last] = value
    (run / "policy.json").write_text(json.dumps(data))
    refused(run)


def test_each_key_is_needed(run: Path) -> None:
    """No key has a default, not those of normaliser, action scaling, environment and versions."""
    data = json.loads((run / "policy.json").read_text())
    assert {"env_id", "act_low", "act_high", "norm_clip", "versions"} < data.keys()
    for key in data:
        (run / "policy.json").write_text(json.dumps({k: v for k, v in data.items() if k != key}))
        refused(run)
    (run / "policy.json").write_text(json.dumps({**data, "versions": {}}))
    refused(run)


def test_each_tensor_is_needed(run: Path) -> None:
    path = run / "policy.safetensors"
    tensors = load_file(path)
    assert {"norm.count", "norm.mean", "norm.var"} < tensors.keys()
    for name in tensors:
        save_file({k: t.clone() for k, t in tensors.items() if k != name}, path)
        refused(run)


Tensors = dict[str, torch.Tensor]
TENSORS: dict[str, Callable[[Tensors], Any]] = {
    "no normaliser": lambda t: [t.pop(k) for k in list(t) if k.startswith("norm.")],
    "no mean": lambda t: t.pop("norm.mean"),
    "short mean": lambda t: t.update({"norm.mean": torch.zeros(1, dtype=torch.float64)}),
    "half mean": lambda t: t.update({"norm.mean": torch.zeros(2, dtype=torch.bfloat16)}),
    "nan mean": lambda t: t["norm.mean"].fill_(torch.nan),
    "negative variance": lambda t: t["norm.var"].fill_(-1.0),
    "negative count": lambda t: t["norm.count"].fill_(-1),
    "no layer": lambda t: t.pop("actor.layers.0.weight_IN"),
    "another layer": lambda t: t.update({"actor.layers.2.weight_IN": torch.zeros(2, 2)}),
    "wide layer": lambda t: t.update({"actor.layers.0.weight_IN": torch.zeros(5, 20)}),
    "double layer": lambda t: t.update({"actor.decoder.bias_A": torch.zeros(1).double()}),
    "nan weight": lambda t: t["actor.layers.0.weight_IN"].fill_(torch.nan),
    "infinite weight": lambda t: t["actor.decoder.bias_A"].fill_(torch.inf),
    "foreign": lambda t: t.update({"x": torch.zeros(2)}),
    "strange type": lambda t: t.update({"x": torch.zeros(2).to(torch.float8_e4m3fn)}),
    "nothing": lambda t: t.clear(),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors(run: Path, name: str) -> None:
    path = run / "policy.safetensors"
    tensors = {k: v.clone() for k, v in load_file(path).items()}
    TENSORS[name](tensors)
    save_file(tensors, path)
    refused(run)


@pytest.mark.parametrize("obs", [np.zeros(3), np.zeros((2, 3)), np.zeros(()), np.full(2, np.nan)])
def test_observations_that_do_not_fit(run: Path, obs: np.ndarray) -> None:
    with pytest.raises(ValueError, match="obs "):
        load_policy(run)(obs)
