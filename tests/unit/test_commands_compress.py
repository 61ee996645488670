"""`spikerl compress` as it is typed: the policies made, the output, the refusals."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from builders import INVERTED_PENDULUM, care_bn_config
from exports import DENSE, DIRECT, config, policy_of, population
from shell import SHORT, spikerl, tree

from spikerl import load_policy
from spikerl.commands import compress
from spikerl.envs.make import make_env, task_of
from spikerl.models.actor import connections
from spikerl.models.actor_config import ActorConfig
from spikerl.models.networks import build_actor
from spikerl.models.policy import Policy

NONE = np.empty(0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs: their policies act on InvertedPendulum for 50 steps at most."""
    root = tmp_path_factory.mktemp("runs")
    env = make_env(INVERTED_PENDULUM)
    task = task_of(env)
    env.close()
    discrete = replace(task, act_shape=(), act_low=NONE, act_high=NONE, choices=range(2))
    actors = {"spiking": (config(), task), "dense": (DENSE, task), "values": (config(), discrete)}
    for name, (actor, own_task) in actors.items():
        folder = root / name
        folder.mkdir()
        policy: Policy = policy_of(actor, own_task)
        policy.save(folder)
        text = spikerl("train", *SHORT, "--cfg", "job").out
        (folder / "config.yaml").write_text(text)
    return root


@pytest.fixture(autouse=True)
def folder(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(made)
    return made


def test_all_of_it(folder: Path) -> None:
    said = spikerl(
        "compress", "run=spiking", "bits=[4,8,8,6]", "prune=0.5", "early_exit=0.3", "exit_steps=2",
        "episodes=2",
    )  # fmt: skip
    assert said.status == 0, said.err
    made = folder / "spiking_prune0.5_bits4-8-8-6_exit0.3x2"
    assert said.out.splitlines()[-1] == f"run folder: {made.name}"
    facts = json.loads((made / "compressed.json").read_text())
    assert (facts["prune"], facts["early_exit"]) == (0.5, {"threshold": 0.3, "steps": 2})
    assert list(facts["bits"].values()) == [4, 8, 8, 6]
    before, after = facts["before"], facts["after"]
    assert len(before["returns"]) == len(after["returns"]) == 2
    # 40 inputs, layers of 12, 9 and 10, one action: 480, 108, 90 and 10 weights; 80 means and
    # widths of the encoder, 31 biases of layers and 1 of the decoder.
    others = 4 * (80 + 31 + 1)
    assert before["footprint_bytes"] == others + 4 * (480 + 108 + 90 + 10)
    assert after["footprint_bytes"] == others + 240 + 108 + 90 + 8 + 4 * 4
    assert after["packed_bytes"] < after["footprint_bytes"] < before["footprint_bytes"]
    assert before["spike_steps"] == 5.0
    assert 3.0 <= after["spike_steps"] < 5.0
    assert after["acs"] < before["acs"]
    # `eval` of the folder gives the returns and spike steps of the comparison.
    answer = json.loads(spikerl("eval", f"run={made}", "episodes=2", "ops=true", "json=true").out)
    assert answer["returns"] == after["returns"]
    assert answer["spike_steps"] == after["spike_steps"]
    assert answer["operations"]["footprint_bytes"] == after["footprint_bytes"]
    assert answer["modelled_memory"]["constants"]["weight_bits"]["hidden 1"] == 4
    said = spikerl("eval", f"run={made}", "episodes=2", "ops=true")
    assert f"spike steps {after['spike_steps']:.2f} of 5, mean over decisions\n" in said.out
    assert "bits of weights: hidden 1 4, hidden 2 8, output 8, decoder 6\n" in said.out
    for form, remedy in (("onnx", "every observation of its graph"), ("nir", "nothing in a NIR")):
        line = spikerl("export", f"run={made}", f"format={form}").line
        assert line.startswith(f"format={form}: cannot hold early_exit: {remedy}")
    line = spikerl("compress", f"run={made}", "bits=8").line
    assert line.endswith("it is compressed already; give the run that it was made from")
    assert yaml.safe_load((made / "config.yaml").read_text())["run_dir"].endswith(made.name)


def test_a_dense_policy(folder: Path) -> None:
    said = spikerl("compress", "run=dense", "run_dir=small", "bits=8", "prune=0.5", "episodes=1")
    assert said.status == 0, said.err
    facts = json.loads(Path("small/compressed.json").read_text())
    manifest = json.loads(Path("small/manifest.json").read_text())
    assert facts["run"] == manifest["compressed_from"] == "dense"  # no absolute path
    assert "\nrun_dir: small\n" in Path("small/config.yaml").read_text()
    assert facts["after"]["spikes"] is facts["after"]["spike_steps"] is None
    assert facts["after"]["acs"] == 0
    assert facts["after"]["macs"] <= facts["before"]["macs"] / 2
    rows = said.out.splitlines()[:-1]
    assert f"{'spikes':<32}{'-':>22}{'-':>22}" in rows
    assert {len(row) for row in rows} == {32 + 2 * 22}
    weights = connections(load_policy("small").actor)
    assert all(int((w == 0).sum()) >= w.numel() // 2 for w in weights.values())


def test_fine_tuned(folder: Path) -> None:
    said = spikerl(
        "compress", "run=spiking", "bits=4", "prune=0.5", "finetune=20", "early_exit=0.2",
        "episodes=1",
    )  # fmt: skip
    assert said.status == 0, said.err
    made = "spiking_prune0.5_bits4_exit0.2x1_finetune20"
    assert said.out.startswith("fine-tuned for 20 steps: loss ")
    facts = json.loads(Path(made, "compressed.json").read_text())
    assert facts["finetune"] == 20
    tuned = load_policy(made)  # refuses a matrix that is not on its grid
    assert tuned.compression is not None
    assert tuned.compression.finetune == 20
    assert tuned.compression.early_exit is not None
    plain = ["run_dir=plain", "bits=4", "prune=0.5", "episodes=1"]
    assert spikerl("compress", "run=spiking", *plain).status == 0
    first = load_policy("plain")
    assert first.compression is not None
    assert first.compression.scales == tuned.compression.scales
    biases = [p.actor.get_parameter("layers.0.bias_N") for p in (first, tuned)]
    assert not torch.equal(*biases)


def test_fine_tuning_leaves_a_pruned_policy_pruned(folder: Path) -> None:
    """A policy that was pruned in training (`actor.prune`) and is only quantised here."""
    shutil.copytree("spiking", "sparse")
    policy = load_policy("sparse")
    with torch.no_grad():
        connections(policy.actor)["layers.1.weight_IN"][:6] = 0.0
    policy.save(Path("sparse"))
    more = ["run_dir=tuned", "bits=8", "finetune=20", "episodes=1"]
    assert spikerl("compress", "run=sparse", *more).status == 0
    weight = connections(load_policy("tuned").actor)["layers.1.weight_IN"]
    assert int((weight[:6] != 0.0).sum()) == 0
    assert int((weight[6:] != 0.0).sum()) > 0


@pytest.mark.parametrize("encoder", ["direct", "poisson"])
def test_goals_are_asked_for_in_pieces(encoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """10 observations in pieces of at least 4 are 4 and 6; a random encoder gets all at once."""
    monkeypatch.setattr(compress, "PIECE", 4)
    part = DIRECT if encoder == "direct" else population(encoder)
    actor = build_actor(config(encoder=part), 3, 2)
    sizes: list[int] = []
    actor.register_forward_hook(lambda net, given, out: sizes.append(len(given[0])))
    obs = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    parts = compress.actions(actor, obs, torch.Generator().manual_seed(1))
    assert sizes == ([4, 6] if encoder == "direct" else [10])
    with torch.no_grad():
        whole = actor(obs, torch.Generator().manual_seed(1))
    torch.testing.assert_close(parts, whole)
    sizes.clear()
    compress.actions(actor, obs[:7], torch.Generator())
    assert sizes == [7]


def test_what_was_not_asked_for_stays(folder: Path) -> None:
    said = spikerl("compress", "run=spiking", "run_dir=early", "early_exit=0.1", "episodes=1")
    assert said.status == 0, said.err
    names = ("spiking", "early")
    assert len({(Path(name) / "policy.safetensors").read_bytes() for name in names}) == 1
    early = load_policy("early")
    assert early.compression is not None
    assert (early.compression.bits, early.compression.prune) == ({}, None)
    obs = np.random.default_rng(0).normal(size=(50, 4))
    assert np.abs(early(obs) - load_policy("spiking")(obs)).max() > 0.0


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("run=spiking", "bits=null: give bits, prune or early_exit"),
        ("run=spiking bits=1", "bits=1: give 2 to 16, or a list of such numbers"),
        ("run=spiking bits=[8,8]", "bits=[8, 8]: give one number, or one for each of"),
        ("run=spiking prune=0", "prune=0.0: give a share above 0 and below 1"),
        ("run=spiking prune=0.001", "prune=0.001: of the 480 weights of layers.0.weight_IN that"),
        ("run=spiking early_exit=0.1 exit_steps=5", "exit_steps=5: the policy has 5 spike steps"),
        ("run=spiking bits=8 exit_steps=4", "exit_steps=4: it belongs to early_exit"),
        ("run=spiking bits=8 finetune=0", "finetune=0: give at least 1, or null"),
        ("run=spiking early_exit=0.1 finetune=9", "finetune=9: it makes up for bits or prune"),
        ("run=dense early_exit=0.1", "early_exit=0.1: a dense policy has no spike steps"),
        ("run=values early_exit=0.1", "early_exit=0.1: an action that is chosen by its value has"),
        ("run=spiking bits=8 run_dir=dense", "run_dir="),
        ("run=spiking bits=8 episodes=0", "episodes=0: give at least 1"),
        ("run=nowhere bits=8", "run="),
    ],
)
def test_refusals(typed: str, line: str, folder: Path) -> None:
    before = tree(folder)
    assert spikerl("compress", *typed.split()).line.startswith(line)
    assert tree(folder) == before


def test_a_folder_that_is_there_has_no_dated_other(folder: Path) -> None:
    there = folder / "spiking_prune0.5"
    there.mkdir()
    said = spikerl("compress", "run=spiking", "prune=0.5")
    there.rmdir()
    assert said.line == f"run_dir={there}: it exists already; give another run_dir"


def test_a_sweep_keeps_what_it_makes(folder: Path) -> None:
    """Jobs without run_dir write beside the run, as without -m; of jobs with the same typed run_dir
    only the first succeeds.
    """
    said = spikerl("compress", "-m", "run=dense", "bits=5", "prune=0.5,0.75", "episodes=1")
    assert said.status == 0, said.err
    made = [Path(f"dense_prune{share}_bits5/compressed.json") for share in (0.5, 0.75)]
    assert [json.loads(file.read_text())["prune"] for file in made] == [0.5, 0.75]
    said = spikerl("compress", "-m", "run=dense", "bits=5,6", "episodes=1", "run_dir=typed")
    assert "run_dir=typed: it exists already" in said.err
    assert json.loads(Path("typed/compressed.json").read_text())["bits"]["layers.0.weight_IN"] == 5


def test_normalised_drives_are_folded_first(folder: Path) -> None:
    policy = load_policy("spiking")
    parts = ActorConfig(**{**vars(config()), "actor": care_bn_config([12, 9])})
    torch.manual_seed(0)
    normed = policy_of(parts, policy.task)
    normed.save(Path("dense"))
    try:
        line = spikerl("compress", "run=dense", "run_dir=new", "bits=8").line
    finally:
        policy_of(DENSE, policy.task).save(Path("dense"))
    assert line.endswith("is not folded into weights; give a policy that acts")


def test_a_run_that_began_with_a_best_policy(folder: Path) -> None:
    """The compressed folder has one policy, so its config names neither init_from nor `best`."""
    shutil.copytree("dense", "began")
    config = yaml.safe_load(Path("began/config.yaml").read_text())
    config |= {"init_from": "gone", "init_policy": "best"}
    Path("began/config.yaml").write_text(yaml.safe_dump(config))
    assert spikerl("compress", "run=began", "bits=8", "episodes=1").status == 0
    made = yaml.safe_load(Path("began_bits8/config.yaml").read_text())
    assert (made["init_from"], made["init_policy"]) == (None, "last")


def test_it_is_trained_further(folder: Path) -> None:
    """Training from it starts with its weights, but keeps neither grid nor zeros nor early exit."""
    assert spikerl("compress", "run=spiking", "run_dir=base", "bits=4", "episodes=1").status == 0
    more = ["total_steps=60", "steps_per_epoch=60", "actor.hidden_sizes=[12,9]"]
    said = spikerl("train", *SHORT, *more, "init_from=base", "run_dir=on")
    assert said.status == 0, said.err
    first = load_policy("on/checkpoints/step_0000000000")
    assert first.compression is None
    base = load_policy("base")
    for name, weight in connections(base.actor).items():
        assert torch.equal(weight, connections(first.actor)[name])


def test_a_sweep_that_is_started_again_does_what_is_missing(folder: Path) -> None:
    typed = ["compress", "-m", "run=dense", "bits=5,6", "episodes=1"]
    assert spikerl(*typed).status == 0
    shutil.rmtree(folder / "dense_bits6")
    before = tree(folder / "dense_bits5")
    said = spikerl(*typed)
    assert (said.status, said.err) == (0, "")
    assert "│ bits=5 │ done already │ -                │ dense_bits5      │" in said.out
    assert "2 of 2 jobs done" in said.out
    assert tree(folder / "dense_bits5") == before
    assert (folder / "dense_bits6" / "policy.json").exists()
    said = spikerl(*typed[:-1], "episodes=2")  # which are others
    assert (said.status, said.err.count("it exists already; give another run_dir")) == (2, 2)
