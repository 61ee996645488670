"""Standard output has only answers, whatever the shell, the environment or the reader does."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from rich.console import Console
from shell import SHORT, spikerl, tree

import spikerl as package
from spikerl import output
from spikerl.cli import main as cli
from spikerl.cli.main import check_text
from spikerl.errors import BadRequest
from spikerl.files import absolute, shown
from spikerl.runs.display import Screen, View

ROOT = Path(package.__file__).parents[1]


class Talks(gym.Env[np.ndarray, np.ndarray]):
    """It prints, and changes the working directory."""

    observation_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float64)
    action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
    elsewhere = "/"

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        print("a licence, a banner")
        return np.zeros(2), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        os.chdir(self.elsewhere)
        return np.full(2, 0.5), 1.0, False, False, {}


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    gym.register("Talks-v0", entry_point=lambda **_: Talks(), max_episode_steps=20)
    yield
    del gym.registry["Talks-v0"]


TALKS = [*SHORT, "env=gym", "env.id=Talks-v0", "total_steps=150"]


def shell(script: str, **environ: str) -> subprocess.CompletedProcess[str]:
    program = f'spikerl() {{ {sys.executable} -m spikerl "$@"; }}\n'
    return subprocess.run(
        ["bash", "-c", program + script], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environ},
    )  # fmt: skip


# --- JSON ----------------------------------------------------------------------------------------


def test_what_an_environment_prints_is_no_answer(tmp_path: Path) -> None:
    assert spikerl("train", *TALKS, "run_dir=r").status == 0
    os.chdir(tmp_path)
    said = spikerl("eval", "run=r", "episodes=1", "json=true")
    assert json.loads(said.out)["return_mean"] == 30.0
    assert "a banner" in said.err


def test_code_in_c_and_what_is_printed_at_exit_are_none_either() -> None:
    program = (
        "import atexit, os\n"
        "from spikerl import output\n"
        "output.prepare()\n"
        "atexit.register(print, 'bye')\n"
        "with output.only_answers():\n"
        "    os.system('echo from a process')\n"
        "    print('from python')\n"
        "    output.answer({'a': 1})\n"
        "print('later')\n"
        "output.finish(0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == '{"a": 1}\n'
    assert sorted(done.stderr.split("\n")) == ["", "bye", "from a process", "from python", "later"]


def test_a_second_answer_reaches_standard_output_too() -> None:
    """A sweep's second job prints a second answer."""
    program = (
        "from spikerl import output\n"
        "output.prepare()\n"
        "for number in (1, 2):\n"
        "    with output.only_answers():\n"
        "        print('loud')\n"
        "        output.answer({'a': number})\n"
        "output.finish(0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == '{"a": 1}\n{"a": 2}\n'
    assert done.stderr == "loud\nloud\n"


def test_what_comes_after_goes_where_standard_output_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with output.only_answers():
        pass
    later = io.StringIO()
    monkeypatch.setattr(sys, "stdout", later)
    output.answer({"a": 1})
    assert later.getvalue() == '{"a": 1}\n'


# --- what users' code does to the program's own streams and to its end ----------------------------


def test_a_stream_that_is_closed_goes_on() -> None:
    reader, writer = os.pipe()
    stream = output.Stream(writer)
    stream.write("a")
    stream.close()
    assert not stream.closed
    stream.write("b")
    stream.flush()
    os.close(writer)
    assert os.read(reader, 9) == b"ab"
    os.close(reader)


@pytest.mark.parametrize(("seconds", "status", "said"), [
    (60, 75, "spikerl: ends although the environment's still runs, as no thread may keep it\n"),
    (0.6, 0, ""),
])  # fmt: skip
def test_a_thread_does_not_keep_the_program(seconds: float, status: int, said: str) -> None:
    """The program waits STRAY_S for a thread; one that ends by then does not change the status."""
    program = (
        "import threading, time\n"
        "from spikerl.distributed import process_lifetime as lifetime\n"
        f"lifetime.STRAY_S = {0.2 if status else 5}\n"
        f"sleep = lambda: time.sleep({seconds})\n"
        'threading.Thread(target=sleep, name="the environment\'s").start()\n'
        "lifetime.end_despite_threads(75)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=50
    )
    assert (done.returncode, done.stderr) == (status, said)


def test_the_command_ends_so(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(cli, "end_despite_threads", ended.append)
    monkeypatch.setattr(output, "prepare", lambda: None)
    monkeypatch.setattr(sys, "argv", ["spikerl", "no-such-command"])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert ended == [2]


# --- a reader that goes away, and a terminal that lacks characters --------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_whose_reader_went_away(number: int, tmp_path: Path) -> None:
    """Standard output or standard error is a broken pipe, or closed."""
    typed = " ".join([*SHORT, "total_steps=150"])
    gone = "| true" if number == 1 else "2>&1 >/dev/null | true"
    done = shell(
        f"set -o pipefail; spikerl train '{typed.replace(' ', chr(39) + ' ' + chr(39))}'"
        f" run_dir=a {gone} && spikerl train resume=a total_steps=160 {number}>&-"
    )
    assert done.returncode == 0, done
    assert "Traceback" not in done.stderr
    assert json.loads((tmp_path / "a/manifest.json").read_text())["status"] == "done"
    assert len((tmp_path / "a/metrics.jsonl").read_text().splitlines()) == 2


def test_a_stream_whose_reader_went_away() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    stream = output.Stream(writer)
    for _ in range(2):
        print("x" * 100_000, file=stream)
        stream.flush()
    os.close(writer)


def test_a_character_that_the_terminal_lacks() -> None:
    reader, writer = os.pipe()
    stream = output.Stream(writer, "ascii")
    print("caf\xe9", file=stream, flush=True)
    assert os.read(reader, 100) == b"caf\\xe9\n"
    os.close(reader)
    os.close(writer)


def test_a_color_that_is_forced_draws_no_panel(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(sys, "stdout", file)
    assert Console().is_terminal
    view = View("title", 100)
    assert view.live is None
    view.line("a line")
    assert file.getvalue() == "a line\n"


@pytest.mark.parametrize(("term", "drawn"), [("xterm", True), ("dumb", False)])
def test_a_terminal(term: str, drawn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", term)
    assert Screen().is_terminal == drawn


def test_the_lines_of_jobs_side_by_side_have_names(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setenv("SPIKERL_JOB", "seed=1")
    view = View("title", 100, console=Console(file=file, force_terminal=True, highlight=False))
    view.line("a line")
    assert view.live is None
    assert file.getvalue() == "[seed=1] a line\n"


# --- paths ---------------------------------------------------------------------------------------


def test_bytes_that_are_no_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said = spikerl("train", *SHORT, "run_dir=caf\udce9")
    assert said.line == "run_dir=caf\\xe9: its name is not UTF-8; give another"
    odd = tmp_path / "caf\udce9"
    odd.mkdir()
    monkeypatch.chdir(odd)
    assert "caf\\xe9=: its name is not UTF-8" in spikerl("train", *SHORT).line
    odd.rmdir()
    with pytest.raises(BadRequest, match="it was removed"):
        check_text([])


def test_a_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert absolute("~/r") == tmp_path / "me" / "r"
    assert absolute("./~/r") == tmp_path / "~" / "r"
    assert absolute("a/../b") == tmp_path / "b"
    assert spikerl("train", *SHORT, "total_steps=150", "run_dir=~/r").status == 0
    assert spikerl("eval", "run=~/r", "episodes=1").status == 0
    assert spikerl("train", "resume=~/r", "total_steps=160").status == 0
    typed = [*SHORT, "total_steps=50", "init_from=~/r", "seed=1"]
    assert spikerl("train", "-m", *typed, "run_dir=~/s").status == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["me"]
    assert sorted(path.name for path in (tmp_path / "me").iterdir()) == ["r", "s"]
    said = spikerl("train", *SHORT, "run_dir=~/r")
    assert said.line.startswith("run_dir=~/r: it exists already")


def test_shown(tmp_path: Path) -> None:
    shorter = [shown(path) for path in (tmp_path / "a/b", tmp_path, tmp_path.parent)]
    assert shorter == ["a/b", str(tmp_path), str(tmp_path.parent)]


def test_an_environment_that_goes_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(Talks, "elsewhere", str(tmp_path / "elsewhere"))
    for name in ("r", "dated"):
        monkeypatch.chdir(tmp_path)
        place = ["run_dir=r"] if name == "r" else []
        said = spikerl("train", *TALKS, *place)
        assert (said.status, said.err) == (0, ""), said
    assert tree(tmp_path / "elsewhere") == {}
    (dated,) = (tmp_path / "outputs/Talks-v0/td3").iterdir()
    for run in (tmp_path / "r", dated):
        assert len((run / "metrics.jsonl").read_text().splitlines()) == 1
        assert json.loads((run / "manifest.json").read_text())["status"] == "done"
    monkeypatch.chdir(tmp_path)
    said = spikerl("train", "resume=r", "total_steps=300")
    assert (said.status, said.err) == (0, ""), said
    assert tree(tmp_path / "elsewhere") == {}


# --- config files ---------------------------------------------------------------------------------


def test_what_cfg_prints_is_a_config_file(tmp_path: Path) -> None:
    printed = spikerl("train", "--cfg", "job", "env=Pendulum", "seed=7").out
    (tmp_path / "c.yaml").write_text(printed)
    again = spikerl("train", "config=c.yaml", "--cfg", "job")
    assert again.out == printed
    assert (
        spikerl("train", "config=c.yaml", "total_steps=0").line == "total_steps=0: give at least 1"
    )


def test_a_failure_by_design_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(self: Any, action: np.ndarray) -> Any:
        raise ValueError("the robot fell over")

    monkeypatch.setattr(Talks, "step", breaks)
    said = spikerl("train", *TALKS, "run_dir=r")
    assert said.status == 1
    assert said.err.startswith("spikerl: step 1: Talks-v0 raised ValueError: the robot fell over")
    assert said.err.count("\n") == 1
