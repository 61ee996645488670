"""`spikerl import`: a run folder from a policy that another program trained."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np

from spikerl.config import build as configs
from spikerl.config.together import check_actions
from spikerl.envs.make import make_env, task_of
from spikerl.errors import DONE, BadRequest
from spikerl.files import shown
from spikerl.models.foreign import Foreign, policy_of, read_stats, read_weights, recognise
from spikerl.runs import folder as run_folder
from spikerl.schema import dotted
from spikerl.training.start import default_folder
from spikerl.types import Task


def main(data: dict[str, Any], argv: Sequence[str]) -> int:
    """`spikerl import`: the exit status."""
    files = {key: data.pop(key) for key in ("popsan", "dense", "stats")}
    given = [key for key in ("popsan", "dense") if files[key] is not None]
    if len(given) != 1:
        remedy = "give popsan=MODEL.pt or dense=MODEL.pt, one of them"
        raise BadRequest("popsan", files["popsan"], remedy)
    key = given[0]
    model = Path(str(files[key]))
    foreign = recognise(read_weights(model, key), model, key)
    if (foreign.kind == "dense") != (key == "dense"):
        other = "dense" if key == "popsan" else "popsan"
        raise BadRequest(key, model, f"is a {foreign.described} actor; give {other}=FILE")
    stats = statistics(files["stats"], foreign)
    asked = deepcopy(data)
    settle(data, foreign, normalises=stats is not None)
    check_typed(argv, asked, data, foreign)
    config = configs.build(data)
    for name in ("resume", "init_from", "config"):
        if (value := data[name]) is not None:
            raise BadRequest(name, value, "has no effect on an import; leave it out")
    env = make_env(config.env)
    task = task_of(env)
    env.close()
    check_task(task, foreign, key, model)
    check_actions(config.algo, task)
    policy = policy_of(foreign, config.actor, task, stats, config.algo.norm_clip)
    read = [model] if stats is None else [model, Path(str(files["stats"]))]
    sources = [shown(path) for path in read]
    facts = {"status": "done", "imported_from": sources, "algo": None}
    target = config.run.run_dir or default_folder(config, "imported")
    named = config.run.run_dir is not None
    run_folder.check_free(target, named=named, dated=True)
    record = run_folder.make_manifest(task.env_id, argv, {}, facts)
    folder = run_folder.create(target, config.raw, record, policy.save, named=named)
    seen = "" if stats is not None else "; observations are not normalised"
    print(f"{task.env_id}: {foreign.described}{seen}; run folder: {shown(folder)}")
    return DONE


def statistics(given: Any, foreign: Foreign) -> tuple[np.ndarray, np.ndarray] | None:
    """Mean and variance that normalise observations, or None. If the policy saw normalised ones,
    None has to be typed as stats=none: the file may have been forgotten.
    """
    if given is None and foreign.normalises:
        remedy = "such a policy sees normalised observations; give its MEAN_VAR.p, or stats=none"
        raise BadRequest("stats", None, remedy)
    if given in (None, "none"):
        return None
    path = Path(str(given))
    mean, var = read_stats(path)
    if len(mean) != foreign.obs:
        remedy = f"holds statistics of {len(mean)} entries; the policy has {foreign.obs}"
        raise BadRequest("stats", path, remedy)
    return mean, var


def settle(data: dict[str, Any], foreign: Foreign, *, normalises: bool) -> None:
    """Set the sizes of the policy in the config; refuse parts that do not fit its weights."""
    if not normalises:
        data["algo"] |= {"norm_clip": None, "norm_interval": None}
    if foreign.kind == "dense":
        lr = data["actor"]["lr"]
        data["actor"] = {"name": "mlp", "hidden_sizes": foreign.hidden, "lr": lr}
        return
    encoder, decoder, actor = (data[group]["name"] for group in ("encoder", "decoder", "actor"))
    if actor != "popsan":
        raise BadRequest("actor", actor, "such a policy is actor=popsan; leave it out")
    if ("pop_size" in data["encoder"]) != (foreign.encoder is not None) or encoder == "learned":
        wanted = "direct" if foreign.encoder is None else "population, poisson or analog"
        raise BadRequest("encoder", encoder, f"the file has the weights of {wanted}; give that")
    if (decoder == "ilc") != (foreign.kind == "ilc_san") or "pop_size" not in data["decoder"]:
        wanted = "ilc" if foreign.kind == "ilc_san" else "rate or membrane"
        raise BadRequest("decoder", decoder, f"the file has the weights of {wanted}; give that")
    if foreign.encoder is not None:
        data["encoder"]["pop_size"] = foreign.encoder
    data["decoder"]["pop_size"] = foreign.decoder
    data["actor"]["hidden_sizes"] = foreign.hidden


def check_typed(
    argv: Sequence[str], asked: dict[str, Any], settled: dict[str, Any], foreign: Foreign
) -> None:
    """Refuse typed settings that contradict what the imported file decides."""
    had, now = dict(dotted(asked)), dict(dotted(settled))
    for arg in argv:
        key, _, value = arg.lstrip("+").partition("=")
        if foreign.kind == "dense" and key.partition(".")[0] in ("encoder", "neuron", "decoder"):
            raise BadRequest(key, value, "a dense actor has none; leave it out")
        leaf = key if key in had else f"{key}.name"
        if leaf not in had or had[leaf] == now.get(leaf):
            continue
        if key.startswith("algo."):
            raise BadRequest(key, value, "observations are not normalised; leave it out")
        own = f"the file has {now[leaf]}" if leaf in now else f"a {foreign.described} has none"
        raise BadRequest(key, value, f"{own}; leave it out")


def check_task(task: Task, foreign: Foreign, key: str, model: Path) -> None:
    if task.choices is not None:
        raise BadRequest("env", task.env_id, "such code acts continuously, and this task's actions"
                         " are discrete")  # fmt: skip
    if (task.obs_dim, task.act_dim) != (foreign.obs, foreign.act):
        remedy = (
            f"the policy maps {foreign.obs} observations to {foreign.act} actions,"
            f" {task.env_id} needs {task.obs_dim} and {task.act_dim}"
        )
        raise BadRequest(key, model, remedy)
    if not (np.ptp(task.act_high) == 0.0 and (task.act_low == -task.act_high).all()):
        remedy = "such code scales every action entry by one symmetric bound, which this task lacks"
        raise BadRequest("env", task.env_id, remedy)
    if not foreign.scales and task.act_high[0] != 1.0:
        remedy = f"its code does not scale actions, whose bound here is {task.act_high[0]:g}, not 1"
        raise BadRequest("env", task.env_id, remedy)
