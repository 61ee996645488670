"""What each format can hold of a policy, and why not the rest: the only list of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from spikerl.errors import BadRequest
from spikerl.export.contract import DECODERS, ENCODERS, NEURONS
from spikerl.models.actor import ActorConfig, MLPConfig
from spikerl.snn.decoders import DecoderConfig
from spikerl.snn.encoders import EncoderConfig
from spikerl.snn.neurons import NeuronConfig

FORMATS = ("c", "onnx", "nir")
FAITHFUL, REFUSED = "faithful", "refused"


@dataclass(frozen=True)
class Verdict:
    """How a format holds one part of a policy; no format so far has an approximate one."""

    level: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.level}: {self.reason}" if self.reason else self.level


YES = Verdict(FAITHFUL)


def neuron_verdict(format: str, name: str, reset: str, decays: tuple[float, ...] = ()) -> Verdict:
    """`decays`: the shares that are kept, where they are known."""
    if name not in NEURONS:
        return Verdict(REFUSED, "a plugin's equation is not known here")
    if format != "nir":
        return YES
    if name == "alif":
        return Verdict(REFUSED, "no NIR primitive has a threshold that adapts")
    if name == "dynamic":
        return Verdict(REFUSED, "no NIR primitive is of second order")
    if reset == "soft":
        return Verdict(REFUSED, "NIR neurons reset to v_reset, not by the threshold")
    if 1.0 in decays:
        return Verdict(REFUSED, "a decay of 1 would need an infinite time constant")
    kind = {"cuba_lif": "CubaLIF", "plif": "LIF, with the trained decay"}.get(name, "LIF")
    return Verdict(FAITHFUL, kind)


def encoder_verdict(format: str, name: str) -> Verdict:
    if name not in ENCODERS:
        return Verdict(REFUSED, "a plugin's equation is not known here")
    if name == "poisson":
        return Verdict(REFUSED, "it draws its spikes, and the file has no random numbers")
    if format == "nir" and name == "learned":
        return Verdict(REFUSED, "its matrix belongs to no layer, and the contract holds none")
    return Verdict(FAITHFUL, "in the contract, before the graph") if format == "nir" else YES


def decoder_verdict(format: str, name: str) -> Verdict:
    if name not in DECODERS:
        return Verdict(REFUSED, "a plugin's equation is not known here")
    if name == "voltage":
        return Verdict(REFUSED, "it reads values, and files hold actions alone")
    if format == "nir" and name == "ilc":
        return Verdict(REFUSED, "NIR leaves the delay of a recurrent connection open")
    if format == "nir" and name == "learned":
        return Verdict(REFUSED, "its matrix over all spike steps belongs to no layer")
    return Verdict(FAITHFUL, "in the contract, behind the graph") if format == "nir" else YES


def dense_verdict(format: str) -> Verdict:
    if format == "nir":
        return Verdict(REFUSED, "a dense actor has no neurons; give c or onnx")
    return YES


def verdicts(format: str, config: ActorConfig) -> dict[str, Verdict]:
    """By the config group of each part."""
    if isinstance(config.actor, MLPConfig):
        return {"actor": dense_verdict(format)}
    encoder, neuron, decoder = config.encoder, config.neuron, config.decoder
    assert isinstance(encoder, EncoderConfig)
    assert isinstance(neuron, NeuronConfig)
    assert isinstance(decoder, DecoderConfig)
    keys = ("voltage_decay", "current_decay") if neuron.name != "plif" else ()
    decays = tuple(getattr(neuron, key) for key in keys if hasattr(neuron, key))
    return {
        "encoder": encoder_verdict(format, encoder.name),
        "neuron": neuron_verdict(format, neuron.name, neuron.reset, decays),
        "decoder": decoder_verdict(format, decoder.name),
    }


def check(format: str, config: ActorConfig) -> dict[str, Verdict]:
    """The verdicts; BadRequest where a part is refused, by its name."""
    parts: dict[str, Any] = vars(config)
    answers = verdicts(format, config)
    for group, verdict in answers.items():
        if verdict.level == REFUSED:
            remedy = f"cannot hold {group}={parts[group].name}: {verdict.reason}"
            raise BadRequest("format", format, remedy)
    return answers


def table() -> list[str]:
    """All of it as lines of Markdown."""
    rows: list[tuple[str, list[Verdict]]] = []
    for name in NEURONS:
        for reset in ("hard", "soft") if name != "dynamic" else ("hard",):
            row = [neuron_verdict(format, name, reset) for format in FORMATS]
            rows.append((f"neuron `{name}`, {reset} reset", row))
    row = [neuron_verdict(format, "lif", "hard", (1.0,)) for format in FORMATS]
    rows.append(("neuron `lif` or `cuba_lif` with a decay of 1", row))
    rows += [(f"encoder `{n}`", [encoder_verdict(f, n) for f in FORMATS]) for n in ENCODERS]
    rows += [(f"decoder `{n}`", [decoder_verdict(f, n) for f in FORMATS]) for n in DECODERS]
    rows.append(("dense actor (`mlp`)", [dense_verdict(format) for format in FORMATS]))
    rows.append(("parts of a plugin", [neuron_verdict(format, "", "hard") for format in FORMATS]))
    lines = [f"| | {' | '.join(f'`{format}`' for format in FORMATS)} |", "|---|---|---|---|"]
    return lines + [f"| {name} | {' | '.join(map(str, row))} |" for name, row in rows]
