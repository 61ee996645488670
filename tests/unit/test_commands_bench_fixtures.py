"""What `spikerl bench` times: a run's own actor, if the typed keys agree with the run's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from builders import popsan_config, proxy_td3_config, small_config
from exports import config, policy_of, saved, task
from shell import refusal

from spikerl.commands.bench.command import Bench, BenchRequest
from spikerl.commands.bench.fixtures import BenchFixtures
from spikerl.commands.bench.progress import BenchProgress
from spikerl.commands.bench.timing import Benchmark, Results, measurement
from spikerl.models.actor import Actor
from spikerl.types import Resolved


def small_bench() -> Bench:
    request = BenchRequest(parts=[], batches=[12], world_sizes=[], rounds=1, run=None, json=False)
    asked = small_config()
    asked.resolved.kernel = Resolved("cpu/portable", "requested")  # no test here runs the kernel
    return Bench(asked, request, BenchProgress())


def test_an_actor_of_another_shape_is_refused(tmp_path: Path) -> None:
    run = saved(policy_of(config(), task(4, 1)), tmp_path / "run")
    asked = small_config()
    line = str(refusal(BenchFixtures, asked, str(run)))
    parts = "with population, cuba_lif, rate, populations 10, 10"
    remedy = f"its actor is popsan [12, 9] {parts}; give its keys, not popsan [16] {parts}"
    assert line == f"run={run}: {remedy}"
    asked.actor.actor = popsan_config([12, 9])
    timed = BenchFixtures(asked, str(run)).spiking("reference")
    weight = policy_of(config(), task(4, 1)).actor.layers[0].weight_IN
    assert torch.equal(timed.layers[0].weight_IN, weight)


def test_td3_with_a_proxy_is_refused() -> None:
    """Its update takes several batches; the benchmark part `proxy` times it instead."""
    asked = small_config()
    asked.algo = proxy_td3_config()
    line = str(refusal(BenchFixtures, asked))
    assert line == "algo=proxy_td3: bench times TD3; leave it out"


def test_a_dense_actor_runs_in_the_kernel_that_trains_it(monkeypatch: pytest.MonkeyPatch) -> None:
    learned: list[tuple[str, str]] = []

    def learner(self: Bench, actor: Actor, *others: Any) -> None:
        learned.append((type(actor).__name__, actor.kernel))

    monkeypatch.setattr(Bench, "learner", learner)
    small_bench().update(12)
    spiking = [("SpikingActor", kernel) for kernel in ("cpu/portable", "cpu/portable", "reference")]
    assert learned == [*spiking, ("MLPActor", "cpu/portable")]


def test_a_runs_weights_are_not_those_of_other_neurons(monkeypatch: pytest.MonkeyPatch) -> None:
    def time(self: Bench, title: str, benchmarks: list[Benchmark]) -> Results:
        return Results([measurement(each, [1.0], 1) for each in benchmarks])

    stub = SimpleNamespace(batches_per_update=1)
    monkeypatch.setattr(Bench, "time", time)
    monkeypatch.setattr(Bench, "learner", lambda *given, **more: stub)
    bench = small_bench()
    bench.weights = "run"
    weights = [m.weights for m in bench.proxies().measurements]
    assert weights == ["run", "trained rates", "trained rates", "trained rates"]
