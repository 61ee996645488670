"""Run folders as they are read, plotted, and shown on a page."""

from __future__ import annotations

import csv
import errno
import json
import os
import re
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shell import refusal, spikerl
from table_runs import write_run

from spikerl.commands import report
from spikerl.reporting import curves, tables
from spikerl.reporting.numbers import PM
from spikerl.reporting.page import command_of
from spikerl.reporting.records import Run, number, run_folders
from spikerl.reporting.side_by_side import SideBySide, draw, names_of, render_runs
from spikerl.reporting.tables import Section


def test_a_run(tmp_path: Path) -> None:
    run = Run.read(write_run(tmp_path / "a", seed=3))
    assert (run.seed, run.step, run.returns) == (3, 200, [1003.0, 2003.0])
    assert (run.score("max_average"), run.score("last_ten_mean")) == (2003.0, 1503.0)
    assert (run.wall_s, run.joules) == (7200.0, 10.0)
    assert run.settings == {"seed": "3", "algo.name": "td3", "algo.tau": "0.005"}
    x, y = run.curve("eval_return", "wall")
    assert (x.tolist(), y.tolist()) == ([1.0, 2.0], [1003.0, 2003.0])
    assert run.curve("eval_return", "joules")[0].tolist() == [5.0, 10.0]
    assert run.curve("eval_return", "cpu")[0].tolist() == [0.25, 0.5]
    assert run.within(0.4, "cpu") == (1003.0, 100)
    assert run.within(0.5, "cpu") == (2003.0, 200)
    assert run.within(0.51, "cpu") is None
    assert run.within(1.0) == (1003.0, 100)
    assert run.curve("layer_firing_rates.1")[1].tolist() == [0.2, 0.2]
    assert run.curve("layer_firing_rates.2")[1].tolist() == []


def test_discarded_work_was_spent(tmp_path: Path) -> None:
    """Discarded rows count in the joules, as in `spikerl runs` and summary.json."""
    folder = write_run(tmp_path / "a")
    (folder / "discarded.jsonl").write_text('{"step": 300, "eval_return": 9e9, "energy_j": 4.0}\n')
    run = Run.read(folder)
    assert (run.joules, run.step, run.returns) == (14.0, 200, [1000.0, 2000.0])
    (folder / "discarded.jsonl").write_text('{"step": 300, "energy_j": null}\n')
    assert Run.read(folder).joules is None


def test_a_run_that_goes_on(tmp_path: Path) -> None:
    """The last line is incomplete, and the row before has no evaluation."""
    folder = write_run(tmp_path / "a")
    rows = ['{"step": 100, "eval_return": null}', '{"step": 200, "eval_r']
    (folder / "metrics.jsonl").write_text("\n".join(rows))
    run = Run.read(folder)
    assert (run.step, run.returns, run.score("max_average"), run.joules) == (0, [], None, None)


BROKEN: list[tuple[str, str]] = [
    ("manifest.json", "[]"),
    ("manifest.json", '{"status": 3}'),
    ("config.yaml", "a: !!python/object:os.system x"),
    ("config.yaml", "[1]"),
    ("metrics.jsonl", '{"step": "x"}\n'),
    ("metrics.jsonl", "nonsense\n"),
    ("metrics.jsonl", f'{{"step": {1 << 63}}}\n'),
    ("manifest.json", r'{"status": "done", "env_id": "\ud800"}'),
    ("metrics.jsonl", '{"step": 1, "energy_j": "x"}\n'),
    ("discarded.jsonl", "nonsense\n"),
    ("evaluation.json", "[1]"),
    ("evaluation.json", '{"return_mean": NaN}'),
]


@pytest.mark.parametrize(("name", "content"), BROKEN)
def test_what_cannot_be_read(name: str, content: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    (folder / name).write_text(content)
    assert str(refusal(Run.read, folder)).startswith(f"runs={folder}: ")


def test_run_folders(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "x" / "seed=0,a[1]"), write_run(tmp_path / "y")
    inner = a / "checkpoints" / "step_1"
    inner.mkdir(parents=True)
    (inner / "manifest.json").touch()
    write_run(tmp_path / "x" / ".b.1.partial")
    assert run_folders(str(tmp_path)) == [a, b]
    assert run_folders(f"{tmp_path}/*") == [a, b]
    assert run_folders(str(tmp_path / "y")) == [b]
    (tmp_path / "y2").symlink_to(tmp_path / "y")
    assert run_folders(f"{tmp_path}/y*") == [b]  # a link is not listed twice
    assert run_folders(str(a)) == [a]  # its literal name; as a pattern it would not match
    for nothing in ("z*", "z"):
        said = str(refusal(run_folders, str(tmp_path / nothing)))
        assert said.endswith("no run folder matches; spikerl runs lists those of outputs/")


def test_a_folder_that_may_not_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be a run, so it is listed; the error comes when it is read."""
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    listed = os.scandir

    def scandir(place: str) -> Any:
        if Path(place) == a:
            raise PermissionError(errno.EACCES, "Permission denied", str(place))
        return listed(place)

    monkeypatch.setattr(os, "scandir", scandir)
    assert run_folders(str(tmp_path)) == [a, b]


def test_an_integer_that_no_float_holds() -> None:
    assert number(10**400) is None
    assert number(10**300) == 1e300


def test_a_damaged_record_is_named_by_its_line(tmp_path: Path) -> None:
    run = write_run(tmp_path / "x")
    rows = (run / "metrics.jsonl").read_bytes().count(b"\n")
    with (run / "metrics.jsonl").open("a") as f:
        f.write('{"epoch": 3, "st\n')
    said = str(refusal(Run.read, run))
    assert said.endswith(f"its record or config: line {rows + 1} of metrics.jsonl is not a row")


def line(*points: tuple[float, float]) -> curves.Line:
    x, y = np.array(points).T
    return x, y


def test_band_of_shared_points() -> None:
    """After the second seed's end the mean is the first's alone, without an interval."""
    lines = [line((1, 0.0), (2, 2.0), (3, 4.0)), line((1, 2.0), (2, 2.0))]
    x, mean, low, high = curves.band(lines, shared=True)
    assert (x.tolist(), mean.tolist()) == ([1, 2, 3], [1.0, 2.0, 4.0])
    assert (low[:2].tolist(), high[:2].tolist()) == ([0.0, 2.0], [2.0, 2.0])
    assert np.isnan([low[2], high[2]]).all()


def test_band_over_time() -> None:
    """The band is interpolated, from where both have begun to where the shorter one ends."""
    lines = [line((0, 0.0), (10, 10.0)), line((2, 4.0), (6, 8.0))]
    x, mean, _, _ = curves.band(lines, shared=False)
    assert (x[0], x[-1]) == (2.0, 6.0)
    assert (mean[0], mean[-1]) == (3.0, 7.0)


def test_pictures_are_the_same_bytes() -> None:
    panel = {"a": {"x": [line((1, 2.0), (2, 3.0)), line((1, 2.5), (2, 3.5))], "none": []}}
    first, second = curves.curves(panel, "step", "y"), curves.curves(panel, "step", "y")
    assert first is not None
    assert second is not None
    svg = curves.encoded(first, "svg")
    assert svg == curves.encoded(second, "svg")
    assert b"x (n=2)" in svg
    dollars = curves.curves({"$x_{$": {"$x_{$": [line((1, 2.0))]}}, "step", "y")
    assert dollars is not None
    assert b"$x_{$" in curves.encoded(dollars, "svg")
    assert b"none" not in re.findall(rb"<text[^>]*>([^<]*)<", svg)
    assert curves.encoded(first, "png")[1:4] == b"PNG"
    assert curves.curves({"a": {"x": []}}, "step", "y") is None


def test_a_policy_beside_what_it_spends(tmp_path: Path) -> None:
    """Means over the last ten evaluations; if rows lack a number, it is that of evaluation.json."""
    folder = write_run(tmp_path / "a")
    rows = [
        {"step": i, "eval_return": float(i), "macs": 2.0 * i, "acs": 10.0, "firing_rate": None}
        for i in range(1, 13)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = Run.read(folder)
    assert run.point(("macs",)) == (15.0, 7.5)  # means of evaluations 3 to 12
    assert run.point(("macs", "acs")) == (25.0, 7.5)
    assert run.point(("firing_rate",)) == (None, 7.5)
    assert run.decision("acs") == 10.0
    assert run.point(("modelled_45nm_nj",)) is None
    (folder / "evaluation.json").write_text('{"return_mean": 4.0, "modelled_45nm_nj": 3.0}')
    assert Run.read(folder).point(("modelled_45nm_nj",)) == (3.0, 4.0)
    assert Run.read(folder).point(("modelled_45nm_nj", "modelled_memory_nj")) == (None, 4.0)
    rows[5]["macs"] = None  # one unknown value
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert Run.read(folder).decision("macs") is None


def test_returns_at_equal_time(tmp_path: Path) -> None:
    """Evaluations are after 3600 s and 7200 s; a run that did not take so long is left out."""
    runs = [Run.read(write_run(tmp_path / str(seed), seed=seed)) for seed in range(2)]
    assert runs[0].within(1.0) == (1000.0, 100)
    assert runs[0].within(1.5) == (1000.0, 100)
    assert runs[0].within(2.0) == (2000.0, 200)
    assert runs[0].within(0.5) is None
    assert runs[0].within(2.1) is None
    runs[0].rows[1]["eval_return"] = "x"
    assert runs[0].within(2.0) == (1000.0, 100)
    runs[0].rows[1]["eval_return"] = 2000.0
    report = SideBySide(runs, None)
    assert report.after(1.5)[1:] == [["all runs", "1000 \u00b1 1 (n=2, 100 steps)"]]
    assert report.after(2.1)[1:] == [["all runs", "-"]]
    failed = Run.read(write_run(tmp_path / "2", seed=2, status="failed"))
    failed.rows.pop()  # it failed after an hour
    said = "1000 \u00b1 1 (n=2, 100 steps, 1 failed)"
    assert SideBySide([*runs, failed], None).after(1.5)[1:] == [["all runs", said]]


def test_points() -> None:
    """A label without x is a horizontal line, or is left out with lines=False."""
    dense: list[curves.Point] = [(None, 4.0), (None, 8.0)]
    panel: dict[str, list[curves.Point]] = {
        "spiking": [(1.0, 5.0), (3.0, 7.0)], "dense": dense, "none": [],
    }  # fmt: skip
    figure = curves.scatter({"Ant": panel, "Hopper": {"dense": dense}}, "x", "y", lines=True)
    assert figure is not None
    (ax,) = figure.axes  # nothing on Hopper has an x
    drawn = [np.array(line.get_data()).tolist() for line in ax.lines]
    assert drawn == [[[1.0, 3.0], [5.0, 7.0]], [[2.0], [6.0]], [[0.0, 1.0], [6.0, 6.0]]]
    assert ax.get_xscale() == "linear"
    figure = curves.scatter({"Ant": panel}, "x", "y", lines=False)
    assert figure is not None
    assert len(figure.axes[0].lines) == 2
    assert curves.scatter({"Ant": {"dense": dense}}, "x", "y", lines=True) is None
    wide = curves.scatter({"Ant": {"a": [(1.0, 5.0), (11.0, 7.0)]}}, "x", "y", lines=False)
    assert wide is not None
    assert wide.axes[0].get_xscale() == "log"


def test_groups(tmp_path: Path) -> None:
    specs = [("td3", 0), ("td3", 1), ("sac", 0)]
    runs = [Run.read(write_run(tmp_path / f"{a}{s}", algo=a, seed=s)) for a, s in specs]
    groups = SideBySide(runs, None)
    assert groups.varied == ["seed", "algo.name"]
    assert {name: len(group) for name, group in groups.groups.items()} == {
        "algo.name=td3": 2, "algo.name=sac": 1,
    }  # fmt: skip
    assert groups.returns("max_average")[1:] == [
        ["algo.name=td3", "2000 \u00b1 1 (n=2, 200 steps)"],
        ["algo.name=sac", "2000 (n=1, 200 steps)"],
    ]
    changed = write_run(tmp_path / "late", algo="sac")
    text = (changed / "config.yaml").read_text()
    (changed / "config.yaml").write_text(text.replace("algo:", "aaa: 1\nalgo:"))
    newer = [*runs, Run.read(changed)]
    assert SideBySide(newer, None).group_by == ["algo.name"]  # a key older runs lack is ignored
    (changed / "config.yaml").write_text(text.replace("algo:", "aaa: 2\nalgo:"))
    assert SideBySide([*newer, Run.read(changed)], None).group_by == ["algo.name", "aaa"]
    for name, scale in (("small", 0.1), ("large", 10)):
        own = (changed / "config.yaml").read_text() + f"env: {{reward_scale: {scale}}}\n"
        folder = write_run(tmp_path / name, algo="sac")
        (folder / "config.yaml").write_text(own)
    scaled = [Run.read(tmp_path / name) for name in ("small", "large")]
    assert SideBySide(scaled, None).group_by == ["env.reward_scale"]  # both have the same task
    assert list(SideBySide(runs, ["seed"]).groups) == ["seed=0", "seed=1"]
    assert list(SideBySide(runs, []).groups) == ["all runs"]
    assert names_of(runs) == ["td30", "td31", "sac0"]
    assert names_of(runs[:1]) == ["td30"]


def test_runs_that_failed_are_counted(tmp_path: Path) -> None:
    """Failed runs without any evaluation are counted, too."""
    runs = [Run.read(write_run(tmp_path / f"{seed}", seed=seed)) for seed in range(2)]
    for run in runs:
        run.manifest["status"] = "failed"
    runs[1].rows.clear()
    said = SideBySide(runs, None).returns("max_average")[1]
    assert said == ["all runs", "2000 (n=1, 200 steps, 2 failed)"]
    assert SideBySide(runs[1:], None).returns("max_average")[1][1] == "- (1 failed)"


def test_returns_of_policies_files(tmp_path: Path) -> None:
    """A converted policy has only the return of its file; without one there is no section."""
    runs = [Run.read(write_run(tmp_path / f"{seed}", seed=seed)) for seed in range(3)]
    section = "## Return: of the policy's file"
    render_runs(SideBySide(runs, None), tmp_path / "out", [])
    assert section not in (tmp_path / "out/table.md").read_text()
    for run, ret in zip(runs[1:], (200.0, 300.0), strict=True):
        run.evaluation["return_mean"] = ret
        run.rows.clear()
    report = SideBySide(runs, None)
    said = f"250 {PM} 71 (n=2)"
    assert report.of_files() == [["", "Ant-v5"], ["all runs", said]]
    render_runs(report, tmp_path / "out", [])
    text = (tmp_path / "out/table.md").read_text()
    assert f"{section}\n\n|  | Ant-v5 |\n| --- | ---: |\n| all runs | {said} |" in text
    lines = list(csv.DictReader((tmp_path / "out/table.csv").open()))
    assert [line["of_its_file"] for line in lines] == ["", "200.0", "300.0"]


def test_a_name_with_a_line_break_keeps_the_table_whole(tmp_path: Path) -> None:
    runs = [Run.read(write_run(tmp_path / name, algo=name[0])) for name in ("a\n|b", "c")]
    grid = SideBySide(runs, None).settings(names_of(runs))
    said: dict[str, Any] = {"lines": [], "notes": ["a\nb"], "provenance": []}
    text = tables.markdown("2 runs", sections=[Section("S", grid)], **said)
    assert "|  | algo.name |\n| --- | ---: |\n| a \\|b | a |\n| c | c |\n" in text
    assert "\n- a b\n" in text


def test_each_task_has_a_picture_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curves, "encoded", lambda figure, kind: b"")
    tasks = ("A.b-v0", "A_b-v0", "A/b-v0", "\u8f68-v0", "\u9053-v0")
    runs = [Run.read(write_run(tmp_path / str(i), env_id=id_)) for i, id_ in enumerate(tasks)]
    _, written = draw(SideBySide(runs, None), tmp_path)
    inside = {name for name in written if name.startswith("inside_")}
    assert len(inside) == len(tasks)
    assert {"inside_A.b-v0.svg", "inside_A%2Fb-v0.svg"} <= inside
    assert all((tmp_path / name).is_file() for name in inside)
    draw(SideBySide(runs[:1], None), tmp_path)
    assert [path.name for path in tmp_path.glob("inside_*")] == ["inside_A.b-v0.svg"]


def test_long_names_of_groups_say_what_sets_them_apart(tmp_path: Path) -> None:
    runs = []
    for e in (5, 6):
        folder = write_run(tmp_path / str(e))
        (folder / "config.yaml").write_text(f"a: 1\nb: 1\nc: 1\nd: 1\ne: {e}\n")
        runs.append(Run.read(folder))
    assert list(SideBySide(runs, ["a", "b", "c", "d", "e"]).groups) == [
        "a=1, b=1, c=1, d=1, ..., e=5", "a=1, b=1, c=1, d=1, ..., e=6",
    ]  # fmt: skip


def test_the_same_run_twice_is_said(tmp_path: Path) -> None:
    seeds = (0, 1, 0, 0)
    runs = [Run.read(write_run(tmp_path / f"{i}", seed=seed)) for i, seed in enumerate(seeds)]
    assert [SideBySide(runs[:i], None).again for i in (2, 3, 4)] == [0, 1, 2]
    render_runs(SideBySide(runs, None), tmp_path / "out", [])
    line = "warning: 2 of the runs have seed and settings of another; n counts them"
    assert line in (tmp_path / "out" / "table.md").read_text()
    compressed = write_run(tmp_path / "compressed")  # its config is its source's
    (compressed / "metrics.jsonl").write_text("")
    assert SideBySide([*runs[:2], Run.read(compressed)], None).again == 0


def test_a_resumed_run_is_repeated_by_both_commands(tmp_path: Path) -> None:
    first, longer = "spikerl train env=Ant total_steps=9", "spikerl train resume=r total_steps=12"
    events = [{"command": "spikerl train resume=r"}, {"command": longer}]
    run = Run.read(write_run(tmp_path / "r", command=first, resumed=events))
    assert command_of(run) == f"{first}\n{longer}"


def test_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page refers to nothing outside itself, whatever the runs' manifests contain."""
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "a", command="<script>alert('x')</script> http://there")
    write_run(tmp_path / "runs" / "b", algo="sac", seed=1, counted=True,
              git={"commit": "abc", "dirty": True})  # fmt: skip
    (write_run(tmp_path / "runs" / "c") / "metrics.jsonl").write_text("nonsense\n")
    (tmp_path / "runs" / "curves.png").write_bytes(b"no folder")
    said = spikerl("report", "runs=runs/*", "out=out", "hours=[1.5]", "core_hours=[0.5]")
    assert (said.status, said.err) == (0, "")
    assert said.out.startswith("out: 2 runs; table.md, ")
    assert f"left out: {tmp_path}/runs/c: its record or config" in said.out
    assert said.out.count("left out") == 1
    page = (tmp_path / "out" / "index.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    references = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"'\s>]*)""", page)
    assert references
    assert all(r.startswith(("#", "data:image/svg+xml;base64,")) for r in references)
    for anchor in (r for r in references if r.startswith("#")):
        assert f'id="{anchor[1:]}"' in page
    for text in (
        "Return after 1.5 h of wall time",
        "Return after 0.5 h of processor time",
        "algo.name",
        "layer 1",
        "0.250",
        "0.125",
        "warning: some ran from a checkout",
    ):
        assert text in page
    table = (tmp_path / "out" / "table.csv").read_text().splitlines()
    assert table[0].startswith("run,group,env_id,seed,status,steps,max_average")
    assert table[2].startswith("b,algo.name=sac,Ant-v5,1,done,200,2001.0,1501.0")
    assert (tmp_path / "out" / "runs.csv").read_text().count("\n") == 5
    assert ",200,2001.0,1501.0,,0.25,1.0,2.5,30.5,400.5," in table[2]
    assert "a weight fetched 20 pJ/bit" in page
    for name in (
        "curves.svg",
        "curves.png",
        "curves_joules.png",
        "inside_Ant-v5.svg",
        "against_firing.png",
        "against_45nm.png",
        "against_memory.png",
    ):
        assert (tmp_path / "out" / name).stat().st_size > 1000


def test_watching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A report is rendered again when a run has changed, and ends when no run is running."""
    monkeypatch.chdir(tmp_path)
    folder = write_run(tmp_path / "a", status="running")
    looks: list[float] = []

    def go_on(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 2:
            text = (folder / "manifest.json").read_text()
            (folder / "manifest.json").write_text(text.replace("running", "done"))

    monkeypatch.setattr(time, "sleep", go_on)
    said = spikerl("report", "runs=a", "watch=true")
    assert said.status == 0
    assert said.out.count("1 run; ") == 2
    assert looks == [report.WATCH_S] * 2


ASKED: list[tuple[list[str], str]] = [
    (["runs=nowhere/*"], "runs=nowhere/*: no run folder matches"),
    (["runs=runs/a", "group_by=algo.nam"], "group_by=algo.nam: no run has this key; did you mean"),
    (["runs=runs/a", "group_by=x"], "group_by=x: no run has this key; known: algo.name, algo.tau"),
    (["runs=runs/a", "hours=[0]"], "hours=[0.0]: give numbers above 0"),
    (["runs=runs/a", "core_hours=[-1]"], "core_hours=[-1.0]: give numbers above 0"),
    (["runs=runs/a", "group_by=[3]"], "group_by=[3]: give keys of configs"),
    (["runs=runs/a", "out="], "out=: give a folder"),
    (["runs=runs/a", "out=runs/a/config.yaml"], "out=runs/a/config.yaml: "),
    (["runs=runs/broken"], "runs=runs/broken: no run can be read"),
]


@pytest.mark.parametrize(("args", "line"), ASKED)
def test_wrong_requests(
    args: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "a")
    (write_run(tmp_path / "runs" / "broken") / "metrics.jsonl").write_text("nonsense\n")
    assert spikerl("report", *args).line.startswith(line)


def test_jobs_of_a_sweep_have_pages_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        write_run(tmp_path / name, seed=seed)
    sweep = ["report", "-m", "runs=a,b"]
    line = "out=p: each job would write over the last one's; give 'out=p/${runs}'"
    assert spikerl(*sweep, "out=p").line == line
    assert spikerl(*sweep, "out=p,q").line.startswith("out=p,q: each job")
    assert spikerl(*sweep).line.startswith("out=outputs/report: each job")
    assert not (tmp_path / "p").exists()
    assert spikerl(*sweep, "out=p/${runs}").status == 0
    seeds = [(tmp_path / "p" / name / "table.csv").read_text().split(",Ant-v5,")[1][0]
             for name in "ab"]  # fmt: skip
    assert seeds == ["0", "1"]


@pytest.mark.parametrize("args", [["report", "runs=a"], ["reproduce", "table=ours", "render=true"]])
def test_without_the_extra(
    args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a")
    patched = "spikerl.reporting.render.find_spec"
    monkeypatch.setattr(patched, lambda name: None if name == "matplotlib" else find_spec(name))
    assert "matplotlib is missing; pip install 'spikerl[report]' brings it" in spikerl(*args).line


TABLE = ["reproduce", "table=popsan_table1"]
CELLS: list[tuple[list[str], str]] = [
    (["reproduce"], "table=null: give one of ant_without_contacts, care_bn, "),
    (["reproduce", "table=popsan_tabel1"], "table=popsan_tabel1: no such option; did you mean"),
    ([*TABLE, "rows=[popsan_td4]"], "rows=popsan_td4: no such name; did you mean popsan_td3"),
    ([*TABLE, "columns=Hoper"], "columns=Hoper: no such name; did you mean Hopper?"),
    ([*TABLE, "rows=[]"], "rows=[]: no cell is selected"),
    ([*TABLE, "rows=popsan_td3_loihi"], "rows=popsan_td3_loihi: no cell is selected: these are"),
    ([*TABLE, "seeds=0"], "seeds=0: give how many"),
    ([*TABLE, "total_steps=0"], "total_steps=0: give at least 1"),
    ([*TABLE, "jobs=x"], "jobs=x: expected int"),
    ([*TABLE, "nice=20"], "nice=20: give 0 to 19"),
    ([*TABLE, "plan=true", "render=true"], "render=True: goes without plan"),
    ([*TABLE, "+table.rows.x.label=y"], "table.rows.x.experiment=null: give one, or published"),
]


@pytest.mark.parametrize(("args", "line"), CELLS)
def test_wrong_cells(
    args: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert spikerl(*args).line.startswith(line)
    assert not list(tmp_path.iterdir())


def test_libraries_for_pictures_wait_until_one_is_drawn() -> None:
    code = (
        "import sys, spikerl.commands.report, spikerl.commands.reproduce.command;"
        " sys.exit(' '.join({'matplotlib', 'jinja2'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
