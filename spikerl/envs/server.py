"""Imported only, and first, by the server that forks processes for environments (`process`)."""

from __future__ import annotations

import os
import signal

from spikerl.distributed.process_lifetime import die_with_parent
from spikerl.signals import STOPS

die_with_parent(int(os.environ.pop("SPIKERL_ENVS_OF")))
for number in STOPS:
    signal.signal(number, signal.SIG_IGN)  # the run answers them
if os.environ.pop("SPIKERL_ENVS_SAFE_PATH"):  # PYTHONSAFEPATH was set for the server alone
    os.environ.pop("PYTHONSAFEPATH", None)

import spikerl.envs.process  # noqa: E402, F401  # and with it all that environments need
