"""`spikerl export`: a policy as a file for other programs and machines."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from spikerl.config.yaml_file import check_confirmed
from spikerl.errors import DONE, FAILED, BadRequest
from spikerl.export import c, contract, nir, onnx, proof, support
from spikerl.files import checksum, json_bytes, write_atomic
from spikerl.models.actor import SpikingActor
from spikerl.models.policy import Policy, load_policy
from spikerl.schema import parse


class Format(NamedTuple):
    check_here: Callable[[], None]  # BadRequest where something that it needs is not installed
    write: Callable[[Policy, Path], None]
    interpreter: Callable[[Path, dict[str, Any], Path], proof.Interpreter]
    dt: float | None = None  # seconds of a spike step, where the format has time


FORMATS = {
    "c": Format(c.check_here, c.write, c.Interpreter),
    "onnx": Format(onnx.check_here, onnx.write, onnx.Interpreter),
    "nir": Format(nir.check_here, nir.write, nir.Interpreter, nir.DT),
}


@dataclass(kw_only=True)
class ExportRequest:
    run: str
    format: str
    file: str | None
    policy: str  # last, best
    episodes: int
    seed: int
    env_id: str | None
    plugins: list[str]

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise BadRequest("format", self.format, f"give one of {', '.join(FORMATS)}")
        if self.episodes < 1:
            raise BadRequest("episodes", self.episodes, "give at least 1")
        if not 0 <= self.seed < 2**63:
            raise BadRequest("seed", self.seed, "give 0 or more, below 2^63")


def main(data: dict[str, Any], argv: Sequence[str]) -> int:
    """`spikerl export`."""
    request = parse(ExportRequest, data)
    form = FORMATS[request.format]
    policy = policy_of(request)
    verdicts = support.check(request.format, policy.config)
    form.check_here()
    file = Path(request.file or Path(request.run) / f"policy.{request.format}")
    beside = file.with_name(f"{file.name}.json")
    check_free(file, beside)
    env_id = request.env_id or policy.task.env_id
    check_confirmed(request.run, env_id, dict(policy.task.env_kwargs), request.env_id)
    env = proof.known_env(policy, request.run, request.env_id)
    described = contract.describe(request.format, policy, form.dt)
    described["support"] = {group: str(verdict) for group, verdict in verdicts.items()}
    # Nothing lies at its place before it is proven.
    with TemporaryDirectory(prefix="spikerl-export-") as folder:
        written = Path(folder) / f"policy.{request.format}"
        form.write(policy, written)
        content = written.read_bytes()
        # As a reader has it: from JSON.
        reread = json.loads(json_bytes(described))
        interpreter = form.interpreter(written, reread, Path(folder))
        try:
            proven = proof.prove(policy, interpreter, env, request.episodes, request.seed)
        except proof.ProofFailed as error:
            line = f"the file does not act as the policy, and is not kept: {error}"
            print(f"spikerl: format={request.format}: {line}", file=sys.stderr)
            return FAILED
    described |= {"file": file.name, "sha256": checksum(content), "bytes": len(content)}
    publish(file, content, beside, json_bytes({**described, "proof": proven}))
    print(f"{file}: {len(content)} bytes; contract: {beside}")
    print(
        f"{proven['observations']} observations reproduced: {proven['spikes_compared']} spikes"
        f" equal, actions within {proven['largest_action_difference']:.1e};"
        f" set aside for rounding: {proven['set_aside']}"
    )
    if env is None:
        print(
            f"{env_id} is not registered here: observations drawn, no return;"
            " env_id=MODULE:NAME imports the module that registers it"
        )
    else:
        print(
            f"{env.id}: return of the file {proven['return_mean']:.1f}, of the policy"
            f" {proven['return_mean_of_policy']:.1f} over {request.episodes} episodes"
        )
    return DONE


def policy_of(request: ExportRequest) -> Policy:
    policy = load_policy(request.run, policy=request.policy)
    if isinstance(policy.actor, SpikingActor) and len(policy.actor.norms):
        remedy = "its batch normalisation is not folded into weights; give a policy that acts"
        raise BadRequest("run", request.run, remedy)
    if policy.task.choices is not None:
        remedy = "a file holds continuous actions, and its policy chooses one of"
        raise BadRequest("run", request.run, f"{remedy} {policy.task.act_dim}; use load_policy")
    if policy.norm.far:
        remedy = "an observation entry lies so far from 0 that a file's float32 loses its digits;"
        remedy += " subtract a constant from it in the environment"
        raise BadRequest("run", request.run, remedy)
    return policy


def check_free(file: Path, beside: Path) -> None:
    for path in (file, beside):
        if os.path.lexists(path):
            raise BadRequest("file", path, "it exists already; remove it, or give another file")
    if not file.parent.is_dir() or not os.access(file.parent, os.W_OK | os.X_OK):
        remedy = f"{file.parent} is no folder that can be written to; give another file"
        raise BadRequest("file", file, remedy)


def publish(file: Path, content: bytes, beside: Path, described: bytes) -> None:
    """Both or none."""
    write_atomic(beside, described)
    try:
        write_atomic(file, content)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
