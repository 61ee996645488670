"""How the commands treat environments that users write."""

from __future__ import annotations

import json
import os
from pathlib import Path

import own_envs
import pytest
from shell import SHORT, spikerl

LEARNS = [arg for arg in SHORT if not arg.startswith("env")]


def of(name: str) -> list[str]:
    return ["env=gym", f"env.id=own_envs:{name}-v0", *LEARNS]


def raising(what: str, where: str = "step") -> list[str]:
    return [*of("Raises"), f"env.kwargs={{where:{where},what:{what}}}"]


@pytest.mark.parametrize("what", ["SystemExit", "KeyboardInterrupt"])
def test_a_failure_is_one_line_and_a_traceback_in_the_run(tmp_path: Path, what: str) -> None:
    run = tmp_path / "r"
    said = spikerl("train", *raising(what), f"run_dir={run}")
    assert said.status == 1
    assert said.err.count("\n") == 1
    assert said.err.startswith(f"spikerl: step 31: Raises-v0 raised {what} (")
    assert "error.txt has the traceback" in said.err
    error = (run / "error.txt").read_text()
    assert error.startswith("Traceback")
    assert "own_envs.py" in error
    assert json.loads((run / "manifest.json").read_text())["status"] == "failed"


def test_a_sweep_goes_on_behind_it(tmp_path: Path) -> None:
    said = spikerl("train", "-m", *raising("SystemExit"), "env.kwargs.where=step,nowhere",
                   f"run_dir={tmp_path}")  # fmt: skip
    assert said.status == 1
    assert "1 of 2 jobs done" in said.out
    assert said.err.count("Traceback") == 0
    assert "step 31: Raises-v0 raised SystemExit" in said.err


def test_an_evaluation_prints_no_object(tmp_path: Path) -> None:
    run = tmp_path / "r"
    quiet = [*of("Raises"), "env.kwargs={where:nowhere,what:SystemExit}", f"run_dir={run}"]
    assert spikerl("train", *quiet).status == 0
    policy = json.loads((run / "policy.json").read_text())
    policy["env_kwargs"]["where"] = "step"
    (run / "policy.json").write_text(json.dumps(policy))
    said = spikerl("eval", f"run={run}", "env_id=own_envs:Raises-v0", "json=true")
    assert (said.status, said.out) == (1, "")
    assert said.err.startswith("spikerl: evaluation, step 31: Raises-v0 raised SystemExit")
    assert said.err.count("\n") == 1


def test_paths_that_a_policy_gives_its_environment_are_confirmed(tmp_path: Path) -> None:
    run = tmp_path / "r"
    typed = ["env=Pendulum", *LEARNS, "env.max_episode_steps=9", f"run_dir={run}"]
    assert spikerl("train", *typed, "total_steps=20", "steps_per_epoch=20").status == 0
    policy = json.loads((run / "policy.json").read_text())
    policy["env_kwargs"] = {"xml_file": "/etc/passwd"}
    (run / "policy.json").write_text(json.dumps(policy))
    assert "confirm with env_id=Pendulum-v1" in spikerl("eval", f"run={run}").line


def test_settings_of_the_environment_lie_in_the_config(tmp_path: Path) -> None:
    first, again = tmp_path / "a", tmp_path / "b"
    wrappers = "env.wrappers=[{name:RescaleAction,min_action:-1.0,max_action:1.0}]"
    made = spikerl("train", *of("Takes"), "env.kwargs={mass:2.0}", "env.kwargs.more={x:[1,a]}",
                   wrappers, "env.reward_scale=0.5", f"run_dir={first}")  # fmt: skip
    assert made.status == 0, made
    config = f"config={first / 'config.yaml'}"
    module = "env.id=own_envs:Takes-v0"
    assert spikerl("train", config, module, f"run_dir={again}").status == 0
    policies = [(run / "policy.safetensors").read_bytes() for run in (first, again)]
    assert policies[0] == policies[1]
    data = json.loads((again / "policy.json").read_text())
    assert data["env_kwargs"] == {"mass": 2.0, "more": {"x": [1, "a"]}}
    assert [one["name"] for one in data["env_wrappers"]] == ["RescaleAction"]
    resumed = spikerl("train", f"resume={again}", module, "total_steps=400")
    assert resumed.status == 0, resumed
    assert spikerl("eval", f"run={again}", "env_id=own_envs:Takes-v0", "episodes=1").status == 0


def test_an_untrusted_config_gives_no_paths(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("env: {name: Ant, kwargs: {xml_file: /etc/passwd}}\n")
    assert spikerl("train", f"config={config}").line.startswith("env.kwargs.xml_file=")
    config.write_text("env: {name: Ant, kwargs: {xml_file: a/../../b.xml}}\n")
    assert spikerl("train", f"config={config}").line.startswith("env.kwargs.xml_file=")


@pytest.mark.slow
def test_two_workers_name_the_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(own_envs.__file__).parent), prepend=os.pathsep)
    run = tmp_path / "r"
    said = spikerl("train", *raising("SystemExit"), "world_size=2", f"run_dir={run}")
    assert said.status == 1
    assert "EnvironmentFailed: step 61: Raises-v0 raised SystemExit" in said.err
    assert "own_envs.py" in (run / "error.txt").read_text()


def test_a_resume_names_what_begins_anew(tmp_path: Path) -> None:
    """The state of a user's environment cannot be saved, so that it goes on from a reset."""
    run = tmp_path / "r"
    made = spikerl("train", *of("Takes"), "env.kwargs={mass:2.0,more:1}", f"run_dir={run}")
    assert made.status == 0, made
    said = spikerl("train", f"resume={run}", "env.id=own_envs:Takes-v0", "total_steps=360")
    assert said.status == 0, said
    line = next(line for line in said.out.splitlines() if line.startswith("resumed at step "))
    assert line.endswith(" transitions, random streams; not exact: anew: environments of this kind,"
                         " which go on from a reset")  # fmt: skip
