"""POLICY.md, the card beside a policy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from table_runs import write_run

from spikerl.reporting.policy_card import policy_card
from spikerl.reporting.records import Run
from spikerl.reporting.render import render_table
from spikerl.reporting.table_file import read_table

CARD = """\
# PopSAN TD3 on Ant-v5, seed 0

    spikerl eval run=a episodes=20 seed=7

|  |  |
| --- | ---: |
| return of the policy's file | 2.0 \N{PLUS-MINUS SIGN} 1.0 over 2 episodes |
| its firing rate | 0.250 |
| training steps | 200 |
| largest of its evaluations | 2000 |
| mean of its last ten evaluations | 1500 |
| critic loss | 1.5 |
| MACs a decision | 1.0 |
| ACs a decision | 2.5 |
| modelled nJ a decision, arithmetic at 45 nm | 30.5 |
| modelled nJ a decision, memory traffic | 400 |
| commit | abc |
| folder | a |

| layer | firing rate | in the surrogate window | never fire | always fire |
| --- | ---: | ---: | ---: | ---: |
| encoder | 0.100 | - | - | - |
| layer 1 | 0.200 | 0.500 | 0.250 | 0.125 |

Made by

    spikerl train env=Ant
"""


def evaluated(folder: Path) -> None:
    write_run(folder, counted=True, git={"commit": "abc", "dirty": False})
    evaluation = {"return_mean": 2.0, "return_std": 1.0, "returns": [1.0, 3.0],
                  "firing_rate": 0.25, "seed": 7}  # fmt: skip
    (folder / "evaluation.json").write_text(json.dumps(evaluation))


def test_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    evaluated(Path("a"))
    assert policy_card(Run.read(Path("a")), "PopSAN TD3") == CARD


def test_a_run_that_became_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the last typed total_steps counts, as the one before was not reached; if it is that of
    the first command, there is no resume.
    """
    monkeypatch.chdir(tmp_path)
    evaluated(Path("a"))
    path = Path("a/manifest.json")
    longer = [{"command": f"spikerl train resume=a{more}"}
              for more in (" total_steps=1000", " total_steps=500", "")]  # fmt: skip
    manifest = json.loads(path.read_text()) | {"resumed": longer}
    path.write_text(json.dumps(manifest))
    made_by = "Made by\n\n    spikerl train env=Ant\n    spikerl train resume=a total_steps=500\n"
    assert policy_card(Run.read(Path("a")), "PopSAN TD3").endswith(made_by)
    path.write_text(json.dumps(manifest | {"command": "spikerl train total_steps=500"}))
    made_by = "Made by\n\n    spikerl train total_steps=500\n"
    assert policy_card(Run.read(Path("a")), "PopSAN TD3").endswith(made_by)


def test_operations_are_of_the_file_that_it_stands_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluations during training, whose mean is 1, were of other policies."""
    monkeypatch.chdir(tmp_path)
    evaluated(Path("a"))
    path = Path("a/evaluation.json")
    counted = {"macs": 3.0, "modelled_memory_nj": None}  # null: not known
    path.write_text(json.dumps(json.loads(path.read_text()) | counted))
    card = policy_card(Run.read(Path("a")), "PopSAN TD3")
    lines = {"| MACs a decision | 1.0 |": "| MACs a decision | 3.0 |",
             "| modelled nJ a decision, memory traffic | 400 |\n": ""}  # fmt: skip
    expected = CARD
    for line, other in lines.items():
        expected = expected.replace(line, other)
    assert card == expected


def test_a_table_writes_those_of_its_own_policies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rendering `ours`, which shows another table's runs, writes no cards into their folders."""
    monkeypatch.chdir(tmp_path)
    rows = Path("outputs/reproduced/popsan_table1/popsan_td3/Ant")
    evaluated(rows / "seed0")
    write_run(rows / "seed1")  # its policy's file is not evaluated yet
    render_table(read_table("ours"), 1000)
    assert not list(tmp_path.rglob("POLICY.md"))
    render_table(read_table("popsan_table1"), 1000)
    assert list(tmp_path.rglob("POLICY.md")) == [tmp_path / rows / "seed0/POLICY.md"]


def test_a_policy_that_was_not_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    evaluated(Path("a"))
    (tmp_path / "a/metrics.jsonl").write_text("")
    card = policy_card(Run.read(Path("a")), "converted")
    assert "\n| its firing rate | 0.250 |\n| commit | abc |\n" in card
