"""The contract of an exported file: a JSON file beside it with all that a reader must know.

Shape legend   O observation entries, P neurons of one population, A action entries.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import Tensor

from spikerl.machine import versions
from spikerl.models.actor import MLPActor
from spikerl.models.policy import Policy
from spikerl.models.policy_file import task_data
from spikerl.snn.decoders import LinearDecoder, RateDecoder
from spikerl.snn.encoders import PopulationEncoder

SCHEMA = 2  # 2: includes everything that an evaluation needs

NORMALIZER = "x = min(max((obs - mean) / std, -clip), clip)"
ACTION = "act = min(max(low + (tanh(y) + 1) * half_range, least), most)"
SPIKES = "at each of T spike steps: v += A; o = [v > threshold]; v -= threshold * o"
# Equations of the built-in parts; those of plugins are unknown and not exported.
ENCODERS = {
    "population": f"A = exp(-(x - mean)^2 / (2 std^2)); {SPIKES}",
    "poisson": "at each of T spike steps o = [u < exp(-(x - mean)^2 / (2 std^2))], u uniform",
    "tanh_population": f"A = exp(-(tanh(x) - mean)^2 / (2 std^2)); {SPIKES}",
    "analog": "the current exp(-(x - mean)^2 / (2 std^2)) at each of T spike steps",
    "direct": "the current x at each of T spike steps",
    "learned": "currents x W + b, of which entries t O to (t + 1) O drive spike step t",
}
NEURONS = {
    "lif": "v = voltage_decay r(v, o) + drive; o = [v > threshold]",
    "cuba_lif": "c = current_decay c + drive; v = voltage_decay r(v, o) + c; o = [v > threshold]",
    "plif": "v = decay r(v, o) + drive; o = [v > threshold]; decay is of the layer",
    "alif": "a = adaptation_decay a + o; v = voltage_decay r(v, o) + drive;"
    " o = [v > threshold + adaptation a]",
    "dynamic": "c = current_decay c + drive; v' = (1 - o) v + theta_r o; u' = u + theta_s o;"
    " v = v'^2 - u' + c; u = u' + theta_v v' - theta_u u'; o = [v > threshold]",
    "residual_if": "v = r(v, o) + drive; o = [v > threshold]; v begins at start threshold and what"
    " the decision before left",
}
RESETS = {"hard": "r(v, o) = v (1 - o)", "soft": "r(v, o) = v - threshold o"}
MEMBRANE = "V = voltage_decay V + weight . o + bias at each spike step, per action entry"
DECODERS = {
    "rate": "y = weight . mean(o) + bias, per action entry, of its own population",
    "membrane": f"{MEMBRANE}; y is what `read` names of V",
    "ilc": f"{MEMBRANE}; y is what `read` names of V; the population's spikes of the step before"
    " drive it through a lateral matrix",
    "linear": "y = mean(o) W + b of the last hidden layer",
    "voltage": "V = voltage_decay V + (1 - voltage_decay) (o W + b) at each spike step, per action,"
    " o of the last hidden layer; y is what `read` names of V",
    "learned": "y = (o W1 + b1) W2 + b2, o all spike steps of the last hidden layer",
}
EARLY_EXIT = (
    "with a_t = tanh(y) of the first t spike steps, the last is the first t > steps at which"
    " |a_t - a_(t-j)| < threshold in every entry for j = 1 to steps, else T"
)


def describe(format: str, policy: Policy, dt: float | None) -> dict[str, Any]:
    """The contract, except what is known only after the file is written and proven."""
    task, config, actor = policy.task, policy.config, policy.actor
    low, half_range, least, most = task.units
    mean, std = policy.norm.mean_std
    data: dict[str, Any] = {
        "schema": SCHEMA,
        "format": format,
        **task_data(task),
        "normalizer": {
            "equation": NORMALIZER,
            "mean": mean.tolist(),
            "std": std.tolist(),
            "clip": policy.norm.clip,
        },
        "action": {
            "equation": ACTION,
            "low": low.tolist(),
            "half_range": half_range.tolist(),
            "least": least.tolist(),
            "most": most.tolist(),
        },
    }
    if task.layout:  # observations are dictionaries
        data["obs_layout"] = [entry._asdict() for entry in task.layout]
    if isinstance(actor, MLPActor):
        data["network"] = "ReLU layers; y is the last layer's output"
        data["sizes"] = {"layers": [layer.bias_N.numel() for layer in actor.layers]}
    else:
        assert config.encoder
        assert config.neuron
        assert config.decoder
        neuron = NEURONS[config.neuron.name]
        if config.neuron.name != "dynamic":
            neuron += f"; {RESETS[config.neuron.reset]}"
        data |= {
            "dt": dt,
            "spike_steps": actor.spike_steps,
            "sizes": {
                "encoder": actor.encoder.outputs,
                "layers": [layer.bias_N.numel() for layer in actor.layers],
            },
            "encoder": {"equation": ENCODERS[config.encoder.name], **asdict(config.encoder)},
            "neuron": {"equation": neuron, **asdict(config.neuron)},
            "decoder": {"equation": DECODERS[config.decoder.name], **asdict(config.decoder)},
        }
        if actor.early_exit is not None:
            data["early_exit"] = {"equation": EARLY_EXIT, **asdict(actor.early_exit)}
        if format in ("nir", "loihi"):
            data["encoder"] |= encoder_arrays(actor.encoder)
            data["decoder"] |= decoder_arrays(actor.decoder)
    here = versions()
    return {**data, "versions": here, "trained_with": policy.trained_with or here}


def encoder_arrays(encoder: object) -> dict[str, Any]:
    """The encoder's receptive fields, (O, P), for formats whose file does not contain them."""
    if not isinstance(encoder, PopulationEncoder):
        return {}
    return {"mean": plain(encoder.mean_OP), "std": plain(encoder.std_OP)}


def decoder_arrays(decoder: object) -> dict[str, Any]:
    """The decoder's weights, (A, P) for populations or (N, A) for `linear`, and bias, (A,)."""
    if isinstance(decoder, RateDecoder):
        return {"weight": plain(decoder.weight_AP), "bias": plain(decoder.bias_A)}
    assert isinstance(decoder, LinearDecoder)
    return {"weight": plain(decoder.map.weight_IN), "bias": plain(decoder.map.bias_N)}


def plain(values: Tensor) -> Any:
    return values.detach().cpu().tolist()
