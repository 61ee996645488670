"""What `--help` says of the keys."""

from __future__ import annotations

import pytest
from shell import spikerl

from spikerl.cli.help import with_meanings


def test_each_key_with_its_comment() -> None:
    text = "spikerl train\nbase: env, neuron\ntable: care_bn, ours\nenv: Ant\n\n"
    text += "Keys and their defaults (x)\n\n"
    keys = "neuron:\n  reset: hard\n  name: lif\nactor:\n  reset: 1\nthreads: null\nseed: 0\n"
    assert with_meanings(text + keys, "train") == (
        "spikerl train\nenv: Ant\n\nKeys and their defaults (x)\n\n"
        "neuron:\n  reset: hard  # soft: a spike takes the threshold from the voltage\n"
        "  name: lif\n"
        "actor:\n  reset: 1\n"
        "threads: null  # of each worker; null: its share of the cores\nseed: 0\n"
    )
    assert with_meanings("no list of keys", "train") == "no list of keys"


@pytest.mark.parametrize("command", ["train", "eval"])
def test_help(command: str) -> None:
    said = spikerl(command, "--help")
    assert (said.status, said.err) == (0, "")
    assert "  # " in said.out
