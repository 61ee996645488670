"""Policies of other programs, read without running code of theirs."""

from __future__ import annotations

import os
import pickle
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spikerl.commands import train
from spikerl.config import build as configs
from spikerl.envs.make import make_env, task_of
from spikerl.errors import BadRequest
from spikerl.models.actor import ActorConfig, SpikingActor, build_actor
from spikerl.models.normalizer import RunningNorm
from spikerl.models.pickles import check_torch_file, read_arrays
from spikerl.models.policy import Policy
from spikerl.runs import folder as run_folder
from spikerl.types import Task

# PopSAN's code does not save how many observations its statistics hold. Its published policies were
# trained for this many steps; the number matters only when init_from goes on collecting.
POPSAN_OBSERVATIONS = 1_000_000
MAX_BYTES = 1 << 30


def main(data: dict[str, Any], argv: Sequence[str]) -> int:
    """`spikerl import`: a run folder from what the public PopSAN code saved."""
    model, stats = Path(str(data.pop("popsan"))), Path(str(data.pop("stats")))
    weights = read_weights(model)
    mean, var = read_stats(stats)
    sizes = sizes_of(weights, model)
    if len(mean) != sizes["obs"]:
        remedy = f"holds statistics of {len(mean)} entries; the policy has {sizes['obs']}"
        raise BadRequest("stats", stats, remedy)
    data["encoder"]["pop_size"], data["decoder"]["pop_size"] = sizes["encoder"], sizes["decoder"]
    data["actor"]["hidden_sizes"] = sizes["hidden"]
    config = configs.build(data)
    if (name := config.actor.actor.name) != "popsan":
        raise BadRequest("actor", name, "the public PopSAN code trains actor=popsan; leave it out")
    for key in ("resume", "init_from", "config"):
        if (value := data[key]) is not None:
            raise BadRequest(key, value, "has no effect on an import; leave it out")
    env = make_env(config.env)
    task = task_of(env)
    env.close()
    if (task.obs_dim, task.act_dim) != (sizes["obs"], sizes["act"]):
        remedy = (
            f"the policy maps {sizes['obs']} observations to {sizes['act']} actions,"
            f" {task.env_id} needs {task.obs_dim} and {task.act_dim}"
        )
        raise BadRequest("popsan", model, remedy)
    if not (np.ptp(task.act_high) == 0.0 and (task.act_low == -task.act_high).all()):
        remedy = "PopSAN scales every action entry by one symmetric bound, which this task has not"
        raise BadRequest("env", task.env_id, remedy)
    clip = config.algo.norm_clip
    if clip is None:
        raise BadRequest("algo.norm_clip", None, "PopSAN's code clips observations; give 3.0")
    policy = popsan_policy(config.actor, task, weights, mean, var, clip)
    facts = {"status": "done", "imported_from": [str(model), str(stats)]}
    target = config.run.run_dir or train.default_folder(config)
    named = config.run.run_dir is not None
    run_folder.check_free(target, named=named)
    record = run_folder.make_manifest(task.env_id, argv, {}, facts)
    folder = run_folder.create(target, config.raw, record, policy.save, named=named)
    print(f"{task.env_id}: {sizes['hidden']} hidden, populations {sizes['encoder']} and"
          f" {sizes['decoder']}; run folder: {folder}")  # fmt: skip
    return 0


def popsan_policy(
    config: ActorConfig,
    task: Task,
    weights: dict[str, Tensor],
    mean: np.ndarray,
    var: np.ndarray,
    clip: float,
) -> Policy:
    actor = build_actor(config, task.obs_dim, task.act_dim)
    assert isinstance(actor, SpikingActor)
    actor.load_state_dict(translate(weights))
    norm = RunningNorm(task.obs_dim, clip)
    moments = {"mean": torch.from_numpy(mean.copy()), "var": torch.from_numpy(var.copy())}
    norm.load({"count": torch.tensor(POPSAN_OBSERVATIONS, dtype=torch.int64), **moments})
    return Policy(task, config, actor, norm)


def translate(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """PopSAN's parameter names and shapes to this program's."""
    ours = {
        "encoder.mean_OP": weights["encoder.mean"][0],
        "encoder.std_OP": weights["encoder.std"][0],
        "decoder.weight_AP": weights["decoder.decoder.weight"][:, 0],
        "decoder.bias_A": weights["decoder.decoder.bias"],
    }
    for i, layer in enumerate(layer_names(weights)):
        ours[f"layers.{i}.weight_IN"] = weights[f"{layer}.weight"].T.contiguous()
        ours[f"layers.{i}.bias_N"] = weights[f"{layer}.bias"]
    return ours


def layer_names(weights: dict[str, Tensor]) -> list[str]:
    pattern = re.compile(r"snn\.hidden_layers\.(\d+)\.weight")
    hidden = sorted(int(m[1]) for name in weights if (m := pattern.fullmatch(name)))
    return [*(f"snn.hidden_layers.{i}" for i in hidden), "snn.out_pop_layer"]


def sizes_of(weights: dict[str, Tensor], model: Path) -> dict[str, Any]:
    """The network's sizes, read off its tensors; anything inconsistent is foreign."""
    foreign = BadRequest("popsan", model, "is not the actor of the public PopSAN code")
    try:
        _, obs, encoder = weights["encoder.mean"].shape
        act, one, decoder = weights["decoder.decoder.weight"].shape
        names = layer_names(weights)
        widths = [obs * encoder, *(weights[f"{n}.bias"].shape[0] for n in names)]
        expected = {
            "encoder.mean": (1, obs, encoder),
            "encoder.std": (1, obs, encoder),
            "decoder.decoder.weight": (act, 1, decoder),
            "decoder.decoder.bias": (act,),
        }
        for name, i, n in zip(names, widths[:-1], widths[1:], strict=True):
            expected |= {f"{name}.weight": (n, i), f"{name}.bias": (n,)}
    except (KeyError, ValueError, IndexError):
        raise foreign from None
    if {name: tuple(t.shape) for name, t in weights.items()} != expected:
        raise foreign
    if one != 1 or widths[-1] != act * decoder or len(names) < 2:
        raise foreign
    if not all(t.is_floating_point() and t.isfinite().all() for t in weights.values()):
        raise BadRequest("popsan", model, "holds values that are not finite numbers")
    return {"obs": obs, "act": act, "encoder": encoder, "decoder": decoder, "hidden": widths[1:-1]}


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict; torch's reader admits tensors and plain containers only."""
    _check_file("popsan", path)
    try:
        check_torch_file(path)
        with warnings.catch_warnings(action="ignore"):  # of foreign files, which are refused below
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # whose text advises to run what the file holds
        raise BadRequest("popsan", path, "cannot be read as tensors: it holds more") from None
    except Exception as error:  # torch raises many types on a damaged or hostile file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadRequest("popsan", path, f"cannot be read as tensors: {reason}") from None
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(t, Tensor) for name, t in weights.items()
    ):
        raise BadRequest("popsan", path, "holds no state dict")
    for t in weights.values():  # a stride of 0 makes a small file describe a tensor of any size
        plain = t.layout == torch.strided and t.device.type == "cpu" and t.is_floating_point()
        if not plain:
            raise BadRequest("popsan", path, "holds other than plain tensors")
        if t.nbytes > t.untyped_storage().nbytes():
            raise BadRequest("popsan", path, "holds a tensor larger than its values")
    return {name: t.float() for name, t in weights.items()}


def read_stats(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """PopSAN's pickled [mean, var] of the observations."""
    _check_file("stats", path)
    try:
        stats = read_arrays(path.read_bytes())
        mean, var = stats
        if not all(isinstance(a, np.ndarray) and a.dtype.kind in "fi" for a in (mean, var)):
            raise pickle.UnpicklingError("something else is in it")
        mean, var = mean.astype(np.float64), var.astype(np.float64)
    except Exception as error:  # a damaged or hostile pickle raises almost anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
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
