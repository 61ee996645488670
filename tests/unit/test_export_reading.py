"""Evaluations of exported files, compared with those of the policy."""

from __future__ import annotations

import json
import shutil
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from exports import config, confirmed, exported, policy_of, saved, small, task
from shell import spikerl

from spikerl.errors import NonFinite
from spikerl.export import c, proof, reading
from spikerl.models.actor import SpikingActor
from spikerl.models.compression import Compression
from spikerl.snn.early_exit import EarlyExit
from spikerl.types import Entry, Task

onnx_package = import_module("onnx")
nir_package = import_module("nir")
h5py = import_module("h5py")

FORMATS = ["c", "onnx", "nir", "loihi"]


@pytest.mark.parametrize("format", FORMATS)
def test_it_is_evaluated_as_the_policy_is(format: str, tmp_path: Path) -> None:
    if format == "c" and not any(map(shutil.which, ("cc", "gcc", "clang"))):
        pytest.skip("no C compiler")
    run = saved(policy_of(config(), task(3, 1, "Pendulum-v1")), tmp_path / "run")
    file = small(tmp_path, format)
    answers = []
    for args in ([f"run={run}"], confirmed(file)):
        said = spikerl("eval", *args, "episodes=3", "json=true")
        assert said.status == 0, said
        answers.append(json.loads(said.out))
    policy, own = answers
    counted = [name for name in policy if name not in own]  # no operations of a file
    assert counted == ["macs", "acs", "modelled_45nm_nj", "modelled_memory_nj", "operations",
                       "modelled_energy", "modelled_memory"]  # fmt: skip
    assert list(own) == [name for name in policy if name not in counted]
    close = 0.02 if format == "loihi" else 1e-4
    assert own["returns"] == pytest.approx(policy["returns"], rel=close)
    assert own["lengths"] == [20, 20, 20]
    assert own["firing_rate"] == pytest.approx(policy["firing_rate"], rel=close)
    assert own["spike_steps"] == policy["spike_steps"] == 5.0
    assert own["trained_with"] == policy["versions"]
    text = spikerl("eval", *confirmed(file), "episodes=1").out.splitlines()
    assert text[0].startswith("episode 0  return -")
    assert text[1].startswith("Pendulum-v1: return -")
    assert text[2].startswith("firing rate 0.")
    assert text[2].count(",") == 3  # encoder and three layers


def test_encoders_that_fire_nothing_and_dense_ones(tmp_path: Path) -> None:
    from exports import DENSE, POLICIES

    file = small(tmp_path, "onnx", POLICIES["converted"])
    text = spikerl("eval", f"run={file}", "episodes=1").out.splitlines()
    assert text[2].startswith("firing rate 0.")
    assert "layers: -, 0." in text[2]
    facts = json.loads(spikerl("eval", f"run={file}", "episodes=1", "json=true").out)
    assert facts["spike_steps"] == 5.0
    (tmp_path / "dense").mkdir()
    file = small(tmp_path / "dense", "onnx", DENSE)
    assert len(spikerl("eval", f"run={file}", "episodes=1").out.splitlines()) == 2


@pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler")
def test_of_a_file_that_decides_early_no_firing_is_said(tmp_path: Path) -> None:
    """No firing rate is given, as the spike steps that are skipped would count as silent."""
    policy = policy_of(config(), task(3, 1, "Pendulum-v1"))
    assert isinstance(policy.actor, SpikingActor)
    early = policy.actor.early_exit = EarlyExit(threshold=0.3, steps=1)
    policy.compression = Compression(prune=None, bits={}, scales={}, early_exit=early)
    run, file = saved(policy, tmp_path / "run"), exported(policy, "c", tmp_path)
    answers = [
        json.loads(spikerl("eval", *args, "episodes=1", "json=true").out)
        for args in ([f"run={run}"], confirmed(file))
    ]
    assert answers[1]["returns"] == pytest.approx(answers[0]["returns"], rel=1e-4)
    assert 2.0 <= answers[0]["spike_steps"] < 5.0
    assert (answers[1]["firing_rate"], answers[1]["spike_steps"]) == (None, None)


def test_c_is_not_compiled_unless_its_checksum_is_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(args: object) -> None:
        raise AssertionError("it was compiled")

    monkeypatch.setattr(c, "compile_c", never)
    file = small(tmp_path, "c")
    digest = confirmed(file)[1]
    assert spikerl("eval", f"run={file}").line == (
        f"run={file}: C is compiled and runs as code of yours; if you trust who wrote it, confirm"
        f" with {digest}"
    )
    other = "0" * 64
    assert spikerl("eval", f"run={file}", f"sha256='{other}'").line == (
        f"sha256={other}: {file} has {digest.removeprefix('sha256=')}"
    )


def test_a_checksum_of_nothing(tmp_path: Path) -> None:
    run = saved(policy_of(config(), task()), tmp_path / "run")
    assert spikerl("eval", f"run={run}", "sha256=ab").line == (
        "sha256=ab: it is an exported file's, and run names none; leave it out"
    )


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("ops=true", "ops=true: operations are counted of a run folder's policy; give run=RUN"),
        ("video=true", "video=true: videos are put into a run folder; give run=RUN"),
        ("policy=best", "policy=best: an exported file holds one policy; leave it out"),
        ("device=cuda", "device=cuda: exported files run on the CPU; leave it out"),
        ("env_id=InvertedPendulum-v5", "env_id=InvertedPendulum-v5: its policy maps (3,) to (1,)"),
        ("sha256=12", "sha256=12: "),
    ],
)
def test_options_that_make_no_sense_for_a_file(typed: str, line: str, tmp_path: Path) -> None:
    assert spikerl("eval", f"run={small(tmp_path, 'loihi')}", typed).line.startswith(line)


def test_the_task_survives(tmp_path: Path) -> None:
    """A task with a layout of dictionary observations, arguments and another action dtype."""
    layout = (Entry(("a", 0), (2,)), Entry(("b",), (1,), -1))
    own = Task(
        "Pendulum-v1", (3,), (1, 1), np.array([-2.0]), np.array([1.0]), 7, "float16",
        layout=layout, env_kwargs={"g": 9.0}, env_wrappers=("one",),
    )  # fmt: skip
    read = reading.read(exported(policy_of(config(), own), "loihi", tmp_path)).task
    assert repr(read) == repr(own)


def test_the_content_that_was_checked_is_what_runs(tmp_path: Path) -> None:
    file = small(tmp_path, "loihi")
    before = reading.read(file)
    expected = before.policy().file.actions(np.ones((1, 3), np.float32))
    file.write_bytes(b"")
    assert before.policy().file.actions(np.ones((1, 3), np.float32)) == expected


def test_an_action_that_is_no_number() -> None:
    class Broken:
        def spikes(self, obs_BO: np.ndarray) -> list[np.ndarray]:
            return []

        def actions(self, obs_BO: np.ndarray) -> np.ndarray:
            return np.array([[np.nan]], np.float32)

    policy = proof.FilePolicy(task(3, 1), Broken())
    import torch

    with pytest.raises(NonFinite, match="the exported file gave an action"):
        policy.act(np.zeros((1, 3)), torch.Generator())
