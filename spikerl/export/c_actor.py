"""Generates an actor's C code: its constants, static arrays and the statements of a decision.

Event-driven: a layer's drive is its bias plus the weight rows of the inputs that fired.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from spikerl.models.actor import MLPActor, SpikingActor
from spikerl.snn.decoders import (
    ILCDecoder,
    LearnedDecoder,
    LinearDecoder,
    MembraneDecoder,
    RateDecoder,
)
from spikerl.snn.early_exit import EarlyExit
from spikerl.snn.encoders import LearnedEncoder, PopulationEncoder, TanhPopulationEncoder
from spikerl.snn.linear import Linear
from spikerl.snn.neurons import ALIF, PLIF, CubaLIF, Dynamic, Neuron

SPARSE = 0.25  # share of nonzero weights below which only these are stored, with indices


def number(value: float) -> str:
    """A C float constant; nine digits identify every float32 exactly."""
    text = f"{np.float32(value):.9g}"
    return f"{text}f" if "." in text or "e" in text else f"{text}.0f"


def array(name: str, values: Tensor | np.ndarray, kind: str = "float") -> str:
    flat = np.asarray(values.detach() if isinstance(values, Tensor) else values).ravel()
    if kind == "double":
        texts = [repr(float(value)) for value in flat]
    elif kind == "int":
        texts = [str(int(value)) for value in flat]
    else:
        texts = [number(value) for value in flat]
    rows = (", ".join(texts[i : i + 8]) for i in range(0, len(texts), 8))
    body = ",\n    ".join(rows)
    return f"static const {kind} {name}[{len(texts)}] = {{\n    {body}}};\n"


class Rows:
    """A layer's weight rows, one for each input, as constants; sparse if there are many zeros."""

    def __init__(self, k: int, layer: Linear) -> None:
        weight_IN = layer.weight_IN.detach().numpy()
        self.k, self.n = k, weight_IN.shape[1]
        kept_IN = weight_IN != 0.0
        self.sparse = bool(kept_IN.any() and kept_IN.mean() < SPARSE)
        self.constants = [array(f"bias{k}", layer.bias_N)]
        if not self.sparse:
            self.constants.append(array(f"weight{k}", weight_IN))
            return
        first = np.concatenate([[0], kept_IN.sum(1).cumsum()])
        self.constants += [
            array(f"weight{k}", weight_IN[kept_IN]),
            array(f"index{k}", kept_IN.nonzero()[1], "int"),
            array(f"first{k}", first, "int"),
        ]

    def add(self, to: str, factor: str | None = None) -> str:
        """The C statement that adds the row of input i, times `factor` if given, to array `to`."""
        k, n = self.k, self.n
        scaled, times = ("_scaled", f", {factor}") if factor else ("", "")
        if not self.sparse:
            return f"add{scaled}({to}{times}, weight{k} + {n}L * i, {n});"
        at, count = f"first{k}[i]", f"first{k}[i + 1] - first{k}[i]"
        return f"add_some{scaled}({to}{times}, index{k} + {at}, weight{k} + {at}, {count});"


class DenseSource:
    """ReLU layers; an activation that is 0 adds nothing."""

    def __init__(self, actor: MLPActor) -> None:
        self.constants: list[str] = []
        self.state: list[str] = []
        self.body: list[str] = []
        source, width = "x", actor.obs_dim
        for k, layer in enumerate(actor.layers):
            n, last = layer.bias_N.numel(), k == len(actor.layers) - 1
            target, rows = "y" if last else f"h{k}", Rows(k, layer)
            self.constants += rows.constants
            self.state += [] if last else [f"static float h{k}[{n}];\n"]
            self.body += [
                f"set({target}, bias{k}, {n});",
                f"for (i = 0; i < {width}; i++)",
                f"    {rows.add(target, f'{source}[i]')}",
            ]
            if not last:
                self.body.append(f"for (i = 0; i < {n}; i++) if (h{k}[i] < 0.0f) h{k}[i] = 0.0f;")
            source, width = target, n


class SpikingSource:
    def __init__(self, actor: SpikingActor) -> None:
        self.actor = actor
        self.sizes = [layer.bias_N.numel() for layer in actor.layers]
        self.constants: list[str] = []
        self.state: list[str] = []
        self.steps: list[str] = []  # statements of a spike step t
        self.body: list[str] = ["int t;"]
        self.encoder()
        for k, neuron in enumerate(actor.neurons):
            self.layer(k, neuron)
        exit = actor.early_exit
        # Number of spike steps that the decoder has read, as C code.
        self.read = "(float)(t + 1)" if exit else number(actor.spike_steps)
        after = self.decoder(len(self.sizes) - 1)
        if exit:
            self.steps += after
            self.early_exit(exit)
            after = []
        self.body.append(f"for (t = 0; t < {actor.spike_steps}; t++) {{")
        self.body += [f"    {line}" for line in self.steps]
        self.body += ["}", *after]

    def zeroed(self, name: str, n: int, kind: str = "float") -> None:
        """Declare a static array that is set to zeros at the beginning of each call."""
        self.state.append(f"static {kind} {name}[{n}];\n")
        zero = "0.0f" if kind == "float" else "0"
        self.body.append(f"for (i = 0; i < {n}; i++) {name}[i] = {zero};")

    def encoder(self) -> None:
        """Generate the computation of `drive0`, the first layer's drive, at each spike step, or
        once if it is constant.
        """
        encoder, n0 = self.actor.encoder, self.sizes[0]
        rows, size = Rows(0, self.actor.layers[0]), self.actor.encoder.outputs
        self.constants += rows.constants
        self.state.append(f"static float drive0[{n0}];\n")
        if isinstance(encoder, PopulationEncoder):
            self.constants += [array("centre", encoder.mean_OP), array("width", encoder.std_OP)]
            self.state.append(f"static float activity[{size}];\n")
            pop = encoder.config.pop_size
            squashed = "tanhf(x[{0}])" if isinstance(encoder, TanhPopulationEncoder) else "x[{0}]"
            entry = f"i / {pop}" if pop > 1 else "i"
            self.body += [
                f"for (i = 0; i < {size}; i++) {{",
                f"    float d = {squashed.format(entry)} - centre[i];",
                "    activity[i] = expf(-0.5f * (d * d) / (width[i] * width[i]));",
                "}",
            ]
        if encoder.spikes:
            assert isinstance(encoder, PopulationEncoder)
            threshold = number(encoder.config.threshold)
            self.zeroed("charge", size)
            self.state.append(f"static unsigned char in[{size}];\n")
            self.steps += [
                f"set(drive0, bias0, {n0});",
                f"for (i = 0; i < {size}; i++) {{",
                "    charge[i] += activity[i];",
                f"    in[i] = charge[i] > {threshold};",
                "    if (!in[i]) continue;",
                f"    charge[i] -= {threshold};",
                f"    {rows.add('drive0')}",
                "}",
                f"POLICY_SPIKES(0, t, in, {size});",
            ]
            return
        if isinstance(encoder, LearnedEncoder):
            total = size * self.actor.spike_steps
            self.constants += [
                array("code", encoder.map.weight_IN),
                array("code_bias", encoder.map.bias_N),
            ]
            self.state.append(f"static float currents[{total}];\n")
            self.body += [
                f"set(currents, code_bias, {total});",
                f"for (i = 0; i < {self.actor.obs_dim}; i++)",
                f"    add_scaled(currents, x[i], code + {total}L * i, {total});",
            ]
            self.steps += [
                f"set(drive0, bias0, {n0});",
                f"for (i = 0; i < {size}; i++)",
                f"    {rows.add('drive0', f'currents[{size} * t + i]')}",
            ]
            return
        # The same currents at every spike step: their drive is computed once.
        current = "activity" if isinstance(encoder, PopulationEncoder) else "x"
        self.body += [
            f"set(drive0, bias0, {n0});",
            f"for (i = 0; i < {size}; i++)",
            f"    {rows.add('drive0', f'{current}[i]')}",
        ]

    def layer(self, k: int, neuron: Neuron) -> None:
        n, last = self.sizes[k], k == len(self.sizes) - 1
        if k > 0:
            rows, below = Rows(k, self.actor.layers[k]), self.sizes[k - 1]
            self.constants += rows.constants
            self.state.append(f"static float drive{k}[{n}];\n")
            self.steps += [
                f"set(drive{k}, bias{k}, {n});",
                f"for (i = 0; i < {below}; i++)",
                f"    if (fired{k - 1}[i]) {rows.add(f'drive{k}')}",
            ]
        self.zeroed(f"fired{k}", n, "unsigned char")
        drive = f"drive{k}[i]"
        decoder = self.actor.decoder
        if last and isinstance(decoder, ILCDecoder):
            pop = decoder.config.pop_size
            self.constants += [
                array("lateral", decoder.lateral_APP),
                array("lateral_bias", decoder.lateral_bias_N),
            ]
            self.state.append(f"static float from_side[{n}];\n")
            row = f"from_side + {pop} * (i / {pop}), lateral + {pop}L * i, {pop}"
            self.steps += [
                f"set(from_side, lateral_bias, {n});",
                f"for (i = 0; i < {n}; i++)",
                f"    if (fired{k}[i]) add({row});",
            ]
            drive = f"(drive{k}[i] + from_side[i])"
        self.zeroed(f"voltage{k}", n)
        lines = self.equation(k, n, neuron, drive)
        self.steps += [f"for (i = 0; i < {n}; i++) {{", *(f"    {line}" for line in lines), "}"]
        index = k + bool(self.actor.encoder.spikes)
        self.steps.append(f"POLICY_SPIKES({index}, t, fired{k}, {n});")

    def equation(self, k: int, n: int, neuron: Neuron, drive: str) -> list[str]:
        """The statements of one neuron's spike step; equations as in snn/neurons.py."""
        v, fired, c = f"voltage{k}[i]", f"fired{k}[i]", neuron.config
        threshold = number(c.threshold)
        if isinstance(neuron, Dynamic):
            d = neuron.config
            self.zeroed(f"current{k}", n)
            self.zeroed(f"recovery{k}", n)
            u, current = f"recovery{k}[i]", f"current{k}[i]"
            return [
                f"float v = {fired} ? {number(d.theta_r)} : {v};",
                f"float u = {u} + ({fired} ? {number(d.theta_s)} : 0.0f);",
                f"{current} = {number(d.current_decay)} * {current} + {drive};",
                f"{v} = v + v * v - v - u + {current};",
                f"{u} = u + {number(d.theta_v)} * v - {number(d.theta_u)} * u;",
                f"{fired} = {v} > {threshold};",
            ]
        kept = f"({fired} ? 0.0f : {v})"
        if c.reset == "soft":
            kept = f"({fired} ? {v} - {threshold} : {v})"
        if isinstance(neuron, PLIF):
            learned = number(float(neuron.decay_logit.detach().sigmoid()))
            return [
                f"{v} = {learned} * {kept} + {drive};",
                f"{fired} = {v} > {threshold};",
            ]
        if isinstance(neuron, ALIF):
            a = neuron.config
            self.zeroed(f"adapted{k}", n)
            adapted = f"adapted{k}[i]"
            return [
                f"{adapted} = {number(a.adaptation_decay)} * {adapted} + (float){fired};",
                f"{v} = {number(a.voltage_decay)} * {kept} + {drive};",
                f"{fired} = {v} > {threshold} + {number(a.adaptation)} * {adapted};",
            ]
        assert isinstance(neuron, CubaLIF)
        decay = number(neuron.config.voltage_decay)
        if neuron.current_decay == 0.0:
            return [f"{v} = {decay} * {kept} + {drive};", f"{fired} = {v} > {threshold};"]
        self.zeroed(f"current{k}", n)
        current = f"current{k}[i]"
        return [
            f"{current} = {number(neuron.current_decay)} * {current} + {drive};",
            f"{v} = {decay} * {kept} + {current};",
            f"{fired} = {v} > {threshold};",
        ]

    def decoder(self, k: int) -> list[str]:
        """Generate the reading of the last layer's `fired` at each spike step; returns the
        statements that follow the last step.
        """
        decoder, n, acts = self.actor.decoder, self.sizes[k], self.actor.act_dim
        if isinstance(decoder, MembraneDecoder):
            return self.membrane(decoder, k)
        if isinstance(decoder, LearnedDecoder):
            self.constants += [
                array("over_time", decoder.over_time.weight_IN),
                array("over_time_bias", decoder.over_time.bias_N),
                array("out_weight", decoder.map.weight_IN),
                array("out_bias", decoder.map.bias_N),
            ]
            self.state.append(f"static float readout[{n}];\n")
            self.body.append(f"set(readout, over_time_bias, {n});")
            self.steps += [
                f"for (i = 0; i < {n}; i++)",
                f"    if (fired{k}[i]) add(readout, over_time + {n}L * ({n}L * t + i), {n});",
            ]
            return [
                f"set(y, out_bias, {acts});",
                f"for (i = 0; i < {n}; i++)",
                f"    add_scaled(y, readout[i], out_weight + {acts}L * i, {acts});",
            ]
        self.zeroed("count", n, "int")
        self.steps.append(f"for (i = 0; i < {n}; i++) count[i] += fired{k}[i];")
        rate = f"(float)count[i] / {self.read}"
        if isinstance(decoder, LinearDecoder):
            self.constants += [
                array("out_weight", decoder.map.weight_IN),
                array("out_bias", decoder.map.bias_N),
            ]
            return [
                f"set(y, out_bias, {acts});",
                f"for (i = 0; i < {n}; i++)",
                f"    add_scaled(y, {rate}, out_weight + {acts}L * i, {acts});",
            ]
        assert isinstance(decoder, RateDecoder)
        self.constants += [
            array("out_weight", decoder.weight_AP),
            array("out_bias", decoder.bias_A),
        ]
        pop = decoder.config.pop_size
        return [
            f"set(y, out_bias, {acts});",
            f"for (i = 0; i < {n}; i++)",
            f"    if (count[i]) y[i / {pop}] += out_weight[i] * ({rate});",
        ]

    def early_exit(self, exit: EarlyExit) -> None:
        """Generate the exit from the loop over spike steps; see snn/early_exit.py."""
        acts, k = self.actor.act_dim, exit.steps
        self.state.append(f"static float each[{self.actor.spike_steps * acts}];\n")
        self.body.append("int settled;")
        self.steps += [
            f"for (i = 0; i < {acts}; i++) each[{acts} * t + i] = tanhf(y[i]);",
            f"settled = t >= {k};",
            f"for (i = 0; settled && i < {k * acts}; i++)",
            f"    settled = fabsf(each[{acts} * t + i % {acts}] - each[{acts} * (t - {k}) + i])"
            f" < {number(exit.threshold)};",
            "if (settled) break;",
        ]

    def membrane(self, decoder: MembraneDecoder, k: int) -> list[str]:
        acts, n = self.actor.act_dim, self.sizes[k]
        c, pop = decoder.config, decoder.config.pop_size
        self.constants += [
            array("out_weight", decoder.weight_AP),
            array("out_bias", decoder.bias_A),
        ]
        self.zeroed("membrane", acts)
        self.state.append(f"static float charge_out[{acts}];\n")
        keep = {
            "last": ["y[i] = membrane[i];"],
            "mean": ["total[i] += membrane[i];", f"y[i] = total[i] / {self.read};"],
            "max": [
                "if (t == 0 || membrane[i] > high[i]) high[i] = membrane[i];",
                "if (t == 0 || membrane[i] < low[i]) low[i] = membrane[i];",
                "y[i] = fabsf(high[i]) > fabsf(low[i]) ? high[i] : low[i];",
            ],
        }[c.read]
        if c.read == "max":
            self.state += [f"static float high[{acts}];\n", f"static float low[{acts}];\n"]
        if c.read == "mean":
            self.zeroed("total", acts)
        decay = number(c.voltage_decay)
        self.steps += [
            f"set(charge_out, out_bias, {acts});",
            f"for (i = 0; i < {n}; i++)",
            f"    if (fired{k}[i]) charge_out[i / {pop}] += out_weight[i];",
            f"for (i = 0; i < {acts}; i++) {{",
            f"    membrane[i] = {decay} * membrane[i] + charge_out[i];",
            *(f"    {line}" for line in keep),
            "}",
        ]
        return []
