"""Loggers: views of metrics.jsonl for other programs, each with every number of it.

`tensorboard`   events below tb/
`csv`           metrics.csv, a column for each number by its name in metrics.jsonl
`prometheus`    metrics.prom, the last row as gauges, for a collector of text files
`wandb`         Weights & Biases; WANDB_MODE=offline needs no account
`mlflow`        MLflow, at MLFLOW_TRACKING_URI

A resumed run goes on in the same view, and no view's steps go back. The first three are files
(`logger_files.py`), the others services (`services.py`). Here is what they share: their names, and
the names that numbers have in them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from spikerl.errors import BadRequest

# The tag of each number of metrics.jsonl, as users of other libraries know it. What is not here is
# train/NAME.
TAGS = {
    "train_return": "rollout/ep_rew_mean",
    "train_episodes": "rollout/episodes",
    "eval_return": "eval/mean_reward",
    "eval_return_std": "eval/std_reward",
    "eval_length": "eval/mean_ep_length",
    "updates": "train/n_updates",
    "temperature": "train/ent_coef",
    "layer_firing_rates": "layers/firing_rate",
    "layer_window_fractions": "layers/window_fraction",
    "layer_silent": "layers/silent",
    "layer_saturated": "layers/saturated",
    "macs": "decision/macs",
    "acs": "decision/acs",
    "modelled_45nm_nj": "modelled/45nm_nj",
    "modelled_memory_nj": "modelled/memory_nj",
    "epoch": "time/epoch",
    "step": "time/total_timesteps",
    "env_steps_per_s": "time/fps",
    "updates_per_s": "time/updates_per_s",
    "wall_s": "time/time_elapsed",
    "cpu_s": "time/cpu_seconds",
    "energy_j": "energy/joules",
    "energy_gpu_j": "energy/gpu_joules",
    "energy_cpu_j": "energy/cpu_joules",
    "energy_train_j": "energy/train_joules",
    "energy_eval_j": "energy/eval_joules",
    "power_w": "energy/watts",
}
WITH_ENCODER = ("layer_firing_rates",)  # from layer 0 on; other lists begin with layer 1
SERVICES = ("wandb", "mlflow")
NAMES = ("tensorboard", "csv", "prometheus", *SERVICES)


def check_loggers(names: Sequence[str]) -> None:
    for name in names:
        if name not in NAMES:
            raise BadRequest("logger", name, f"give a list of {', '.join(NAMES)}")
        if name in SERVICES and find_spec(name) is None:
            raise BadRequest("logger", name, f"{name} is missing; pip install 'spikerl[{name}]'")


def numbers(row: Mapping[str, Any]) -> Iterator[tuple[str, int | None, float]]:
    """Every number of a row: its name, its layer where it is one of a list, and itself."""
    for name, value in row.items():
        if isinstance(value, list):
            first = 0 if name in WITH_ENCODER else 1
            layers = enumerate(value, first)
            yield from ((name, i, number) for i, number in layers if number is not None)
        elif isinstance(value, int | float):
            yield name, None, value


def tagged(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row by their tags."""
    shown = {}
    for name, layer, number in numbers(row):
        tag = TAGS.get(name, f"train/{name}")
        shown[tag if layer is None else f"{tag}/{layer}"] = number
    return shown
