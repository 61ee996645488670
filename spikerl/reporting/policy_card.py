"""A page beside a trained policy: what it reaches, how it is used, what it was made by."""

from __future__ import annotations

from shlex import quote
from textwrap import indent

from spikerl.reporting.numbers import rounded, steps
from spikerl.reporting.page import command_of, facts, layers
from spikerl.reporting.records import Run
from spikerl.reporting.tables import markdown_grid


def policy_card(run: Run, label: str) -> str:
    """The card, as Markdown, of a run whose policy's file was evaluated. What is not known is left
    out, such as the training of a policy that was made from another one.
    """
    of_the_file, of_the_last_epoch = facts(run)[1:3], facts(run)[3:]
    trained = [
        ["training steps", steps(run.trained_to)],
        ["largest of its evaluations", rounded(run.score("max_average"))],
        ["mean of its last ten evaluations", rounded(run.score("last_ten_mean"))],
    ]
    known = [line for line in (*of_the_file, *trained, *of_the_last_epoch) if line[1] != "-"]
    seed = run.evaluation.get("seed", run.seed)  # of the episodes
    parts = [
        f"# {label} on {run.env_id}, seed {run.seed}",
        f"    spikerl eval {quote(f'run={run.folder}')} episodes=20 seed={seed}",
        markdown_grid([["", ""], *known]),
        markdown_grid(layers(run)) if run.last("layer_firing_rates") else "",
        f"Made by\n\n{indent(command_of(run), '    ')}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"
