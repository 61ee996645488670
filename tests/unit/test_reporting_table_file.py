"""Table files: every one that is shipped, and the refusals of wrong ones."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from shell import refusal

from spikerl.cli.compose import expand
from spikerl.config.build import build
from spikerl.config.yaml_file import conf_folder, group_options
from spikerl.reporting.cell_config import config_of
from spikerl.reporting.table_file import Table, cell_of, read_table, select, table_of
from spikerl.schema import dotted

NAMES = group_options("table")


@pytest.mark.parametrize("name", NAMES)
def test_shipped_tables(name: str) -> None:
    table = read_table(name)
    assert table.name == name
    for row in table.rows:
        for column in table.columns:
            cell = cell_of(table, row, column, 3)
            r = table.rows[row]
            runs = bool(r.experiment or r.same_as or r.convert)
            assert (cell is not None) == (runs and (r.columns is None or column in r.columns))
            assert cell is None or cell.folder.parts[-3:-1] == (cell.folder.parts[-3], column)


def test_help_lists_them() -> None:
    text = (conf_folder() / "reproduce.yaml").read_text()
    listed = text.partition("tables: ")[2].partition("\n\n")[0]
    assert sorted(listed.replace(",", " ").split()) == NAMES


def test_values_of_the_source() -> None:
    """A sample of values, typed again from the papers' tables."""
    popsan = read_table("popsan_table1").rows
    assert popsan["popsan_td3"].published is not None
    assert popsan["popsan_td3"].published.values["Walker2d"] == [4995, 682]
    assert popsan["convert_25_soft"].published is not None
    assert popsan["convert_25_soft"].published.values["Ant"] == [3026, 1718]
    proxy = read_table("proxy_target_table1").rows["proxy_lif"].published
    assert proxy is not None
    assert (proxy.values["HalfCheetah"], proxy.aggregate) == ([10103, 607], 5.84)
    mdc_san = read_table("mdc_san_table1").rows["mdc_san"].published
    assert mdc_san is not None
    assert mdc_san.values["HalfCheetah"] == [11657, None]


def test_figures_are_marked() -> None:
    rows = read_table("popsan_algorithms").rows.values()
    assert all(row.published and row.published.figure for row in rows)


def test_cells() -> None:
    table = read_table("popsan_table1")
    cell = cell_of(table, "popsan_td3", "Hopper", 7)
    assert cell is not None
    assert str(cell.folder) == "outputs/reproduced/popsan_table1/popsan_td3/Hopper/seed7"
    assert cell.overrides == (
        "experiment=popsan/td3", "env=Hopper", "env.version=v5", "eval_episodes=10",
        "encoder=poisson", "seed=7",
    )  # fmt: skip
    dense = cell_of(table, "dense_td3", "Hopper", 7)
    assert dense is not None
    assert "encoder=poisson" not in dense.overrides
    converted = cell_of(table, "convert_5_soft", "Hopper", 7)
    assert converted is not None
    assert (converted.command, converted.source) == ("convert", dense.folder)
    assert converted.overrides == ("spike_steps=5", "reset=soft")


def test_a_row_may_leave_columns_out() -> None:
    table = table_of(changed("rows/dense/columns", ["Hopper"]))
    assert cell_of(table, "dense", "Ant", 0) is None
    assert cell_of(table, "dense", "Hopper", 0) is not None
    assert cell_of(table, "spiking", "Ant", 0) is not None
    sparse = read_table("sparsity")  # one of its rows leaves a column out
    other = table_of(
        {
            **BASE,
            "protocol": vars(sparse.protocol),
            "baseline": "same",
            "rows": {"same": {"label": "s", "same_as": "sparsity/dense_td3"}},
            "columns": {"Hopper_population": {"env": "Hopper", "version": "v5"}},
        }
    )
    assert cell_of(other, "same", "Hopper_population", 0) is None
    converted = {"label": "c", "convert": "dense", "overrides": ["reset=soft"]}
    data = changed("rows/dense/columns", ["Hopper"])
    data["rows"]["c"] = converted
    table = table_of(data)
    assert cell_of(table, "c", "Ant", 0) is None


def test_cells_of_another_table() -> None:
    ours, theirs = read_table("ours"), read_table("popsan_table1")
    cell = cell_of(ours, "popsan_td3", "Hopper", 7)
    other = cell_of(theirs, "popsan_td3", "Hopper", 7)
    assert cell is not None
    assert other is not None
    assert (cell.folder, cell.overrides) == (other.folder, other.overrides)


BASE: dict[str, Any] = yaml.safe_load(
    """
name: small
title: t
source: s
baseline: dense
protocol: {total_steps: 100, seeds: 2, eval_episodes: 1, metric: max_average}
rows:
  spiking:
    label: a
    experiment: popsan/td3
    published:
      {source: Table 1, version: v4, seeds: 5, metric: max_average, values: {Ant: [3, 1]}}
  dense: {label: b, experiment: dense/td3, overrides: [algo.gamma=0.9]}
columns:
  Ant: {env: Ant, version: v4, overrides: {spiking: [encoder=poisson]}}
  Hopper: {env: Hopper, version: v4}
"""
)


def changed(path: str, value: Any) -> dict[str, Any]:
    data = deepcopy(BASE)
    *parents, last = path.split("/")
    place = data
    for key in parents:
        place = place[key]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return data


PUBLISHED = "rows/spiking/published"
WRONG: list[tuple[str, Any, str]] = [
    ("titel", "x", "table.titel=x: no such key"),
    ("title", None, "table.title=???: "),
    ("name", "../x", "table.name=../x: give a name of letters, digits and _"),
    ("protocol", 5, "table.protocol=5: give its keys and their values"),
    ("rows/c", 5, "table.rows.c=5: give its keys and their values"),
    ("columns/Ant", [1], "table.columns.Ant=[1]: give its keys and their values"),
    (PUBLISHED, 5, "table.rows.spiking.published=5: give its keys and their values"),
    ("rows", {}, "table.rows={}: give at least one"),
    ("rows/a b", {"label": "x", "experiment": "dense/td3"}, "table.rows=a b: give a name"),
    ("protocol/seeds", 0, "table.protocol.seeds=0: give at least 1"),
    ("protocol/metric", "median", "table.protocol.metric=median: one of max_average"),
    ("protocol/core_hours", [0.5, 0], "table.protocol.core_hours=0.0: give hours above 0"),
    ("protocol/overrides", ["seed=3"], "table.protocol.overrides=seed=3: a cell sets it"),
    ("protocol/overrides", ["dataset=d"], "table.protocol.overrides=dataset=d: a cell sets it"),
    ("protocol/overrides", ["tau"], "table.protocol.overrides=tau: cannot be read"),
    ("baseline", "dens", "table.baseline=dens: no such row; did you mean dense?"),
    ("rows/spiking/experiment", "popsan/td4",
     "table.rows.spiking.experiment=popsan/td4: no such option; did you mean popsan/td3"),
    ("rows/spiking/lable", "x", "table.rows.spiking.lable=x: no such key"),
    ("rows/spiking/convert", "dense", "table.rows.spiking.convert=dense: it has experiment"),
    ("rows/dense/experiment", None, "table.rows.dense.experiment=null: give one, or published"),
    ("rows/dense/overrides", ["env=Ant"], "table.rows.dense.overrides=env=Ant: a cell sets it"),
    ("rows/dense/times_steps", 0, "table.rows.dense.times_steps=0: give at least 1"),
    ("rows/dense/columns", ["Ants"], "table.rows.dense.columns=Ants: no such name; did you mean"),
    ("rows/dense/columns", [], "table.rows.dense.columns=[]: no cell is selected"),
    ("rows/c", {"label": "b", "experiment": "dense/sac"}, "table.rows.dense.label=b: another row"),
    ("rows/c", {"label": "c", "convert": "spikin"}, "table.rows.c.convert=spikin: give a row"),
    ("rows/c", {"label": "c", "same_as": "popsan_table1/x"}, "table.rows.c.same_as=popsan_table1/x:"
     " no such row there"),
    ("rows/c", {"label": "c", "same_as": "popsan_table1/popsan_td3"},
     "table.rows.c.same_as=popsan_table1/popsan_td3: its column Ant is another"),
    ("rows/c", {"label": "c", "same_as": "popsan_table1/popsan_td3", "times_steps": 3},
     "table.rows.c.times_steps=3: its cells are popsan_table1/popsan_td3; leave it out"),
    ("rows/c", {"label": "c", "same_as": "popsan_table1/popsan_td3", "overrides": ["a.b=1"]},
     "table.rows.c.overrides=['a.b=1']: its cells are popsan_table1/popsan_td3; leave it out"),
    (f"{PUBLISHED}/source", None, "table.rows.spiking.published.source=???: "),
    (f"{PUBLISHED}/source", " ", "table.rows.spiking.published.source=: say where"),
    (f"{PUBLISHED}/metric", "median",
     "table.rows.spiking.published.metric=median: one of max_average, last_ten_mean, smoothed_"),
    (f"{PUBLISHED}/values", {"Ants": [1, 2]}, "table.rows.spiking.published.values=Ants: no such"
     " column; did you mean Ant?"),
    (f"{PUBLISHED}/values", {"Ant": [1]}, "table.rows.spiking.published.values.Ant=[1]: give"),
    (f"{PUBLISHED}/values", {"Ant": ["x", 1]}, "table.rows.spiking.published.values.Ant="),
    (f"{PUBLISHED}/values", {"Ant": [1, -1]}, "table.rows.spiking.published.values.Ant="),
    (f"{PUBLISHED}/values", {}, "table.rows.spiking.published.values={}: give"),
    (f"{PUBLISHED}/aggregate", 1.0, "table.aggregate=null: say what"),
    ("columns/Ant/env", "Ants", "table.columns.Ant.env=Ants: no such option; did you mean Ant"),
    ("columns/Ant/version", "5", "table.columns.Ant.version=5: give a version"),
    ("columns/Ant/overrides", {"spikin": []}, "table.columns.Ant.overrides=spikin: no such row"),
    ("columns/Ant2", {"env": "Hopper", "version": "v4"},
     "table.rows=spiking: the cell spiking/Ant2 is the same run as spiking/Hopper"),
    ("rows/c", {"label": "c", "experiment": "dense/td3", "overrides": ["algo.gamma=0.9"]},
     "table.rows=c: the cell c/Ant is the same run as dense/Ant"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value", "line"), WRONG)
def test_wrong_files(path: str, value: Any, line: str) -> None:
    assert str(refusal(table_of, changed(path, value))).startswith(line)


def test_base_is_right() -> None:
    table = table_of(BASE)
    assert isinstance(table, Table)
    assert list(table.columns) == ["Ant", "Hopper"]


def test_two_datasets_of_a_task_are_two_columns() -> None:
    two = {name: {"env": "Ant", "version": "v5", "dataset": f"d/{name}-v0"} for name in ("a", "b")}
    table = table_of(changed("columns", BASE["columns"] | two))
    row = next(iter(table.rows))
    cells = [cell_of(table, row, column, 0) for column in two]
    given = [o for cell in cells if cell for o in cell.overrides if o.startswith("dataset")]
    assert given == ["dataset=d/a-v0", "dataset=d/b-v0"]
    two["b"]["dataset"] = "d/a-v0"
    line = str(refusal(table_of, changed("columns", BASE["columns"] | two)))
    assert line == "table.rows=spiking: the cell spiking/b is the same run as spiking/a"


def test_selection() -> None:
    names = ["a", "b", "c"]
    assert select(names, None, key="rows") == names
    assert select(names, ["c", "a"], key="rows") == ["a", "c"]
    assert select(names, "b", key="rows") == ["b"]
    assert str(refusal(select, names, [], key="rows")) == "rows=[]: no cell is selected"
    long = ["HalfCheetah", "Hopper"]
    line = "columns=Hoper: no such name; did you mean Hopper?"
    assert str(refusal(select, long, ["Hoper"], key="columns")) == line


def test_a_cell_is_composed_as_its_run_is() -> None:
    """Else `reproduce`, called again, would take its own runs for those of other settings."""
    data = yaml.safe_load((conf_folder() / "table" / "ours.yaml").read_text())
    data["protocol"]["overrides"] = ["algo.replay_capacity=1e5", "algo.random_steps=20k",
                                     "logger=csv", "env.kwargs.x=2"]  # fmt: skip
    table = table_of(data)
    cell = cell_of(table, "popsan_td3_sparse", "HalfCheetah", 3)
    assert cell is not None
    config = config_of(cell)
    for key, value in {
        "algo.replay_capacity": "100000",
        "algo.random_steps": "20000",
        "logger": "['csv']",
        "env.kwargs.x": "2",
        "seed": "3",
    }.items():
        assert config[key] == value
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        run = compose("train", expand("train", cell.overrides))
    settings = dotted(OmegaConf.to_container(run, resolve=True))
    assert config == {key: str(value) for key, value in settings}


def test_unknown_table() -> None:
    line = "table=popsan_tabel1: no such table; did you mean popsan_table1"
    assert str(refusal(read_table, "popsan_tabel1")).startswith(line)


def overridden() -> list[tuple[str, ...]]:
    """All different overrides of experiments by rows and columns, each once, on some task."""
    cells = [
        cell_of(table, row, column, 0)
        for table in map(read_table, NAMES)
        for row, r in table.rows.items()
        for column, c in table.columns.items()
        if r.experiment and (r.overrides or row in c.overrides)
    ]
    by_rest = {
        tuple(o for o in cell.overrides if not o.startswith(("env", "dataset"))): cell.overrides
        for cell in cells
        if cell
    }
    return sorted(by_rest.values())


@pytest.mark.parametrize("overrides", overridden(), ids=" ".join)
def test_overrides_make_a_run(overrides: tuple[str, ...]) -> None:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        config = compose("train", expand("train", overrides))
    build(OmegaConf.to_container(config, resolve=True))  # type: ignore[arg-type]
