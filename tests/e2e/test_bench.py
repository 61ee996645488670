"""`spikerl bench`, briefly and with small networks: what it says, not how fast anything is."""

from __future__ import annotations

import json
from typing import Any

import pytest
from shell import spikerl

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
    assert answer.keys() == {"machine", "measurements", "ratios", "roofline"}
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


def test_two_workers() -> None:
    found = {m["what"]: m for m in bench("parts=[workers]")["measurements"]}
    sizes = {what: (m["world_size"], m["batch"]) for what, m in found.items()}
    assert sizes == {
        "update, alone": (1, 12), "update, weak": (2, 12), "update, strong": (2, 6),
    }  # fmt: skip


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
        ("actor=mlp", "actor=mlp: bench times a spiking actor"),
        ("run=nowhere", "run=nowhere: no policy there"),
    ],
)
def test_refused(typed: str, line: str) -> None:
    assert spikerl("bench", *SMALL, "parts=[]", typed).line.startswith(line)
