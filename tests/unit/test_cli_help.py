"""How `--help` explains the keys."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from shell import spikerl

from spikerl import plugins
from spikerl.cli.help import with_meanings


def test_each_key_with_its_comment() -> None:
    text = "spikerl train\nbase: env, neuron\ntable: care_bn, ours\nprecision: fp32\n"
    text += "env/ALE: Pong, Pong_pixels\n\n"
    text += "Keys and their defaults (x)\n\n"
    keys = "neuron:\n  reset: hard\n  name: lif\nactor:\n  reset: 1\nthreads: null\nseed: 0\n"
    assert with_meanings(text + keys, "train") == (
        "spikerl train\nprecision: bf16, fp16, fp32\n\nKeys and their defaults (x)\n\n"
        "neuron:\n  reset: hard  # soft: a spike takes the threshold from the voltage\n"
        "  name: lif\n"
        "actor:\n  reset: 1\n"
        "threads: null  # of each worker; null: its share of the cores, or 1 for batches up to"
        " 128\nseed: 0\n"
    )
    assert with_meanings("no list of keys", "train") == "no list of keys"


def test_a_comment_is_that_of_the_option_chosen() -> None:
    """A key's comment is taken from the chosen algorithm's file, or else from td3's."""
    td3 = "algo:\n  name: td3\n  gamma: 0.99\n  tau: 0.005\n"
    assert with_meanings(td3, "train") == (
        "algo:\n  name: td3\n  gamma: 0.99  # discount of a step\n"
        "  tau: 0.005  # weight of the online network in each update of its target network\n"
    )
    bc = "algo:\n  name: bc\n  gamma: 0.99\n  batch_size: 1\n"
    bc += "neuron:\n  name: plif\n  surrogate: rect\n"
    assert with_meanings(bc, "train") == (
        "algo:\n  name: bc\n  gamma: 0.99  # unused: nothing is bootstrapped\n"
        "  batch_size: 1  # transitions of an update: over all workers; with scaling=weak, of each"
        " worker\nneuron:\n  name: plif\n"
        "  surrogate: rect  # gradient of a spike: rect, triangle, sigmoid, atan\n"
    )


def test_an_option_of_a_plugin_has_its_comments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys that a plugin's option inherits have the comments of its base option, not td3's."""
    (tmp_path / "conf" / "algo").mkdir(parents=True)
    text = "defaults:\n  - bc\n  - _self_\n\nname: mine\npower: 1.0 # of the error\n"
    (tmp_path / "conf" / "algo" / "mine.yaml").write_text(text)
    package = ModuleType("extras")
    package.__path__ = [str(tmp_path)]
    monkeypatch.setitem(plugins.loaded, "extras", package)
    assert with_meanings("algo:\n  name: mine\n  gamma: 0.99\n  power: 1.0\n", "train") == (
        "algo:\n  name: mine\n  gamma: 0.99  # unused: nothing is bootstrapped\n"
        "  power: 1.0  # of the error\n"
    )


def test_a_comment_says_what_a_key_means() -> None:
    """A comment does not refer to an option that is not shown."""
    keys = "actor:\n  name: cnn\n  channels_first: false\n  pixel_max: 1.0\n  prune: null\n"
    assert with_meanings(keys, "train") == (
        "actor:\n  name: cnn\n  channels_first: false  # observations are (height, width, C)\n"
        "  pixel_max: 1.0  # that observations are divided by\n"
        "  prune: null  # share of each matrix of weights that is 0 from the first step on, those"
        " nearest to 0\n"
    )


@pytest.mark.parametrize("command", ["train", "bench", "eval"])
def test_help(command: str) -> None:
    """No key is shown as null without a comment."""
    said = spikerl(command, "--help")
    assert (said.status, said.err) == (0, "")
    if command != "eval":  # options as they are typed, with their subfolder
        assert "\nenv: ALE/Pong, ALE/Pong_pixels, Acrobot, " in said.out
        assert "\nenv/" not in said.out
    assert "  # " in said.out
    assert [line for line in said.out.splitlines() if line.endswith(": null")] == []


def test_a_command_that_starts_from_another_has_its_comments() -> None:
    keys = "nnodes: 1\nrounds: 15\n"
    meant = "nnodes: 1  # machines\nrounds: 15  # each benchmark is timed once a round\n"
    assert with_meanings(keys, "bench") == meant
    assert with_meanings("nnodes: 1\n", "eval") == "nnodes: 1\n"
