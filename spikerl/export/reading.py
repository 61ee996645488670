"""Reads an exported file with its contract; both are checked before either is used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from spikerl.errors import BadRequest, first_line
from spikerl.export.contract import SCHEMA
from spikerl.export.formats import FORMATS
from spikerl.export.host import check_outside
from spikerl.export.proof import FilePolicy, Interpreter
from spikerl.files import checksum, read_bytes, read_json
from spikerl.models.policy_file import read_task
from spikerl.types import Task

MAX_CONTRACT = 1 << 26  # bytes; receptive fields of many observation entries take most of it
MAX_FILE = 1 << 30
MOST_NEURONS = 1 << 20  # of a layer
MOST_STEPS = 1000


@dataclass
class Exported:
    """A file whose content matches its contract, and which has not been run yet."""

    path: Path
    content: bytes
    contract: dict[str, Any]
    task: Task
    sha256: str
    trained_with: dict[str, str]

    @property
    def format(self) -> str:
        return str(self.contract["format"])

    def policy(self) -> FilePolicy:
        """The file, ready to act; BadRequest if its format is not installed or the file is invalid.

        C is compiled here and runs as code of this process.
        """
        form = FORMATS[self.format]
        try:
            form.check_here()
        except BadRequest as error:
            raise BadRequest("run", self.path, error.args[2]) from None
        try:
            # Use the content that was checked, as the file may change.
            with TemporaryDirectory(prefix="spikerl-eval-") as folder:
                file = Path(folder) / f"policy.{self.format}"
                file.write_bytes(self.content)
                interpreter = form.interpreter(file, self.contract, Path(folder))
                check_acts(interpreter, self.task)
        except BadRequest as error:
            raise BadRequest("run", self.path, error.args[2]) from None
        except Exception as error:  # readers of damaged files raise almost anything
            raise BadRequest("run", self.path, f"cannot be read: {first_line(error)}") from None
        encoder = self.contract["encoder"]["name"] if "spike_steps" in self.contract else None
        return FilePolicy(
            self.task,
            interpreter,
            encoder_spikes=encoder in ("population", "tanh_population"),
            exits_early="early_exit" in self.contract,
            trained_with=self.trained_with,
        )


def read(path: Path) -> Exported:
    """Read and check; BadRequest if the file or its contract is missing, foreign or damaged."""
    beside = path.with_name(f"{path.name}.json")
    if not beside.is_file():
        remedy = f"is not a run folder, and no exported file: {beside.name} is not beside it"
        raise BadRequest("run", path, remedy)
    try:
        contract = read_json(beside, MAX_CONTRACT)
        content = read_bytes(path, MAX_FILE)
    except (OSError, ValueError) as error:
        raise BadRequest("run", path, f"cannot be read: {first_line(error)}") from None
    schema = contract.get("schema") if isinstance(contract, dict) else None
    if schema != SCHEMA:
        remedy = f"{beside.name} has schema {schema}, this version reads {SCHEMA}; export it again"
        raise BadRequest("run", path, remedy)
    digest = checksum(content)
    if contract.get("sha256") != digest:
        remedy = f"is not the file that {beside.name} describes: its sha256 differs"
        raise BadRequest("run", path, remedy)
    if str(contract.get("format")) not in FORMATS:
        raise BadRequest("run", path, f"{beside.name} names a format that is not known")
    try:
        layout = [[e["path"], e["shape"], e["start"]] for e in contract.get("obs_layout", [])]
        task = read_task({**contract, "obs_layout": layout})
        if task.choices is not None:
            raise ValueError("act_choices, which no exported file has")
        check_outside(contract, task)
        check_sizes(contract)
        trained_with = {str(k): str(v) for k, v in dict(contract["trained_with"]).items()}
        if not all(text.isprintable() for text in trained_with.values()):
            raise ValueError("trained_with, which cannot be printed")
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        # For a value of a wrong type, Python's message would not name the key.
        plain = isinstance(error, KeyError | ValueError)
        what = first_line(error) if plain else "a value, which is of another kind than its key says"
        remedy = f"{beside.name} lacks or garbles {what}; export it again"
        raise BadRequest("run", path, remedy) from None
    return Exported(path, content, contract, task, digest, trained_with)


def check_acts(file: Interpreter, task: Task) -> None:
    """Act on batches of two sizes, as some faults only show then; may raise almost any error."""
    for batch in (1, 3):
        obs_BO = np.zeros((batch, task.obs_dim), np.float32)
        shapes = [
            file.actions(obs_BO).shape,
            *(spikes.shape[1:2] for spikes in file.spikes(obs_BO)),
        ]
        if shapes[0] != (batch, task.act_dim) or any(shape != (batch,) for shape in shapes[1:]):
            raise ValueError("its actions or spikes are of another shape than its observations")


def check_sizes(contract: dict[str, Any]) -> None:
    """Raise KeyError, TypeError or ValueError unless the contract's sizes are those of a policy."""
    sizes = contract["sizes"]
    every = list(sizes["layers"])
    if "spike_steps" in contract:
        if not 1 <= contract["spike_steps"] <= MOST_STEPS:
            raise ValueError("spike_steps")
        every += [sizes["encoder"]]
        for part in ("encoder", "neuron", "decoder"):
            if not isinstance(contract[part]["name"], str):
                raise ValueError(part)
    if not every or not all(type(n) is int and 1 <= n <= MOST_NEURONS for n in every):
        raise ValueError("sizes")
