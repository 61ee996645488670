"""Shell completion: Hydra's, with the command word taken out of the line it sees."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from spikerl.compose import COMMANDS, conf_folder


def complete(args: Sequence[str]) -> int:
    """Answer `spikerl -sc install=SHELL` and, for the shell, `spikerl -sc query=SHELL`."""
    import hydra

    line = os.environ.get("COMP_LINE", "")
    words = line.split()
    command = words[1] if len(words) > 1 else ""
    query = any(arg.startswith("query=") for arg in args)
    if query and (len(words) < 2 or (len(words) == 2 and not line.endswith(" "))):
        print("\n".join(name for name in COMMANDS if name.startswith(command)))
        return 0
    if query and command not in COMMANDS:
        return 0
    if query:
        start = line.index(command, len(words[0]))
        shorter = line[:start] + line[start + len(command) :].lstrip()
        point = int(os.environ.get("COMP_POINT", len(line)))
        os.environ["COMP_LINE"] = shorter
        os.environ["COMP_POINT"] = str(point - (len(line) - len(shorter)))
    sys.argv = ["spikerl", *args]
    hydra.main(str(conf_folder()), command or "train", version_base="1.3")(lambda config: None)()
    return 0
