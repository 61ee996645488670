"""`spikerl bench`, briefly and with small networks: what it reports, not how fast anything is."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
from shell import spikerl

from spikerl.distributed import mpi

SMALL = [
    "env=InvertedPendulum",
    "rounds=2",
    "batches=[12]",
    "actor.hidden_sizes=[16]",
    "algo.critic_hidden_sizes=[16]",
    "algo.batch_size=12",
    "algo.update_interval=4",
]
FIELDS = {
    "what", "kernel", "precision", "batch", "world_size", "threads", "weights", "median_ms",
    "min_ms", "per_second",
}  # fmt: skip


def bench(*args: str) -> dict[str, Any]:
    said = spikerl("bench", *SMALL, "json=true", *args)
    assert said.status == 0, said.err
    assert all(line.startswith("bench: ") for line in said.err.splitlines())
    return dict(json.loads(said.out))


def test_acting_updating_and_training() -> None:
    said = spikerl("bench", *SMALL, "json=true", "parts=[acting,update,training]")
    assert (said.status, said.err.splitlines()) == (0, [
        "bench: acting, 2 rounds", "bench: update, batch 12, 2 rounds", "bench: filling replays",
        "bench: training, 2 rounds",
    ])  # fmt: skip
    answer = json.loads(said.out)
    assert answer.keys() == {"machine", "measurements", "ratios", "left_out", "roofline"}
    assert {"cpu", "cores", "cpu_flags", "versions", "commit"} <= answer["machine"].keys()
    measurements = answer["measurements"]
    assert all(m.keys() == FIELDS for m in measurements)
    assert all(0 < m["min_ms"] <= m["median_ms"] for m in measurements)
    assert all(m["per_second"] == pytest.approx(1e3 / m["median_ms"]) for m in measurements)
    (chosen,) = {m["kernel"] for m in measurements if m["what"] == "policy(obs)"}
    updates = {(m["kernel"], m["precision"]) for m in measurements if m["what"] == "update"}
    assert updates == {
        (chosen, "fp32"), (chosen, "bf16"), ("reference", "fp32"), ("dense", "fp32"),
        ("popsan loop", "fp32"), ("dense loop", "fp32"),
    }  # fmt: skip
    assert {m["kernel"] for m in measurements if m["what"] == "training"} == {
        chosen, "dense", "popsan loop", "dense loop",
    }  # fmt: skip
    baselines = ("popsan loop", "dense loop")
    acting = ["policy(obs)", "actor"] + ["its library call"] * chosen.startswith("cpu/")
    work = [f"update {chosen} {precision} batch 12" for precision in ("fp32", "bf16")]
    work.append(f"training {chosen} fp32 batch 12")
    assert answer["ratios"].keys() == {
        *(f"{what} {chosen} fp32 / {other}" for what in acting for other in baselines),
        *(f"{name} / {other}" for name in work for other in (*baselines, "dense")),
    }
    times = {
        m["kernel"]: m["median_ms"]
        for m in measurements
        if m["what"] == "update" and m["precision"] == "fp32"
    }
    ratio = answer["ratios"][f"update {chosen} fp32 batch 12 / popsan loop"]["ratio"]
    assert ratio == pytest.approx(times[chosen] / times["popsan loop"])


def test_proxies() -> None:
    answer = bench("parts=[proxy]")
    rules = ["td3", "proxy_td3 lif K=3", "proxy_td3 cuba_lif K=3", "proxy_td3 lif K=1"]
    times = {m["what"]: m["median_ms"] for m in answer["measurements"]}
    assert list(times) == [f"update, {rule}" for rule in rules]
    assert [name.split()[-1] for name in answer["ratios"]] == ["td3"] * 3
    (of_one_step,) = (r for name, r in answer["ratios"].items() if "K=1" in name)
    expected = times["update, proxy_td3 lif K=1"] / times["update, td3"]
    assert of_one_step["ratio"] == pytest.approx(expected)


def exchanges() -> list[str]:
    """The ways in which two workers can exchange data on this machine."""
    shared = ["shared memory"] if os.access("/dev/shm", os.W_OK) else []
    return [*shared, "gloo"] + ([] if mpi.missing() else ["mpi"])


@pytest.mark.slow
def test_two_workers() -> None:
    answer = bench("parts=[workers]", "world_sizes=[2]")
    measurements = {m["what"]: m for m in answer["measurements"]}
    sizes = {what: (m["world_size"], m["batch"]) for what, m in measurements.items()}
    expected = {"update, alone": (1, 12), "exchange of the normaliser": (2, 1)}
    for over in exchanges():
        expected |= {
            f"update, weak over {over}": (2, 12),
            f"update, strong over {over}": (2, 6),
            f"exchanges, weak over {over}": (2, 12),
            f"exchanges, strong over {over}": (2, 6),
            f"exchanges alone, over {over}": (2, 1),
        }
    assert sizes == expected
    assert bool(mpi.missing()) == ("mpi, 2 workers" in answer["left_out"])
    # The exchange of the normaliser, measured with the last backend, comes once in 50 steps; these
    # have 50 updates, or with weak scaling 25.
    for scaling, updates in (("weak", 25), ("strong", 50)):
        name = f"{scaling} over {exchanges()[-1]}"
        merging = measurements["exchange of the normaliser"]["median_ms"] / updates
        part = measurements[f"exchanges, {name}"]["median_ms"] + merging
        whole = measurements[f"update, {name}"]["median_ms"] + merging
        share = answer["ratios"][f"share of exchanges in an update of 2 workers, {name}"]
        assert 0.0 < share["ratio"] < 1.0
        assert share["ratio"] == pytest.approx(part / whole)


@pytest.mark.slow
def test_exchanges_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpi, "missing", lambda: "it is not there")
    answer = bench("parts=[exchange]", "world_sizes=[2]", "rounds=1")
    assert answer["left_out"] == {"mpi, 2 workers": "it is not there"}
    assert all(m["world_size"] == 2 for m in answer["measurements"])
    assert {m["what"] for m in answer["measurements"]} == {
        f"sum of {4**power} numbers over {over}"
        for power in (0, *range(5, 12))
        for over in exchanges()
        if over != "mpi"
    }


def test_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    said = spikerl("bench", *SMALL, "parts=[acting]", "kernel=reference")
    assert said.status == 0
    lines = said.out.splitlines()
    assert max(map(len, lines)) <= 80
    starts = ["policy(obs) reference ", "actor reference ", "actor dense loop "]
    assert [sum(line.startswith(start) for line in lines) for start in starts] == [1, 1, 1]


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("parts=[fly]", "parts=fly: give some of acting"),
        ("batches=[0]", "batches=[0]: give 1 to 1048576"),
        ("batches=[]", "batches=[]: give at least one"),
        (
            "parts=[workers] batches=[8,3] world_sizes=[2,4]",
            "batches=[8, 3]: its last is shared out; give at least 4",
        ),
        ("rounds=0", "rounds=[0]: give 1 to 1048576"),
        ("world_sizes=[2,1]", "world_sizes=[2, 1]: give 2 to 4096; one worker alone"),
        ("parts=[exchange] world_sizes=[9999]", "world_sizes=[9999]: give 2 to 4096"),
        ("batches=[10000000]", "batches=[10000000]: give 1 to 1048576"),
        ("actor.hidden_sizes=[1000000,1000000]", "actor.hidden_sizes=[1000000, 1000000]: the run"),
        ("config=run/config.yaml", "config=run/config.yaml: bench does not read it"),
        ("init_from=run", "init_from="),
        ("world_size=2", "world_size=2: bench has a list: give world_sizes"),
        ("num_envs=2", "num_envs=2: bench trains in one environment; leave it out"),
        ("actor=mlp", "actor=mlp: bench times a spiking actor"),
        ("run=nowhere", "run=nowhere: no policy there"),
    ],
)
def test_refused(typed: str, line: str) -> None:
    assert spikerl("bench", *SMALL, "parts=[]", *typed.split()).line.startswith(line)


def test_a_replay_that_is_never_filled_needs_no_memory() -> None:
    huge = ["algo.replay_capacity=2000000000", "total_steps=2000000000"]
    assert bench("parts=[acting]", *huge)["measurements"]
