"""One worker of a run: python -m spikerl.commands.worker MAILBOX [PID].

The elastic agent starts it, whose process it names, or mpiexec, which cannot know its own.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from spikerl.distributed.launchers import adopt
from spikerl.distributed.process_lifetime import die_if_spawned, end_despite_threads, watched

die_if_spawned()


def main(mailbox: Path, parent: int | None = None) -> int:
    if parent is None:
        adopt()
        parent = watched(mailbox)
    from spikerl.commands import train
    from spikerl.distributed import launch

    def work(spec: dict[str, Any]) -> int:
        if "bench" in spec:
            from spikerl.commands.bench import workers

            return workers.work(spec)
        return train.work(spec, mailbox)

    return launch.work(mailbox, parent, work)


if __name__ == "__main__":
    status = main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
    end_despite_threads(status)
    sys.exit(status)
