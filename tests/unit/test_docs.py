"""README and docs: commands are accepted, links lead to files, prose fits into 100 columns."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from documented import commands_in, jobs, lines, variants
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from spikerl.algos import ALGOS
from spikerl.cli.compose import commands, expand
from spikerl.cli.words import split
from spikerl.config.run import RunConfig
from spikerl.config.yaml_file import conf_folder
from spikerl.distributed.world import BACKENDS
from spikerl.energy.meter import METERS
from spikerl.envs.config import EnvConfig
from spikerl.kernels import KERNELS
from spikerl.models.networks import ACTOR_GROUPS, parse_actor
from spikerl.models.precision import PRECISIONS
from spikerl.schema import parse

ROOT = Path(__file__).resolve().parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
RESULTS = ROOT / "outputs" / "reproduced"
# The first of the cards that rendering a table writes for its policies.
CARDS = [card for t in RESULTS.iterdir() for card in sorted(t.rglob("POLICY.md"))[:1]]
OTHERS = [*RESULTS.glob("*/*.md"), *CARDS, *(ROOT / "tests").rglob("*.md")]
PAGES = [ROOT / "README.md", *DOCS, *sorted(OTHERS)]
WIDTH = 100


def validate(data: dict[Any, Any]) -> None:
    """The checks of `build` that do not depend on the machine; raises if one fails."""
    known = {f.name for f in fields(RunConfig)}
    parse(RunConfig, {key: value for key, value in data.items() if key in known})
    parse(EnvConfig, data["env"], key="env")
    parse_actor({group: data[group] for group in ACTOR_GROUPS})
    for registry in (ALGOS, PRECISIONS, KERNELS, BACKENDS, METERS):
        registry.parse(data[registry.group])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder that `resume=` and `config=` accept."""
    folder = tmp_path_factory.mktemp("run")
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        config = OmegaConf.to_yaml(compose("train"), resolve=True)
    (folder / "config.yaml").write_text(config)
    (folder / "manifest.json").write_text(json.dumps({}))
    return folder


def check(words: list[str], run: Path) -> None:
    """Compose the configs of a command; raises if it is refused."""
    command, *args = words
    assert command in commands(), f"{command} is not a command"
    args = [re.sub(r"^resume=.*", f"resume={run}", arg) for arg in args]
    args = [re.sub(r"^config=.*", f"config={run}/config.yaml", arg) for arg in args]
    overrides, _ = split(expand(command, args))
    # The tests do not need optuna, which cluster.md tells how to install.
    overrides = [arg for arg in overrides if not re.match(r"hydra[/.]sweeper", arg)]
    for job in jobs(overrides):
        check_job(command, job, bool(overrides))


@cache
def check_job(command: str, job: tuple[str, ...], complete: bool) -> None:
    """Check one job; with `complete`, every key without a default must have been given."""
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        config = compose(command, list(job))
    data = OmegaConf.to_container(config, resolve=True, throw_on_missing=complete)
    assert isinstance(data, dict)
    if "algo" in data:
        validate(data)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_accepted(page: Path, run: Path) -> None:
    GlobalHydra.instance().clear()
    refused = []
    for command in dict.fromkeys(commands_in(page.read_text(encoding="utf-8"))):
        if "plugins=" in command:
            continue  # test_extending.py runs it with its plugin
        for words in variants(command):
            try:
                check(words, run)
            except Exception as error:
                refused.append(f"spikerl {' '.join(words)}: {error}")
    assert not refused, "\n".join(refused)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_are_there(page: Path) -> None:
    spans = re.findall(r"`([\w./-]+)`", page.read_text(encoding="utf-8"))
    names = {span for span in spans if "NAME" not in span}
    assert [name for name in sorted(names) if names_file(name) and not places(name)] == []


def names_file(span: str) -> bool:
    """Whether `span` is written as the name of a source, test or script of this repository."""
    first, slash, _ = span.partition("/")
    ours = first in ("tests", "spikerl", "conf") or (ROOT / "spikerl" / first).is_dir()
    source = re.search(r"\.(py|cpp|h|yaml)$", span) and (ours or first.startswith("test_"))
    return bool(source) or (first == "scripts" and slash == "/")


def places(name: str) -> list[Path]:
    """Paths of a file named relative to the root or spikerl/, or by name alone if it is a test."""
    if name.startswith("test_"):
        return list((ROOT / "tests").rglob(name))
    return [path for path in (ROOT / name, ROOT / "spikerl" / name) if path.exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_prose_fits(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert [line for kind, line in lines(text) if kind == "prose" and len(line) > WIDTH] == []


def test_the_index_leads_to_every_page() -> None:
    linked = set(re.findall(r"\(([^)#/]+\.md)", (ROOT / "docs" / "index.md").read_text()))
    assert {page.name for page in DOCS} - {"index.md"} == linked


PAGE = """\
Prose with `spikerl train env=Ant
seed=1` and `spikerl --help`.

    $ srun -n2 spikerl train env=Hopper \\
        seed=3 ...
    spikerl: rdzv=a:1: refused
    stopped; spikerl train resume=run goes on

```
$ PYTHONPATH=. torchrun --nnodes=2 -m spikerl bench rounds=5 json=true > out.json
scripts/spikerl eval run=RUN
```

| `sbatch -n8 scripts/slurm.sbatch RUN env=Ant` | `spikerl doctor` |

1. An item
    that goes on, which is not code: spikerl train seed=2
"""


def test_commands_are_seen() -> None:
    assert commands_in(PAGE) == [
        "train env=Hopper seed=3 ...",
        "bench rounds=5 json=true > out.json",
        "eval run=RUN",
        "train env=Ant seed=1",
        "doctor",
        "train env=Ant",
    ]


def test_kinds_of_lines() -> None:
    kinds = "".join(kind[0] for kind, _ in lines(PAGE))
    assert kinds == "ppb" + "ccccb" + "ccccb" + "tb" + "pp"


def test_variants() -> None:
    command = "train algo=td3|sac seed=S 'algo.gamma=interval(0.9,1)' ... > file"
    td3, sac = variants(command)
    assert td3 == ["train", "algo=td3", "seed=0", "algo.gamma=interval(0.9,1)"]
    assert sac == ["train", "algo=sac", "seed=0", "algo.gamma=interval(0.9,1)"]
    assert list(jobs(td3[1:])) == [("algo=td3", "seed=0", "algo.gamma=0.9")]
    assert list(jobs(["env=Ant,Hopper", "seed=1", "num_envs=1,2,4"])) == [
        ("env=Ant", "seed=1", "num_envs=1"),
        ("env=Hopper", "seed=1", "num_envs=2"),
        ("env=Ant", "seed=1", "num_envs=4"),
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "env=Hoper"], "env/Hoper"),
        (["train", "sed=1"], "sed"),
        (["train", "algo.gamma=2"], "algo.gamma=2"),
        (["train", "seed=one"], "seed=one"),
        (["evaluate", "run=RUN"], "not a command"),
        (["eval", "seed=1"], "run"),
    ],
)
def test_wrong_commands_are_refused(words: list[str], message: str, run: Path) -> None:
    GlobalHydra.instance().clear()
    with pytest.raises(Exception, match=re.escape(message)):
        check(words, run)
