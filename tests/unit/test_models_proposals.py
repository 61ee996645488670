"""A policy that chooses among proposed actions: its choice, and the commands that take it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from builders import INVERTED_PENDULUM
from exports import config
from recorded import episode, task_for, write
from shell import SHORT, spikerl

from spikerl.models.actor_config import ProposalConfig
from spikerl.models.normalizer import RunningNorm
from spikerl.models.policy import Policy
from spikerl.models.proposals import Proposer, build_policy
from spikerl.runs.policies import load_policy

SIZES = {"hidden_sizes": [8], "critic_hidden_sizes": [8]}


def chooser(samples: int, phi: float = 0.3) -> Policy:
    torch.manual_seed(1)
    chosen = config()
    chosen.proposals = ProposalConfig(samples=samples, phi=phi, **SIZES)
    task = task_for(INVERTED_PENDULUM)
    network = build_policy(chosen, task.obs_dim, task.act_dim)
    return Policy(task, chosen, network, RunningNorm(task.obs_dim, 3.0))


def test_it_takes_the_best_of_those_that_it_draws() -> None:
    """The action equals the best of the same draws, evaluated one after another."""
    policy = chooser(5)
    net = policy.network
    assert isinstance(net, Proposer)
    obs = torch.randn(3, 4, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        taken = net(obs, torch.Generator().manual_seed(7))
        z = torch.randn(15, 2, generator=torch.Generator().manual_seed(7)).clamp(-0.5, 0.5)
        for i in range(3):
            best, highest = torch.zeros(1), -float("inf")
            for k in range(5):
                own = torch.cat([obs[i], z[5 * i + k]]).unsqueeze(0)
                act = net.decoder(own)
                change = net.change(torch.cat([obs[i : i + 1], act], 1), None)
                act = (act + 0.3 * change).clamp(-1.0, 1.0)
                if float(net.value(obs[i : i + 1], act)) > highest:
                    best, highest = act[0], float(net.value(obs[i : i + 1], act))
            torch.testing.assert_close(taken[i], best)
        assert len({round(float(a), 6) for a in taken}) == 3


def test_saved_and_loaded_it_acts_the_same(tmp_path: Path) -> None:
    policy, obs = chooser(4), np.linspace(-1.0, 1.0, 8).reshape(2, 4)
    policy.save(tmp_path)
    loaded = load_policy(tmp_path)
    assert loaded.config.proposals == policy.config.proposals
    np.testing.assert_allclose(loaded(obs), policy(obs), rtol=1e-5, atol=1e-6)
    activity = loaded.activity(loaded.observe(obs), torch.Generator())
    assert activity is not None
    assert activity.observations == 2


TINY = ["algo=bcq", "algo.vae_hidden_sizes=[8]", "algo.target_samples=2", "algo.act_samples=3",
        "total_steps=20", "steps_per_epoch=10", "logger=[]", "dataset=d"]  # fmt: skip
OFFLINE = [w for w in SHORT if not w.startswith(("algo.learn", "algo.random", "total", "steps"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset, and a run of each kind of actor."""
    made = tmp_path_factory.mktemp("bcq")
    write(made / "d", [episode(30)])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        keys = ["encoder=learned", "decoder=learned", "neuron=lif", "run_dir=run"]
        assert spikerl("train", *OFFLINE, *TINY, *keys).status == 0
        assert spikerl("train", *OFFLINE, *TINY, "actor=mlp", "run_dir=dense").status == 0
    return made


@pytest.mark.parametrize("run", ["run", "dense"])
def test_a_trained_one_is_evaluated(
    run: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert spikerl("eval", f"run={run}", "episodes=1").status == 0
    network = load_policy(run).network
    assert isinstance(network, Proposer)
    assert network.change.obs_dim == 5
    assert network.config == ProposalConfig(
        samples=3, phi=0.05, hidden_sizes=[8], critic_hidden_sizes=[16]
    )


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ("export run=run format=c", "algo=bcq: its policy chooses among proposed actions"),
        ("compress run=run prune=0.5 run_dir=small", "algo=bcq: its policy chooses among"),
        ("convert run=dense run_dir=spiking", "algo=bcq: its policy chooses among"),
        ("eval run=run ops=true", "algo=bcq: its policy chooses among"),
        ("eval run=run video=spikes", "video=spikes: no network alone makes its decisions"),
        ("train algo=td3 init_from=run", "init_from=run: its actor is popsan"),
        ("train algo=bcq dataset=d init_from=run", "init_from=run: the actor of algo=bcq acts on"),
        (
            "train algo=bcq dataset=d actor=care_bn",
            "actor=care_bn: its moments are of observations",
        ),
        ("train algo=bcq dataset=d algo.phi=3", "algo.phi=3.0: give a value in [0, 2]"),
        ("train algo=bcq dataset=d algo.target_samples=0", "algo.target_samples=0: give 1 to"),
    ],
)
def test_refused(asked: str, line: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    command, *words = asked.split()
    if command == "train":
        words += ["env=InvertedPendulum", "env.max_episode_steps=30", "actor.hidden_sizes=[16]"]
    assert spikerl(command, *words).line.startswith(line)
    assert not {"small", "spiking", "outputs"} & {path.name for path in folder.iterdir()}
    assert not (folder / "run" / "videos").exists()
