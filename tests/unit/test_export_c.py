"""The C file: compiled with strict warnings, and compared with the policy."""

from __future__ import annotations

import errno
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import (
    POISSON,
    lif_config,
)
from exports import DIRECT, config, policy_of, saved, task
from exports import POLICIES as EVERYWHERE
from published import MODEL, STATS, needs_published_policy
from shell import refusal, spikerl

from spikerl.export import c, c_actor, contract, proof
from spikerl.models.actor import SpikingActor
from spikerl.models.compression import prune
from spikerl.models.policy import Policy
from spikerl.runs.policies import find_policy
from spikerl.snn.decoders import DecoderConfig
from spikerl.snn.early_exit import EarlyExit

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler"
)


def interpreter(policy: Policy, folder: Path) -> c.Interpreter:
    file = folder / "policy.c"
    c.write(policy, file)
    return c.Interpreter(file, contract.describe("c", policy, None), folder)


POLICIES = EVERYWHERE | {
    "one layer of converted networks": config(
        [7], encoder=DIRECT, neuron=lif_config(voltage_decay=1.0, reset="soft"),
        decoder=DecoderConfig(name="linear"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ["popsan", "converted", "plif mean", "alif last", "ilc max"])
def test_it_decides_as_early(name: str, tmp_path: Path) -> None:
    policy = policy_of(POLICIES[name], task())
    assert isinstance(policy.actor, SpikingActor)
    policy.actor.early_exit = EarlyExit(threshold=0.2, steps=1)
    file = interpreter(policy, tmp_path)
    proven = proof.prove(policy, file, None, 1, 0)
    assert proven["observations"] >= 1000
    recorded = proof.record(policy, None, 1, 0)
    # After the deciding step no spikes are recorded.
    steps = policy.actor.activity(policy.norm.normalize(torch.from_numpy(recorded.obs_BO)))
    assert 2.0 < steps.spike_steps < 4.9
    assert recorded.spikes[-1][4].any(1).mean() < 0.9
    policy.actor.early_exit = None
    with pytest.raises(proof.ProofFailed, match="first spike that differs"):
        proof.prove(policy, file, None, 1, 0)


@pytest.mark.parametrize("name", POLICIES)
def test_it_acts_as_the_policy(name: str, tmp_path: Path) -> None:
    policy = policy_of(POLICIES[name], task())
    proven = proof.prove(policy, interpreter(policy, tmp_path), None, 1, 0)
    assert proven["observations"] >= 1000
    rates = [layer.mean() for layer in proof.record(policy, None, 1, 0).spikes]
    assert all(0.01 < rate < 0.99 for rate in rates)
    steps, widths = 5, {"popsan": 30 + 12 + 9 + 20, "dense": 0}
    if name in widths:
        assert proven["spikes_compared"] == proven["observations"] * steps * widths[name]


@pytest.mark.parametrize("name", ["popsan", "converted", "learned", "dense"])
def test_weights_of_zero_are_left_out(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    """The actions are the same to the bit as with them, also if some inputs have no weight left."""
    policy = policy_of(POLICIES[name], task())
    prune(policy.actor, 0.8)
    with torch.no_grad():
        for layer in policy.actor.layers:
            layer.weight_IN[1] = 0.0
    obs = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    acts, sizes = [], []
    for share in (0.5, 0.0):
        monkeypatch.setattr(c_actor, "SPARSE", share)
        folder = tmp_path / str(share)
        folder.mkdir()
        acts.append(interpreter(policy, folder).actions(obs))
        text = (folder / "policy.c").read_text()
        sizes.append(sum(text.count(f"static const float weight{k}[") for k in range(3)))
        assert ("index1[" in text) == (share == 0.5)
    np.testing.assert_array_equal(acts[0], acts[1])
    assert len(np.unique(acts[0])) > 1
    assert sizes[0] == sizes[1] == len(policy.actor.layers)
    monkeypatch.undo()
    assert proof.prove(policy, interpreter(policy, tmp_path), None, 1, 0)["observations"] >= 1000


def test_by_hand(tmp_path: Path) -> None:
    """Drive 0.75 at each of 4 spike steps, no leak, threshold 1, soft reset."""
    parts = config(
        [1], encoder=DIRECT, neuron=lif_config(voltage_decay=1.0, threshold=1.0, reset="soft"),
        decoder=DecoderConfig(name="linear"),
    )  # fmt: skip
    parts.actor.spike_steps = 4  # type: ignore[union-attr]
    policy = policy_of(parts, task(1, 1))
    policy.norm.mean_std = torch.tensor([[1.0], [2.0]])
    weights = {"layers.0.weight_IN": 0.5, "layers.0.bias_N": 0.25}
    weights |= {"decoder.map.weight_IN": 2.0, "decoder.map.bias_N": -1.0}
    with torch.no_grad():
        for key, value in weights.items():
            policy.actor.get_parameter(key).fill_(value)
    file = interpreter(policy, tmp_path)
    obs = np.array([[3.0]], np.float32)  # normalised to 1
    # Voltages 0.75, 1.5 (0.5 left), 1.25 (0.25 left), and 1, which is not above the threshold.
    assert file.spikes(obs)[0].ravel().tolist() == [False, True, True, False]
    # rate 1/2: y = 2 * 0.5 - 1 = 0, the middle between the bounds -0.5 and 2
    assert file.actions(obs).tolist() == [[0.75]]


def test_a_dense_file_hides_no_nan(tmp_path: Path) -> None:
    """A NaN stays NaN, as in ONNX; with fmaxf for relu it would become an action."""
    file = interpreter(policy_of(POLICIES["dense"], task()), tmp_path)
    assert np.isnan(file.actions(np.array([[np.nan, 0.0, 0.0]], np.float32))).all()


def test_a_silent_input_adds_nothing(tmp_path: Path) -> None:
    """A NaN weight has no effect until its input fires."""
    policy = policy_of(config(), task())
    file = tmp_path / "policy.c"
    c.write(policy, file)
    text = file.read_text()
    start = text.index("weight1[")
    first = re.compile(r"(\{\n    )(-?[0-9.e-]+f)").search(text, start)
    assert first
    file.write_text(text[: first.start(2)] + "(0.0f / 0.0f)" + text[first.end(2) :])
    changed = c.Interpreter(file, contract.describe("c", policy, None), tmp_path)
    obs = proof.record(policy, None, 1, 0)
    fired = obs.spikes[1][:, :, 0].any(0)
    assert fired.any()
    assert not fired.all()
    same = [np.equal(a, b).all((0, 2)) for a, b in
            zip(changed.spikes(obs.obs_BO), obs.spikes, strict=True)]  # fmt: skip
    assert np.logical_and.reduce(same)[~fired].all()
    assert not same[2][fired].all()


@pytest.mark.parametrize(
    "value", [0.1, 1000.00006103515625, -3.4028235e38, 1e-45, 1.0, 16777216.0, 0.0]
)
def test_numbers_survive(value: float) -> None:
    text = c_actor.number(value)
    assert text.endswith("f")
    assert re.search(r"[.e]", text)
    assert np.float32(text[:-1]) == np.float32(value)


def test_it_stands_beside_other_code(tmp_path: Path) -> None:
    """Its names do not clash with those of the C library's headers."""
    beside = tmp_path / "robot.c"
    includes = ["math", "stdio", "stdlib", "string", "time", "unistd", "signal", "sys/socket"]
    lines = "".join(f"#include <{name}.h>\n" for name in includes)
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))))
    for name in POLICIES:
        text = c.source(policy_of(POLICIES[name], task()))
        beside.write_text(f"{lines}{text}")
        command = [compiler, "-fsyntax-only", "-Werror", str(beside)]
        said = subprocess.run(command, capture_output=True, text=True)
        assert said.returncode == 0, (name, said.stderr)


def test_an_id_stays_within_its_comment(tmp_path: Path) -> None:
    policy = policy_of(config(), task(env_id='X */ #error "run" \\'))
    assert c.source(policy).startswith("/* The policy of X  error run , written")


def test_export(tmp_path: Path) -> None:
    run = saved(policy_of(config(), task(3, 1, "Pendulum-v1", 200)), tmp_path / "run")
    said = spikerl("export", f"run={run}", "format=c", "episodes=8")
    assert said.status == 0, said
    file = run / "policy.c"
    data = json.loads((run / "policy.c.json").read_text())
    assert data["bytes"] == file.stat().st_size
    assert data["sizes"] == {"encoder": 30, "layers": [12, 9, 10]}
    assert data["proof"]["observations"] >= 1000
    assert data["proof"]["return_mean"] < 0
    assert "return of the file" in said.out
    assert sorted(path.name for path in run.iterdir()) == [
        "policy.c", "policy.c.json", "policy.json", "policy.safetensors",
    ]  # fmt: skip
    line = spikerl("export", f"run={run}", "format=c").line
    assert line == f"file={file}: it exists already; remove it, or give another file"


def test_another_export_was_quicker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job of a sweep that runs at the same time may write the file first."""
    run = saved(policy_of(config(), task()), tmp_path / "run")
    file, prove = run / "policy.c", proof.prove

    def meanwhile(*args: Any) -> dict[str, Any]:
        file.write_text("of the other")
        return prove(*args)

    monkeypatch.setattr(proof, "prove", meanwhile)
    line = spikerl("export", f"run={run}", "format=c", "episodes=1").line
    assert line == f"file={file}: it exists already; remove it, or give another file"
    assert file.read_text() == "of the other"
    assert not (run / "policy.c.json").exists()


@pytest.mark.parametrize(
    ("name", "beside"),
    [("policy", "policy.json"), ("best/policy", "policy.json"), ("error.txt", "error.txt.json")],
)
def test_a_run_keeps_its_names(name: str, beside: str, tmp_path: Path) -> None:
    """Names of the run's own files are refused, even those that do not exist yet."""
    run = tmp_path / "run"
    for folder in ("best", "checkpoints"):
        (run / folder).mkdir(parents=True)
    for own in ("config.yaml", "manifest.json"):
        (run / own).write_text("{}")
    saved(policy_of(config(), task()), run / "checkpoints/step_0000000001")
    line = spikerl("export", f"run={run}", "format=c", f"file={run / name}").line
    assert line == (
        f"file={run / name}: in a run folder, it or {beside} beside it may be taken for the run's"
        " own; give a name that ends in .c"
    )
    assert find_policy(run, key="run") == run / "checkpoints/step_0000000001"


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    run = saved(policy_of(config(), task()), tmp_path / "run")
    monkeypatch.setattr("spikerl.commands.export.write_atomic", full)
    line = spikerl("export", f"run={run}", "format=c").line
    assert line == f"file={run}/policy.c: No space left on device; nothing was kept"


def test_a_file_that_differs_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = saved(policy_of(config(), task()), tmp_path / "run")
    other = policy_of(config(neuron=lif_config()), task())
    monkeypatch.setattr(c, "source", lambda _, source=c.source: source(other))
    said = spikerl("export", f"run={run}", "format=c")
    assert said.status == 1
    assert re.fullmatch(
        r"spikerl: format=c: the file does not act as the policy, and is not kept: first spike"
        r" that differs: observation 0, spike step \d, layer [123] of 4, neuron \d+: the policy's"
        r" fires\n", said.err
    ), said.err  # fmt: skip
    assert not list(run.glob("policy.c*"))


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        (["format=tpu"], "format=tpu: give one of c, onnx, nir, loihi"),
        (["policy=step_3"], "policy=step_3: give last or best"),
        (["episodes=0"], "episodes=0: give at least 1"),
        (["file={run}/no/x.c"], "file={run}/no/x.c: {run}/no is not a folder that can be written"),
        (["run={run}/no"], "run={run}/no: no policy there"),
        (["env_id=Nowhere-v0"], "env_id=Nowhere-v0: Nowhere-v0 is not a registered environment"),
        (["env_id=Pendulum-v1"], "env_id=Pendulum-v1: its policy maps"),
    ],
)
def test_wrong_requests(typed: list[str], line: str, tmp_path: Path) -> None:
    run = saved(policy_of(config(), task()), tmp_path / "run")
    args = {"run": f"{run}", "format": "c"} | dict(
        arg.format(run=run).split("=", 1) for arg in typed
    )
    said = spikerl("export", *(f"{key}={value}" for key, value in args.items()))
    assert said.line.startswith(line.format(run=run))
    assert not list(run.glob("policy.c*"))


def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler -m32")
    assert str(refusal(c.check_here)) == (
        "format=c: its proof needs a C compiler (no-such-compiler); install one, or name it with"
        " CC=COMMAND"
    )


def test_a_compiler_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", 'cc "-m32')
    assert str(refusal(c.check_here)) == (
        'format=c: CC=cc "-m32: no closing quotation; give it a command'
    )


def test_a_compiler_for_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CC may be set to a cross compiler for a robot."""
    compiler = tmp_path / "cross-cc"
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho robot > "$2"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    run = saved(policy_of(config(), task()), tmp_path / "run")
    line = spikerl("export", f"run={run}", "format=c").line
    assert line.startswith(f"format=c: what {compiler} made cannot be loaded: ")
    assert line.endswith(
        "; set CC to a compiler for this machine, TMPDIR to a folder that may hold programs"
    )
    assert not list(run.glob("policy.c*"))


def test_a_poisson_encoder_is_refused(tmp_path: Path) -> None:
    run = saved(policy_of(config(encoder=POISSON), task()), tmp_path / "run")
    assert spikerl("export", f"run={run}", "format=c").line == (
        "format=c: cannot hold encoder=poisson: it draws its spikes, and the file has no random"
        " numbers"
    )


@needs_published_policy
@pytest.mark.parametrize("format", ["c", "onnx", "nir"])
def test_the_published_policy(format: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    args = [f"popsan={MODEL}", f"stats={STATS}", "env=HalfCheetah", f"run_dir={run}"]
    assert spikerl("import", *args).status == 0
    assert spikerl("export", f"run={run}", f"format={format}", "episodes=2").status == 0
    data = json.loads((run / f"policy.{format}.json").read_text())
    assert data["sizes"] == {"encoder": 170, "layers": [256, 256, 60]}
    assert data["proof"]["return_mean"] > 9000
