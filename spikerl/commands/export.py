"""`spikerl export`: a policy as a file for other programs and machines."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from spikerl.config.yaml_file import check_confirmed
from spikerl.errors import DONE, FAILED, BadRequest, Exists
from spikerl.export import contract, proof, reading, support
from spikerl.export.formats import FORMATS
from spikerl.files import (
    checksum,
    checksum_of,
    json_bytes,
    partial_of,
    shown,
    why_no_name,
    write_atomic,
)
from spikerl.models.actor import SpikingActor
from spikerl.models.policy import Policy
from spikerl.output import several
from spikerl.runs.policies import find_policy, load_policy
from spikerl.schema import check_seed, parse

# Tang et al., arXiv:2010.09635, Table 1: Loihi against GPU, HalfCheetah to Walker2d.
PUBLISHED = (-0.143, -0.021)


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
        check_seed(self.seed)


def main(data: dict[str, Any], argv: Sequence[str]) -> int:
    """`spikerl export`: the exit status."""
    request = parse(ExportRequest, data)
    form = FORMATS[request.format]
    # Found once: a run that goes on meanwhile saves other policies.
    folder = find_policy(Path(request.run), request.policy, key="run")
    policy, weights = policy_of(request, folder), checksum_of(folder / "policy.safetensors")
    exits_early = policy.compression is not None and policy.compression.early_exit is not None
    verdicts = support.check(request.format, policy.config, exits_early)
    form.check_here()
    form.check_policy(policy)
    file = Path(request.file or Path(request.run) / f"policy.{request.format}")
    if not file.name:
        raise BadRequest("file", file, "give the name of a file")
    beside = file.with_name(f"{file.name}.json")
    check_name(file, beside, request.format)
    check_free(file, beside, weights)
    if not request.env_id:
        check_confirmed(request.run, policy.task, None)
    env = proof.known_env(policy, request.run, request.env_id)
    made_from = {
        "command": shlex.join(argv),
        "run": shown(Path(request.run)),
        "policy": request.policy,
        "sha256": weights,
    }
    described = {
        **contract.describe(request.format, policy, form.dt),
        **form.facts(policy),
        "made_from": made_from,
        "support": {group: str(verdict) for group, verdict in verdicts.items()},
    }
    # The file appears at its place only once it is proven.
    with TemporaryDirectory(prefix="spikerl-export-") as scratch:
        written = Path(scratch) / f"policy.{request.format}"
        form.write(policy, written)
        content = written.read_bytes()
        # As a reader will have it, from JSON.
        reread = json.loads(json_bytes(described))
        interpreter = form.interpreter(written, reread, Path(scratch))
        try:
            proven = proof.prove(
                policy, interpreter, env, request.episodes, request.seed, form.emulated
            )
        except proof.ProofFailed as error:
            acts = "the policy" if form.emulated is None else "its emulation"
            line = f"the file does not act as {acts}, and is not kept: {error}"
            print(f"spikerl: format={request.format}: {line}", file=sys.stderr)
            return FAILED
    described |= {"file": file.name, "sha256": checksum(content), "bytes": len(content)}
    check_free(file, beside, weights)  # another process may have been quicker
    try:
        publish(file, content, beside, json_bytes({**described, "proof": proven}))
    except OSError as error:
        remedy = f"{error.strerror or error}; nothing was kept"
        raise BadRequest("file", shown(file), remedy) from error
    print(f"{shown(file)}: {len(content)} bytes; contract: {shown(beside)}")
    print_proof(proven)
    if form.emulated is not None:
        print_approximation(proven)
    if env is None:
        print(
            f"{policy.task.env_id} is not registered here: observations drawn, no return;"
            " env_id=MODULE:NAME imports the module that registers it"
        )
    else:
        print(
            f"{env.id}: return of the file {proven['return_mean']:.1f}, of the policy"
            f" {proven['return_mean_of_policy']:.1f} over {several(request.episodes, 'episode')}"
        )
    return DONE


def print_proof(proven: dict[str, Any]) -> None:
    print(
        f"{proven['observations']} observations reproduced: {proven['spikes_compared']} spikes"
        f" equal, actions within {proven['largest_action_difference']:.1e};"
        f" set aside for rounding: {proven['set_aside']}"
    )


def print_approximation(proven: dict[str, Any]) -> None:
    shares = ", ".join(f"{share:.2%}" for share in proven["spikes_unlike_policy"])
    print(
        f"reproduced is the emulation of the target. Of the policy's own spikes differ {shares}"
        " (encoder and layers); its actions differ by"
        f" {proven['mean_action_difference_from_policy']:.1e} on average,"
        f" {proven['largest_action_difference_from_policy']:.1e} at most"
    )
    if (change := proven["return_change"]) is not None:
        least, most = PUBLISHED
        how = "better than" if change > most else "worse than" if change < least else "within"
        print(
            f"return: {change:+.1%}, {how} what is published of PopSAN on the chip,"
            f" {most:.1%} to {least:.1%}"
        )


def policy_of(request: ExportRequest, folder: Path) -> Policy:
    policy = load_policy(folder)
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


def check_name(file: Path, beside: Path, form: str) -> None:
    """Refuse names that a run may give to files of its own, as these would be taken for the run's:
    in a run that still trains, a contract policy.json would pass for its final policy.
    """
    runs = ("manifest.json", "config.yaml")
    in_run = any(all((p / name).is_file() for name in runs) for p in file.absolute().parents)
    if in_run and file.suffix != f".{form}":
        remedy = f"in a run folder, it or {beside.name} beside it may be taken for the run's own"
        raise BadRequest("file", shown(file), f"{remedy}; give a name that ends in .{form}")


def check_free(file: Path, beside: Path, weights: str) -> None:
    for path in (file, beside):
        if os.path.lexists(path):
            kind = Exists if holds(file, weights) else BadRequest
            raise kind("file", shown(path), "it exists already; remove it, or give another file")
    if not file.parent.is_dir() or not os.access(file.parent, os.W_OK | os.X_OK):
        remedy = f"{shown(file.parent)} is not a folder that can be written to; give another file"
        raise BadRequest("file", shown(file), remedy)
    if reason := why_no_name(partial_of(beside)):  # the longest name that is written
        raise BadRequest("file", shown(file), f"{reason}; give another file")


def holds(file: Path, weights: str) -> bool:
    """Whether the exported file is whole and of these weights: a run that went on has others."""
    try:
        return bool(reading.read(file).contract["made_from"]["sha256"] == weights)
    except (BadRequest, KeyError, TypeError):
        return False


def publish(file: Path, content: bytes, beside: Path, described: bytes) -> None:
    """Write the file and its contract: both or none."""
    write_atomic(beside, described)
    try:
        write_atomic(file, content)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
