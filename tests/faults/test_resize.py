"""resume=RUN world_size=W: another number of workers takes over every row and environment once.

Shape legend   N environments, T steps of each.
"""

from __future__ import annotations

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import test_mpi
import torch
from builders import ppo_config, small_config, with_run
from processes import computed, gone, record, resume, rows, train
from shell import SHORT, spikerl
from torch import Tensor
from trainers import Workers

from spikerl.energy.meter import Reading, consecutive, merge
from spikerl.runs.checkpoint import verified
from spikerl.seeding import generator_for, seed_for
from spikerl.training.resize import merge_progress

N = 4
CAPACITY = 90  # 22 steps of each environment
KEPT = 22 * N
OFF_POLICY = small_config(
    num_envs=N, total_steps=2000, steps_per_epoch=1000, replay_capacity=CAPACITY, norm_interval=60
)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def check_handed_over(run: Path, old: Workers, new: Workers) -> None:
    """Save `old`, load it into `new`, and check that nothing differs by a bit."""
    old.save(run)
    new.load(run)
    held = old.rows()
    assert len(held) == len(held.unique(dim=0))
    assert torch.equal(new.rows(), held)
    assert torch.equal(new.pending(), old.pending())
    assert all(map(same, new.envs(), old.envs()))
    for trainer in new.trainers:
        assert same(trainer.learner_state(), old.first.learner_state())
        assert trainer.norm.count == old.first.norm.count
        assert trainer.algo.updates == old.first.algo.updates
        assert trainer.envs.steps == old.first.envs.steps
    before, after = ([r for t in w.trainers for r in t.progress.returns] for w in (old, new))
    assert after == before


def test_there_and_back(tmp_path: Path) -> None:
    """4 workers, then 2, 4, 1, 2 and 4, changed in mid-epoch and between merges of the normaliser;
    the replay wraps around.
    """
    run, workers = tmp_path, Workers(OFF_POLICY, 4)
    for size, until in ((2, 52), (4, 76), (1, 204), (2, 228), (4, 300)):
        workers.train(until)
        assert len(workers.rows()) == min(until, KEPT)
        assert len(workers.pending().flatten(0, 1)) == until % 60
        new = Workers(OFF_POLICY, size)
        check_handed_over(run, workers, new)
        workers.close()
        workers = new
    assert workers.first.algo.updates == 260  # ten at each of the steps 50, 60, ..., 300
    workers.close()


def test_segments_are_those_that_the_replays_reach(tmp_path: Path) -> None:
    """Segments that another number of workers wrote count too; one that no kept checkpoint needs is
    removed.
    """
    workers = Workers(OFF_POLICY, 4)
    workers.train(40)
    workers.save(tmp_path)
    two = Workers(OFF_POLICY, 2)
    two.load(tmp_path)
    for until in (80, 120, 128, 132, 160, 200):
        two.train(until)
        two.save(tmp_path)
        named = verified(tmp_path, print).manifest["segments"]
        assert any("_of_4" in name for name in named) == (until < 40 + KEPT)
        assert len(named) == 2 * sum(end > until - KEPT for end in (80, 120, 128, 132, 160, 200)
                                     if end <= until) + 4 * (until < 40 + KEPT)  # fmt: skip
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.f32")}
    assert not any("_of_4" in name for name in left)
    workers.close()
    two.close()


def test_a_rollout_in_progress(tmp_path: Path) -> None:
    """The rows of PPO's rollout stay with their environments, and all updates are made."""
    algo = ppo_config(rollout_steps=40, norm_interval=40, batch_size=10, critic_hidden_sizes=[16])
    training = replace(OFF_POLICY, algo=algo)
    old, new = Workers(training, 4), Workers(training, 2)
    old.train(60)
    check_handed_over(tmp_path, old, new)
    assert len(new.rows()) == 40
    new.train(80)
    assert new.first.algo.updates == 16
    old.close()
    new.close()


def test_streams_begin_anew(tmp_path: Path) -> None:
    """The random streams depend on the rank and the step, so that none repeats another's draws."""
    old, new = Workers(OFF_POLICY, 2), Workers(OFF_POLICY, 4)
    old.train(52)
    check_handed_over(tmp_path, old, new)
    for rank, trainer in enumerate(new.trainers):
        for name, state in trainer.streams.state().items():
            assert torch.equal(state, generator_for(0, name, rank, 52).get_state())
    seen = [seed_for(0, "explore", *key) for key in ((0,), (1,), (0, 52), (1, 52), (1, 53))]
    assert len({*seen}) == len(seen)
    old.close()
    new.close()


def test_weak_scaling_goes_on_with_updates_of_the_new_size(tmp_path: Path) -> None:
    """After the change, there is one update in as many steps as there are workers now, on top of
    the updates that were made before.
    """
    training = with_run(OFF_POLICY, scaling="weak")
    old, new = Workers(training, 4), Workers(training, 2)
    old.train(200)
    made = (200 - 40) // 4  # made at steps 50, 60, ..., 200, for all steps since 40
    assert old.first.algo.updates == made
    check_handed_over(tmp_path, old, new)
    assert new.first.updates_by(400) == made + 200 // 2
    new.train(400)
    assert new.first.algo.updates == made + 200 // 2
    old.close()
    new.close()


def test_an_epoch_in_progress_weighs_every_update_alike(tmp_path: Path) -> None:
    old, new = Workers(OFF_POLICY, 4), Workers(OFF_POLICY, 2)
    old.train(100)
    for trainer in old.trainers:  # 60 updates
        trainer.progress.sums = {"critic_loss": (15.0 * (trainer.world.rank + 1), 15.0)}
        trainer.progress.train_s = 1.0 + trainer.world.rank
        trainer.progress.cpu_s = 2.0
        trainer.progress.energy = [1.0, {f"gpu:{trainer.world.rank % 2}": 5.0}, {}]
    check_handed_over(tmp_path, old, new)
    first, second = (trainer.progress for trainer in new.trainers)
    assert first.sums == {"critic_loss": (150.0, 60.0)}  # each worker's updates weigh 1/4
    assert (first.train_s, second.train_s) == (4.0, 0.0)
    assert (first.cpu_s, second.cpu_s) == (8.0, 0.0)
    assert first.energy == [1.0, {"gpu:0": 5.0, "gpu:1": 5.0}, {}]
    assert (second.sums, second.returns) == ({}, [])
    assert second.energy == first.energy  # the next merge counts it once
    three = Workers(OFF_POLICY, 1)  # while the second worker has no sums of losses yet
    check_handed_over(tmp_path, new, three)
    assert three.first.progress.sums == {"critic_loss": (150.0, 60.0)}
    assert three.first.progress.energy == [1.0, {"gpu:0": 5.0, "gpu:1": 5.0}, {}]
    for workers in (old, new, three):
        workers.close()


def test_what_devices_spent_before_more_workers_came_is_in_the_sum() -> None:
    """2 workers with a device each used 100 J each; after the change, 4 workers used 50 J each."""
    before = {"updates": 0, "returns": [], "train_s": 1.0, "sums": {}}
    parts = [{**before, "energy": [1.0, {f"gpu:{rank}": 100.0}, {}]} for rank in range(2)]
    energy = Reading(*merge_progress(parts)["energy"])
    after = [Reading(1.0, {f"gpu:{rank}": 50.0}, {}) for rank in range(4)]
    found = merge([consecutive(energy, own) for own in after])
    assert found.joules == {"gpu:0": 150.0, "gpu:1": 150.0}
    assert set(found.missing) == {"gpu:2", "gpu:3"}  # marks the sum as incomplete


ARGS = ["env=HalfCheetah", "env.vectorizer=async"]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of a run of four workers, one environment each, stopped on request."""
    home = tmp_path_factory.mktemp("stopped") / "home"
    run = train(home, *ARGS, "world_size=4")
    run.until(lambda: run.begun() and len(rows(home / "run")) >= 1)
    assert run.kill(signal.SIGTERM) == 75, run.said()
    return home


def copy(stopped: Path, to: Path) -> Path:
    to.mkdir()
    shutil.copytree(stopped / "run", to / "run", symlinks=True)
    return to


@pytest.mark.slow
def test_a_run_goes_on_with_fewer_workers(stopped: Path, tmp_path: Path) -> None:
    """With 2 workers it goes on to the same result over MPI, though one is killed and restarted;
    then it goes on with 4 again.
    """
    step = record(stopped / "run" / "checkpoints" / "latest")["step"]
    whole = resume(copy(stopped, tmp_path / "whole"), "world_size=2")
    assert whole.wait() == 0, whole.said()
    said = "4 workers became 2: random streams and batches differ from here on"
    assert f"; not exact: {said}" in whole.out.read_text()
    assert "2 workers x 2 environments" in whole.out.read_text()

    home = copy(stopped, tmp_path / "home")
    run = resume(home, "world_size=2", "backend=mpi", "max_restarts=1")
    run.until(run.begun)
    os.kill(test_mpi.worker(run, "1"), signal.SIGKILL)
    assert run.wait() == 0, run.said()
    gone(home)
    assert computed(home / "run") == computed(tmp_path / "whole" / "run")
    manifest = record(home / "run")
    changes = [(e["world_size_before"], e["world_size"], e["exact"]) for e in manifest["resumed"]]
    assert changes in ([(4, 2, False), (4, 2, False)], [(4, 2, False), (2, 2, True)])
    assert manifest["resumed"][0]["not_exact_because"] == said
    assert manifest["resumed"][0]["step"] == step
    assert (manifest["world_size"], manifest["num_envs"]) == (2, 4)
    assert manifest["resolved"]["backend"]["choice"] == "mpi"

    run = resume(home, "world_size=4", "total_steps=600")
    assert run.wait() == 0, run.said()
    assert record(home / "run")["resumed"][-1]["world_size"] == 4
    assert [row["step"] for row in rows(home / "run")] == list(range(100, 601, 100))
    gone(home)


def test_workers_that_cannot_share_the_environments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert spikerl("train", *SHORT, "num_envs=4", "run_dir=run").status == 0
    before = Path("run/manifest.json").read_bytes()
    said = spikerl("train", "resume=run", "total_steps=600", "world_size=3")
    line = "the run's 4 environments cannot be shared out evenly; give a divisor"
    assert said.line == f"world_size=3: {line}"
    assert Path("run/manifest.json").read_bytes() == before
