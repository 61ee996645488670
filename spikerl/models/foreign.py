"""Reads policies that other programs trained, without running code from their files.

`popsan`      the actors of combra-lab/pop-spiking-deep-rl (Tang et al., arXiv:2010.09635): of TD3
              and DDPG; of SAC, without the dense network of its deviations; of PPO, whose mean is
              not scaled to the action bounds
`ilc_san`     the actors of lucifer2859/ILC-SAN (Chen et al., arXiv:2401.05444), all connections
`dense`       ReLU layers and tanh: l1 l2 l3, fc1 fc2 fc_mu (xuzijie32/ANN2SNN-CRPI,
              arXiv:2601.21778), pi.0 pi.2 pi.4 (ILC-SAN's baseline)

Shape legend   O observation entries, A action entries, P neurons of one output population,
N neurons, I inputs of a layer.
"""

from __future__ import annotations

import os
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from spikerl.errors import BadRequest, first_line
from spikerl.models.actor_config import ActorConfig
from spikerl.models.networks import build_actor
from spikerl.models.normalizer import RunningNorm
from spikerl.models.pickles import check_torch_file, read_arrays
from spikerl.models.policy import Policy
from spikerl.types import Task

# These programs do not save how many observations their statistics cover. PopSAN's published
# policies were trained for this many steps; it matters only when init_from collects further ones.
POPSAN_OBSERVATIONS = 1_000_000
MAX_BYTES = 1 << 30

# Names of a dense actor's layers, ordered by number, and the name of a last layer without number.
DENSE = (
    (r"l(\d+)", None),
    (r"fc(\d+)", "fc_mu"),
    (r"pi\.(\d+)", None),
)
# Tensors in a file that do not take part in mapping an observation to the mean action.
BESIDE = re.compile(
    r"log_std|log_std_network\.\d+\.(weight|bias)|fc_std\.(weight|bias)"
    r"|neuron\d+\.(thre|act_buffer)"
)


@dataclass
class Foreign:
    """A policy's parameters under this program's names, and what its file implies about it."""

    kind: str  # popsan, ilc_san or dense
    weights: dict[str, Tensor]
    obs: int
    act: int
    hidden: list[int]
    encoder: int | None = None  # neurons of one population; None: there are no receptive fields
    decoder: int | None = None
    normalises: bool = True  # whether the training code normalises observations
    scales: bool = True  # whether it scales actions by the task's bound

    @property
    def described(self) -> str:
        sizes = f"{self.hidden} hidden"
        if self.kind == "dense":
            return f"dense, {sizes}"
        if self.encoder is None:
            return f"{sizes}, output populations {self.decoder}"
        return f"{sizes}, populations {self.encoder} and {self.decoder}"


def recognise(weights: Mapping[str, Tensor], path: Path, key: str = "popsan") -> Foreign:
    """Identify the actor by its weights' names and shapes; BadRequest if they are inconsistent."""
    foreign = BadRequest(key, path, "is not an actor of a form that is known (see docs/import.md)")
    own = {name: t for name, t in weights.items() if not BESIDE.fullmatch(name)}
    try:
        spiking = "decoder.decoder.weight" in own
        read = _spiking(own) if spiking else _dense(own)
    except (KeyError, ValueError, IndexError, TypeError):  # len() of a number raises the last
        raise foreign from None
    if not all(t.is_floating_point() and t.isfinite().all() for t in weights.values()):
        raise BadRequest(key, path, "holds values that are not finite numbers")
    if "encoder.std" in weights and not weights["encoder.std"].all():
        raise BadRequest(key, path, "has a receptive field of no width (encoder.std)")
    if "log_std" in weights:  # PPO's
        read.normalises = read.scales = False
    return read


def _spiking(weights: dict[str, Tensor]) -> Foreign:
    """Read a spiking actor; ValueError, KeyError or IndexError unless names and shapes agree."""
    act, one, decoder = weights["decoder.decoder.weight"].shape
    names = layer_names(weights)
    widths = [len(weights[f"{name}.bias"]) for name in names]
    expected = {"decoder.decoder.weight": (act, 1, decoder), "decoder.decoder.bias": (act,)}
    encoder = None
    if "encoder.mean" in weights:
        _, obs, encoder = weights["encoder.mean"].shape
        expected |= dict.fromkeys(("encoder.mean", "encoder.std"), (1, obs, encoder))
        inputs = obs * encoder
    else:
        inputs = obs = weights[f"{names[0]}.weight"].shape[1]
    for name, i, n in zip(names, [inputs, *widths[:-1]], widths, strict=True):
        expected |= {f"{name}.weight": (n, i), f"{name}.bias": (n,)}
    population = act * decoder
    within = {
        "snn.conn.weight": (population, 1, decoder), "snn.conn.bias": (population,),
        "snn.weight": (population,), "snn.bias": (population,),
    }  # fmt: skip
    connected = weights.keys() & within
    if "snn.conn.bias" in connected and "snn.conn.weight" not in connected:
        raise ValueError
    expected |= {name: within[name] for name in connected}
    if {name: tuple(t.shape) for name, t in weights.items()} != expected:
        raise ValueError
    if one != 1 or widths[-1] != population or len(names) < 2:
        raise ValueError
    ours = translate(weights)
    kind = "ilc_san" if connected else "popsan"
    if connected:
        ours |= lateral(weights, act, decoder)
    return Foreign(kind, ours, obs, act, widths[:-1], encoder, decoder)


def _dense(weights: dict[str, Tensor]) -> Foreign:
    """Read a dense actor; errors as in `_spiking`."""
    for pattern, end in DENSE:
        numbers = sorted({int(m[1]) for n in weights if (m := re.match(pattern + r"\.weight", n))})
        if not numbers:
            continue
        names = [pattern.replace(r"(\d+)", str(n)).replace("\\", "") for n in numbers]
        names += [end] if end else []
        widths = [weights[f"{names[0]}.weight"].shape[1]]
        widths += [len(weights[f"{name}.bias"]) for name in names]
        expected: dict[str, tuple[int, ...]] = {}
        for name, i, n in zip(names, widths[:-1], widths[1:], strict=True):
            expected |= {f"{name}.weight": (n, i), f"{name}.bias": (n,)}
        if len(names) < 2 or {name: tuple(t.shape) for name, t in weights.items()} != expected:
            raise ValueError
        ours = _layers(weights, names)
        normalises = pattern.startswith("pi")
        return Foreign("dense", ours, widths[0], widths[-1], widths[1:-1], normalises=normalises)
    raise ValueError


def translate(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert PopSAN's parameter names and shapes to this program's."""
    ours = {
        "decoder.weight_AP": weights["decoder.decoder.weight"][:, 0],
        "decoder.bias_A": weights["decoder.decoder.bias"],
    }
    if "encoder.mean" in weights:
        ours |= {f"encoder.{name}_OP": weights[f"encoder.{name}"][0] for name in ("mean", "std")}
    return ours | _layers(weights, layer_names(weights))


def lateral(weights: Mapping[str, Tensor], act: int, size: int) -> dict[str, Tensor]:
    """ILC-SAN's connections within output populations, all kinds as a full matrix and a bias.

    That code's `conn` is a convolution with a group for each action entry: its output channel
    a P + q has the weights to neuron q from all P neurons of population a.
    """
    lateral_APP = torch.zeros(act, size, size, dtype=torch.float32)
    if "snn.conn.weight" in weights:
        lateral_APP = weights["snn.conn.weight"].view(act, size, size).transpose(1, 2).contiguous()
    elif "snn.weight" in weights:  # each neuron is connected to itself only
        lateral_APP = torch.diag_embed(weights["snn.weight"].view(act, size))
    nothing = torch.zeros(act * size, dtype=torch.float32)
    bias = weights.get("snn.conn.bias", weights.get("snn.bias", nothing))
    return {"decoder.lateral_APP": lateral_APP, "decoder.lateral_bias_N": bias}


def layer_names(weights: Mapping[str, Tensor]) -> list[str]:
    pattern = re.compile(r"snn\.hidden_layers\.(\d+)\.weight")
    hidden = sorted(int(m[1]) for name in weights if (m := pattern.fullmatch(name)))
    return [*(f"snn.hidden_layers.{i}" for i in hidden), "snn.out_pop_layer"]


def _layers(weights: Mapping[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    ours = {}
    for i, name in enumerate(names):
        ours[f"layers.{i}.weight_IN"] = weights[f"{name}.weight"].T.contiguous()
        ours[f"layers.{i}.bias_N"] = weights[f"{name}.bias"]
    return ours


def policy_of(
    foreign: Foreign,
    config: ActorConfig,
    task: Task,
    stats: tuple[np.ndarray, np.ndarray] | None,
    clip: float | None,
) -> Policy:
    """Build the policy. `stats`: the observations' mean and variance; None: no normalisation."""
    actor = build_actor(config, task.obs_dim, task.act_dim)
    for name, tensor in actor.state_dict().items():
        if name not in foreign.weights or foreign.weights[name].shape != tensor.shape:
            group = {"neurons": "neuron", "layers": "actor"}.get(part := name.split(".")[0], part)
            remedy = f"the file has no {name} of it; give what the policy was trained with"
            raise BadRequest(group, getattr(config, group).name, remedy)
    actor.load_state_dict(foreign.weights)
    norm = RunningNorm(task.obs_dim, clip)
    if stats is not None:
        mean, var = (torch.from_numpy(array.copy()) for array in stats)
        count = torch.tensor(POPSAN_OBSERVATIONS, dtype=torch.int64)
        norm.load({"count": count, "mean": mean, "var": var})
    return Policy(task, config, actor, norm)


def read_weights(path: Path, key: str = "popsan") -> dict[str, Tensor]:
    """A state dict; torch's reader admits tensors and plain containers only."""
    _check_file(key, path)
    try:
        check_torch_file(path)
        with warnings.catch_warnings(action="ignore"):  # torch warns of files that fail below
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch's message advises loading that runs the file's code
        raise BadRequest(key, path, "cannot be read as tensors: it holds more") from None
    except Exception as error:  # torch raises many types on a damaged or hostile file
        reason = first_line(error)
        raise BadRequest(key, path, f"cannot be read as tensors: {reason}") from None
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(t, Tensor) for name, t in weights.items()
    ):
        raise BadRequest(key, path, "holds no state dict")
    for t in weights.values():  # a stride of 0 makes a small file describe a tensor of any size
        plain = t.layout == torch.strided and t.device.type == "cpu" and t.is_floating_point()
        if not plain:
            raise BadRequest(key, path, "holds other than plain tensors")
        if t.nbytes > t.untyped_storage().nbytes():
            raise BadRequest(key, path, "holds a tensor larger than its values")
    return {name: t.float() for name, t in weights.items()}


def read_stats(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """PopSAN's pickled [mean, var] of the observations."""
    _check_file("stats", path)
    try:
        mean, var = (array.astype(np.float64) for array in read_arrays(path.read_bytes()))
    except Exception as error:  # a damaged or hostile pickle raises almost anything
        reason = first_line(error)
        raise BadRequest("stats", path, f"cannot be read as two arrays: {reason}") from None
    if (
        mean.ndim != 1
        or not len(mean)
        or mean.shape != var.shape
        or not np.isfinite([mean, var]).all()
    ):
        raise BadRequest("stats", path, "holds no mean and variance of one length")
    if (var < 0).any():
        raise BadRequest("stats", path, "holds a negative variance")
    return mean, var


def _check_file(key: str, path: Path) -> None:
    if not os.path.isfile(path):
        raise BadRequest(key, path, "no such file")
    if path.stat().st_size > MAX_BYTES:
        raise BadRequest(key, path, f"is larger than {MAX_BYTES} bytes")
