"""Which parts of a policy each format can hold, and why not the others; the only such list."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from spikerl.errors import BadRequest
from spikerl.export.contract import DECODERS, ENCODERS, NEURONS
from spikerl.models.actor import MLPActor, SpikingActor
from spikerl.models.actor_config import ActorConfig, MLPConfig
from spikerl.models.networks import ACTORS
from spikerl.snn.conv import ConvConfig
from spikerl.snn.decoders import DecoderConfig
from spikerl.snn.encoders import EncoderConfig
from spikerl.snn.neurons import NeuronConfig

FAITHFUL, APPROXIMATE, REFUSED = "faithful", "approximate", "refused"


@dataclass(frozen=True)
class Verdict:
    """How a format holds one part of a policy."""

    level: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.level}: {self.reason}" if self.reason else self.level


YES = Verdict(FAITHFUL)
INSIDE = {"nir": "the graph", "loihi": "the chip"}  # what encoder and decoder lie outside of


def neuron_verdict(format: str, name: str, reset: str, decays: tuple[float, ...] = ()) -> Verdict:
    """`decays`: the neuron's decays that are fixed by the config."""
    if name not in NEURONS:
        return Verdict(REFUSED, "a plugin's equation is not known here")
    if name == "residual_if":
        return Verdict(REFUSED, "a decision may begin with what the one before left")
    if format in ("c", "onnx"):
        return YES
    none = {"nir": "no NIR primitive", "loihi": "no neuron of the chip"}[format]
    if name == "alif":
        return Verdict(REFUSED, f"{none} has a threshold that adapts")
    if name == "dynamic":
        return Verdict(REFUSED, f"{none} is of second order")
    if reset == "soft":
        where = {"nir": "NIR neurons reset to v_reset", "loihi": "the chip's neurons reset to 0"}
        return Verdict(REFUSED, f"{where[format]}, not by the threshold")
    if format == "loihi":
        return Verdict(APPROXIMATE, "weights of 8 bits, decays of 1/4096")
    if 1.0 in decays:
        return Verdict(REFUSED, "a decay of 1 would need an infinite time constant")
    kind = {"cuba_lif": "CubaLIF", "plif": "LIF, with the trained decay"}.get(name, "LIF")
    return Verdict(FAITHFUL, kind)


def encoder_verdict(format: str, name: str) -> Verdict:
    if name not in ENCODERS:
        return Verdict(REFUSED, "a plugin's equation is not known here")
    if name == "poisson":
        return Verdict(REFUSED, "it draws its spikes, and the file has no random numbers")
    if format in ("c", "onnx"):
        return YES
    if format == "loihi" and name not in ("population", "tanh_population"):
        return Verdict(REFUSED, "it gives currents, and the chip takes spikes")
    if name == "learned":
        return Verdict(REFUSED, "its matrix belongs to no layer, and the contract holds none")
    return Verdict(FAITHFUL, f"in the contract, before {INSIDE[format]}")


def decoder_verdict(format: str, name: str) -> Verdict:
    if name not in DECODERS:
        return Verdict(REFUSED, "a plugin's equation is not known here")
    if name == "voltage":
        return Verdict(REFUSED, "it reads values, and files hold actions alone")
    if format in ("c", "onnx"):
        return YES
    if name == "learned":
        return Verdict(REFUSED, "its matrix over all spike steps belongs to no layer")
    if name == "ilc" and format == "nir":
        return Verdict(REFUSED, "NIR leaves the delay of a recurrent connection open")
    if name == "ilc":
        return Verdict(APPROXIMATE, "lateral weights of 8 bits, on the chip")
    return Verdict(FAITHFUL, f"in the contract, behind {INSIDE[format]}")


def dense_verdict(format: str) -> Verdict:
    if format in ("nir", "loihi"):
        return Verdict(REFUSED, "a dense actor has no neurons; give c or onnx")
    return YES


def early_exit_verdict(format: str) -> Verdict:
    if format == "onnx":
        return Verdict(REFUSED, "every observation of its graph goes through all spike steps")
    if format == "nir":
        return Verdict(REFUSED, "nothing in a NIR graph ends it")
    if format == "loihi":
        return Verdict(REFUSED, "the chip computes all spike steps")
    return YES


def verdicts(format: str, config: ActorConfig, exits_early: bool = False) -> dict[str, Verdict]:
    """Verdicts by the config group of each part, and on the early exit if there is one."""
    if ACTORS.part(config.actor) not in (SpikingActor, MLPActor):
        return {"actor": Verdict(REFUSED, "a plugin's equation is not known here")}
    if isinstance(config.actor, ConvConfig):
        return {"actor": Verdict(REFUSED, "no format has its convolutions here")}
    if isinstance(config.actor, MLPConfig):
        return {"actor": dense_verdict(format)}
    encoder, neuron, decoder = config.encoder, config.neuron, config.decoder
    assert isinstance(encoder, EncoderConfig)
    assert isinstance(neuron, NeuronConfig)
    assert isinstance(decoder, DecoderConfig)
    keys = ("voltage_decay", "current_decay") if neuron.name != "plif" else ()
    decays = tuple(getattr(neuron, key) for key in keys if hasattr(neuron, key))
    early = {"early_exit": early_exit_verdict(format)} if exits_early else {}
    return {
        **early,
        "encoder": encoder_verdict(format, encoder.name),
        "neuron": neuron_verdict(format, neuron.name, neuron.reset, decays),
        "decoder": decoder_verdict(format, decoder.name),
    }


def check(format: str, config: ActorConfig, exits_early: bool = False) -> dict[str, Verdict]:
    """The verdicts; BadRequest that names a part if it is refused."""
    parts: dict[str, Any] = vars(config)
    answers = verdicts(format, config, exits_early)
    for group, verdict in answers.items():
        if verdict.level == REFUSED:
            part = f"{group}={parts[group].name}" if group in parts else group
            remedy = f"cannot hold {part}: {verdict.reason}"
            raise BadRequest("format", format, remedy)
    return answers
