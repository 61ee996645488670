"""From what was typed to what Hydra gets: paths, flags, a config file's place among overrides."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from shell import refusal, spikerl

from spikerl.cli.compose import deferred, expand
from spikerl.cli.keys import known_keys
from spikerl.cli.words import split, unquoted
from spikerl.config.yaml_file import conf_folder, group_options, quoted
from spikerl.kernels import build


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refused(command: str, *args: str) -> str:
    return str(refusal(expand, command, args))


# --- paths ----------------------------------------------------------------------------------

NAMES = ["sweep/env=Ant,seed=1", "a b", "it's", "a[/b]", "~/x", "ü", "a\\b", "a\\", "100%", "(x)",
         "{y}", "a:b", "#", 'say "x"', "1e3", "null", "seed=[4],x='2'"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", ["run", "run_dir"])
def test_a_path_is_taken_as_it_is_typed(key: str, name: str) -> None:
    (override,) = expand("eval", [f"{key}={name}"])
    value = OverridesParser.create().parse_override(override).value()
    assert (None if name == "null" else name) == (value if value is None else str(value))


@pytest.mark.parametrize("typed", ["'a=b'", '"a, b"', "", "null"])
def test_a_path_in_quotes_is_left_alone(typed: str) -> None:
    assert expand("eval", [f"run={typed}"]) == [f"run={typed}"]


def test_a_sweep_over_paths_is_one() -> None:
    assert expand("eval", ["-m", "run=a,b"]) == ["run=a,b", "-m"]
    assert expand("eval", ["-m", "run=choice(a,b)"]) == ["run=choice(a,b)", "-m"]
    for name in ("s/seed=0", "s/seed=0,env=Ant"):  # a folder of an earlier sweep
        assert expand("train", ["-m", f"init_from={name}"]) == [f"init_from='{name}'", "-m"]


def test_other_values_are_hydras() -> None:
    assert expand("train", ["algo={name: td3}", "seed=a=b"]) == ["algo={name: td3}", "seed=a=b"]


@pytest.mark.parametrize("value", [*NAMES, "'", "\\'", "''", "a'b'c"])
def test_quoted(value: str) -> None:
    override = OverridesParser.create().parse_override(f"x={quoted(value)}")
    assert override.value() == value
    assert unquoted(quoted(value)) == value


@pytest.mark.parametrize(
    ("value", "bare"),
    [("'a'", "a"), ('"a b"', "a b"), ("a", "a"), ("'a", "'a"), ("'a\"", "'a\""), ("", "")],
)
def test_unquoted(value: str, bare: str) -> None:
    assert unquoted(value) == bare


# --- flags ----------------------------------------------------------------------------------


def test_flags_keep_their_values() -> None:
    args = ["-c", "job", "seed=1", "--package", "algo", "-m", "env=Ant"]
    assert split(args) == (["seed=1", "env=Ant"], ["-c", "job", "--package", "algo", "-m"])
    assert split(["--info", "seed=1"]) == (["seed=1"], ["--info"])
    assert split(["--cfg=job"]) == ([], ["--cfg=job"])


def test_what_a_swept_option_brings_is_each_jobs() -> None:
    typed = ["-m", "actor=popsan,mlp", "actor.lr=1e-3", "+actor.x=[1,2]", "~actor.y", "seed=1",
             "actor.hidden_sizes=[4],[5]", "algo.gamma=0.9"]  # fmt: skip
    assert deferred(typed) == [
        "actor=popsan,mlp", "actor.lr=choice(1e-3)", "+actor.x=choice([1,2])", "~actor.y", "seed=1",
        "actor.hidden_sizes=[4],[5]", "algo.gamma=0.9", "-m"]  # fmt: skip
    typed = ["experiment=care_bn,mdc_san", "algo.gamma=0.9", "seed=1", "--multirun"]
    assert deferred(typed) == ["experiment=care_bn,mdc_san", "algo.gamma=choice(0.9)", *typed[2:]]


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--cfg", "jobs"], "--cfg=jobs: give job, hydra, all"),
        (["--cfg"], "--cfg=: give job, hydra, all"),
        (["-c", "-m"], "-c=-m: give job, hydra, all"),
        (["--cfg=x"], "--cfg=x: give job, hydra, all"),
        (["--info", "me"], "--info=me: give all, config, "),
        (["-p"], "-p=: give a group or a key"),
        (["--config-d", "x"], "--config-d=: no such flag"),
        (["-cp/x"], "-cp/x=: no such flag"),
        (["--"], "--=: no such flag"),
        (["-mc"], "-mc=: no such flag"),
    ],
)
def test_flags_that_are_wrong(args: list[str], line: str) -> None:
    assert refused("train", *args).startswith(line)


def test_each_refused_group_option_names_the_options() -> None:
    for value in ("null", "true", "3", "-1.5", "NULL", "True", "1e3", "-inf", "nan"):
        assert refused("train", f"encoder={value}") == (
            f"encoder={value}: no such option; known: analog, direct, learned,"
            " poisson, population, tanh_population"
        )
    assert "popsan/td3" in refused("train", "experiment=popsan")
    several = "no such option; --help lists what there is"
    assert refused("train", "experiment=popsan/td3,x") == f"experiment=x: {several}"
    assert expand("train", ["-m", "env='glob(H*)'"]) == ["env='glob(H*)'", "-m"]


def test_the_value_of_a_flag_is_no_override() -> None:
    for flags in (["--cfg", "hydra"], ["--cfg", "job", "--package", "env"], ["-c", "all"]):
        assert expand("train", ["seed=1", *flags]) == ["seed=1", *flags]
    resumable(name="Ant")
    assert expand("train", ["resume=run", "--cfg", "job"])[-3:] == ["resume='run'", "--cfg", "job"]
    assert refused("train", "-m", "resume=run").endswith(": one run at a time; leave out -m")


def test_to_force_a_key_that_is_there_is_to_set_it() -> None:
    typed = ["++run_dir=1e3", "++logger=csv", "++total_steps=1k", "++algo.tau=0.1", "++a.b=1"]
    plain = ["run_dir='1e3'", "logger=[csv]", "total_steps=1000", "++algo.tau=0.1", "++a.b=1"]
    assert expand("train", typed) == plain


def test_groups_that_the_actor_does_not_have() -> None:
    line = "encoder=poisson: has no effect with actor=mlp; leave it out"
    write("c.yaml", {"actor": {"name": "mlp"}, "encoder": {"name": "population"}})
    for typed in ("actor=mlp", "++actor=mlp", "config=c.yaml"):
        assert refused("train", typed, "encoder=poisson") == line
        assert refused("train", typed, "++neuron.threshold=1").startswith("++neuron.threshold=1: ")
    other = ["actor=popsan", "encoder=poisson"]
    assert expand("train", ["config=c.yaml", *other]) == other
    for both in ("dense/td3,popsan/td3", "popsan/td3,dense/td3"):  # only popsan/td3 has an encoder
        sweep = [f"experiment={both}", "encoder=poisson", "-m"]
        assert expand("train", sweep) == sweep


DENSE = re.compile(r"override /actor: (mlp|cnn|transformer)$", re.MULTILINE)


def test_every_dense_experiment_refuses_spiking_parts() -> None:
    folder = conf_folder() / "experiment"
    dense = [path for path in folder.rglob("*.yaml") if DENSE.search(path.read_text())]
    names = [str(path.relative_to(folder).with_suffix("")) for path in dense]
    assert {"dense/td3", "proxy_target/ann"} < {*names}
    for name in names:
        line = f"neuron=lif: has no effect with experiment={name}; leave it out"
        assert refused("train", f"experiment={name}", "neuron=lif") == line


# --- config files -----------------------------------------------------------------------------


def write(name: str, data: object) -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(json.dumps(data))  # JSON is YAML


def test_typed_values_come_after_the_files() -> None:
    write("a=1/config.yaml", {"seed": 1, "algo": {"name": "td3", "tau": 0.1}, "run_dir": "x"})
    args = ["-c", "job", "seed=3", "config=a=1/config.yaml", "total_steps=5"]
    assert expand("train", args) == [
        "algo='td3'", "algo.name='td3'", "algo.tau=0.1", "seed=3", "total_steps=5", "-c", "job",
    ]  # fmt: skip


@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_config_is_read_however_it_is_written(prefix: str) -> None:
    write("c.yaml", {"seed": 7})
    assert expand("train", [f"{prefix}config=c.yaml"]) == ["seed=7"]


def test_the_last_config_counts() -> None:
    write("a.yaml", {"seed": 1})
    write("b.yaml", {"seed": 2})
    assert expand("train", ["config=a.yaml", "config='b.yaml'"]) == ["seed=2"]
    assert expand("train", ["config=null"]) == ["config=null"]


@pytest.mark.parametrize(
    "data",
    [
        {"seed": "${oc.env:HOME}"},
        {"actor": {"name": "popsan", "hidden_sizes": ["${oc.decode:'4'}"]}},
        {"env": {"name": "gym", "id": "module:Env-v0"}},
        {"env": {"name": "gym", "id": ["module:Env-v0"]}},
    ],
    ids=str,
)
def test_what_a_file_may_not_say(data: object) -> None:
    write("c.yaml", data)
    assert "not accepted from c.yaml, as it may run code; if it is to be trusted, type " in refused(
        "train", "config=c.yaml"
    )


def test_a_module_to_import_is_typed() -> None:
    write("c.yaml", {"env": {"name": "gym", "id": "module:Env-v0"}, "seed": 1})
    for typed in ("env.id=module:Env-v0", "env.id=Other-v0"):
        args = expand("train", ["config=c.yaml", typed])
        assert args == ["env='gym'", "env.name='gym'", "seed=1", typed]


def test_a_path_for_an_environment_is_typed() -> None:
    """A config file's path is refused until it is typed; the file's other arguments are kept, but
    a second path in it is refused.
    """
    kwargs = {"path": "/a", "speed": 2.0}
    write("c.yaml", {"env": {"name": "gym", "kwargs": kwargs}, "seed": 1})
    refusal = refused("train", "config=c.yaml")
    assert refusal.startswith("env.kwargs.path=/a: not accepted from c.yaml")
    assert refusal.endswith("type env.kwargs.path=... on the command line")
    typed = ["config=c.yaml", "env.kwargs.path=/a"]
    held = ["env='gym'", "env.name='gym'", "env.kwargs=null", "env.kwargs={speed:2.0}", "seed=1"]
    assert expand("train", typed) == [*held, "++env.kwargs.path=/a"]
    whole = ["config=c.yaml", "env.kwargs={path: /b}"]  # replaces all env.kwargs of the file
    own = ["env='gym'", "env.name='gym'", "seed=1", "++env.kwargs={path: /b}"]
    assert expand("train", whole) == own
    write("c.yaml", {"env": {"name": "gym", "kwargs": {**kwargs, "other": "/b"}}, "seed": 1})
    assert refused("train", *typed).startswith("env.kwargs.other=/b: not accepted from c.yaml")


def resumable(**env: str) -> None:
    write("run/manifest.json", {"status": "preempted"})
    write("run/config.yaml", {"env": env, "seed": 4, "total_steps": 10})


def test_resume() -> None:
    resumable(name="Ant")
    expected = ["env='Ant'", "env.name='Ant'", "seed=4"]
    for typed in ("resume=run", "++resume=run"):
        args = expand("train", [typed, "total_steps=20"])
        assert args == [*expected, "resume='run'", "total_steps=20"]


def test_resume_confirms_the_module_of_its_environment() -> None:
    resumable(name="gym", id="module:Env-v0")
    assert refused("train", "resume=run").startswith("env.id=module:Env-v0: not accepted from run")
    line = refused("train", "resume=run", "env.id=other:Env-v0")
    assert line.startswith("env.id=other:Env-v0: a resumed run keeps it")
    typed = ["resume=run", "env.id=module:Env-v0"]
    assert expand("train", typed)[-2:] == ["resume='run'", "env.id=module:Env-v0"]


@pytest.mark.parametrize("args", [["config=c.yaml", "resume=run"], ["resume=run", "config=c.yaml"]])
def test_resume_takes_no_other_config(args: list[str]) -> None:
    resumable(name="Ant")
    write("c.yaml", {"seed": 9})
    assert refused("train", *args).startswith("config=c.yaml: a resumed run keeps it")


def test_known_keys() -> None:
    keys = known_keys("train")
    assert {"env", "env.id", "algo.batch_size", "seed", "experiment"} <= set(keys)
    assert not [key for key in keys if key.startswith("hydra")]
    assert known_keys("doctor") == ["json"]


def test_group_options() -> None:
    actors = ["care_bn", "cnn", "conv", "mlp", "popsan", "spikeformer", "transformer"]
    assert group_options("actor") == actors
    assert {"care_bn", "popsan/ddpg", "popsan/td3"} < set(group_options("experiment"))


def test_requests_follow_each_other_in_one_process() -> None:
    first = spikerl("train", "env=Ants").line
    spikerl("train", "--cfg", "job")
    spikerl("eval", "run=nowhere")
    spikerl("train", "--help")
    assert first == "env=Ants: no such option; did you mean Ant?"
    assert spikerl("train", "env=Ants").line == first


def test_a_resume_keeps_what_the_run_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resume keeps the kernel, unless the device differs, and threads, unless world_size does."""
    choices = {"threads": "3", "kernel": "cpu/avx2", "device": "cpu"}
    chosen = {name: {"choice": choice} for name, choice in choices.items()}
    monkeypatch.setattr(build, "supported_paths", lambda: ["avx2", "portable"])
    manifest = {"resolved": chosen, "world_size": 2, "num_envs": 4}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "config.yaml").write_text("seed: 4\nworld_size: 8\nnum_envs: null\n")

    def kept(*args: str) -> set[str]:
        found = set(expand("train", [f"resume={tmp_path}", *args]))
        return found - {"seed=4", f"resume='{tmp_path}'"}

    kernel = {"device=cpu", "kernel=cpu", "kernel.path=avx2"}
    assert kept() == {"num_envs=4", "world_size=2", "threads=3", *kernel}
    assert kept("device=cuda") == {"num_envs=4", "world_size=2", "threads=3", "device=cuda"}
    assert kept("world_size=4") == {"num_envs=4", "world_size=4", *kernel}
    for name, value in (("RANK", "0"), ("MASTER_ADDR", "a"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WORLD_SIZE", "1")  # as torchrun sets it
    assert kept() == {"num_envs=4", "world_size=1", *kernel}
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert kept() == {"num_envs=4", "world_size=2", "threads=3", *kernel}
    chosen["device"]["choice"] = "cuda:0"
    chosen["kernel"]["choice"] = "triton/graphs"  # CUDA graphs, for one worker only
    manifest["world_size"] = 1
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    plain = {"kernel=triton", "kernel.path=null"}
    assert kept() == {"num_envs=4", "world_size=2", "kernel.path=null"}  # no GPU is seen
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert kept() == {"num_envs=4", "world_size=2", *plain}
    moved = {"num_envs=4", "world_size=2", "device=cuda", "kernel.path=null"}
    assert kept("device=cuda") == moved
    monkeypatch.setenv("WORLD_SIZE", "1")
    graphs = {"kernel=triton", "kernel.path=graphs"}
    assert kept() == {"num_envs=4", "world_size=1", "threads=3", *graphs}
    chosen["kernel"]["choice"] = "cpu/${evil}"
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert not any("evil" in arg for arg in expand("train", [f"resume={tmp_path}"]))


def test_a_resume_on_another_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A path of the C++ kernel that was chosen automatically and does not exist here is dropped."""
    chosen = {"device": "cpu", "threads": 1, "kernel": "cpu/avx512"}
    resolved = {name: {"choice": choice} for name, choice in chosen.items()}
    monkeypatch.setattr(build, "supported_paths", lambda: ["avx2", "portable"])

    def kept(path: str | None, *typed: str) -> set[str]:
        write("run/manifest.json", {"resolved": resolved, "world_size": 1, "num_envs": 3})
        write("run/config.yaml", {"kernel": {"name": "auto", "path": path}})
        own = {"kernel='auto'", "kernel.name='auto'", "resume='run'", "kernel.path=null"}
        return set(expand("train", ["resume=run", *typed])) - own

    same = {"num_envs=3", "threads=1", "world_size=1", "device=cpu"}
    assert kept(None) == {*same, "kernel=cpu"}
    assert kept("avx512") == {*same, "kernel=cpu", "kernel.path=avx512"}  # refused later
    assert kept("avx512", "kernel.path=avx2") == {*same, "kernel.path=avx2"}
    named = {"kernel=reference", "threads=2", "num_envs=3", "world_size=1", "device=cpu"}
    assert kept(None, "kernel=reference", "threads=2") == named


@pytest.mark.parametrize("typed", [
    "+hydra={callbacks:{x:{_target_:os.system}}}", "hydra.callbacks=${x}", "+hydra.callbacks.x=1",
    "+hydra.job_logging.handlers.x={class:subprocess.Popen,args:[touch,hit]}", "hydra.run.dir=x",
    "hydra.launcher.x=${oc.env:HOME}", "hydra/callbacks=x", "env@hydra.callbacks.x=Ant",
    "hydra.job.env_set.LD_PRELOAD=x", "~hydra.launcher", "+hydra.searchpath=[x]",
])  # fmt: skip
def test_hydra_settings_that_could_run_code(typed: str) -> None:
    key = typed.partition("=")[0]
    assert str(refusal(expand, "train", [typed])).startswith(f"{key}=")
    expand("train", ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweeper.max=3"])


def test_an_experiment_beside_a_file_that_would_undo_it() -> None:
    """An experiment is refused beside a file that sets all its keys, but accepted beside a smaller
    file, even one that names algo and actor.
    """
    whole = dict.fromkeys(
        ["precision", "backend", "energy", "seed", "total_steps", "steps_per_epoch",
         "eval_episodes", "num_envs", "scaling", "deterministic", "env"], 1
    )  # fmt: skip
    write("c.yaml", {**whole, "algo": {"name": "td3"}, "actor": {"name": "popsan"}})
    assert refused("train", "config=c.yaml", "experiment=dense/td3") == (
        "experiment=dense/td3: c.yaml sets all that an experiment does; leave one of them out"
    )
    write("seed.yaml", {"seed": 1})
    args = expand("train", ["config=seed.yaml", "experiment=dense/td3"])
    assert args == ["seed=1", "experiment=dense/td3"]
    write("part.yaml", {"algo": "sac", "actor": "popsan", "seed": 7})
    args = expand("train", ["config=part.yaml", "experiment=mdc_san"])
    assert sorted(args) == ["actor='popsan'", "algo='sac'", "experiment=mdc_san", "seed=7"]
