"""Processes forked from one that has imported what a run needs, which saves seconds each."""

from __future__ import annotations

import multiprocessing as mp

SERVER = mp.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["spikerl.commands.train", "spikerl.cli.main", "spikerl.runs.record", "hydra", "pytest"]
)
