"""The lines that are printed at the start of a run."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from builders import bc_config, small_config, td3_config, with_run

from spikerl.config import build as configs
from spikerl.distributed.world import ALONE
from spikerl.models.actor_config import PopSANConfig
from spikerl.snn.encoders import PopulationConfig
from spikerl.training.announcement import announce, nothing_learned

TRAINER: Any = SimpleNamespace(  # attributes that `announce` reads
    world=ALONE,
    task=SimpleNamespace(env_id="Some-v1", obs_dim=3, act_dim=1),
    updates_by=lambda steps: steps,
    dataset=None,
    init_actor=None,
    algo=SimpleNamespace(
        actor_optimizer=SimpleNamespace(unpruned=None), notes=list, random_steps=0, critic_warmup=0
    ),
    evaluator=SimpleNamespace(note=None),
)


@pytest.mark.parametrize(
    ("precision", "paths", "noted"),
    [("bf16", ["avx512"], True), ("bf16", ["amx", "avx512"], False), ("fp32", ["avx512"], False)],
)
def test_bf16_without_matrix_units(
    default: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    paths: list[str],
    noted: bool,
) -> None:
    monkeypatch.setattr("spikerl.models.precision.supported_paths", lambda: paths)
    own = {"name": precision, "actor": "fp32", "critic": precision}
    kernel = {**default["kernel"], "name": "reference"}
    config = configs.build({**default, "precision": own, "kernel": kernel, "device": "cpu"})
    note = "note: bf16 is usually slower than fp32 here: this processor has no matrix units (AMX)"
    assert (note in announce(config, TRAINER, [])) == noted


@pytest.mark.parametrize(
    ("resume", "typed", "device", "others"),
    [
        (None, [], "requested", "requested"),
        ("r", [], "as before", "as before"),
        ("r", ["spikerl", "train", "resume=r", "device=cpu"], "requested", "as before"),
    ],
)
def test_what_a_resumed_run_keeps_was_not_requested(
    resume: str | None, typed: list[str], device: str, others: str
) -> None:
    config = with_run(small_config(), resume=resume)
    assert announce(config, TRAINER, typed)[2] == (
        f"device=cpu ({device}); threads=1 ({others}); kernel=reference ({others});"
        " backend=none (one worker exchanges nothing); energy=none (requested)"
    )


@pytest.mark.parametrize(("random_steps", "warned"), [(16, False), (17, True)])
def test_whether_any_action_is_not_random(random_steps: int, warned: bool) -> None:
    """8 environments begin their last step at step 16, so 17 random steps cover all actions."""
    config = small_config(num_envs=8, total_steps=20)
    algo = SimpleNamespace(**{**vars(TRAINER.algo), "random_steps": random_steps})
    lines = announce(config, SimpleNamespace(**{**vars(TRAINER), "algo": algo}), [])  # type: ignore[arg-type]
    said = f"warning: all actions of this run are random (algo.random_steps={random_steps})"
    assert any(line.startswith(said) for line in lines) == warned


def test_what_makes_updates_of_a_run_without_one() -> None:
    assert nothing_learned(bc_config()).endswith("; give more total_steps")
    algo = td3_config(learning_starts=30, update_interval=200)
    assert replace(algo, learning_starts=0).updates_due(100, 1) == 0
    assert replace(algo, learning_starts=0, update_interval=100).updates_due(100, 1) == 100
    remedy = "; give more total_steps, or less algo.learning_starts and algo.update_interval"
    assert nothing_learned(algo).endswith(remedy)


def test_weights_that_act_otherwise_here() -> None:
    """No warning for settings that only learning reads or that are initial values of weights."""
    config = small_config()
    actor = config.actor
    assert isinstance(actor.actor, PopSANConfig)
    assert isinstance(actor.encoder, PopulationConfig)
    assert actor.neuron

    def said(**parts: Any) -> list[str]:
        theirs = replace(actor, **parts)
        trainer: Any = SimpleNamespace(**{**vars(TRAINER), "init_actor": theirs})
        return [line for line in announce(config, trainer, []) if "otherwise" in line]

    assert said() == []
    assert said(encoder=replace(actor.encoder, var=0.3), neuron=replace(actor.neuron,
                surrogate_window=0.4, surrogate="atan")) == []  # fmt: skip
    neuron, steps = replace(actor.neuron, threshold=3.0), replace(actor.actor, spike_steps=8)
    assert said(neuron=neuron, actor=steps) == [
        "warning: its policy acts otherwise here, as it had neuron.threshold=3.0 (here 0.5),"
        f" actor.spike_steps=8 (here {vars(actor.actor)['spike_steps']})"
    ]
