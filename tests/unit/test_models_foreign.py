"""Policies of other programs act as their equations say; other files are refused.

Shape legend   B batch, O observation entries, A action entries, P neurons of one population.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from omegaconf import OmegaConf
from shell import Said, spikerl

from spikerl import load_policy
from spikerl.errors import BadRequest
from spikerl.models.foreign import recognise

Weights = dict[str, np.ndarray]
OBS, ACT, ENCODER, DECODER, HIDDEN = 3, 1, 4, 3, [8, 7]  # for Pendulum, with the action bound 2
HOPPER = 11, 3
MEAN, VAR = np.array([0.5, -0.5, 1.0]), np.array([0.4, 0.6, 9.0])


def spiking(seed: int, obs: int = OBS, act: int = ACT, encoder: int = ENCODER) -> Weights:
    """A state dict as PopSAN's code saves it; its layers fire often, though not always."""
    draw = np.random.default_rng(seed)
    widths = [obs * encoder or obs, *HIDDEN, act * DECODER]
    names = ["snn.hidden_layers.0", "snn.hidden_layers.1", "snn.out_pop_layer"]
    weights: Weights = {
        "decoder.decoder.weight": draw.normal(size=(act, 1, DECODER)) / 5,
        "decoder.decoder.bias": draw.normal(size=act) / 50,
    }
    if encoder:
        weights["encoder.mean"] = draw.uniform(-3, 3, (1, obs, encoder))
        weights["encoder.std"] = draw.uniform(0.3, 1.5, (1, obs, encoder))
    for name, i, n in zip(names, widths[:-1], widths[1:], strict=True):
        weights[f"{name}.weight"] = draw.normal(size=(n, i)) / np.sqrt(i)
        weights[f"{name}.bias"] = draw.normal(size=n) / 5
    return {name: w.astype(np.float32).astype(np.float64) for name, w in weights.items()}


def connected(weights: Weights, kind: str, act: int = ACT) -> Weights:
    """The weights with those that ILC-SAN's code adds for one of its --connections."""
    draw = np.random.default_rng(7)
    population = act * DECODER
    conv = draw.normal(size=(population, 1, DECODER)).astype(np.float32).astype(np.float64)
    if kind in ("no-self", "lateral"):  # its forward pass sets these to 0
        for a in range(act):
            for j in range(DECODER):
                conv[a * DECODER + j, 0, j] = 0.0
    one = draw.normal(size=population).astype(np.float32).astype(np.float64)
    two = (draw.normal(size=population) / 4).astype(np.float32).astype(np.float64)
    added = {
        "intra": {"snn.conn.weight": conv, "snn.conn.bias": two},
        "no-self": {"snn.conn.weight": conv, "snn.conn.bias": two},
        "no-bias": {"snn.conn.weight": conv},
        "lateral": {"snn.conn.weight": conv},
        "no-lateral": {"snn.weight": one, "snn.bias": two},
        "self": {"snn.weight": one},
        "bias": {"snn.bias": two},
        "none": {},
    }
    return weights | added[kind]


def within(weights: Weights, fired: np.ndarray) -> np.ndarray:
    """Currents of output neurons from the spikes of their own populations, in plain loops."""
    got = np.zeros_like(fired)
    for neuron in range(fired.shape[1]):
        first = neuron // DECODER * DECODER
        if "snn.conn.weight" in weights:
            for j in range(DECODER):
                got[:, neuron] += weights["snn.conn.weight"][neuron, 0, j] * fired[:, first + j]
        if "snn.weight" in weights:
            got[:, neuron] += weights["snn.weight"][neuron] * fired[:, neuron]
    return got + weights.get("snn.conn.bias", 0.0) + weights.get("snn.bias", 0.0)


def act_by_hand(
    weights: Weights, seen: np.ndarray, read: str = "rate", encode: str = "spikes"
) -> tuple[np.ndarray, np.ndarray]:
    """Unbounded mean actions in float64 for normalised observations `seen`; and, for each row, the
    smallest distance of any membrane from its threshold.
    """
    drive = seen
    if "encoder.mean" in weights:
        distance = seen[:, :, None] - weights["encoder.mean"]
        drive = np.exp(-0.5 * distance**2 / weights["encoder.std"] ** 2).reshape(len(seen), -1)
    names = ["snn.hidden_layers.0", "snn.hidden_layers.1", "snn.out_pop_layer"]
    state = {n: [np.zeros((len(seen), len(weights[f"{n}.bias"])))] * 3 for n in names}
    potential, rate, membrane = np.zeros_like(drive), 0.0, 0.0
    kernel, bias = weights["decoder.decoder.weight"][:, 0], weights["decoder.decoder.bias"]
    margin, history = np.full(len(seen), np.inf), []
    for _ in range(5):
        x = drive
        if encode == "spikes":
            potential = potential + drive
            margin = np.minimum(margin, np.abs(potential - 0.999).min(1))
            x = (potential > 0.999).astype(float)
            potential = potential - 0.999 * x
        for name in names:
            current, voltage, fired = state[name]
            current = 0.5 * current + x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]
            if name == "snn.out_pop_layer":
                current = current + within(weights, fired)
            voltage = 0.75 * voltage * (1 - fired) + current
            margin = np.minimum(margin, np.abs(voltage - 0.5).min(1))
            x = (voltage > 0.5).astype(float)
            state[name] = [current, voltage, x]
        spikes = x.reshape(len(seen), *kernel.shape)
        rate = rate + (spikes * kernel).sum(-1) / 5
        membrane = membrane + (spikes * kernel).sum(-1) + bias
        history.append(membrane)
    if read == "rate":
        return np.tanh(rate + bias), margin
    if read == "last":
        return np.tanh(membrane), margin
    return np.tanh(np.mean(history, 0)), margin


def save(weights: Weights, name: str = "m.pt", dtype: torch.dtype = torch.float32) -> None:
    torch.save({k: torch.from_numpy(w.copy()).to(dtype) for k, w in weights.items()}, name)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("s.p").write_bytes(pickle.dumps([MEAN, VAR]))
    return tmp_path


def bring(*args: str) -> Said:
    said = spikerl("import", "run_dir=run", *args)
    assert (said.status, said.err) == (0, ""), said
    return said


def some_obs(obs: int = OBS) -> np.ndarray:
    return np.random.default_rng(3).normal(size=(1500, obs)) * 2.0


def normalised(obs: np.ndarray, clip: float = 3.0) -> np.ndarray:
    return np.clip((obs - MEAN) / np.sqrt(VAR + np.finfo(np.float32).eps), -clip, clip)


def agree(wanted: np.ndarray, margin: np.ndarray, obs: np.ndarray, bound: float) -> None:
    clear = margin > 1e-5
    assert clear.mean() > 0.9
    assert wanted[clear].std(0).max() > 0.01, "the test's policy should not be constant"
    got = load_policy("run")(obs)
    np.testing.assert_allclose(got[clear], bound * wanted[clear], rtol=0, atol=1e-5 * bound)


# --- PopSAN's ---------------------------------------------------------------------------------


def test_sac(folder: Path) -> None:
    """The deterministic action is the tanh of the spiking network's output, without deviations."""
    weights = spiking(0)
    layers = {
        "log_std_network.0.weight": np.ones((8, 3)), "log_std_network.0.bias": np.ones(8),
        "log_std_network.2.weight": np.ones((7, 8)), "log_std_network.2.bias": np.ones(7),
        "log_std_network.4.weight": np.ones((1, 7)), "log_std_network.4.bias": np.ones(1),
    }  # fmt: skip
    save(weights | layers)
    bring("popsan=m.pt", "stats=s.p", "env=Pendulum")
    wanted, margin = act_by_hand(weights, normalised(some_obs()))
    agree(wanted, margin, some_obs(), 2.0)


def test_ppo(folder: Path) -> None:
    """PopSAN's PPO never updates its statistics, does not clip observations nor scale actions."""
    weights = spiking(1, *HOPPER)
    save(weights | {"log_std": np.full(3, -0.5)})
    said = bring("popsan=m.pt", "env=Hopper")
    assert said.out == (
        "Hopper-v5: [8, 7] hidden, populations 4 and 3; observations are not normalised;"
        " run folder: run\n"
    )
    obs = some_obs(HOPPER[0]) * 2.5  # a normaliser would clip many
    wanted, margin = act_by_hand(weights, obs.astype(np.float32).astype(np.float64))
    agree(wanted, margin, obs, 1.0)
    config = OmegaConf.load("run/config.yaml")
    assert (config.algo.norm_clip, config.algo.norm_interval) == (None, None)
    save(spiking(1) | {"log_std": np.full(1, -0.5)})
    refused = spikerl("import", "popsan=m.pt", "env=Pendulum", "run_dir=other")
    assert refused.line == "env=Pendulum-v1: its code does not scale actions, whose bound here is" \
        " 2, not 1"  # fmt: skip


def test_without_clipping(folder: Path) -> None:
    weights = spiking(2)
    save(weights)
    bring("popsan=m.pt", "stats=s.p", "env=Pendulum", "algo.norm_clip=null")
    seen = normalised(some_obs(), np.inf)
    assert (np.abs(seen) > 3.0).any()
    wanted, margin = act_by_hand(weights, seen)
    agree(wanted, margin, some_obs(), 2.0)


def test_without_statistics(folder: Path) -> None:
    """Without statistics the import is refused, unless stats=none says that there are none."""
    weights = spiking(3)
    save(weights)
    refused = spikerl("import", "popsan=m.pt", "env=Pendulum", "run_dir=run")
    assert refused.line == (
        "stats=null: such a policy sees normalised observations; give its MEAN_VAR.p, or stats=none"
    )
    bring("popsan=m.pt", "stats=none", "env=Pendulum")
    assert load_policy("run").norm.count == 0
    wanted, margin = act_by_hand(weights, some_obs().astype(np.float32).astype(np.float64))
    agree(wanted, margin, some_obs(), 2.0)
    manifest = json.loads(Path("run/manifest.json").read_text())
    assert manifest["imported_from"] == ["m.pt"]


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("order", ["C", "F"])
def test_statistics_of_every_protocol(protocol: int, order: Any, folder: Path) -> None:
    """All protocols of pickle can be read; the fifth is the default of Python 3.14."""
    from spikerl.models.foreign import read_stats

    big = np.array([1.5, -2.0, 3.0], ">f8")
    for arrays in ([MEAN, VAR], [MEAN.astype("f4"), VAR], [big, VAR]):
        laid = [np.array(a, order=order) for a in arrays]
        Path("s.p").write_bytes(pickle.dumps(laid, protocol=protocol))
        mean, var = read_stats(Path("s.p"))
        np.testing.assert_array_equal(mean, arrays[0])
        np.testing.assert_array_equal(var, arrays[1])


class Frombuffer:
    """An object whose pickle calls numpy's _frombuffer with these arguments."""

    def __init__(self, *args: object) -> None:
        self.args = args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return np._core.numeric._frombuffer, self.args  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "args",
    [
        ("a file", np.dtype("f8"), (1,), "C"),
        (b"12345678", np.dtype("f8"), (1 << 60,), "C"),
        (b"12345678", "f8", (1,), "C"),
        (b"12345678", np.dtype("f8"), (1,), "Z"),
        (b"1234567", np.dtype("f8"), (1,), "C"),
        (b"12345678", np.dtype("V8"), (1,), "C"),
    ],
)
def test_hostile_buffers(args: tuple[object, ...], folder: Path) -> None:
    from spikerl.models.foreign import read_stats

    Path("s.p").write_bytes(pickle.dumps([Frombuffer(*args), VAR], protocol=5))
    with pytest.raises(BadRequest, match=r"^stats=s\.p: cannot be read as two arrays"):
        read_stats(Path("s.p"))


# --- ILC-SAN's --------------------------------------------------------------------------------

KINDS = ["intra", "no-bias", "no-self", "no-lateral", "bias", "self", "lateral"]


@pytest.mark.parametrize("kind", KINDS)
def test_connections(kind: str, folder: Path) -> None:
    weights = connected(spiking(4, *HOPPER), kind, act=3)
    save(weights)
    mean, var = np.zeros(11), np.full(11, 2.0)
    Path("s.p").write_bytes(pickle.dumps([mean, var]))
    bring("popsan=m.pt", "stats=s.p", "env=Hopper", "decoder=ilc")
    obs = some_obs(11)
    seen = np.clip(obs / np.sqrt(2.0 + np.finfo(np.float32).eps), -3, 3)
    wanted, margin = act_by_hand(weights, seen, "last")
    assert not np.allclose(wanted, act_by_hand(spiking(4, *HOPPER), seen, "last")[0])
    agree(wanted, margin, obs, 1.0)


@pytest.mark.parametrize(
    ("read", "args"),
    [
        ("mean", ["decoder=ilc", "decoder.read=mean"]),
        ("rate", ["decoder=ilc", "decoder.read=mean", "decoder.voltage_decay=0"]),  # "fr-mlp"
    ],
)
def test_what_is_read(read: str, args: list[str], folder: Path) -> None:
    weights = connected(spiking(5), "intra")
    save(weights)
    bring("popsan=m.pt", "stats=s.p", "env=Pendulum", *args)
    wanted, margin = act_by_hand(weights, normalised(some_obs()), read)
    agree(wanted, margin, some_obs(), 2.0)


@pytest.mark.parametrize("encode", ["analog", "direct"])
def test_other_encoders(encode: str, folder: Path) -> None:
    weights = connected(spiking(6, encoder=0 if encode == "direct" else ENCODER), "none")
    save(weights)
    bring("popsan=m.pt", "stats=s.p", "env=Pendulum", f"encoder={encode}", "decoder=membrane")
    wanted, margin = act_by_hand(weights, normalised(some_obs()), "last", "currents")
    agree(wanted, margin, some_obs(), 2.0)


# --- dense ------------------------------------------------------------------------------------


def dense(names: list[str], sizes: list[int]) -> Weights:
    draw = np.random.default_rng(8)
    weights = {}
    for name, i, n in zip(names, sizes[:-1], sizes[1:], strict=True):
        weights[f"{name}.weight"] = draw.normal(size=(n, i)) / np.sqrt(i)
        weights[f"{name}.bias"] = draw.normal(size=n) / 5
    return weights


BESIDE = {
    "neuron1.thre": np.ones(6), "neuron1.act_buffer": np.ones((1, 6)),
    "neuron2.thre": np.ones(5), "neuron2.act_buffer": np.ones((1, 5)),
    "fc_std.weight": np.ones((1, 5)), "fc_std.bias": np.ones(1),
}  # fmt: skip


@pytest.mark.parametrize("names", [["l1", "l2", "l3"], ["fc1", "fc2", "fc_mu"]], ids=lambda n: n[0])
def test_dense(names: list[str], folder: Path) -> None:
    weights = dense(names, [3, 6, 5, 1])
    save(weights | BESIDE)
    said = bring("dense=m.pt", "env=Pendulum", "actor.lr=0.002")
    assert said.out == (
        "Pendulum-v1: dense, [6, 5] hidden; observations are not normalised; run folder: run\n"
    )
    obs = some_obs() * 3.0
    x = obs
    for name in names[:-1]:
        x = np.maximum(x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"], 0.0)
    wanted = 2.0 * np.tanh(x @ weights[f"{names[-1]}.weight"].T + weights[f"{names[-1]}.bias"])
    np.testing.assert_allclose(load_policy("run")(obs), wanted, rtol=0, atol=1e-5)
    actor = OmegaConf.to_container(OmegaConf.load("run/config.yaml").actor)
    assert actor == {"name": "mlp", "hidden_sizes": [6, 5], "lr": 0.002}
    assert json.loads(Path("run/manifest.json").read_text())["algo"] is None


def test_a_dense_baseline_with_statistics(folder: Path) -> None:
    weights = dense(["pi.0", "pi.2", "pi.4"], [3, 6, 5, 1])
    save(weights)
    bring("dense=m.pt", "stats=s.p", "env=Pendulum")
    x = normalised(some_obs())
    for name in ("pi.0", "pi.2"):
        x = np.maximum(x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"], 0.0)
    wanted = 2.0 * np.tanh(x @ weights["pi.4.weight"].T + weights["pi.4.bias"])
    np.testing.assert_allclose(load_policy("run")(some_obs()), wanted, rtol=0, atol=1e-5)


def test_what_is_imported_goes_on(folder: Path) -> None:
    """An imported policy can be evaluated, converted to spikes, and trained further."""
    save(dense(["l1", "l2", "l3"], [3, 6, 5, 1]))
    said = spikerl("import", "dense=m.pt", "env=Pendulum")
    assert said.status == 0
    (run,) = Path("outputs/Pendulum/imported").iterdir()
    answer = json.loads(spikerl("eval", f"run={run}", "episodes=1", "json=true").out)
    assert (answer["lengths"], answer["firing_rate"]) == ([200], None)
    said = spikerl("convert", f"run={run}", "run_dir=spiking", "episodes=1")
    assert said.status == 0, said.err
    said = spikerl(
        "train", f"config={run}/config.yaml", f"init_from={run}", "run_dir=on", "total_steps=60",
        "steps_per_epoch=60", "eval_episodes=1", "threads=1", "energy=none",
        "env.max_episode_steps=20", "algo.critic_hidden_sizes=[8]",
    )  # fmt: skip
    assert said.status == 0, said.err
    before, first = (load_policy(p) for p in (run, "on/checkpoints/step_0000000000"))
    np.testing.assert_array_equal(before(some_obs()), first(some_obs()))
    assert load_policy("on").norm.count == 0


@pytest.mark.parametrize("command", ["convert run_dir=new", "eval", "export format=c"])
def test_paths_that_an_environment_is_given_are_confirmed(folder: Path, command: str) -> None:
    """A run from somebody else may pass any file to its environment, so env_id must confirm it."""
    save(dense(["l1", "l2", "l3"], [3, 6, 5, 1]))
    assert spikerl("import", "dense=m.pt", "env=Pendulum", "run_dir=run").status == 0
    policy, config = Path("run/policy.json"), Path("run/config.yaml")
    kwargs = {"file": "/etc/hosts"}
    policy.write_text(json.dumps({**json.loads(policy.read_text()), "env_kwargs": kwargs}))
    data = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump({**data, "env": {**data["env"], "kwargs": kwargs}}))
    line = spikerl(*command.split(), "run=run").line
    assert line.endswith("is given paths of files; confirm with env_id=Pendulum-v1")
    line = spikerl(*command.split(), "run=run", "env_id=Pendulum-v1").line
    assert "Pendulum-v1 cannot be made here" in line


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "args", "line"),
    [
        (spiking(0), ["dense=m.pt", "stats=s.p"],
         "dense=m.pt: is a [8, 7] hidden, populations 4 and 3 actor; give popsan=FILE"),
        (dense(["l1", "l2"], [3, 6, 1]), ["popsan=m.pt"],
         "popsan=m.pt: is a dense, [6] hidden actor; give dense=FILE"),
        (connected(spiking(0), "intra"), ["popsan=m.pt", "stats=s.p"],
         "decoder=rate: the file has the weights of ilc; give that"),
        (spiking(0), ["popsan=m.pt", "stats=s.p", "decoder=ilc"],
         "decoder=ilc: the file has the weights of rate or membrane; give that"),
        (spiking(0), ["popsan=m.pt", "stats=s.p", "decoder=linear"],
         "decoder=linear: the file has the weights of rate or membrane; give that"),
        (spiking(0), ["popsan=m.pt", "stats=s.p", "encoder=direct"],
         "encoder=direct: the file has the weights of population, poisson or analog; give that"),
        (spiking(0, encoder=0), ["popsan=m.pt", "stats=s.p"],
         "encoder=population: the file has the weights of direct; give that"),
        (spiking(0), ["popsan=m.pt", "dense=m.pt"],
         "popsan=m.pt: give popsan=MODEL.pt or dense=MODEL.pt, one of them"),
        ({}, [], "popsan=null: give popsan=MODEL.pt or dense=MODEL.pt, one of them"),
    ],
    ids=range(9),
)  # fmt: skip
def test_refused(weights: Weights, args: list[str], line: str, folder: Path) -> None:
    save(weights)
    said = spikerl("import", *args, "env=Pendulum", "run_dir=run")
    assert said.line == line
    assert not Path("run").exists()


@pytest.mark.parametrize(
    "weights",
    [
        dense(["l1"], [3, 1]),
        dense(["l1", "l2", "l3"], [3, 6, 5, 1]) | {"l2.weight": np.ones((5, 7))},
        dense(["l1", "l2", "l3"], [3, 6, 5, 1]) | {"other": np.ones(3)},
        dense(["fc1", "fc2"], [3, 6, 1]),
        dense(["l1", "l2", "l3"], [3, 6, 5, 1]) | {"l1.bias": np.full(6, np.nan)},
        spiking(0) | {"snn.conn.bias": np.ones(3)},
        spiking(0) | {"snn.conn.weight": np.ones((3, 1, 4))},
        spiking(0) | {"encoder.std": np.ones((1, 3, 5))},
        spiking(0) | {"encoder.std": np.zeros((1, 3, 4))},
        spiking(0) | {"snn.hidden_layers.0.bias": np.array(0.0)},
        dense(["l1", "l2", "l3"], [3, 6, 5, 1]) | {"l1.bias": np.array(0.0)},
        {"log_std": np.ones(1)},
        {},
    ],
    ids=range(13),
)
def test_foreign(weights: Weights) -> None:
    tensors = {name: torch.from_numpy(w) for name, w in weights.items()}
    with pytest.raises(
        BadRequest, match=r"^popsan=m\.pt: (is not an actor|holds values that|has a recept)"
    ):
        recognise(tensors, Path("m.pt"))
