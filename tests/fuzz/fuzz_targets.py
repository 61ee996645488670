"""The targets of fuzzing: each makes valid files once, then damages them and has them read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
import zipfile
from collections.abc import Callable
from contextlib import closing
from io import BytesIO
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import fuzz_inputs as odd
import numpy as np
import torch
import yaml
from builders import POPULATION, popsan_config, small_config
from fuzz_dataset import dataset
from safetensors.torch import load
from shell import spikerl

from spikerl.cli.compose import expand
from spikerl.commands import train
from spikerl.config import build as configs
from spikerl.distributed import launch
from spikerl.envs.make import make_env, task_of
from spikerl.errors import BadRequest
from spikerl.models.foreign import read_stats, read_weights, recognise
from spikerl.runs import folder as run_folder
from spikerl.runs.checkpoint import verified
from spikerl.runs.policies import load_policy
from spikerl.runs.rows import cut_back, read_rows
from spikerl.snn.decoders import RateConfig
from spikerl.training.session import Session
from spikerl.training.trainer import Trainer

Case = Callable[[Random], bool]  # True: it was loaded; raises BadRequest if it was refused
TINY = [
    "env=InvertedPendulum", "env.max_episode_steps=9", "total_steps=40", "steps_per_epoch=20",
    "algo.learning_starts=15", "algo.random_steps=10", "algo.batch_size=4",
    "algo.update_interval=5", "algo.norm_interval=5", "algo.replay_capacity=30",
    "eval_episodes=1", "actor.hidden_sizes=[4]",
    "algo.critic_hidden_sizes=[4]", "encoder.pop_size=3", "decoder.pop_size=3", "threads=1",
    "device=cpu", "energy=none",
]  # fmt: skip


FIRST: list[Path] = []


def trained(folder: Path) -> Path:
    """A small run in `folder`, which becomes the working folder; it is trained once per process."""
    os.chdir(folder)
    run = folder / "honest"
    if not FIRST:
        said = spikerl("train", *TINY, "run_dir=honest")
        assert said.status == 0, said
        shutil.copy(run / "metrics.jsonl", run / "discarded.jsonl")
        FIRST.append(run)
    elif FIRST[0] != run:
        shutil.copytree(FIRST[0], run, symlinks=True)
    return run


def policy_json(folder: Path) -> Case:
    run = shutil.copytree(trained(folder), folder / "run", symlinks=True)
    data = json.loads((run / "policy.json").read_text())
    whole = (run / "policy.json").read_bytes()

    def case(chance: Random) -> bool:
        text = odd.json_text(chance, data) if chance.random() < 0.7 else odd.mutated(chance, whole)
        (run / "policy.json").write_bytes(text)
        return acts(run)

    return case


def policy_tensors(folder: Path) -> Case:
    run = shutil.copytree(trained(folder), folder / "run", symlinks=True)
    tensors = load((run / "policy.safetensors").read_bytes())

    def case(chance: Random) -> bool:
        (run / "policy.safetensors").write_bytes(odd.tensors_file(chance, tensors))
        return acts(run)

    return case


def acts(run: Path) -> bool:
    policy = load_policy(run)
    act = policy(np.zeros((2, *policy.task.obs_shape)))
    low, high = (
        b.reshape(policy.task.act_shape) for b in (policy.task.act_low, policy.task.act_high)
    )
    assert ((act >= low) & (act <= high)).all(), act
    return True


def statistics(folder: Path) -> Case:
    honest = [np.arange(4.0), np.arange(1.0, 5.0)]

    def case(chance: Random) -> bool:
        (folder / "stats.p").write_bytes(odd.pickled(chance, honest))
        read_stats(folder / "stats.p")
        return True

    return case


def model(folder: Path) -> Case:
    shapes = {
        "encoder.mean": (1, 2, 3), "encoder.std": (1, 2, 3), "snn.hidden_layers.0.weight": (4, 6),
        "snn.hidden_layers.0.bias": (4,), "snn.out_pop_layer.weight": (3, 4),
        "snn.out_pop_layer.bias": (3,), "decoder.decoder.weight": (1, 1, 3),
        "decoder.decoder.bias": (1,),
    }  # fmt: skip
    honest = {name: torch.ones(shape) for name, shape in shapes.items()}
    files = []
    for zipped in (True, False):
        out = BytesIO()
        torch.save(honest, out, _use_new_zipfile_serialization=zipped)
        files.append(out.getvalue())

    def content(chance: Random) -> bytes:
        whole = chance.choice(files)
        kind = chance.randrange(4)
        if kind == 0:
            return odd.mutated(chance, whole)
        if kind == 1:
            return repacked(chance, files[0])
        if kind == 2:
            return odd.pickle_of(chance) + whole[chance.randrange(len(whole)) :]
        tensors: dict[str, Any] = dict(honest)
        name = chance.choice(sorted(tensors))
        tensors[name] = chance.choice((odd.value(chance), odd.odd_tensor(chance, tensors[name])))
        out = BytesIO()
        try:
            torch.save(tensors, out, _use_new_zipfile_serialization=chance.random() < 0.5)
        except (OverflowError, UnicodeEncodeError):
            return whole
        return out.getvalue()

    def case(chance: Random) -> bool:
        (folder / "m.pt").write_bytes(content(chance))
        recognise(read_weights(folder / "m.pt"), folder / "m.pt")
        return True

    return case


def repacked(chance: Random, whole: bytes) -> bytes:
    """The archive with other members: damaged pickles, false sizes, zip bombs."""
    out = BytesIO()
    with zipfile.ZipFile(BytesIO(whole)) as honest, zipfile.ZipFile(out, "w") as archive:
        for member in honest.infolist():
            data = honest.read(member)
            packed = zipfile.ZIP_STORED
            kind = chance.randrange(8)
            if member.filename.endswith(".pkl") and kind < 4:
                number = chance.choice((2**16, 2**31, 2**40)).to_bytes(8, "little")
                claims = data.replace(b"K\x06", b"\x8a\x08" + number, 1)
                spoilt = (odd.mutated(chance, data), odd.pickle_of(chance), claims, claims)
                data = chance.choice(spoilt)
            elif "/data/" in member.filename and kind == 0:
                data, packed = bytes(chance.choice((2**10, 2**24))), zipfile.ZIP_DEFLATED
            elif kind == 1 and chance.random() < 0.2:
                continue
            archive.writestr(member.filename, data, packed)
    return odd.damaged(chance, out.getvalue())


def checkpoint(folder: Path) -> Case:
    """Damaged checkpoints, mostly with checksums that fit, as a forger could write them."""
    honest = trained(folder)
    training = small_config(
        total_steps=40, steps_per_epoch=20, eval_episodes=1, replay_capacity=30, batch_size=4,
        critic_hidden_sizes=[4],
    )  # fmt: skip
    training.actor.actor = popsan_config([4])
    training.actor.encoder = type(POPULATION)(**{**vars(POPULATION), "pop_size": 3})
    training.actor.decoder = RateConfig(name="rate", pop_size=3)
    with closing(make_env(training.env)) as env:
        trainer = Trainer(training, task_of(env))
    latest = verified(honest, lambda text: None)
    assert latest is not None
    name = latest.folder.name
    run = folder / "run"
    kept = run / "checkpoints" / name
    shutil.copytree(honest / "checkpoints" / name, kept)
    shutil.copytree(honest / "replay", run / "replay")
    shutil.copy(honest / "metrics.jsonl", run)
    files = {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
    tensors = {path: load(data) for path, data in files.items() if path.suffix == ".safetensors"}

    def spoil(chance: Random, path: Path) -> bytes:
        if path in tensors and chance.random() < 0.8:
            return odd.tensors_file(chance, tensors[path])
        if path.suffix == ".json" and chance.random() < 0.8:
            return odd.json_text(chance, json.loads(files[path]))
        return odd.mutated(chance, files[path])

    def case(chance: Random) -> bool:
        for path, content in files.items():
            path.write_bytes(content)
        path = chance.choice(sorted(files))
        path.write_bytes(spoil(chance, path))
        if chance.random() < 0.8:
            rewrite_checksums(kept, run)
        found = verified(run, lambda text: None)
        trainer.norm.pending = []
        session: Any = SimpleNamespace(trainer=trainer, folder=run)
        return not Session.restore(session, found)

    return case


def rewrite_checksums(kept: Path, run: Path) -> None:
    try:
        data = json.loads((kept / "manifest.json").read_text())
        data.pop("seal", None)
        for names, below in ((data["files"], kept), (data["segments"], run)):
            for name in names:
                if name in ("manifest.json",) or not (below / name).is_file():
                    continue
                names[name] = hashlib.sha256((below / name).read_bytes()).hexdigest()
        text = json.dumps(data, sort_keys=True)
        data["seal"] = hashlib.sha256(text.encode()).hexdigest()
        (kept / "manifest.json").write_text(json.dumps(data))
    except (ValueError, TypeError, KeyError, AttributeError, OSError, RecursionError):
        return  # the manifest is too damaged to be rewritten


def resumed(folder: Path) -> Case:
    """Damage to a run's files outside its checkpoints; the steps of a resume up to the training."""
    run = shutil.copytree(trained(folder), folder / "run", symlinks=True)
    names = ("manifest.json", "metrics.jsonl", "discarded.jsonl", "config.yaml")
    files = {name: (run / name).read_bytes() for name in names}
    config = configs.build(yaml.safe_load(files["config.yaml"]))
    log = (run / "log.txt").read_bytes()

    def spoil(chance: Random, name: str) -> bytes:
        if name == "config.yaml":
            return yaml_text(chance, files[name])
        if name == "manifest.json" and chance.random() < 0.7:
            return odd.json_text(chance, json.loads(files[name]))
        if name == "manifest.json" or chance.random() < 0.5:
            return odd.mutated(chance, files[name])
        rows = odd.twisted(chance, [json.loads(line) for line in files[name].splitlines()])
        rows = rows if isinstance(rows, list) else [rows]
        return b"".join(json.dumps(row).encode() + b"\n" for row in rows)

    def case(chance: Random) -> bool:
        for name, content in files.items():
            (run / name).write_bytes(content)
        (run / "log.txt").write_bytes(log)
        link = run / "linked"
        link.unlink(missing_ok=True)
        name = chance.choice(names)
        if chance.random() < 0.05:  # the folder has a link to another place
            link.symlink_to(chance.choice(("/etc", "/etc/passwd", "../honest", "nowhere")))
        elif chance.random() < 0.05:
            (run / name).unlink()
            (run / name).symlink_to(
                chance.choice(("/etc/passwd", "/dev/zero", folder / "honest" / name))
            )
        else:
            (run / name).write_bytes(spoil(chance, name))
        try:
            expand("train", [f"resume={run}"])
            train.finished(run, config)
            cut_back(run, verified(run, lambda text: None).manifest["metrics_bytes"])
            run_folder.remove_results(run)
            record = run_folder.read_manifest(run, key="resume")
            run_folder.update_manifest(run, resumed=[*record.get("resumed", []), {}])
            read_rows(run / "metrics.jsonl")
            read_rows(run / "discarded.jsonl")
        finally:
            if (run / name).is_symlink():
                (run / name).unlink()
        return True

    return case


def yaml_text(chance: Random, whole: bytes) -> bytes:
    kind = chance.randrange(5)
    if kind == 0:
        return odd.mutated(chance, whole)
    if kind == 1:
        return json.dumps(odd.twisted(chance, yaml.safe_load(whole))).encode()
    lines = whole.decode().splitlines()
    for _ in range(chance.choice((1, 1, 2, 4))):
        at = chance.randrange(len(lines))
        key, colon, _ = lines[at].partition(":")
        scalar = chance.choice((*YAML, *odd.TEXTS, str(chance.choice((1, 0.5, True, -3, 10**19)))))
        lines[at] = f"{key}{colon} {scalar}" if chance.random() < 0.8 else scalar
    return "\n".join(lines).encode()


YAML = (
    "!!python/object/apply:os.system [touch hit]", "!!python/name:os.system ''",
    "!!python/module:fuzz_foreign", "!!python/object/new:os.system [x]", "!!int x", "!!float y",
    "!!timestamp z", "2020-13-45", "2020-01-01", "!!binary '%'", "!!bool q", "!!set {a}",
    "!!omap [a]", "!!pairs [a: 1]", "&a [1]", "*a", "&a [*a]", "<<: *x", "<<: {a: 1}", "? [1]",
    "{1: 2}", "0x" + "f" * 5000, "9" * 5000, "1:1:1:1:1:1", ".inf", ".nan", "1e999", "0o7", "~",
    "[" * 900, "{a: " * 900, "- " * 900, "${oc.env:HOME}", "${oc.decode:'[1]'}", "${.name}", "???",
    "'module:Env-v0'", "fuzz_foreign:Env-v0", "[1, 2, 3]", "[[1]]", "{_target_: os.system}",
    "/etc/passwd", "../../x", "hydra: {run: {dir: x}}", "%YAML 9.9", "---", "...", "!<tag:x> y",
    "|", ">", "@x", "`x`", "!x y", "[100000000, 100000000]", "1000000000000",
)  # fmt: skip


def config_file(folder: Path) -> Case:
    """Each file is composed by Hydra; one in ten is also checked up to the training."""
    whole = (trained(folder) / "config.yaml").read_bytes()
    stand_in()

    def case(chance: Random) -> bool:
        (folder / "c.yaml").write_bytes(yaml_text(chance, whole))
        if chance.random() < 0.9:
            return bool(expand("train", ["config=c.yaml"]))
        return accepts("train", "config=c.yaml")

    return case


KEYS = (
    "env", "env.id", "env.version", "env.max_episode_steps", "env.vectorizer", "actor", "algo",
    "algo.gamma", "algo.batch_size", "algo.critic_hidden_sizes", "algo.replay_capacity", "encoder",
    "encoder.pop_size", "encoder.mean_range", "neuron", "neuron.threshold", "decoder", "kernel",
    "kernel.path", "backend", "energy", "energy.file", "precision", "experiment", "seed",
    "total_steps", "steps_per_epoch", "num_envs", "world_size", "scaling", "device", "threads",
    "deterministic", "max_restarts", "nnodes", "node_rank", "rdzv", "run_dir", "init_from",
    "resume", "config", "hydra", "hydra.callbacks", "hydra.callbacks.x", "hydra/launcher",
    "hydra.run.dir",
    "hydra.job_logging", "hydra.job_logging.handlers.x", "hydra.searchpath", "hydra.sweep.dir",
    "hydra/callbacks", "hydra.launcher", "env@hydra.callbacks", "x", "x.y", "", "algo.", ".algo",
    "algo..gamma", "_target_", "algo._target_", "defaults", "a-b", "é", "actor@decoder",
)  # fmt: skip
VALUES = (
    "1", "0", "-1", "1e9", "1e400", "9" * 5000, "99999999999999999999", "true", "null", "x", "''",
    "[1,2]", "[]", "[[1]]", "[100000000,100000000]", "{a:1}", "{_target_:os.system}",
    "{x:{_target_:os.system,command:touch}}", "{class:subprocess.Popen,args:[touch,hit]}",
    "${seed}", "${oc.env:HOME}", "${oc.env:NOWHERE}", "${oc.decode:'[1]'}", "${x", "'a\\'b'", "a,b",
    "choice(1,2)", "glob(*)", "range(1,5)", "shuffle(1,2)", "int(x)", "cast", "sort(3,1)",
    "extend_list(1)", "[" * 500, "(" * 50, "'", '"', "\\", "a b", "a=b", "=", "é", "\x1b[2J", "\n",
    "../x", "/etc/passwd", "Ant", "HalfCheetah", "gym", "CartPole-v1", "Pendulum-v1", "mlp",
    "popsan", "td3", "ppo", "sac", "proxy_target/lif", "popsan/td3", "spikerl/td3", "auto", "cpu",
    "cuda",
    "bf16", "fp16", "file:///tmp", "pkg://os", "honest", "honest/config.yaml", "weak", "0.5",
    "async",
)  # fmt: skip
FLAGS = ("--cfg", "-c", "job", "--resolve", "--help", "-h", "--info", "--package",
         "--config-dir=/tmp", "-cd", "--hydra-help", "--run", "-x", "--", "--cfg=hydra",
         "-m")  # fmt: skip


def overrides(folder: Path) -> Case:
    """Overrides are composed by Hydra; one case in ten, unless it is a sweep, also runs the command
    up to the training.
    """
    trained(folder)
    stand_in()

    def case(chance: Random) -> bool:
        words = []
        for _ in range(chance.choice((1, 1, 2, 3, 5))):
            prefix = chance.choice(("",) * 8 + ("+", "++", "~"))
            words.append(f"{prefix}{chance.choice(KEYS)}={chance.choice(VALUES)}")
            if chance.random() < 0.1:
                words[-1] = odd.mutated(chance, words[-1].encode()).decode(errors="replace")
            if chance.random() < 0.1:
                words.append(chance.choice(FLAGS))
        whole = chance.random() < 0.1 and not {"-m", "--multirun"} & set(words)
        return accepts("train", *words) if whole else bool(expand("train", words))

    return case


def stand_in() -> None:
    """Replace the training by a function that does nothing: only the steps before it are fuzzed."""
    train.run = lambda *args: 0
    launch.launch = lambda *args: 0


def accepts(*args: str) -> bool:
    """True if the command ends with status 0; BadRequest if with 2 and one line; else a failure."""
    handler = signal.getsignal(signal.SIGINT)
    said = spikerl(*args)
    signal.signal(signal.SIGINT, handler)
    sys.argv = sys.argv[:1]
    if said.status == 0:
        return True
    one_line = said.err.startswith("spikerl: ") and said.err.count("\n") == 1
    if said.status == 2 and one_line and len(said.err) < 4200:
        raise BadRequest("", "", said.err)
    raise AssertionError(f"status {said.status} of {args}: {said.err[:300]}")


# Each target with its share of all cases, in percent.
TARGETS: dict[str, tuple[Callable[[Path], Case], int]] = {
    "policy.json": (policy_json, 20),
    "policy.safetensors": (policy_tensors, 20),
    "PopSAN statistics": (statistics, 20),
    "PopSAN model": (model, 12),
    "checkpoint": (checkpoint, 12),
    "run to resume": (resumed, 6),
    "dataset": (dataset, 4),
    "config=FILE": (config_file, 2),
    "overrides": (overrides, 4),
}
