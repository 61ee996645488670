"""Exported files that are damaged, or not what their contract describes: refused in one line."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exports import config, confirmed, population, rewritten, small, task
from safetensors.numpy import load_file
from safetensors.numpy import save as tensor_bytes
from shell import refusal, spikerl

from spikerl.export import nir, onnx, reading

onnx_package = import_module("onnx")
nir_package = import_module("nir")
h5py = import_module("h5py")

FORMATS = ["c", "onnx", "nir", "loihi"]
WITHOUT_CODE = [format for format in FORMATS if format != "c"]


@pytest.mark.parametrize("format", FORMATS)
def test_another_file_than_the_contract_describes(format: str, tmp_path: Path) -> None:
    file = small(tmp_path, format)
    with file.open("r+b") as f:
        f.seek(-3, 2)
        f.write(b"x")
    line = f"run={file}: is not the file that policy.{format}.json describes: its sha256 differs"
    assert str(refusal(reading.read, file)) == line


@pytest.mark.parametrize("format", WITHOUT_CODE)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.98])
def test_a_truncated_file(format: str, share: float, tmp_path: Path) -> None:
    file = small(tmp_path, format)
    content = file.read_bytes()
    rewritten(file, content[: int(share * len(content))])
    line = str(refusal(lambda: reading.read(file).policy()))
    assert line.startswith(f"run={file}: cannot be read: ")
    assert "\n" not in line


def test_a_truncated_c_file(tmp_path: Path) -> None:
    file = small(tmp_path, "c")
    rewritten(file, file.read_bytes()[:5000])
    assert " refused the file: " in spikerl("eval", *confirmed(file)).line


def test_no_contract(tmp_path: Path) -> None:
    file = small(tmp_path, "loihi")
    beside = tmp_path / "policy.loihi.json"
    beside.write_text('{"schema": ')
    assert "cannot be read: Expecting value" in str(refusal(reading.read, file))
    beside.write_text("[]")
    assert "has schema None, this version reads 2" in str(refusal(reading.read, file))
    beside.unlink()
    assert spikerl("eval", f"run={file}").line == (
        f"run={file}: is not a run folder, and no exported file: policy.loihi.json is not beside it"
    )


WRONG: dict[str, list[Any]] = {
    "schema": [None, 1, "2"],
    "format": [None, "tpu", ["c"]],
    "env_id": ["a\nb"],
    "obs_shape": [None, [4], [0], [3, 10**9], "x"],
    "act_shape": [None, [2], [-1]],
    "act_low": [None, [0.0, 1.0], [10.0]],
    "max_episode_steps": [None, 0, 10**9],
    "normalizer": [None, {}, {"mean": [0, 0, 0], "std": [1, 0, 1], "clip": 3.0}],
    "action": [None, {}, []],
    "spike_steps": [0, 10**6, "5", 4],
    "sizes": [None, {}, {"encoder": 30, "layers": [10**12]}, {"encoder": 30, "layers": []}],
    "encoder": [None, {"name": "other"}, {"name": "population", "threshold": 1.0}],
    "decoder": [None, {"name": "linear"}, {"name": "rate", "weight": [[1.0]], "bias": [0.0, 0.0]}],
    "neuron": [None],
    "trained_with": [None, [1], {"a": "b\n"}],
    "env_kwargs": [[]],
    "obs_layout": [[1], [{"path": ["a"], "shape": [2], "start": None}]],
}


def test_a_contract_with_discrete_actions(tmp_path: Path) -> None:
    file = small(tmp_path, "loihi")
    rewritten(file, act_choices=[0, 2], act_shape=[], act_low=[], act_high=[])
    assert "garbles act_choices, which no exported file has" in str(refusal(reading.read, file))


@pytest.mark.parametrize("key", WRONG)
def test_a_contract_that_does_not_fit(key: str, tmp_path: Path) -> None:
    file = small(tmp_path, "loihi")
    reading.read(file).policy()
    sound = (tmp_path / "policy.loihi.json").read_text()
    for value in WRONG[key]:
        rewritten(file, **{key: value})
        error = refusal(lambda: reading.read(file).policy())
        assert error.args[:2] == ("run", file)
        assert "\n" not in str(error)
        (tmp_path / "policy.loihi.json").write_text(sound)
    data = json.loads(sound)
    if key not in ("env_kwargs", "obs_layout"):
        del data[key]
        (tmp_path / "policy.loihi.json").write_text(json.dumps(data))
        refusal(lambda: reading.read(file).policy())


@pytest.mark.parametrize(
    ("group", "key", "value", "line"),
    [
        ("normalizer", "mean", [0.0, None, 0.0], "garbles mean, which is not finite"),
        ("decoder", "bias", ["nan", 0.0], "bias, which is not finite"),
        ("encoder", "std", 0.0, "encoder.std"),
        ("decoder", "name", "mean", "decoder.name"),
        ("sizes", "layers", 3, "garbles a value, which is of another kind than its key says"),
    ],
)
def test_numbers_that_nothing_can_act_by(
    group: str, key: str, value: Any, line: str, tmp_path: Path
) -> None:
    file = small(tmp_path, "loihi")
    part = json.loads((tmp_path / "policy.loihi.json").read_text())[group]
    if key == "std":  # of one receptive field
        part[key][0][0], value = value, part[key]
    rewritten(file, **{group: part | {key: value}})
    assert line in str(refusal(lambda: reading.read(file).policy()))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"normalizer": {"mean": [0.0] * 2, "std": [1.0] * 2, "clip": 3.0}, "obs_shape": [2]},
            "the contract has other observations or actions",
        ),
        ({"spike_steps": 4}, "the contract has other spike steps or neurons"),
        (
            {"sizes": {"encoder": 30, "layers": [12, 9, 9]}},
            "the contract has other spike steps or neurons",
        ),
    ],
)
def test_a_contract_that_c_does_not_fit(changes: dict[str, Any], line: str, tmp_path: Path) -> None:
    file = rewritten(small(tmp_path, "c"), **changes)
    assert line in str(refusal(reading.read(file).policy))


@pytest.mark.parametrize(("name", "module"), [("onnx", onnx), ("nir", nir)], ids=["onnx", "nir"])
def test_a_missing_package(
    name: str, module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = small(tmp_path, name)
    monkeypatch.setattr(module, "find_spec", lambda package: None)
    assert spikerl("eval", f"run={file}").line == (
        f"run={file}: {name} is not installed; pip install 'spikerl[{name}]'"
    )


def changed_tensors(file: Path, **changes: np.ndarray | None) -> Path:
    tensors = load_file(file) | {k.replace("_", ".", 1): v for k, v in changes.items()}
    return rewritten(file, tensor_bytes({k: v for k, v in tensors.items() if v is not None}))


@pytest.mark.parametrize(
    "changes",
    [
        {"x0_weight": None},
        {"x0_weight": np.zeros((29, 12), np.int8)},
        {"x1_weight": np.zeros((12, 9), np.int16)},
        {"x1_bias": np.zeros((9, 1), np.int8)},
        {"x2_weight": None},
        {"x2_lateral": np.zeros((2, 10, 10), np.int8)},
        {"x0_lateral": np.zeros((12, 1, 1), np.int8)},
        {"x0_vth": np.array([1 << 17], np.int32)},
        {"x0_du": np.array([-1], np.int32)},
        {"x0_dv": np.array([4096], np.int32)},
        {"x0_dv": None},
    ],
)
def test_a_loihi_file_of_another_network(changes: dict[str, Any], tmp_path: Path) -> None:
    own = {key.removeprefix("x"): value for key, value in changes.items()}
    file = changed_tensors(small(tmp_path, "loihi"), **own)
    assert "cannot be read: " in str(refusal(reading.read(file).policy))


def onnx_line(file: Path, change: Any) -> str:
    model = onnx_package.load(file)
    change(model)
    rewritten(file, model.SerializeToString())
    return str(refusal(reading.read(file).policy)).partition("cannot be read: ")[2]


def test_an_onnx_file_with_other_operators(tmp_path: Path) -> None:
    """ConstantOfShape makes a tensor of any size from a small constant."""
    file, helper = small(tmp_path, "onnx"), onnx_package.helper

    def expands(model: Any) -> None:
        shape = onnx_package.numpy_helper.from_array(np.array([10**6, 10**6]), "shape")
        model.graph.initializer.append(shape)
        model.graph.node.append(helper.make_node("ConstantOfShape", ["shape"], ["much"]))

    assert onnx_line(file, expands) == "it has operators that no exported policy has"


def test_an_onnx_file_whose_values_grow(tmp_path: Path) -> None:
    """A column times a row is a matrix of 10^10 numbers."""
    file, helper = small(tmp_path, "onnx"), onnx_package.helper

    def grows(model: Any) -> None:
        for name, shape in (("column", (100_000, 1)), ("row", (1, 100_000))):
            tensor = onnx_package.numpy_helper.from_array(np.ones(shape, np.float32), name)
            model.graph.initializer.append(tensor)
        model.graph.node.append(helper.make_node("MatMul", ["column", "row"], ["much"]))

    assert onnx_line(file, grows) == "it has values whose size is not known, or too large"


def test_an_onnx_file_that_names_another_file(tmp_path: Path) -> None:
    file = small(tmp_path, "onnx")

    def outside(model: Any) -> None:
        tensor = model.graph.initializer[0]
        tensor.data_location = onnx_package.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="/etc/passwd")

    assert onnx_line(file, outside) == "it refers to other files"


def test_an_onnx_file_that_cannot_act(tmp_path: Path) -> None:
    """Refused when it is read, before an episode begins."""
    file = small(tmp_path, "onnx")

    def renamed(model: Any) -> None:
        model.graph.input[0].name = "seen"
        for node in model.graph.node:
            node.input[:] = ["seen" if name == "obs" else name for name in node.input]

    def one_row(model: Any) -> None:
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1

    original = file.read_bytes()
    for change in (renamed, one_row):
        assert onnx_line(rewritten(file, original), change)


@pytest.mark.parametrize(("actions", "rows"), [(2, 3), (1, 4)])
def test_a_file_whose_answers_have_another_shape(actions: int, rows: int) -> None:
    class Wide:
        def actions(self, obs_BO: np.ndarray) -> np.ndarray:
            return np.zeros((len(obs_BO), actions), np.float32)

        def spikes(self, obs_BO: np.ndarray) -> list[np.ndarray]:
            return [np.zeros((5, rows if len(obs_BO) == 3 else 1, 9), bool)]

    with pytest.raises(ValueError, match="of another shape than its observations"):
        reading.check_acts(Wide(), task(3, 1, "Pendulum-v1"))


def nir_line(file: Path, change: Any) -> str:
    with h5py.File(file, "r+") as content:
        change(content)
    rewritten(file)
    return str(refusal(reading.read(file).policy)).partition("cannot be read: ")[2]


def replaced(content: Any, name: str, **how: Any) -> None:
    del content[f"node/nodes/weights_0/{name}"]
    content["node/nodes/weights_0"].create_dataset(name, **how)


def test_a_nir_file_that_refers_elsewhere(tmp_path: Path) -> None:
    def outside(content: Any) -> None:
        content["other"] = h5py.ExternalLink("/etc/passwd", "/x")

    assert nir_line(small(tmp_path, "nir"), outside) == "it refers to other data"
    (tmp_path / "raw").write_bytes(bytes(48))

    def stored(content: Any) -> None:
        raw = [(tmp_path / "raw", 0, 48)]
        replaced(content, "bias", shape=(12,), dtype="f4", external=raw)

    assert nir_line(small(tmp_path, "nir"), stored) == "it refers to other files"


def test_a_nir_file_that_claims_much(tmp_path: Path) -> None:
    def claims(content: Any) -> None:
        replaced(content, "weight", shape=(12, 10**9), dtype="f4", chunks=(1, 1000))

    line = nir_line(small(tmp_path, "nir"), claims)
    assert line == "it claims more values than it holds"


def test_a_nir_file_whose_groups_lead_round(tmp_path: Path) -> None:
    def round_and_round(content: Any) -> None:
        content["node/nodes/again"] = content["node"]

    line = nir_line(small(tmp_path, "nir"), round_and_round)
    assert line == "its groups lead round in a circle"


def nir_graph(file: Path, change: Any) -> str:
    graph = nir_package.read(file)
    change(graph)
    nir_package.write(file, graph)
    rewritten(file)
    return str(refusal(reading.read(file).policy)).partition("cannot be read: ")[2]


def test_a_nir_file_of_another_network(tmp_path: Path) -> None:
    def circle(graph: Any) -> None:
        graph.edges = [(a, "weights_1" if b == "weights_2" else b) for a, b in graph.edges]

    def linear(graph: Any) -> None:
        graph.nodes["weights_1"] = nir_package.Linear(graph.nodes["weights_1"].weight)

    def still(graph: Any) -> None:
        graph.nodes["neurons_1"].tau_syn *= 0.0

    def endless(graph: Any) -> None:
        graph.nodes["weights_1"].bias[2] = np.nan

    def recurrent(graph: Any) -> None:
        graph.edges = [("neurons_1", "weights_1"), *graph.edges]

    changes = (circle, linear, still, endless, recurrent)
    same = config([9, 9])
    assert [nir_graph(small(tmp_path, "nir", same), change) for change in changes] == [
        "its edges lead round in a circle",
        "it has nodes that no exported policy has",
        "it has a time constant that is not above 0",
        "its layers do not fit each other",
        "it has nodes with more than one successor",
    ]


def test_a_nir_file_of_another_contract(tmp_path: Path) -> None:
    """The file has other inputs, or hidden layers in another order, than its contract."""
    file = small(tmp_path, "nir")
    for number, parts in enumerate((config(encoder=population("population")), config([9, 12]))):
        (other := tmp_path / str(number)).mkdir()
        rewritten(file, small(other, "nir", parts).read_bytes())
        line = str(refusal(reading.read(file).policy))
        assert line.endswith(
            ("its layers do not fit each other", "its layers are not those of its contract")[number]
        )
    (lateral := tmp_path / "ilc").mkdir()
    file = small(lateral, "nir")
    decoder = json.loads((lateral / "policy.nir.json").read_text())["decoder"]
    rewritten(file, decoder=decoder | {"name": "ilc"})
    assert "decoder.name" in str(refusal(lambda: reading.read(file).policy()))
