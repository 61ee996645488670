"""A policy compressed and exported in every way, as rows of one table.

`python scripts/hardware_table.py FOLDER RUN [EPISODES]` only calls `spikerl compress` and `export`,
which write into FOLDER, except where their results are there already, and prints the rows.
"""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from spikerl.cli.main import run
from spikerl.files import absolute, shown

COMPRESSED = ("bits=8", "bits=4", "prune=0.9")
FORMATS = ("c", "onnx", "nir", "loihi")
COLUMNS = ("return", "spikes", "MACs", "ACs", "updates", "bytes", "nJ, 45nm", "nJ, memory")


def made(path: Path, source: str, episodes: str, *typed: str) -> dict[str, Any] | None:
    """The JSON that the command writes at `path`; None if it refused the request, and printed why.

    If the file exists already, it must be of the same run and episodes; the command is not called.
    """
    if not path.exists():
        command, *more = typed
        with redirect_stdout(io.StringIO()):
            if run([command, f"run={source}", f"episodes={episodes}", *more]):
                return None
    facts: dict[str, Any] = json.loads(path.read_text())
    had = facts.get("made_from", facts)["run"], str(facts.get("proof", facts)["episodes"])
    if had != (shown(absolute(source)), episodes):
        raise SystemExit(f"{path} is of run={had[0]} episodes={had[1]}; give another FOLDER")
    return facts


def line(name: str, cells: dict[str, str]) -> str:
    return f"| `{name}` | " + " | ".join(cells.get(column, "-") for column in COLUMNS) + " |"


def of_policy(row: dict[str, Any]) -> dict[str, str]:
    return {
        "return": f"{row['return_mean']:,.1f} ± {row['return_std']:,.1f}",
        "spikes": "-" if row["spikes"] is None else f"{row['spikes']:,.0f}",
        "MACs": f"{row['macs']:,.0f}",
        "ACs": f"{row['acs']:,.0f}",
        "updates": f"{row['updates']:,.0f}",
        "bytes": f"{row['footprint_bytes']:,}",
        "nJ, 45nm": f"{row['modelled_45nm_nj']:,.0f}",
        "nJ, memory": f"{row['modelled_stored_nj']:,.0f}",
    }


def of_file(contract: dict[str, Any]) -> dict[str, str]:
    """A file with a proof has the same spikes as its policy, so the same operations and energy."""
    proof, unlike = contract["proof"], contract["proof"].get("spikes_unlike_policy")
    columns = {"return": f"{proof['return_mean']:,.1f}", "bytes": f"{contract['bytes']:,}"}
    if unlike:
        return {**columns, "spikes": f"{max(unlike):.1%} of a layer's differ"}
    counted = ("spikes", "MACs", "ACs", "updates", "nJ, 45nm", "nJ, memory")
    return {**columns, **dict.fromkeys(counted, "as it was")}


def main(folder: Path, source: str, episodes: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, dict[str, str]] = {}
    for how in COMPRESSED:
        target = folder / how.replace("=", "")
        done = target / "compressed.json"
        facts = made(done, source, episodes, "compress", how, f"run_dir={target}")
        if facts is None:
            raise SystemExit(1)
        rows.setdefault("as it was", of_policy(facts["before"]))
        rows[how] = of_policy(facts["after"])
        print(how, "is there", file=sys.stderr, flush=True)
    for form in FORMATS:
        file = folder / f"policy.{form}"
        described = Path(f"{file}.json")
        contract = made(described, source, episodes, "export", f"format={form}", f"file={file}")
        rows[f"format={form}"] = of_file(contract) if contract else {"return": "no file"}
        print(form, "is done", file=sys.stderr, flush=True)
    print("| | " + " | ".join(COLUMNS) + " |\n" + "|---" * (len(COLUMNS) + 1) + "|")
    for name, cells in rows.items():
        print(line(name, cells))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], *(sys.argv[3:] or ["10"]))
