"""`spikerl bench`, briefly and with small networks: what it says, not how fast anything is."""

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
    assert (said.status, said.err) == (0, "")
    return dict(json.loads(said.out))


def test_acting_updating_and_training() -> None:
    answer = bench("parts=[acting,update,training]")
    assert answer.keys() == {"machine", "measurements", "ratios", "left_out", "roofline"}
    assert answer["roofline"]["update_gflop"].keys() == {"12"}
    assert all(answer["roofline"][name] > 0.0 for name in ("product_gflops", "copy_gb_s"))
    assert {"cpu", "cores", "cpu_flags", "versions", "commit"} <= answer["machine"].keys()
    found = answer["measurements"]
    assert all(m.keys() == FIELDS for m in found)
    assert all(0 < m["min_ms"] <= m["median_ms"] for m in found)
    assert all(m["per_second"] == pytest.approx(1e3 / m["median_ms"]) for m in found)
    (chosen,) = {m["kernel"] for m in found if m["what"] == "policy(obs)"}
    updates = {(m["kernel"], m["precision"]) for m in found if m["what"] == "update"}
    assert updates == {
        (chosen, "fp32"), (chosen, "bf16"), ("reference", "fp32"), ("dense", "fp32"),
        ("popsan loop", "fp32"), ("dense loop", "fp32"),
    }  # fmt: skip
    assert {m["kernel"] for m in found if m["what"] == "training"} == {
        chosen, "dense", "popsan loop", "dense loop",
    }  # fmt: skip
    name = f"update {chosen} fp32 batch 12 / popsan loop"
    times = {
        m["kernel"]: m["median_ms"]
        for m in found
        if m["what"] == "update" and m["precision"] == "fp32"
    }
    assert answer["ratios"][name]["ratio"] == pytest.approx(times[chosen] / times["popsan loop"])


def test_proxies() -> None:
    answer = bench("parts=[proxy]")
    rules = ["td3", "proxy_td3 lif K=3", "proxy_td3 cuba_lif K=3", "proxy_td3 lif K=1"]
    times = {m["what"]: m["median_ms"] for m in answer["measurements"]}
    assert list(times) == [f"update, {rule}" for rule in rules]
    (found,) = (r for name, r in answer["ratios"].items() if "K=1" in name)
    expected = times["update, proxy_td3 lif K=1"] / times["update, td3"]
    assert found["ratio"] == pytest.approx(expected)


def ways() -> list[str]:
    """Through what two workers can exchange here."""
    room = ["shared memory"] if os.access("/dev/shm", os.W_OK) else []
    return [*room, "gloo"] + ([] if mpi.missing() else ["mpi"])


def test_two_workers() -> None:
    answer = bench("parts=[workers]", "world_sizes=[2]")
    found = {m["what"]: m for m in answer["measurements"]}
    sizes = {what: (m["world_size"], m["batch"]) for what, m in found.items()}
    expected = {"update, alone": (1, 12), "exchange of the normaliser": (2, 1)}
    for way in ways():
        expected |= {
            f"update, weak over {way}": (2, 12),
            f"update, strong over {way}": (2, 6),
            f"exchanges of an update, weak over {way}": (2, 12),
            f"exchanges of an update, strong over {way}": (2, 6),
            f"exchanges of an update alone, over {way}": (2, 1),
        }
    assert sizes == expected
    assert bool(mpi.missing()) == ("mpi, 2 workers" in answer["left_out"])
    # The last backend's own normaliser's exchange, one in 50 steps: 50 updates, or 25.
    for scaling, updates in (("weak", 25), ("strong", 50)):
        name = f"{scaling} over {ways()[-1]}"
        merging = found["exchange of the normaliser"]["median_ms"] / updates
        part = found[f"exchanges of an update, {name}"]["median_ms"] + merging
        whole = found[f"update, {name}"]["median_ms"] + merging
        share = answer["ratios"][f"share of exchanges in an update of 2 workers, {name}"]
        assert 0.0 < share["ratio"] < 1.0
        assert share["ratio"] == pytest.approx(part / whole)


def test_exchanges_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpi, "missing", lambda: "it is not there")
    answer = bench("parts=[exchange]", "world_sizes=[2]", "rounds=1")
    assert answer["left_out"] == {"mpi, 2 workers": "it is not there"}
    assert all(m["world_size"] == 2 for m in answer["measurements"])
    assert {m["what"] for m in answer["measurements"]} == {
        f"sum of {4**power} numbers over {way}"
        for power in (0, *range(5, 12))
        for way in ways()
        if way != "mpi"
    }


def test_a_table() -> None:
    said = spikerl("bench", *SMALL, "parts=[acting]", "kernel=reference")
    assert said.status == 0
    assert "policy(obs)" in said.out


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("parts=[fly]", "parts=fly: give some of acting"),
        ("batches=[0]", "batches=[0]: give at least 1"),
        ("rounds=0", "rounds=[0]: give at least 1"),
        ("world_sizes=[2,1]", "world_sizes=[2, 1]: give at least 2; one worker alone"),
        ("world_size=2", "world_size=2: bench has a list: give world_sizes"),
        ("actor=mlp", "actor=mlp: bench times a spiking actor"),
        ("run=nowhere", "run=nowhere: no policy there"),
    ],
)
def test_refused(typed: str, line: str) -> None:
    assert spikerl("bench", *SMALL, "parts=[]", typed).line.startswith(line)
