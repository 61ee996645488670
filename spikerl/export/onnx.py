"""Format `onnx`: one graph from raw observations to actions, with the spike steps unrolled.

It uses operators that every runtime has, in float32; the batch may have any size. The spikes of an
encoder or a layer at spike step t are called `spikes_LAYER_t`.

Shape legend   T spike steps, B observations, N neurons of a layer, O observation entries, A action
entries.
"""

from __future__ import annotations

import math
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spikerl.errors import BadRequest
from spikerl.models.actor import MLPActor, SpikingActor
from spikerl.models.policy import Policy
from spikerl.snn.decoders import (
    ILCDecoder,
    LearnedDecoder,
    LinearDecoder,
    MembraneDecoder,
    RateDecoder,
)
from spikerl.snn.encoders import LearnedEncoder, PopulationEncoder, TanhPopulationEncoder
from spikerl.snn.linear import Linear
from spikerl.snn.neurons import ALIF, PLIF, CubaLIF, Dynamic, Neuron

OPSET, IR_VERSION = 17, 8  # of 2022, which runtimes on small machines can read
PACKAGES = ("onnx", "onnxruntime")
# Operators that `write` uses; no others are accepted, as the cost of these is bounded by the sizes
# of their values.
OPERATORS = {
    "Abs", "Add", "Cast", "Clip", "Concat", "Div", "Exp", "Flatten", "Greater", "MatMul", "Max",
    "Min", "Mul", "Relu", "Sub", "Sum", "Tanh", "Unsqueeze", "Where",
}  # fmt: skip
MOST_VALUES = 1 << 20  # bound of the entries of an operator's output, per observation


def check_here() -> None:
    """Raise BadRequest if a package is not installed."""
    for package in PACKAGES:
        if find_spec(package) is None:
            remedy = f"{package} is not installed; pip install 'spikerl[onnx]'"
            raise BadRequest("format", "onnx", remedy)


def write(policy: Policy, path: Path) -> None:
    onnx: Any = import_module("onnx")
    graph, task = Graph(onnx), policy.task
    x = normalized(graph, policy)
    actor = policy.actor
    y = spiking(graph, actor, x) if isinstance(actor, SpikingActor) else dense(graph, actor, x)
    low, half_range, least, most = task.units
    act = graph.op("Mul", graph.op("Add", graph.op("Tanh", y), 1.0), half_range)
    act = graph.op("Max", graph.op("Add", act, low), least)
    graph.op("Min", act, most, name="act")
    kind = onnx.TensorProto.FLOAT
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            graph.nodes,
            "policy",
            [onnx.helper.make_tensor_value_info("obs", kind, ["batch", task.obs_dim])],
            [onnx.helper.make_tensor_value_info("act", kind, ["batch", task.act_dim])],
            graph.constants,
        ),
        opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="spikerl",
    )
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())


Value = str | float | np.ndarray | Tensor  # the name of a value, or a constant


class Graph:
    """Builds a graph: nodes in the order of execution, with a name for every value."""

    def __init__(self, onnx: Any) -> None:
        self.onnx = onnx
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.names: dict[Any, str] = {}  # of existing constants, by value or id
        self.alive: list[Value] = []  # keeps constants alive, so that their ids are not reused

    def op(self, kind: str, *inputs: Value, name: str | None = None, **settings: Any) -> str:
        name = name or f"{kind.lower()}_{len(self.nodes)}"
        names = [value if isinstance(value, str) else self.constant(value) for value in inputs]
        self.nodes.append(self.onnx.helper.make_node(kind, names, [name], **settings))
        return name

    def constant(self, value: float | np.ndarray | Tensor) -> str:
        key = value if isinstance(value, float) else id(value)
        if key not in self.names:
            array = np.asarray(value.detach() if isinstance(value, Tensor) else value)
            if array.dtype != np.int64:
                array = array.astype(np.float32)
            self.names[key] = f"constant_{len(self.constants)}"
            self.alive.append(value)
            self.constants.append(self.onnx.numpy_helper.from_array(array, self.names[key]))
        return self.names[key]

    def affine(self, x: str, layer: Linear) -> str:
        return self.op("Add", self.op("MatMul", x, layer.weight_IN), layer.bias_N)

    def fired(self, excess: str, name: str | None = None) -> str:
        """1 where `excess` is above 0, else 0."""
        above = self.op("Greater", excess, 0.0)
        return self.op("Cast", above, name=name, to=self.onnx.TensorProto.FLOAT)


def normalized(graph: Graph, policy: Policy) -> str:
    mean, std = policy.norm.mean_std
    x = graph.op("Div", graph.op("Sub", "obs", mean), std)
    return graph.op("Clip", x, -policy.norm.clip, policy.norm.clip)


def dense(graph: Graph, actor: MLPActor, x: str) -> str:
    *hidden, last = actor.layers
    for layer in hidden:
        x = graph.op("Relu", graph.affine(x, layer))
    return graph.affine(x, last)


def spiking(graph: Graph, actor: SpikingActor, x: str) -> str:
    """The decoder's outputs, (B, A)."""
    below = encoded(graph, actor, x)
    first = int(actor.encoder.spikes)
    for k, neuron in enumerate(actor.neurons):
        layer = actor.layers[k]
        of = {value: graph.affine(value, layer) for value in dict.fromkeys(below)}
        drives = [of[value] for value in below]
        last = k == len(actor.neurons) - 1
        lateral = actor.decoder if last and isinstance(actor.decoder, ILCDecoder) else None
        below = scan(graph, neuron, drives, f"spikes_{k + first}", lateral)
    return decoded(graph, actor, below)


def encoded(graph: Graph, actor: SpikingActor, x: str) -> list[str]:
    """The inputs of the first layer at each spike step."""
    encoder, steps = actor.encoder, actor.spike_steps
    if isinstance(encoder, LearnedEncoder):
        n = encoder.outputs
        weights = encoder.map.weight_IN.split(n, 1)
        biases = encoder.map.bias_N.split(n)
        return [
            graph.op("Add", graph.op("MatMul", x, w), b)
            for w, b in zip(weights, biases, strict=True)
        ]
    if not isinstance(encoder, PopulationEncoder):
        return [x] * steps
    if isinstance(encoder, TanhPopulationEncoder):
        x = graph.op("Tanh", x)
    distance = graph.op("Sub", graph.op("Unsqueeze", x, np.array([2])), encoder.mean_OP)
    squared = graph.op("Mul", graph.op("Mul", distance, distance), -0.5)
    ratio = graph.op("Div", squared, encoder.std_OP.detach().square())
    activity = graph.op("Flatten", graph.op("Exp", ratio), axis=1)
    if not encoder.spikes:
        return [activity] * steps
    threshold, voltage, spikes = encoder.config.threshold, activity, []
    for t in range(steps):
        if t:
            voltage = graph.op("Add", voltage, activity)
        spikes.append(graph.fired(graph.op("Sub", voltage, threshold), f"spikes_0_{t}"))
        voltage = graph.op("Sub", voltage, graph.op("Mul", spikes[-1], threshold))
    return spikes


def scan(
    graph: Graph, neuron: Neuron, drives: list[str], name: str, lateral: ILCDecoder | None
) -> list[str]:
    """One layer's spikes at each spike step; equations as in snn/neurons.py."""
    c = neuron.config
    zero = graph.op("Mul", drives[0], 0.0)
    voltage, spikes, current, other = zero, zero, zero, zero
    side = None if lateral is None else torch.block_diag(*lateral.lateral_APP.detach())
    fired = []
    for t, drive in enumerate(drives):
        if lateral is not None and side is not None:
            drive = graph.op("Add", drive, graph.op("MatMul", spikes, side))
            drive = graph.op("Add", drive, lateral.lateral_bias_N)
        if isinstance(neuron, Dynamic):
            voltage, current, other = dynamic(graph, neuron, drive, voltage, spikes, current, other)
            excess = graph.op("Sub", voltage, c.threshold)
        else:
            if c.reset == "hard":
                voltage = graph.op("Mul", voltage, graph.op("Sub", 1.0, spikes))
            else:
                voltage = graph.op("Sub", voltage, graph.op("Mul", spikes, c.threshold))
            if isinstance(neuron, CubaLIF) and neuron.current_decay:
                current = graph.op("Add", graph.op("Mul", current, neuron.current_decay), drive)
                drive = current
            voltage = graph.op("Add", graph.op("Mul", voltage, decay_of(neuron)), drive)
            excess = graph.op("Sub", voltage, c.threshold)
            if isinstance(neuron, ALIF):
                kept = graph.op("Mul", other, neuron.config.adaptation_decay)
                other = graph.op("Add", kept, spikes)
                raised = graph.op("Add", graph.op("Mul", other, neuron.config.adaptation),
                                  c.threshold)  # fmt: skip
                excess = graph.op("Sub", voltage, raised)
        spikes = graph.fired(excess, f"{name}_{t}")
        fired.append(spikes)
    return fired


def decay_of(neuron: Neuron) -> float:
    if isinstance(neuron, PLIF):
        return float(neuron.decay_logit.detach().sigmoid())
    assert isinstance(neuron, CubaLIF | ALIF)
    return neuron.config.voltage_decay


def dynamic(
    graph: Graph, neuron: Dynamic, drive: str, voltage: str, spikes: str, current: str, other: str
) -> tuple[str, str, str]:
    """Voltage, current and recovery of the next spike step."""
    c = neuron.config
    kept = graph.op("Mul", voltage, graph.op("Sub", 1.0, spikes))
    v = graph.op("Add", kept, graph.op("Mul", spikes, c.theta_r))
    u = graph.op("Add", other, graph.op("Mul", spikes, c.theta_s))
    current = graph.op("Add", graph.op("Mul", current, c.current_decay), drive)
    v_next = graph.op("Add", graph.op("Sub", graph.op("Mul", v, v), u), current)
    grown = graph.op("Add", u, graph.op("Mul", v, c.theta_v))
    return v_next, current, graph.op("Sub", grown, graph.op("Mul", u, c.theta_u))


def decoded(graph: Graph, actor: SpikingActor, spikes: list[str]) -> str:
    decoder = actor.decoder
    if isinstance(decoder, LearnedDecoder):
        over_time = graph.op("Concat", *spikes, axis=1)
        return graph.affine(graph.affine(over_time, decoder.over_time), decoder.map)
    if not isinstance(decoder, MembraneDecoder):
        rates = graph.op("Div", graph.op("Sum", *spikes), float(len(spikes)))
        if isinstance(decoder, LinearDecoder):
            return graph.affine(rates, decoder.map)
        assert isinstance(decoder, RateDecoder)
        weight = torch.block_diag(*decoder.weight_AP.detach()).T
        return graph.op("Add", graph.op("MatMul", rates, weight), decoder.bias_A)
    weight = torch.block_diag(*decoder.weight_AP.detach()).T
    voltage, voltages = "", []
    for fired in spikes:
        charge = graph.op("Add", graph.op("MatMul", fired, weight), decoder.bias_A)
        if voltage:
            kept = graph.op("Mul", voltage, decoder.config.voltage_decay)
            charge = graph.op("Add", kept, charge)
        voltage = charge
        voltages.append(voltage)
    if decoder.config.read == "last":
        return voltage
    if decoder.config.read == "mean":
        return graph.op("Div", graph.op("Sum", *voltages), float(len(voltages)))
    high, low = graph.op("Max", *voltages), graph.op("Min", *voltages)
    higher = graph.op("Greater", graph.op("Abs", high), graph.op("Abs", low))
    return graph.op("Where", higher, high, low)


class Interpreter:
    """Runs the file in onnxruntime."""

    def __init__(self, path: Path, contract: dict[str, Any], scratch: Path) -> None:
        """Raises ValueError unless the file has the form that `write` makes."""
        onnx: Any = import_module("onnx")
        content = path.read_bytes()
        model = onnx.load_model_from_string(content)  # reads no other files
        check_graph(onnx, model)
        self.session = session(content)
        self.steps = contract.get("spike_steps", 0)
        written = {name for node in model.graph.node for name in node.output}
        self.layers: list[list[str]] = []
        while self.steps and f"spikes_{len(self.layers)}_0" in written:
            k = len(self.layers)
            self.layers.append([f"spikes_{k}_{t}" for t in range(self.steps)])
        # The same graph with spikes as additional outputs.
        kind = onnx.TensorProto.FLOAT
        for name in (name for names in self.layers for name in names):
            model.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))
        self.traced = session(model.SerializeToString())

    def spikes(self, obs_BO: np.ndarray) -> list[np.ndarray]:
        return [
            np.stack(self.traced.run(names, {"obs": obs_BO})).astype(bool) for names in self.layers
        ]

    def actions(self, obs_BO: np.ndarray) -> np.ndarray:
        act: np.ndarray = self.session.run(["act"], {"obs": obs_BO})[0]
        return act


def check_graph(onnx: Any, model: Any) -> None:
    """Raise ValueError if the graph has parts that `write` does not make, or values whose size is
    unknown or too large.
    """
    graph, domains = model.graph, {opset.domain for opset in model.opset_import}
    own = {attribute.type for node in graph.node for attribute in node.attribute}
    plain = own <= {onnx.AttributeProto.INT}  # axis, to; none is a graph
    if domains != {""} or not plain or {node.op_type for node in graph.node} - OPERATORS:
        raise ValueError("it has operators that no exported policy has")
    if model.functions or graph.sparse_initializer:
        raise ValueError("it has parts that no exported policy has")
    if any(t.data_location == onnx.TensorProto.EXTERNAL for t in graph.initializer):
        raise ValueError("it refers to other files")
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    known = {value.name: value.type.tensor_type for value in inferred.value_info}
    known |= {value.name: value.type.tensor_type for value in (*inferred.input, *inferred.output)}
    for node in graph.node:
        for name in node.output:
            dims = known[name].shape.dim if name in known else []
            # The first dimension may be the batch, whose size is unknown.
            sizes = [d.dim_value for d in dims[1:]] + [max(d.dim_value, 1) for d in dims[:1]]
            if not dims or min(sizes) < 1 or math.prod(sizes) > MOST_VALUES:
                raise ValueError("it has values whose size is not known, or too large")


def session(model: bytes) -> Any:
    runtime: Any = import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only
    return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
