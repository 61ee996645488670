"""Composed configs: defaults, experiments, configs saved and read again, help, completion."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from spikerl.cli.compose import commands, expand
from spikerl.cli.help import with_meanings
from spikerl.config.build import build
from spikerl.config.yaml_file import NOT_CARRIED, conf_folder, group_options
from spikerl.errors import BadRequest

GROUPS = sorted(folder.name for folder in conf_folder().iterdir() if folder.is_dir())
# Other keys that an option needs.
NEEDS = {"env=gym": ["env.id=MountainCarContinuous-v0"], "energy=replay": ["energy.file=t.csv"],
         **{f"algo={name}": ["dataset=d"] for name in ("bc", "td3_bc", "iql", "bcq")},
         "algo=decision_transformer": ["actor=spikeformer", "dataset=d"],
         **{f"actor={name}": ["algo=decision_transformer", "dataset=d"]
            for name in ("spikeformer", "transformer")}}  # fmt: skip
# Options that only some machines can run; they compose on all.
ELSEWHERE = ("kernel=triton", "backend=nccl", "precision=fp16", "energy=zeus", "energy=replay")
# Groups without options of `train`: `base` is shared by config files, `table` is of `reproduce`.
OTHERS = ("base", "experiment", "table")
OPTIONS = [f"{g}={o}" for g in GROUPS for o in group_options(g) if g not in OTHERS]
# All options; of the tasks, whose files have the same keys, only some that differ.
THERE_AND_BACK = [
    option for option in OPTIONS
    if not option.startswith("env=") or option in ("env=gym", "env=Ant", "env=ALE/Pong_pixels")
]  # fmt: skip

OUT_OF_RANGE = {
    "-1": "seed eval_episodes algo.random_steps algo.learning_starts algo.explore_noise"
    " algo.target_noise algo.noise_clip neuron.current_decay neuron.voltage_decay algo.gamma",
    "0": "total_steps steps_per_epoch num_envs threads world_size algo.batch_size"
    " algo.policy_delay algo.replay_capacity algo.update_interval algo.norm_interval algo.tau"
    " algo.critic_lr algo.norm_clip algo.updates_per_step algo.max_grad_norm actor.spike_steps"
    " actor.lr encoder.pop_size encoder.var encoder.threshold decoder.pop_size neuron.threshold"
    " neuron.surrogate_window",
    "1.5": "algo.gamma algo.tau neuron.current_decay neuron.voltage_decay",
    "nan": "algo.gamma algo.explore_noise algo.critic_lr actor.lr neuron.threshold encoder.var",
    "inf": "algo.noise_clip algo.norm_clip algo.critic_lr encoder.threshold",
    "1001": "actor.spike_steps",
    "9223372036854775808": "seed",
    "[]": "actor.hidden_sizes algo.critic_hidden_sizes encoder.mean_range",
    "[0]": "actor.hidden_sizes algo.critic_hidden_sizes",
    "[3.0,-3.0]": "encoder.mean_range",
}
RANGES = [(key, value) for value, keys in OUT_OF_RANGE.items() for key in keys.split()]


@pytest.fixture(scope="module", autouse=True)
def hydra_at_conf() -> Iterator[None]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        yield


@pytest.fixture(scope="module")
def default() -> DictConfig:
    return compose("train")


def composed(*overrides: str) -> dict[str, Any]:
    config = compose("train", overrides=expand("train", overrides))
    return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]


def saved(folder: Path, config: dict[str, Any]) -> str:
    path = folder / "config.yaml"
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    return f"config={path}"


def test_default_is_popsan() -> None:
    published = composed("experiment=popsan/td3")
    ours = composed()
    assert ours.pop("num_envs") is None  # null: one per worker
    assert published.pop("num_envs") == 1
    assert ours["env"].pop("action_bounds") == "each"
    assert published["env"].pop("action_bounds") == "first"
    assert ours == published


def test_quirks_of_published_code_are_named() -> None:
    code = composed("experiment=popsan/ddpg_poisson", "env=Hopper")
    assert code == composed("experiment=popsan/ddpg", "env=Hopper", "encoder=poisson")
    for name in ("spikerl/td3_mpi", "dense/sac", "proxy_target/ann", "care_bn"):
        assert composed(f"experiment={name}")["env"]["action_bounds"] == "first"


def test_ilc_san_is_popsan_with_another_decoder() -> None:
    assert composed("experiment=ilc_san") == composed("experiment=popsan/td3", "decoder=ilc")


@pytest.mark.parametrize("option", sorted({*OPTIONS} - {*THERE_AND_BACK}))
def test_tasks(option: str) -> None:
    build(composed(option))


@pytest.mark.parametrize("option", THERE_AND_BACK)
def test_there_and_back(option: str, tmp_path: Path) -> None:
    first = composed(option, *NEEDS.get(option, []), "seed=3", "algo.gamma=0.5")
    again = composed(saved(tmp_path, first))
    assert again == first
    if option not in ELSEWHERE:
        build(again)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("env.id", r"it's a \ 'quoted\' name, {x 1} [y] $z # =\\"),
        ("init_from", "outputs/a b/ü"),
        ("algo.max_grad_norm", 0.5),
        ("algo.critic_lr", 1e-12),
        ("actor.hidden_sizes", [7]),
        ("encoder.mean_range", [-1e-3, 2.5]),
        ("threads", None),
        ("deterministic", True),
    ],
)
def test_values_survive(key: str, value: Any, tmp_path: Path) -> None:
    first = composed("env=gym", "env.id=x")
    OmegaConf.update(holder := OmegaConf.create(first), key, value)
    changed: Any = OmegaConf.to_container(holder)
    assert composed(saved(tmp_path, changed)) == changed


def test_typed_wins_over_config(tmp_path: Path) -> None:
    file = saved(tmp_path, composed("actor.hidden_sizes=[9]", "neuron.threshold=0.7", "seed=5"))
    new = composed(file, "actor=mlp", "seed=6", "env=Hopper")
    assert new["actor"] == composed("actor=mlp")["actor"]
    assert new["env"]["id"] == "Hopper-v5"
    assert new["neuron"]["threshold"] == 0.7
    assert new["seed"] == 6
    assert composed("seed=6", "env=Hopper", file, "actor=mlp") == new


def test_where_a_run_was_kept_is_not_carried(tmp_path: Path) -> None:
    """A config file's paths of its run, nnodes and node_rank do not carry over to a new run."""
    old = dict.fromkeys(NOT_CARRIED, "old")
    new = composed(saved(tmp_path, {**composed(), **old}))
    assert {key: new[key] for key in old} == {**dict.fromkeys(old), "nnodes": 1}


def test_version_makes_the_id(tmp_path: Path) -> None:
    assert composed("env.version=v4")["env"]["id"] == "HalfCheetah-v4"
    file = saved(tmp_path, composed("env=Ant", "env.version=v4"))
    assert composed(file)["env"]["id"] == "Ant-v4"
    assert composed(file, "env.version=v5")["env"]["id"] == "Ant-v5"


@pytest.mark.parametrize(("key", "value"), RANGES)
def test_out_of_range(default: DictConfig, key: str, value: str) -> None:
    changed = OmegaConf.merge(default, OmegaConf.from_dotlist([f"{key}={value}"]))
    with pytest.raises(BadRequest) as refused:
        build(OmegaConf.to_container(changed, resolve=True))  # type: ignore[arg-type]
    assert str(refused.value).startswith(f"{key}=")
    assert ": give " in str(refused.value)


def shell(*args: str, **environment: str) -> str:
    """The output of the program in its own process, which must not import torch."""
    code = (
        "import sys; from spikerl.cli import main as cli; status = cli.run(sys.argv[1:]);"
        " assert 'torch' not in sys.modules, 'torch'; sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help() -> None:
    usage = shell("--help")
    assert all(command in usage for command in commands())
    text = shell("train", "--help")
    for group in GROUPS:
        shown = f"\n{group}: " in text or f"\n{group}/" in text
        # `base` is shared by config files, `table` is read by `reproduce` alone.
        assert shown == (group not in ("base", "table")), group
    assert "InvertedDoublePendulum" in text
    assert "steps_per_epoch: 10000" in text


def test_help_says_what_must_be_given() -> None:
    lines = with_meanings("run: ???\nepisodes: 10\n", "eval").splitlines()
    assert lines[0].startswith("run: (required)  # a run folder")
    assert lines[1] == "episodes: 10"


def test_a_reader_that_went_away() -> None:
    command = [sys.executable, "-m", "spikerl", "train", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert (process.communicate(timeout=60)[1], process.returncode) == (b"", 0)


def test_cfg_job() -> None:
    printed = OmegaConf.create(shell("train", "--cfg", "job", "--resolve", "env=Ant", "seed=7"))
    assert printed == composed("env=Ant", "seed=7")


@pytest.mark.parametrize("args", [["{}", "--cfg", "job"], ["--cfg", "job", "{}", "seed=7"]])
def test_flags_anywhere(args: list[str], tmp_path: Path) -> None:
    file = saved(tmp_path, composed("seed=7"))
    printed = shell("train", *(arg.format(file) for arg in args), "--resolve")
    assert OmegaConf.create(printed) == composed("seed=7")


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        (
            "spikerl ",
            {
                "train",
                "bench",
                "collect",
                "compress",
                "convert",
                "doctor",
                "eval",
                "export",
                "import",
                "report",
                "reproduce",
                "runs",
            },
        ),
        ("spikerl tr", {"train"}),
        ("spikerl train env=Half", {"env=HalfCheetah"}),
        (
            "spikerl train env=Ant actor=",
            {
                "actor=care_bn",
                "actor=cnn",
                "actor=conv",
                "actor=mlp",
                "actor=popsan",
                "actor=spikeformer",
                "actor=transformer",
            },
        ),
        ("spikerl train algo.gam", {"algo.gamma="}),
        ("spikerl eval epi", {"episodes="}),
        ("spikerl reproduce table=mdc", {"table=mdc_san_table1"}),
        ("spikerl fly x", set()),
    ],
)
def test_completion(line: str, offered: set[str]) -> None:
    out = shell("-sc", "query=bash", COMP_LINE=line, COMP_POINT=str(len(line)))
    assert set(out.split()) == offered
