"""Rendered tables: numbers worked by hand, n, steps, failures, sources."""

from __future__ import annotations

import csv
import io
import json
import re
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from shell import refusal

from spikerl.reporting import notes, numbers, tables
from spikerl.reporting.render import render_table
from spikerl.reporting.results import Results, seeds_of
from spikerl.reporting.table_file import Protocol, Table, read_table, table_of
from spikerl.reporting.tex import grid_tex, table_tex

DATA: dict[str, Any] = {
    "name": "small",
    "title": "Small",
    "source": "Somebody, 2020",
    "baseline": "dense",
    "aggregate": "APG",
    "protocol": {"total_steps": 3000, "seeds": 3, "eval_episodes": 10, "metric": "max_average"},
    "rows": {
        "spiking": {
            "label": "50 % PopSAN & co",
            "experiment": "popsan/td3",
            "published": {
                "source": "Table 1",
                "version": "v4",
                "seeds": 5,
                "metric": "max_average",
                "values": {"Ant": [300, 30], "InvertedDoublePendulum": [90, None]},
                "aggregate": 1.5,
            },
        },
        "dense": {
            "label": "dense",
            "experiment": "dense/td3",
            "published": {
                "source": "Figure 3",
                "version": "v3",
                "seeds": 5,
                "metric": "smoothed_mean",
                "figure": True,
                "values": {"Ant": [200, None]},
            },
        },
    },
    "columns": {
        "Ant": {"env": "Ant", "version": "v4"},
        "InvertedDoublePendulum": {"env": "InvertedDoublePendulum", "version": "v4"},
    },
    "caveats": ["a caveat"],
}


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(
    row: str, column: str, seed: int, returns: list[float], status: str = "done", **facts: Any
) -> Path:
    """A run of a cell, with an evaluation every 1000 steps."""
    folder = Path(f"outputs/reproduced/small/{row}/{column}/seed{seed}")
    folder.mkdir(parents=True)
    manifest = {"status": status, "env_id": f"{column}-v4", "command": "spikerl train", **facts}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "config.yaml").write_text(f"seed: {seed}\n")
    rows = [
        {"step": 1000 * (i + 1), "eval_return": r, "energy_j": 500.0, "wall_s": 360.0 * (i + 1),
         "cpu_s": 180.0}
        for i, r in enumerate(returns)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def results(total_steps: int = 3000, **changes: Any) -> Results:
    table: Table = table_of({**DATA, **changes})
    return Results(table, total_steps)


def markdown(results: Results) -> str:
    return tables.markdown(results.table.title, **tables.said_of(results))


def column(lines: tables.Grid, name: str) -> list[str]:
    at = lines[0].index(name)
    return [line[at] for line in lines[1:]]


def test_returns_at_equal_processor_time() -> None:
    write("spiking", "Ant", 0, [100.0, 200.0, 300.0])  # one evaluation every 0.05 h
    write("spiking", "Ant", 1, [400.0, 500.0])
    write("dense", "InvertedDoublePendulum", 0, [600.0])
    protocol = {**DATA["protocol"], "core_hours": [0.05, 0.1, 1.0]}
    sections = {s.title: s.grid for s in tables.sections(results(protocol=protocol))}
    assert sections["Return after 0.05 h of processor time"] == [
        ["", "Ant-v4", "InvertedDoublePendulum-v4"],
        ["50 % PopSAN & co", "250 \u00b1 212 (n=2, 1k steps)", "-"],
        ["dense", "-", "600 (n=1, 1k steps)"],
    ]
    assert sections["Return after 0.1 h of processor time"] == [
        ["", "Ant-v4", "InvertedDoublePendulum-v4"],
        ["50 % PopSAN & co", "350 \u00b1 212 (n=2, 2k steps)", "-"],
    ]
    assert "Return after 1 h of processor time" not in sections  # no run was that long


def test_nothing_has_run() -> None:
    lines = tables.grid(results(), "max_average")
    assert column(lines, "Ant-v4") == ["-", "300 \u00b1 30", "-"]
    assert column(lines, "APG") == ["-", "-", "-"]
    assert "no run has begun yet" in markdown(results())
    assert tables.aggregate_grid(results())[1:] == []


def test_a_cell() -> None:
    write("spiking", "Ant", 0, [100.0, 400.0, 200.0])
    write("spiking", "Ant", 1, [300.0, 100.0, 200.0])
    result = results().by_cell["spiking", "Ant"]
    # Maxima 400 and 300; sample sd 50 sqrt(2); means of all three evaluations 700/3 and 200.
    assert tables.cell_text(result, "max_average") == "350 \u00b1 71 (n=2)"
    assert tables.cell_text(result, "last_ten_mean") == "217 \u00b1 24 (n=2)"
    assert results().by_cell["spiking", "Ant"].spent("joules") == 1500.0
    assert column(tables.spent_grid(results()), "Ant-v4") == ["0.30 h, 1.5 kJ"]


def test_what_is_not_whole_is_said() -> None:
    write("spiking", "Ant", 0, [100.0, 400.0, 200.0])
    write("spiking", "Ant", 1, [300.0], "failed")
    write("spiking", "Ant", 2, [], "running")
    text = tables.cell_text(results().by_cell["spiking", "Ant"], "max_average")
    said = "n=2, 1k to 3k of 3k steps, 1 without evaluation, 1 failed"
    assert text == f"350 \u00b1 71 ({said})"


def test_steps_asked_of_what_has_not_run() -> None:
    rows = {**DATA["rows"], "dense": {**DATA["rows"]["dense"], "times_steps": 8}}
    asked = {cell: r.asked for cell, r in results(rows=rows).by_cell.items()}
    assert (asked["spiking", "Ant"], asked["dense", "Ant"]) == (3000, 24000)


def test_a_seed_that_was_not_asked_for_is_there() -> None:
    """All runs on the disk are rendered, also of seeds that were not asked for."""
    write("spiking", "Ant", 17, [5.0, 6.0])
    text = tables.cell_text(results(2000).by_cell["spiking", "Ant"], "max_average")
    assert text == "6.0 (n=1)"
    assert "(the protocol has 3k)" in markdown(results(total_steps=2000))


def test_unmeasured_joules_are_absent() -> None:
    folder = write("spiking", "Ant", 0, [1.0, 2.0])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows[0]["energy_j"] = None
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert results().by_cell["spiking", "Ant"].spent("joules") is None
    assert column(tables.spent_grid(results()), "Ant-v4") == ["0.20 h"]


def fill() -> None:
    for seed, (a, b) in enumerate([(200.0, 90.0), (100.0, 90.0)]):
        write("dense", "Ant", seed, [0.0, 0.0, a])
        write("dense", "InvertedDoublePendulum", seed, [0.0, 0.0, b])
    for seed, (a, b) in enumerate([(300.0, 99.0), (150.0, 99.0)]):
        write("spiking", "Ant", seed, [0.0, 0.0, a])
        write("spiking", "InvertedDoublePendulum", seed, [0.0, 0.0, b])


def test_gains() -> None:
    """Ant: 225 over 150 is +50 %; the pendulum: 99 over 90 is +10 %; the mean 30 %."""
    fill()
    lines = tables.grid(results(), "max_average")
    assert column(lines, "APG") == ["+30.00 %", "-", "+0.00 %"]
    assert column(lines, "APG without InvertedDoublePendulum") == ["+50.00 %", "-", "+0.00 %"]
    assert column(lines, "APG, as printed") == ["", "1.5", ""]


def test_a_gain_over_runs_that_go_on_says_so() -> None:
    fill()
    write("dense", "Ant", 7, [150.0], "running")
    lines = tables.grid(results(), "max_average")
    assert column(lines, "APG")[0] == "+30.00 % (partial)"
    assert column(tables.aggregate_grid(results()), "columns") == ["2 (partial)", "2 (partial)"]


def test_a_short_trial_beside_whole_runs_is_marked() -> None:
    """Runs shorter than the protocol are marked, even if total_steps was typed."""
    write("spiking", "Ant", 0, [100.0, 200.0, 300.0])
    write("spiking", "Ant", 1, [400.0])
    write("dense", "Ant", 0, [500.0])
    found = results(1000)
    lines = column(tables.grid(found, "max_average"), "Ant-v4")
    assert "350 \u00b1 71 (n=2, 1k to 3k of 3k steps)" in lines
    assert "500 (n=1, 1k of 3k steps)" in lines
    assert tables.asked(found).startswith("3k steps, evaluations")


def test_a_gain_without_a_column_is_not_partial_by_it() -> None:
    fill()
    write("dense", "InvertedDoublePendulum", 7, [90.0], "running")
    lines = tables.grid(results(), "max_average")
    assert column(lines, "APG")[0] == "+30.00 % (partial)"
    assert column(lines, "APG without InvertedDoublePendulum")[0] == "+50.00 %"


def test_aggregates() -> None:
    """Relative to the baseline's mean: 2 and 1 on Ant, 1.1 twice on the pendulum; IQM 1.1."""
    fill()
    spiking, dense = results().aggregates
    assert (spiking.row, spiking.columns) == ("spiking", 2)
    assert spiking.iqm == pytest.approx(1.1)
    # On Ant 300 beats both, 150 one of 200 and 100: 3 of 4; on the pendulum 99 beats 90.
    assert spiking.improvement == pytest.approx((0.75 + 1.0) / 2)
    assert dense.improvement is None
    assert dense.iqm == pytest.approx(1.0)


def test_a_negative_baseline() -> None:
    write("dense", "Ant", 0, [-100.0])
    write("spiking", "Ant", 0, [-50.0])
    ours, theirs = results().normalised("spiking")
    assert (ours[0].tolist(), theirs[0].tolist()) == ([1.5], [1.0])


def cells(text: str) -> dict[tuple[str, str], dict[str, str]]:
    return {(line["row"], line["column"]): line for line in csv.DictReader(io.StringIO(text))}


def test_csv() -> None:
    fill()
    table = cells(tables.table_csv(results()))
    assert len(table) == 4
    ant = table["spiking", "Ant"]
    assert {key: ant[key] for key in ("n", "mean", "published", "published_sd", "published_n")} == {
        "n": "2", "mean": "225.0", "published": "300.0", "published_sd": "30.0",
        "published_n": "5",
    }  # fmt: skip
    assert (ant["difference"], ant["steps_min"], ant["steps_asked"]) == ("-75.0", "3000", "3000")
    assert (ant["energy_j"], ant["wall_s"]) == ("1500.0", "1080.0")
    # A published value of other tasks, of another metric, or from a figure gives no difference.
    dense = table["dense", "Ant"]
    assert (dense["published"], dense["published_from_figure"]) == ("200.0", "True")
    assert dense["difference"] == ""


def test_what_was_converted_is_not_compared() -> None:
    """A converted policy has no training curve: its one evaluation is the value of every metric."""
    published = {**DATA["rows"]["spiking"]["published"], "metric": "last_ten_mean"}
    converted = {"label": "converted", "convert": "dense", "published": published}
    protocol = {**DATA["protocol"], "metric": "last_ten_mean"}
    folder = write("converted", "Ant", 0, [])
    (folder / "evaluation.json").write_text('{"return_mean": 250.0, "returns": [200.0, 300.0]}')
    had = results(rows={**DATA["rows"], "converted": converted}, protocol=protocol)
    cell = cells(tables.table_csv(had))["converted", "Ant"]
    assert (cell["mean"], cell["published"], cell["difference"]) == ("250.0", "300.0", "")
    # Compared with 200, the evaluation of the dense policy's file of the same seed.
    for seed, ret in ((0, 200.0), (1, 800.0)):
        dense = write("dense", "Ant", seed, [100.0, 400.0, 200.0])
        evaluation = {"return_mean": ret, "returns": [ret]}
        (dense / "evaluation.json").write_text(json.dumps(evaluation))
    only = {"Ant": DATA["columns"]["Ant"]}
    rows = {"dense": DATA["rows"]["dense"], "converted": {"label": "c", "convert": "dense"}}
    compared = results(rows=rows, columns=only)
    itself, of_it = compared.aggregates
    assert (itself.row, compared.gain("dense")) == ("dense", 0.0)
    assert (of_it.row, compared.gain("converted"), of_it.iqm) == ("converted", 25.0, 1.25)
    said = [line for line in notes.notes(had) if "the converted policy" in line]
    assert [line.partition(":")[0] for line in said] == ["converted"]


def test_an_interval_over_the_baseline_draws_its_mean_anew() -> None:
    """Draws from 1 and 3 have the mean 1, 2 or 3, so 2 and 2 are 2, 1 or 2 / 3 of it. The
    baseline's own row is relative to its fixed mean 2.
    """
    for seed, theirs in enumerate((1.0, 3.0)):
        write("spiking", "Ant", seed, [2.0])
        write("dense", "Ant", seed, [theirs])
    rows = {
        name: {"label": name, "experiment": row["experiment"]} for name, row in DATA["rows"].items()
    }
    only = {"Ant": DATA["columns"]["Ant"]}
    spiking, dense = results(rows=rows, columns=only).aggregates
    assert spiking.iqm == 1.0
    assert spiking.iqm_interval == pytest.approx((2.0 / 3.0, 2.0))
    assert dense.iqm_interval == (0.5, 1.5)


def test_runs_csv() -> None:
    fill()
    runs = [("spiking", seed.run) for seed in results().by_cell["spiking", "Ant"].seeds]
    lines = tables.runs_csv(runs).splitlines()
    assert lines[0] == "exp_name,env_name,seed,metric,env_step,value"
    assert lines[3] == "spiking,Ant-v4,0,eval_return,3000,300.0"
    assert len(lines) == 7


def test_notes_say_where_values_are_from() -> None:
    text = markdown(results())
    line = "published values are of v3 tasks, those of v4 here are other tasks, for which no"
    assert line in text.replace("\n", " ").replace("  ", " ")
    assert "published values are of v4 tasks" not in text
    assert "- a caveat" in text
    assert "Table 1" in text


def test_converted_rows_share_a_note() -> None:
    rows = {**DATA["rows"], **{name: {"label": name, "convert": "dense"} for name in ("c5", "c9")}}
    rows["c9"]["overrides"] = ["spike_steps=9"]
    (said,) = [line for line in notes.notes(results(rows=rows)) if "converted policy" in line]
    assert said.startswith("c5; c9: for every metric the one evaluation of the converted policy, ")


def test_a_metric_that_only_published_values_have() -> None:
    """The row's own runs have no score by this metric, so only published values have a line."""
    fill()
    (lines,) = (s.grid for s in tables.sections(results()) if "smoothed curve" in s.title)
    label = "dense, published (v3, n=5, read off a figure)"
    assert [line[:3] for line in lines[1:]] == [[label, "200", "-"]]


def test_runs_of_other_settings_are_left_out_and_named() -> None:
    write("dense", "Ant", 0, [100.0])
    (write("dense", "Ant", 1, [900.0]) / "config.yaml").write_text("seed: 1\nactor: {lr: 1.0e-9}\n")
    (write("dense", "Ant", 7, [900.0]) / "config.yaml").write_text("seed: 0\n")  # a copy of seed 0
    write("dense", "Ant", 2, [900.0]).rename("outputs/reproduced/small/dense/Ant/seed00")
    had = results()
    assert column(tables.grid(had, "max_average"), "Ant-v4")[-1] == "100 (n=1, 1k of 3k steps)"
    assert [line for line in notes.notes(had) if line.startswith("left out")] == [
        "left out: dense/Ant/seed1: made with other settings: actor.lr=1e-09 (here 0.001)",
        "left out: dense/Ant/seed7: made with other settings: seed=0 (here 7)",
    ]


def test_runs_of_one_column_have_one_dataset() -> None:
    columns = deepcopy(DATA["columns"])
    columns["Ant"]["dataset"] = "d"
    for seed, digest in enumerate("aab"):
        write("dense", "Ant", seed, [100.0], dataset={"folder": "d", "sha256": digest})
        said = [line for line in notes.notes(results(columns=columns)) if "dataset" in line]
        line = "warning: the runs of Ant learned from 2 different datasets"
        assert said == [line] * (digest == "b")


def test_runs_that_cannot_be_read_are_named() -> None:
    write("dense", "Ant", 0, [100.0])
    (write("dense", "Ant", 1, [900.0]) / "metrics.jsonl").write_text("{\n")
    (write("dense", "Ant", 2, [900.0]) / "manifest.json").unlink()  # never began
    had = results()
    assert column(tables.grid(had, "max_average"), "Ant-v4")[-1].startswith("100 (n=1, ")
    line = "left out: dense/Ant/seed1: its record or config: line 1 of metrics.jsonl is not a row"
    assert [one for one in notes.notes(had) if one.startswith("left out")] == [line]


def test_a_conversion_of_a_shorter_run_says_so() -> None:
    write("dense", "Ant", 0, [100.0, 400.0])
    for seed, command in enumerate(("spikerl convert", "spikerl convert 'x", "spikerl convert")):
        folder = write("c", "Ant", seed, [], command=command)
        (folder / "evaluation.json").write_text('{"return_mean": 250.0}')
    rows = {"dense": DATA["rows"]["dense"], "c": {"label": "c", "convert": "dense"}}
    had = results(rows=rows)
    ant = column(tables.grid(had, "max_average"), "Ant-v4")
    assert ant[1] == "250 \u00b1 0 (n=3, 2k of 3k steps)"  # two lack their source
    cell = cells(tables.table_csv(had))["c", "Ant"]
    assert (cell["steps_min"], cell["steps_max"]) == ("2000", "2000")


def test_no_interval_over_a_baseline_of_one_seed() -> None:
    for seed in range(3):
        write("spiking", "Ant", seed, [100.0 + seed])
    write("dense", "Ant", 0, [100.0])
    of = {a.row: a.iqm_interval for a in results().aggregates}
    assert of == {"spiking": None, "dense": None}
    write("dense", "Ant", 1, [110.0])
    assert all(a.iqm_interval for a in results().aggregates)


def test_a_place_that_cannot_be_written_to() -> None:
    Path("outputs/reproduced/small/table.md").mkdir(parents=True)
    line = str(refusal(render_table, table_of(DATA), 3000))
    place = "outputs/reproduced/small/table.md: Is a directory"
    assert line == f"out=outputs/reproduced: {place}; give another folder"


def test_every_published_row_is_shown() -> None:
    had = Results(read_table("popsan_algorithms"), 1_000_000)
    text = markdown(had)
    for row in had.table.rows:
        assert f"| {tables.published_label(had, row)} |" in text
        assert tables.published_label(had, row) in table_tex(had)


def test_mixed_results_are_said() -> None:
    def facts(commit: str, cpu: str) -> dict[str, Any]:
        return {"git": {"commit": commit, "dirty": False}, "hardware": {"cpu": cpu, "gpus": []}}

    write("spiking", "Ant", 0, [1.0], **facts("a", "x"))
    assert not any(line.startswith("warning") for line in notes.provenance(results().runs))
    write("spiking", "Ant", 1, [1.0], **facts("b", "y"))
    warning = "warning: these results are of different commits, machines"
    assert warning in notes.provenance(results().runs)


def test_a_resume_by_another_commit_is_said() -> None:
    first, later = ({"commit": commit, "dirty": commit == "b"} for commit in "ab")
    write("spiking", "Ant", 0, [1.0], git=first, resumed=[{"step": 5}, {"step": 9, "git": later}])
    said = notes.provenance(results().runs)
    assert said[:2] == [
        "commits: a, b",
        "warning: some ran from a checkout with changes of its own",
    ]
    assert said[-1] == "warning: these results are of different commits"


def test_tex() -> None:
    fill()
    text = table_tex(results())
    assert r"50 \% PopSAN \& co & 225 $\pm$ 106 (n=2) & 99.0 $\pm$ 0.0 (n=2) & +30.00 \%" in text
    main, _, published = text.partition("% Small; Somebody, 2020; smoothed curve")
    assert main.count(r"\\") == len(tables.grid(results(), "max_average"))
    assert published.count(r"\\") == 2
    assert text.index(r"\toprule") < text.index(r"\midrule") < text.index(r"\bottomrule")
    assert r"\begin{tabular}{lrrrrr}" in text


def test_tex_of_odd_labels() -> None:
    text = grid_tex([["", "y"], ["[12] A", "1"]], ["two\nlines"])
    assert text.startswith("% two lines\n\\begin")
    assert "\n{}[12] A & 1 \\\\\n" in text


def test_everything_is_rendered() -> None:
    fill()
    table = table_of(DATA)
    written = render_table(table, 3000)
    folder = Path("outputs/reproduced/small")
    assert sorted(written) == sorted(p.name for p in folder.iterdir() if p.is_file())
    assert {"table.md", "table.tex", "runs.csv", "curves.png", "profiles.svg"} < set(written)
    page = (folder / "index.html").read_text()
    references = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"'\s>]*)""", page)
    assert all(r.startswith(("#", "data:image/svg+xml;base64,")) for r in references)
    assert page.count('class="card"') == 8
    for path in folder.glob("dense/Ant/*/metrics.jsonl"):
        path.write_text("")
    assert "profiles.svg" in render_table(table, 3000)  # the other column has runs
    for path in folder.glob("*/*/*/metrics.jsonl"):
        path.write_text("")
    render_table(table, 3000)
    assert not list(folder.glob("*.svg"))  # plots without data are removed


@pytest.mark.parametrize(
    ("count", "text"),
    [(5, "5"), (3000, "3k"), (1_025_000, "1.025M"), (8_000_000, "8M"), (999_999, "999.9k"),
     (1_999_999, "1.999M")],
)  # fmt: skip
def test_steps(count: int, text: str) -> None:
    assert numbers.steps(count) == text


def test_seeds() -> None:
    ten = Protocol(total_steps=1, seeds=3, eval_episodes=1, metric="max_average", first_seed=10)
    assert seeds_of(None, ten) == [10, 11, 12]
    assert seeds_of(2, ten) == [10, 11]
    assert seeds_of([3, 7], ten) == [3, 7]
    assert seeds_of(None, replace(ten, first_seed=0)) == [0, 1, 2]
    for wrong in (0, -1, [], [1, 1], ["a"], "3", True, 1001):
        assert str(refusal(seeds_of, wrong, ten)).endswith(
            "give how many, or a list of different seeds"
        )


def test_joules_name_every_device_that_measured_them() -> None:
    """If a run went on with another machine's meter, both devices are named."""
    folder = write("dense", "Ant", 0, [100.0, 200.0])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    sources = ["zeus:rapl:/sys/a", "zeus:nvml+rapl"]
    lines = [{**row, "energy_source": source} for row, source in zip(rows, sources, strict=True)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = "\n".join(notes.notes(results()))
    assert "measured by zeus:nvml+rapl, zeus:rapl\n" in said
    assert "warning: joules are of different devices" in said
